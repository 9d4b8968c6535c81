"""One self-contained HTML page about a run: figures with intervals, plots, data set, environment, command."""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from breastcli.config import JOBS, SPLITS
from breastcli.errors import UserError, WriteError
from breastcli.files import read_csv, read_json, replacing
from breastcli.metrics.calibration import TITLES as CALIBRATION
from breastcli.metrics.classification import METRICS
from breastcli.records import stamp_of
from breastcli.reporting.explanation_section import read_explanations
from breastcli.reporting.parts import (
    NOTHING,
    Cell,
    Picture,
    Table,
    figure_cell,
    is_finite,
    is_known,
    leak_stamp,
    number,
    read_picture,
    stamp_on_tables,
)
from breastcli.reporting.stress import StressSection, stress_section
from breastcli.reporting.synthesis_section import read_synthesis

logger = logging.getLogger(__name__)

REPORT = "report.html"
FINISHED = ("finished", "done", "complete")
HEADLINE = ("balanced_accuracy", "sensitivity", "specificity", "roc_auc")
SUBSETS = ("balanced_accuracy", "accuracy", "sensitivity", "specificity", "f1", "roc_auc")
PLOTS = {
    "confusion.png": ("Confusion matrix", "counts and percentages of each true class"),
    "roc.png": ("ROC curve", "sensitivity over 1 − specificity, with the area in the legend"),
    "precision_recall.png": (
        "Precision-recall curve",
        "precision over recall, with the prevalence as the line of chance",
    ),
    "reliability.png": (
        "Reliability diagram",
        "share of right answers over the probability of the most probable class",
    ),
    "patients.png": ("Patients, worst first", "each image of a patient at the probability given to its true class"),
    "embedding.png": ("Embedding", "directions in a plane, and the angles between images of one class and of two"),
}
CURVES = "losses, validation figures and learning rate"
GAN_CURVES = "losses, the critic's gap, penalties and diversity, as far as they were recorded"
ENVIRONMENT = ("command", "status", "started", "seconds", "device", "precision", "seed", "git")


@dataclass(frozen=True)
class Evaluation:
    """One evaluated split as the page shows it.

    Attributes:
        split: name of the split.
        stamp: warning that belongs to every table, or "".
        facts: what was evaluated and how, name to value.
        headline: the few figures to look at first: title, figure, what n counts.
        tables: all figures.
        pictures: the plots that are there.
        notes: conventions and warnings.
        stress: what perturbed images cost, or None where nobody asked.
    """

    split: str
    stamp: str
    facts: dict[str, str]
    headline: list[tuple[str, Cell, str]]
    tables: list[Table]
    pictures: list[Picture]
    notes: list[str]
    stress: StressSection | None


