"""report: the page of a run made again, or several runs beside each other on one page."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from breastcli.config import ReportConfig
from breastcli.errors import UsageError, UserError
from breastcli.files import claimed_folder
from breastcli.progress import SILENT, Progress
from breastcli.reporting.report import write_report
from breastcli.reporting.run_files import RunFiles
from breastcli.reporting.runs_page import compare_runs, write_runs_page
from breastcli.system.runfolder import INFO, MODEL_CARD, RUNS, find_run

WRITERS = ("train", "evaluate", "synthesize")  # commands whose folders have a page


@dataclass(frozen=True)
class ReportResult:
    """What ``report`` made.

    Attributes:
        out: the page.
        document: what each run is and how good, and in what their tested images differ.
        pages: every run's own page.
        model_cards: of the runs of classifiers.
        seconds: wall-clock time.
    """

    out: Path
    document: dict[str, Any]
    pages: list[Path]
    model_cards: list[Path]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-safe dictionary."""
        paths = {"pages": [str(path) for path in self.pages], "model_cards": [str(path) for path in self.model_cards]}
        return {**self.document, **paths, "seconds": self.seconds}


def report(config: ReportConfig, progress: Progress = SILENT) -> ReportResult:
    """Make every run's page and model card again from its files; of several also a page that compares them.

    Raises:
        UsageError: no run is given, one twice, or ``out`` for a single one.
        UserError: a folder is no run's, a GAN is to be compared, a file is damaged, or the output folder cannot be
            used.
    """
    started = time.monotonic()
    folders = _find(config)
    several = len(folders) > 1
    if config.out and not several:
        raise UsageError("--out: the page of one run lies in its folder", fix="leave it out, or give several runs")
    runs = [RunFiles.read(folder) for folder in folders]
    generators = [str(files.folder) for files in runs if files.is_generator]
    if several and generators:
        raise UserError(f"{generators[0]} is a GAN and has no figures to compare", fix="give it alone")
    out = Path(config.out) if config.out else RUNS / "report"
    with contextlib.ExitStack() as held:
        if several:
            held.enter_context(claimed_folder(out, allowed=config.overwrite))
        page, document, pages = _write(runs, out, config, progress)
    cards = [files.folder / MODEL_CARD for files in runs if (files.folder / MODEL_CARD).is_file()]
    return ReportResult(page, document, pages, cards, time.monotonic() - started)


def _write(
    runs: list[RunFiles], out: Path, config: ReportConfig, progress: Progress
) -> tuple[Path, dict[str, Any], list[Path]]:
    """Write every run's page, and of several the one that compares them, which comes first in what is returned."""
    pages = []
    progress.begin("pages", len(runs), "pages")
    for files in runs:
        pages.append(write_report(files.folder))
        progress.advance("pages")
    document = compare_runs(runs, config.split)
    page = write_runs_page(out, runs, document) if len(runs) > 1 else pages[0]
    return page, document, pages


def _find(config: ReportConfig) -> list[Path]:
    """Return the run folders, those of pooled evaluations and GANs included."""
    if not config.runs:
        raise UsageError("report needs a run folder", fix="breastcli report RUN, or latest")
    folders = [find_run(name).folder if name == "latest" else Path(name) for name in config.runs]
    for folder in folders:
        known = RunFiles.read(folder).info.get("command") if (folder / INFO).is_file() else None
        if known not in WRITERS:
            fix = "give a folder that train, evaluate (of several runs) or synthesize fit wrote"
            raise UserError(f"{folder} is not a run folder", fix=fix)
    places = [folder.resolve() for folder in folders]
    if len(set(places)) < len(places):
        raise UsageError("a run is given twice", fix="give each run once")
    return folders
