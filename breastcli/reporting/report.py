"""One self-contained HTML page about a run: figures with intervals, plots, cases, data set, environment, commands."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from breastcli.errors import UserError, WriteError
from breastcli.files import read_csv, replacing
from breastcli.metrics.classification import METRICS
from breastcli.records import stamp_of
from breastcli.reporting.data_section import read_data
from breastcli.reporting.evaluation_section import read_evaluation
from breastcli.reporting.explanation_files import find_panels
from breastcli.reporting.explanation_section import read_explanations
from breastcli.reporting.model_card import write_model_card
from breastcli.reporting.page import render_page
from breastcli.reporting.parts import NOTHING, Cell, Table, is_finite, part, read_picture, title_of
from breastcli.reporting.reproduce import commands
from breastcli.reporting.run_files import RunFiles
from breastcli.reporting.synthesis_section import read_synthesis
from breastcli.system.runfolder import CONFIG, EXTRA_SHEET, HISTORY, PAGE

logger = logging.getLogger(__name__)

FINISHED = ("finished", "done", "complete")
CURVES = "losses, validation figures and learning rate"
GAN_CURVES = "losses, the critic's gap, penalties and diversity, as far as they were recorded"
ENVIRONMENT = ("command", "status", "started", "seconds", "device", "precision", "seed", "git")


def write_report(folder: Path) -> Path:
    """Write ``report.html`` from whatever a run folder holds, and the model card where it is of a classifier.

    Args:
        folder: a run folder; everything in it may be missing.

    Returns:
        the page's path; in a folder that cannot be written there may be none, which is warned of.

    Raises:
        UserError: the folder is missing, a file in it is damaged, or the page cannot be written.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder", fix="pass a run folder")
    try:
        # Read while no other job writes the page, so that the last one shows what all have left.
        with replacing(folder / PAGE) as temporary:
            files = RunFiles.read(folder)
            temporary.write_text(render_page(f"{PAGE}.j2", _page_values(files)), encoding="utf-8")
        if files.arch and not files.is_generator:
            write_model_card(files)
    except WriteError as error:
        if not error.read_only:
            raise
        logger.warning("the report stays as it is: %s", error)
    return folder / PAGE


def _page_values(files: RunFiles) -> dict[str, Any]:
    """Return what the template prints."""
    folder, run = files.folder, files.info
    explanations, generated = read_explanations(folder), read_synthesis(folder)
    config, history = folder / CONFIG, folder / HISTORY
    status = str(run.get("status") or "")
    sections = [*explanations, *([generated] if generated else [])]
    leaks = [*files.leaks, *(section.leak for section in explanations), generated.stamp if generated else None]
    leaks = list(dict.fromkeys(filter(None, leaks)))
    extra = part(run, "synthetic")
    return {
        "name": files.name,
        "unfinished": status if status not in ("", *FINISHED) else "",
        "stamps": leaks,
        "history_stamp": stamp_of(next(iter(leaks), None), drawn=False, synthetic=bool(extra)),
        "synthetic": files.synthetic or any(section.synthetic for section in explanations),
        "extra": extra,
        "extra_sheet": read_picture(folder / EXTRA_SHEET, "Synthetic training images", "a few images of each class"),
        "drawn": files.drawn or any(section.drawn for section in sections),
        "data": read_data(files.card, part(run, "audit")),
        "evaluations": [
            read_evaluation(folder / "evaluate" / split, document, files.arch, find_panels(folder, split))
            for split, document in files.evaluations.items()
        ],
        "explanations": explanations,
        "generated": generated,
        "curves": read_picture(folder / "curves.png", "Training curves", GAN_CURVES if generated else CURVES),
        "history": _history_table(read_csv(history)) if history.is_file() else None,
        "environment": {title_of(name): _plain(name, run[name]) for name in ENVIRONMENT if run.get(name) is not None},
        "versions": run.get("versions") or {},
        "commands": commands(files),
        "config": config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        "metrics": METRICS,
    }


def _history_table(history: Sequence[Mapping[str, str]]) -> Table | None:
    """Return every epoch's figures, or those of every line where a GAN's history counts images."""
    if not history:
        return None
    step = "kimg" if "kimg" in history[0] else "epoch"
    names = [name for name in history[0] if name != step]
    rows = [(row.get(step, ""), [Cell(_short_number(row.get(name))) for name in names]) for row in history]
    caption = f"Every {'epoch' if step == 'epoch' else 'line of the history'} (n = {len(rows)})"
    return Table(caption, [title_of(step), *map(title_of, names)], rows)


def _short_number(text: str | None) -> str:
    """Return four significant digits of a number in a CSV file; what is not a number stays as it is."""
    try:
        value = float(text or "nan")
    except ValueError:
        return str(text)
    return f"{value:.4g}" if math.isfinite(value) else NOTHING


def _plain(name: str, value: Any) -> str:
    """Return one value of the environment as a person would write it."""
    if name == "seconds" and is_finite(value):
        hours, rest = divmod(round(value), 3600)
        minutes, seconds = divmod(rest, 60)
        return f"{hours} h {minutes} min {seconds} s" if hours else f"{minutes} min {seconds} s"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {one}" for key, one in value.items())
    return str(value)