def write_report(folder: Path) -> Path:
    """Write ``report.html`` from whatever a run folder holds.

    Args:
        folder: a run folder; everything in it may be missing.

    Returns:
        the page's path; in a folder that cannot be written there may be none, which is warned of.

    Raises:
        UserError: the folder is missing, a file in it is damaged, or the page cannot be written.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder", fix="pass a run folder")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template(f"{REPORT}.j2")
    try:
        # Read while no other job writes the page, so that the last one shows what all have left.
        with replacing(folder / REPORT) as temporary:
            temporary.write_text(template.render(_page_values(folder)), encoding="utf-8")
    except WriteError as error:
        if not error.read_only:
            raise
        logger.warning("the report stays as it is: %s", error)
    return folder / REPORT


def _page_values(folder: Path) -> dict[str, Any]:
    """Return what the template prints."""
    run, documents = _read_object(folder / "run.json"), _read_evaluations(folder)
    card = run.get("dataset") or {}
    cards = [card, *(document.get("dataset") or {} for document in documents.values())]
    explanations, generated = read_explanations(folder), read_synthesis(folder)
    config, history = folder / "config.yaml", folder / "history.csv"
    status = str(run.get("status") or "")
    leaks = [*map(leak_stamp, cards), *(part.leak for part in explanations), generated.stamp if generated else None]
    leaks = dict.fromkeys(filter(None, leaks))
    extra = run.get("synthetic") or {}
    evaluated = [*cards[1:], *({"synthetic": part.synthetic} for part in explanations)]
    synthetic = bool(extra) or any(part.get("synthetic") for part in evaluated)
    return {
        "name": folder.resolve().name,
        "unfinished": status if status not in ("", *FINISHED) else "",
        "stamps": list(leaks),
        "history_stamp": stamp_of(next(iter(leaks), None), drawn=False, synthetic=bool(extra)),
        "synthetic": synthetic,
        "extra": extra,
        "drawn": any(part.get("drawn") for part in cards)
        or any(part.drawn for part in (*explanations, generated) if part),
        "card": card,
        "evaluations": [_evaluation(folder / "evaluate" / split, values) for split, values in documents.items()],
        "explanations": explanations,
        "generated": generated,
        "curves": read_picture(folder / "curves.png", "Training curves", GAN_CURVES if generated else CURVES),
        "history": _history_table(_read_history(history, run)) if history.is_file() else None,
        "environment": {_title(name): _plain(name, run[name]) for name in ENVIRONMENT if run.get(name) is not None},
        "versions": run.get("versions") or {},
        "command": _command_line(run),
        "config": config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        "metrics": METRICS,
    }


def _read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file, empty where there is no such file."""
    values = read_json(path) if path.exists() else {}
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold a JSON object", fix="make it again")
    return values


