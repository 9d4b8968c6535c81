"""A report's sections about evaluated splits, read from what ``breastcli evaluate`` left in a run folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from breastcli.metrics.calibration import TITLES as CALIBRATION
from breastcli.metrics.calibration import show_temperatures
from breastcli.metrics.classification import METRICS
from breastcli.records import Predictions
from breastcli.reporting.cases import confident_errors, rank_patients, thumbnail_name
from breastcli.reporting.parts import (
    NOTHING,
    Cell,
    Picture,
    Table,
    figure_cell,
    is_known,
    number,
    part,
    read_picture,
    stamp_on_tables,
    title_of,
    whole_number,
)
from breastcli.reporting.reported_scores import paper_notes, paper_table
from breastcli.reporting.stress import StressSection, stress_section
from breastcli.system.runfolder import ERRORS, PREDICTIONS

HEADLINE = ("balanced_accuracy", "sensitivity", "specificity", "roc_auc")
MAX_PATIENTS = 8
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
WIDE = {"patients.png", "embedding.png"}


@dataclass(frozen=True)
class Evaluation:
    """One evaluated split as the page shows it.

    Attributes:
        split: name of the split.
        stamp: warning that belongs to every table, or "".
        facts: what was evaluated and how, name to value.
        headline: the few figures to look at first: title, figure, what n counts.
        tables: all figures, those of the papers beside them.
        pictures: the plots that are there.
        notes: conventions and warnings.
        cases: the patients that come out worst, and the most confident errors.
        errors: those errors, as far as there are pictures of them.
        stress: what perturbed images cost, or None where nobody asked.
    """

    split: str
    stamp: str
    facts: dict[str, str]
    headline: list[tuple[str, Cell, str]]
    tables: list[Table]
    pictures: list[Picture]
    notes: list[str]
    cases: list[Table]
    errors: list[Picture]
    stress: StressSection | None


def read_evaluation(
    folder: Path, document: Mapping[str, Any], arch: str | None, panels: Mapping[str, Path]
) -> Evaluation:
    """Return what the page shows of one evaluation.

    Args:
        folder: where it is.
        document: the contents of its ``metrics.json``.
        arch: the network as ``train --arch`` takes it, where that is known.
        panels: image id to the picture of its explanation, of the images that have one.

    Raises:
        UserError: its predictions are damaged.
    """
    image, patient = part(document, "image"), part(document, "patient")
    beside = paper_table(document, arch)
    notes = [note for scores in (image, *patient_levels(patient)) for note in scores.get("notes", ())]
    notes = [*(part(document, "dataset").get("notes") or ()), *notes, *(paper_notes(beside) if beside else ())]
    wide = WIDE | ({"reliability.png"} if part(document, "calibration") else set())  # before and after side by side
    pictures = [read_picture(folder / name, *words, wide=name in wide) for name, words in PLOTS.items()]
    cases: list[Table] = []
    errors: list[Picture] = []
    if (folder / PREDICTIONS).is_file():
        predictions = Predictions.from_csv(folder / PREDICTIONS)
        if predictions.labels is not None:
            cases = [_patient_table(predictions), _error_table(predictions)]
            errors = list(_error_pictures(folder, predictions, panels))
    return Evaluation(
        split=str(document.get("split") or folder.name),
        stamp=stamp_on_tables(part(document, "dataset")),
        facts=_facts(document),
        headline=_headline(image, patient),
        tables=[table for table in _tables(document, beside) if table.rows],
        pictures=[picture for picture in pictures if picture],
        notes=list(dict.fromkeys(notes)),
        cases=[table for table in cases if table.rows],
        errors=errors,
        stress=stress_section(folder, part(document, "stress")),
    )


def patient_levels(patient: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the figures that count patients by majority vote and by mean probability, as far as they are there."""
    return [scores for rule in ("vote", "mean") if (scores := part(patient, rule))]


def _tables(document: Mapping[str, Any], beside: Table | None) -> Iterator[Table]:
    """Yield every table of figures in the order of the page; one without rows is left out there."""
    image = part(document, "image")
    yield overall_table(image, part(document, "patient"))
    if beside:
        yield beside
    yield calibration_table(part(document, "calibration"))
    yield _class_table(image)
    yield _confusion_table(image)
    yield _subset_table(part(document, "by_magnification"), "Magnification")
    yield _subset_table(part(document, "by_subtype"), "Subtype")
    yield _fold_table(document.get("folds") or [], part(document, "spread"))


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
        "Temperature": show_temperatures(part(document, "calibration").get("temperatures", ())),
        "Test-time augmentation": document.get("tta"),
        "Data fingerprint": dataset.get("fingerprint"),
        "Split fingerprint": dataset.get("split_fingerprint"),
    }
    return {name: str(value) for name, value in facts.items() if value}


def _headline(image: Mapping[str, Any], patient: Mapping[str, Any]) -> list[tuple[str, Cell, str]]:
    overall, images = image.get("overall") or {}, f"{image.get('n', 0):,} images"
    tiles = [(title_of(name), figure_cell(overall[name]), images) for name in HEADLINE if is_known(overall.get(name))]
    if is_known(patient.get("recognition_rate")):
        patients = f"{(patient.get('vote') or {}).get('n', 0):,} patients"
        tiles.append(("Patient recognition rate", figure_cell(patient["recognition_rate"]), patients))
    return tiles


def overall_table(image: Mapping[str, Any], patient: Mapping[str, Any]) -> Table:
    """Return every figure at image level and at patient level."""
    levels = {"Images": image, "Patients, by vote": patient.get("vote"), "Patients, by mean": patient.get("mean")}
    known = {head: scores for head, scores in levels.items() if scores}
    heads = [f"{head} (n = {scores.get('n', 0):,}{_groups(scores)})" for head, scores in known.items()]
    rows = [
        (title_of(name), [figure_cell((scores.get("overall") or {}).get(name)) for scores in known.values()])
        for name in _metric_order(known.values())
    ]
    return Table("All figures, with 95 % intervals", ["Figure", *heads], rows)