def _read_history(path: Path, run: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the rows of ``history.csv``, of which a finished run knows how many there are."""
    rows = read_csv(path)
    if run.get("history_rows") not in (None, len(rows)):
        raise UserError(f"{path} was changed after the training", fix="--resume writes it again")
    return rows


def _read_evaluations(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the contents of every ``metrics.json``, the test split first; one without it is unfinished."""
    found = {path.parent.name: path for path in (folder / "evaluate").glob("*/metrics.json")}
    order = [*reversed(SPLITS), *sorted(found.keys() - set(SPLITS))]
    return {split: _read_object(found[split]) for split in order if split in found}


def _evaluation(folder: Path, document: Mapping[str, Any]) -> Evaluation:
    image, patient = document.get("image") or {}, document.get("patient") or {}
    tables = [_overall_table(image, patient), _calibration_table(document.get("calibration") or {})]
    tables += [_class_table(image), *_confusion_tables(image)]
    for key, head in (("by_magnification", "Magnification"), ("by_subtype", "Subtype")):
        tables.append(_subset_table(document.get(key) or {}, head))
    tables.append(_fold_table(document.get("folds") or [], document.get("spread") or {}))
    levels = [image, *(patient.get(rule) or {} for rule in ("vote", "mean"))]
    conventions = [note for scores in levels for note in scores.get("notes", ())]
    pictures = [read_picture(folder / name, title, alt) for name, (title, alt) in PLOTS.items()]
    return Evaluation(
        split=str(document.get("split") or folder.name),
        stamp=stamp_on_tables(document.get("dataset") or {}),
        facts=_facts(document),
        headline=_headline(image, patient),
        tables=[table for table in tables if table.rows],
        pictures=[picture for picture in pictures if picture],
        notes=list(dict.fromkeys([*((document.get("dataset") or {}).get("notes") or ()), *conventions])),
        stress=stress_section(folder, document.get("stress") or {}),
    )


def _facts(document: Mapping[str, Any]) -> dict[str, str]:
    """Return what was evaluated and how."""
    dataset, threshold = document.get("dataset") or {}, document.get("threshold") or {}
    value = threshold.get("value")
    rule = None if value is None else f"{number(value)} (rule: {threshold.get('rule', NOTHING)})"
    facts = {
        "Runs": ", ".join(map(str, document.get("runs") or ())),
        "Data set": dataset.get("name"),
        "Split by": dataset.get("split_level"),
        "Decision threshold": rule,
        "Temperature": ", ".join(map(number, (document.get("calibration") or {}).get("temperatures", ()))),
        "Test-time augmentation": document.get("tta"),
        "Data fingerprint": dataset.get("fingerprint"),
        "Split fingerprint": dataset.get("split_fingerprint"),
    }
    return {name: str(value) for name, value in facts.items() if value}


def _headline(image: Mapping[str, Any], patient: Mapping[str, Any]) -> list[tuple[str, Cell, str]]:
    overall, images = image.get("overall") or {}, f"{image.get('n', 0):,} images"
    tiles = [(_title(name), figure_cell(overall[name]), images) for name in HEADLINE if is_known(overall.get(name))]
    if is_known(patient.get("recognition_rate")):
        patients = f"{(patient.get('vote') or {}).get('n', 0):,} patients"
        tiles.append(("Patient recognition rate", figure_cell(patient["recognition_rate"]), patients))
    return tiles


def _overall_table(image: Mapping[str, Any], patient: Mapping[str, Any]) -> Table:
    """Return every figure at image level and at patient level."""
    levels = {"Images": image, "Patients, by vote": patient.get("vote"), "Patients, by mean": patient.get("mean")}
    known = {head: scores for head, scores in levels.items() if scores}
    heads = [f"{head} (n = {scores.get('n', 0):,}{_groups(scores)})" for head, scores in known.items()]
    rows = [
        (_title(name), [figure_cell((scores.get("overall") or {}).get(name)) for scores in known.values()])
        for name in _metric_order(known.values())
    ]
    return Table("All figures, with 95 % intervals", ["Figure", *heads], rows)


def _groups(scores: Mapping[str, Any]) -> str:
    return f" in {scores['num_groups']:,} groups" if scores.get("num_groups") else ""


def _calibration_table(calibration: Mapping[str, Any]) -> Table:
    """Return what the probabilities were worth before and after calibration."""
    heads = {"before": "Before", "after": "Calibrated", "difference": "Difference"}
    rows = [
        (title, [figure_cell((calibration.get(side) or {}).get(name)) for side in heads])
        for name, title in CALIBRATION.items()
        if calibration
    ]
    return Table("Before and after calibration, image level (lower is better)", ["Figure", *heads.values()], rows)


def _class_table(image: Mapping[str, Any]) -> Table:
    """Return the figures of each class at image level, with the number of its images."""
    per_class, classes = image.get("per_class") or {}, image.get("classes") or []
    counts = {name: sum(row) for name, row in zip(classes, image.get("confusion") or [], strict=False)}
    metrics = _metric_order({"overall": figures} for figures in per_class.values())
    rows = [
        (name, [Cell(_count(counts.get(name))), *(figure_cell(figures.get(metric)) for metric in metrics)])
        for name, figures in per_class.items()
    ]
    return Table("By class, image level", ["True class", "n", *map(_title, metrics)], rows)


def _confusion_tables(image: Mapping[str, Any]) -> list[Table]:
    """Return the confusion matrix for readers who cannot see the plot."""
    classes, counts = image.get("classes") or [], image.get("confusion") or []
    rows = [(name, [Cell(_count(n)) for n in row]) for name, row in zip(classes, counts, strict=False)]
    caption = f"Confusion matrix, image level (n = {image.get('n', 0):,}; rows: true class, columns: predicted class)"
    return [Table(caption, ["True class", *classes], rows)]


def _subset_table(subsets: Mapping[str, Mapping[str, Any]], head: str) -> Table:
    """Return a few figures of each subset; a figure that no subset has gets no column."""
    overall = {name: scores.get("overall") or {} for name, scores in subsets.items()}
    metrics = [name for name in SUBSETS if any(is_known(figures.get(name)) for figures in overall.values())]
    rows = [
        (name, [Cell(_count(subsets[name].get("n"))), *(figure_cell(figures.get(metric)) for metric in metrics)])
        for name, figures in overall.items()
    ]
    return Table(f"By {head.lower()}, image level", [head, "n", *map(_title, metrics)], rows)


def _fold_table(folds: Sequence[Mapping[str, Any]], spread: Mapping[str, Mapping[str, float]]) -> Table:
    """Return each fold's figures, and their mean and standard deviation below."""
    metrics = [name for name in SUBSETS if any((fold.get("overall") or {}).get(name) is not None for fold in folds)]
    rows = [
        (
            str(fold.get("run", NOTHING)),
            [Cell(_count(fold.get("n"))), *(Cell(number((fold.get("overall") or {}).get(name))) for name in metrics)],
        )
        for fold in folds
    ]
    if spread and rows:
        figures = [spread.get(name) or {} for name in metrics]
        cells = [Cell(number(figure.get("mean")), f"± {number(figure.get('sd'))}") for figure in figures]
        rows.append(("Mean ± standard deviation", [Cell(_count(sum(fold.get("n") or 0 for fold in folds))), *cells]))
    return Table("By fold, image level", ["Run", "n", *map(_title, metrics)], rows)


def _history_table(history: Sequence[Mapping[str, str]]) -> Table | None:
    """Return every epoch's figures, or those of every line where a GAN's history counts images."""
    if not history:
        return None
    step = "kimg" if "kimg" in history[0] else "epoch"
    names = [name for name in history[0] if name != step]
    rows = [(row.get(step, ""), [Cell(_short_number(row.get(name))) for name in names]) for row in history]
    caption = f"Every {'epoch' if step == 'epoch' else 'line of the history'} (n = {len(rows)})"
    return Table(caption, [_title(step), *map(_title, names)], rows)


def _metric_order(levels: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the metrics that any of the levels has: known ones in their order, then the others."""
    present = dict.fromkeys(name for scores in levels for name in scores.get("overall") or {})
    return [*(name for name in METRICS if name in present), *(name for name in present if name not in METRICS)]


def _title(name: str) -> str:
    known = {"lr": "Learning rate", "kimg": "Thousand images", "n": "n"}
    known |= {key: metric.title for key, metric in METRICS.items()}
    for prefix, words in (("val_", "Validation "), ("train_", "Training ")):
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            title = known.get(rest, rest.replace("_", " "))
            return words + (title if title[:2].isupper() else title[:1].lower() + title[1:])
    return known.get(name) or name.replace("_", " ").capitalize()


def _short_number(text: str | None) -> str:
    """Return four significant digits of a number in a CSV file; what is not a number stays as it is."""
    try:
        value = float(text or "nan")
    except ValueError:
        return str(text)
    return f"{value:.4g}" if math.isfinite(value) else NOTHING


def _count(value: int | None) -> str:
    return NOTHING if value is None else f"{value:,}"


def _plain(name: str, value: Any) -> str:
    """Return one value of the environment as a person would write it."""
    if name == "seconds" and is_finite(value):
        hours, rest = divmod(round(value), 3600)
        minutes, seconds = divmod(rest, 60)
        return f"{hours} h {minutes} min {seconds} s" if hours else f"{minutes} min {seconds} s"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {part}" for key, part in value.items())
    return str(value)


def _command_line(run: Mapping[str, Any]) -> str:
    """Return a command that makes the run again, without the place of the interpreter.

    A run started from Python (a notebook, a script) has no command of its own; its settings are in ``config.yaml``.
    """
    program, *rest = map(str, run.get("argv") or [""])
    if program in JOBS:
        return shlex.join(["breastcli", program, *rest])
    starts = {"breastcli": ["breastcli"], "__main__.py": ["python", "-m", "breastcli"]}
    name = Path(program).name
    if name in starts:
        return shlex.join([*starts[name], *rest])
    return f"breastcli {run['command']} --config config.yaml" if run.get("command") in JOBS else ""