def _groups(scores: Mapping[str, Any]) -> str:
    return f" in {scores['num_groups']:,} groups" if scores.get("num_groups") else ""


def calibration_table(calibration: Mapping[str, Any]) -> Table:
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
        (name, [Cell(whole_number(counts.get(name))), *(figure_cell(figures.get(metric)) for metric in metrics)])
        for name, figures in per_class.items()
    ]
    return Table("By class, image level", ["True class", "n", *map(title_of, metrics)], rows)


def _confusion_table(image: Mapping[str, Any]) -> Table:
    """Return the confusion matrix for readers who cannot see the plot."""
    classes, counts = image.get("classes") or [], image.get("confusion") or []
    rows = [(name, [Cell(whole_number(n)) for n in row]) for name, row in zip(classes, counts, strict=False)]
    caption = f"Confusion matrix, image level (n = {image.get('n', 0):,}; rows: true class, columns: predicted class)"
    return Table(caption, ["True class", *classes], rows)


def _subset_table(subsets: Mapping[str, Mapping[str, Any]], head: str) -> Table:
    """Return a few figures of each subset; a figure that no subset has gets no column."""
    overall = {name: scores.get("overall") or {} for name, scores in subsets.items()}
    metrics = [name for name in SUBSETS if any(is_known(figures.get(name)) for figures in overall.values())]
    rows = [
        (name, [Cell(whole_number(subsets[name].get("n"))), *(figure_cell(figures.get(metric)) for metric in metrics)])
        for name, figures in overall.items()
    ]
    return Table(f"By {head.lower()}, image level", [head, "n", *map(title_of, metrics)], rows)


def _fold_table(folds: Sequence[Mapping[str, Any]], spread: Mapping[str, Mapping[str, float]]) -> Table:
    """Return each fold's figures, and their mean and standard deviation below."""
    metrics = [name for name in SUBSETS if any((fold.get("overall") or {}).get(name) is not None for fold in folds)]
    rows = [
        (
            str(fold.get("run", NOTHING)),
            [
                Cell(whole_number(fold.get("n"))),
                *(Cell(number((fold.get("overall") or {}).get(name))) for name in metrics),
            ],
        )
        for fold in folds
    ]
    if spread and rows:
        figures = [spread.get(name) or {} for name in metrics]
        cells = [Cell(number(figure.get("mean")), f"± {number(figure.get('sd'))}") for figure in figures]
        rows.append(
            ("Mean ± standard deviation", [Cell(whole_number(sum(fold.get("n") or 0 for fold in folds))), *cells])
        )
    return Table("By fold, image level", ["Run", "n", *map(title_of, metrics)], rows)


def _patient_table(predictions: Predictions) -> Table:
    """Return the patients with wrong images that come out worst."""
    ranked = rank_patients(predictions)
    wrong = [case for case in ranked if case.num_right < len(case.members)]
    rows = [
        (
            case.patient,
            [
                Cell(predictions.classes[case.label]),
                Cell(f"{case.num_right:,} of {len(case.members):,}"),
                Cell(number(case.given)),
            ],
        )
        for case in wrong[:MAX_PATIENTS]
    ]
    caption = f"Patients, the worst {len(rows)} of {len(ranked):,} ({len(wrong):,} have images predicted wrong)"
    return Table(caption, ["Patient", "True class", "Images right", "Mean probability of the true class"], rows)


def _error_table(predictions: Predictions) -> Table:
    """Return the wrong predictions with the highest probability."""
    shown = {name: predictions.column(name) for name in ("patient", "magnification", "subtype")}
    shown = {name: values for name, values in shown.items() if any(values)}
    rows = [
        (
            str(predictions.image_ids[row]),
            [
                Cell(predictions.classes[predictions.labels[row]]),
                Cell(predictions.classes[predictions.predicted[row]]),
                Cell(number(predictions.probs[row, predictions.predicted[row]])),
                *(Cell(str(values[row]) or NOTHING) for values in shown.values()),
            ],
        )
        for row in confident_errors(predictions)
    ]
    num_wrong = int((predictions.predicted != predictions.labels).sum())
    caption = f"Confident errors, the {len(rows)} most probable of {num_wrong:,} among {len(predictions):,} images"
    heads = ["Image", "True class", "Predicted", "Its probability", *map(title_of, shown)]
    return Table(caption, heads, rows)


def _error_pictures(folder: Path, predictions: Predictions, panels: Mapping[str, Path]) -> Iterator[Picture]:
    """Yield a picture of each confident error: with its explanation where there is one, else the image alone."""
    for row in confident_errors(predictions):
        name = str(predictions.image_ids[row])
        true, predicted = (predictions.classes[kind[row]] for kind in (predictions.labels, predictions.predicted))
        probability = number(predictions.probs[row, predictions.predicted[row]])
        title = f"{name}: true class {true}, predicted {predicted} ({probability})"
        if name in panels:
            yield from filter(None, [read_picture(panels[name], title, "the image, and what explains it", wide=True)])
        else:
            thumbnail = folder / ERRORS / thumbnail_name(name)
            yield from filter(None, [read_picture(thumbnail, title, "the image as the network saw it")])


def _metric_order(levels: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the metrics that any of the levels has: known ones in their order, then the others."""
    present = dict.fromkeys(name for scores in levels for name in scores.get("overall") or {})
    return [*(name for name in METRICS if name in present), *(name for name in present if name not in METRICS)]
