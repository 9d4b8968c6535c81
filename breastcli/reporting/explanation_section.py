"""A report's sections about saliency maps, read from what ``breastcli explain`` left in a run folder.

The files may come from elsewhere: whatever in them is not as expected counts as absent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from breastcli.files import read_csv
from breastcli.reporting.explanation_files import find_explanations, images_of, is_outdated, panel_of, read_explanation
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
    part,
    read_picture,
    stamp_on_tables,
)

REPORTED = Path(__file__).with_name("reported.csv")
PAPER = {"source": "dalaresnet50-2024", "table": "14"}
COMPARED = {"iou": "IoU", "dice": "Dice", "recall": "Recall"}  # what the paper's table has, F1 being Dice
LOCALISATION = {
    "iou": "IoU",
    "dice": "Dice",
    "precision": "Precision",
    "recall": "Recall",
    "average_precision": "Average precision",
    "pointing_game": "Pointing game",
    "pointing": "Pointing game",
    "energy_inside": "Energy inside",
}
FAITHFULNESS = {
    "deletion_auc": "Deletion AUC (lower is better)",
    "insertion_auc": "Insertion AUC (higher is better)",
    "average_drop": "Average drop (lower is better)",
    "increase": "Increase in confidence (higher is better)",
}
LEFT_OUT = {
    "missing": "without a mask",
    "mismatched": "with a mask of another size than the image",
    "empty": "with an empty mask",
    "unreadable": "with a mask that cannot be read",
}
MAX_PANELS = 6
OUTDATED = "The run's best checkpoint has changed: these maps are of an older one. Run breastcli explain again."
ABOUT_BASELINES = (
    "Baselines know nothing of the network. Uniform marks the whole image, centre its middle, luminance what is dark, "
    "and random is coarse noise. A method that finds no more than they do has found nothing."
)
ABOUT_THRESHOLDS = "Average precision, pointing game and energy inside look at the map itself, without binarisation."
ABOUT_FAITHFULNESS = (
    "Deletion and insertion follow the probability of the explained class while pixels are taken away or put back, the "
    "most salient first. Average drop and increase compare its probability on the whole image and on what the map "
    "leaves of it."
)


@dataclass(frozen=True)
class ExplanationSection:
    """One folder of explanations as the page shows it.

    Attributes:
        title: what it is called.
        stamp: warning that belongs to every table, or "".
        leak: the part of it that is about the split, or None.
        synthetic: whether the network was trained with synthetic images.
        drawn: whether the data set was drawn by a program.
        facts: what was explained and how, name to value or values.
        tables: localisation, faithfulness and randomisation, as far as there are any.
        warnings: what a reader must know before believing the maps.
        notes: how to read the tables.
        pictures: figures of the methods, gallery, and the first panels.
    """

    title: str
    stamp: str = ""
    leak: str | None = None
    synthetic: bool = False
    drawn: bool = False
    facts: dict[str, str | list[str]] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


def read_explanations(run_folder: Path) -> list[ExplanationSection]:
    """Return a section for every ``explain/*/explain.json``, by name.

    A file that cannot be used gives a section that says so and nothing else.
    """
    return [_read_section(file) for file in find_explanations(run_folder)]


def printed_localisation(method: str) -> dict[str, tuple[float, float]]:
    """Return metric to lowest and highest figure over magnifications in the DALAResNet50 paper's Table 14."""
    rows = {metric: row.values() for (name, metric), row in _paper().items() if name == method}
    return {metric: (min(values), max(values)) for metric, values in rows.items()}


def is_baseline(document: Mapping[str, Any], name: str) -> bool:
    """Return whether a row of ``explain.json``'s figures is no method: it is marked so, or was not among them."""
    marked = part(document, "localisation", "methods", name).get("baseline")
    return bool(marked) or name not in part(document, "methods")


def row_title(document: Mapping[str, Any], name: str) -> str:
    """Return a method's title, or the baseline's name."""
    title = str(part(document, "methods", name).get("title") or name)
    return f"{title.capitalize()} (baseline)" if is_baseline(document, name) else title


def rows_of(document: Mapping[str, Any], section: str) -> list[str]:
    """Return the names that "localisation" or "faithfulness" has figures of, baselines last."""
    return sorted(part(document, section, "methods"), key=lambda name: is_baseline(document, name))


def _read_section(file: Path) -> ExplanationSection:
    document = read_explanation(file)
    if not part(document, "methods"):
        problem = f"{file.parent.name}/{file.name} is damaged, or was not written by breastcli explain: it is left out."
        return ExplanationSection(file.parent.name, warnings=[problem])
    dataset = part(document, "dataset")
    tables = [
        _localisation_table(document),
        _difference_table(document),
        _faithfulness_table(document),
        _randomisation_table(document),
    ]
    return ExplanationSection(
        title=str(document.get("name") or file.parent.name),
        stamp=stamp_on_tables(dataset),
        leak=leak_stamp(dataset),
        synthetic=bool(dataset.get("synthetic")),
        drawn=bool(dataset.get("drawn")),
        facts=_facts(document),
        tables=[table for table in tables if table.rows],
        warnings=[
            *([OUTDATED] if is_outdated(file, document) else []),
            *_surviving(document),
            *_beaten(document),
            *_left_out(document),
        ],
        notes=_notes(document),
        pictures=list(_pictures(file.parent, document)),
    )


def _facts(document: Mapping[str, Any]) -> dict[str, str | list[str]]:
    """Return what was explained and how."""
    methods, split = part(document, "methods"), document.get("split")
    sources = {row_title(document, name): part(methods, name).get("source") for name in methods}
    options = {name: value for name, value in part(document, "options").items() if value not in (None, "")}
    facts = {
        "Images": f"{document.get('n', len(images_of(document)))}{f' of the {split} split' if split else ''}",
        "Run": document.get("run"),
        "Data set": part(document, "dataset").get("name"),
        "Explained class": document.get("target"),
        "Layer": document.get("layer") or "the last",
        "Settings": ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in options.items()),
    }
    known = {name: str(value) for name, value in facts.items() if value}
    return known | {"Methods": [f"{title}: {source}" if source else title for title, source in sources.items()]}


def _localisation_table(document: Mapping[str, Any]) -> Table:
    """Return the mean figures of each method and baseline, and the paper's beside them."""
    names, levels = rows_of(document, "localisation"), _magnifications(document)
    means = {name: part(document, "localisation", "methods", name, "mean") for name in names}
    metrics = [key for key in LOCALISATION if any(is_known(part(figures, key)) for figures in means.values())]
    thresholds = part(document, "localisation", "thresholds")
    compared = COMPARED if any(_paper_figures(name, "iou") for name in names) else {}
    columns = [LOCALISATION[metric] for metric in metrics] + ["Threshold"] * bool(thresholds)
    columns += [f"{title} in the paper" for title in compared.values()]
    rows = []
    for name in names:
        cells = [figure_cell(part(means[name], metric)) for metric in metrics]
        cells += [Cell(number(thresholds.get(name)))] * bool(thresholds)
        cells += [_paper_cell(name, metric, levels) for metric in compared]
        rows.append((row_title(document, name), cells))
    where = part(document, "localisation")
    groups = f" in {where['num_groups']} groups (patients where known)" if where.get("num_groups") else ""
    rule = where.get("rule", NOTHING)
    caption = f"Localisation, mean over n = {where.get('n', NOTHING)} images{groups}; binarised by {rule}"
    return Table(caption, ["Method", *columns], rows)


def _difference_table(document: Mapping[str, Any]) -> Table:
    """Return the first method's figures minus every other's, DT Grad-CAM being first where it is there."""
    differences = part(document, "localisation", "differences")
    first = "dtgradcam" if "dtgradcam" in differences else next(iter(differences), "")
    others = [name for name in rows_of(document, "localisation") if part(differences, first, name)]
    metrics = [key for key in LOCALISATION if any(part(differences, first, name, key) for name in others)]
    rows = [
        (row_title(document, name), [figure_cell(part(differences, first, name, metric)) for metric in metrics])
        for name in others
    ]
    caption = f"{row_title(document, first)} minus each other, paired by image: mean difference and 95 % interval"
    return Table(caption, ["", *(LOCALISATION[metric] for metric in metrics)], rows)


def _faithfulness_table(document: Mapping[str, Any]) -> Table:
    methods = part(document, "faithfulness", "methods")
    metrics = [key for key in FAITHFULNESS if any(is_known(part(methods, name, key)) for name in methods)]
    rows = [
        (row_title(document, name), [figure_cell(part(methods, name, metric)) for metric in metrics])
        for name in rows_of(document, "faithfulness")
    ]
    caption = f"Faithfulness, mean over n = {document.get('n', NOTHING)} images"
    return Table(caption, ["Method", *(FAITHFULNESS[metric] for metric in metrics)], rows)


def _randomisation_table(document: Mapping[str, Any]) -> Table:
    """Return each method's rank correlations, one column per layer down to which the network is random."""
    found = {name: _levels(document, name) for name in part(document, "faithfulness", "randomisation")}
    layers = list(dict.fromkeys(layer for levels in found.values() for layer in levels))
    rows = [
        (row_title(document, name), [Cell(number(levels.get(layer))) for layer in layers])
        for name, levels in found.items()
        if levels
    ]
    caption = "Randomisation check: rank correlation with the trained network's maps once it is random down to here"
    return Table(caption, ["Method", *layers], rows)


def _levels(document: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return layer to rank correlation, in the order in which the network was made random."""
    levels = part(document, "faithfulness", "randomisation", name).get("levels")
    known = [level for level in levels if isinstance(level, Mapping)] if isinstance(levels, list) else []
    return {str(level.get("layer") or level.get("name") or NOTHING): level.get("correlation") for level in known}


def _surviving(document: Mapping[str, Any]) -> Iterator[str]:
    for name in part(document, "faithfulness", "randomisation"):
        if part(document, "faithfulness", "randomisation", name).get("survives") is True:
            correlation = [NOTHING, *map(number, _levels(document, name).values())][-1]
            yield (
                f"{row_title(document, name)} fails the randomisation check: with every weight random its maps still "
                f"agree with those of the trained network (rank correlation {correlation}). They show what is in the "
                "image, not what the network has learnt."
            )


def _beaten(document: Mapping[str, Any]) -> Iterator[str]:
    """Say which methods are not better than the best baseline by their Dice.

    The interval of the paired difference decides where the file has it; otherwise the two intervals must be apart.
    """
    figures = {
        name: part(document, "localisation", "methods", name, "mean", "dice")
        for name in rows_of(document, "localisation")
    }
    figures = {name: figure for name, figure in figures.items() if is_known(figure)}
    best = max((name for name in figures if is_baseline(document, name)), key=lambda x: figures[x]["value"], default="")
    for name, figure in figures.items():
        if is_baseline(document, name) or not best:
            continue
        paired = part(document, "localisation", "differences", name, best, "dice")
        low, bar = (paired.get("low"), 0) if is_known(paired) else (figure.get("low"), figures[best].get("high"))
        told = is_finite(low) and is_finite(bar)
        if told and low > bar:
            continue
        if figure["value"] <= figures[best]["value"]:
            verdict = "does not beat"
        else:
            verdict = "does not clearly beat" if told else "may or may not beat"
        difference = f", difference {_words(paired)}" if is_known(paired) else ""
        yield (
            f"{row_title(document, name)} {verdict} the best baseline, {best}: "
            f"Dice {_words(figure)} against {_words(figures[best])}{difference}."
        )


def _left_out(document: Mapping[str, Any]) -> Iterator[str]:
    values = part(document, "localisation")
    counts = {key: len(values[key]) if isinstance(values.get(key), list) else values.get(key) for key in LEFT_OUT}
    found = [f"{count:,} {LEFT_OUT[key]}" for key, count in counts.items() if is_finite(count) and count > 0]
    if found:
        yield f"Images that the localisation leaves out: {', '.join(found)}."


def _words(figure: Mapping[str, Any]) -> str:
    cell = figure_cell(figure)
    return f"{cell.text} {cell.interval}".strip()


def _notes(document: Mapping[str, Any]) -> list[str]:
    names, others = rows_of(document, "localisation"), rows_of(document, "faithfulness")
    notes = [ABOUT_THRESHOLDS] if names else []
    if any(is_baseline(document, name) for name in (*names, *others)):
        notes.append(ABOUT_BASELINES)
    if any(_paper_figures(name, "iou") for name in names):
        levels = _magnifications(document)
        several = ", the lowest and the highest" if len(levels) > 1 else ""
        notes.append(
            "The paper's figures are those of Table 14 of the DALAResNet50 paper (2024) for BreakHis at "
            f"{', '.join(levels)}{several}. It names neither its masks nor how it binarised the other methods' maps, "
            "so at most the order of the methods can be compared."
        )
    return [*notes, ABOUT_FAITHFULNESS] if others else notes


def _magnifications(document: Mapping[str, Any]) -> list[str]:
    """Return the paper's magnifications that are among the explained images of BreakHis, else all it has."""
    reported = sorted({level for row in _paper().values() for level in row}, key=lambda level: int(level.rstrip("X")))
    known = part(document, "dataset").get("name") == "breakhis"
    ours = {str(image.get("magnification")) for image in images_of(document)} if known else set()
    return [level for level in reported if level in ours] or reported


@cache
def _paper() -> dict[tuple[str, str], dict[str, float]]:
    """Return (method, metric) to magnification to what the paper's table has."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in read_csv(REPORTED):
        if all(row[key] == value for key, value in PAPER.items()):
            found.setdefault((row["arch"], row["metric"]), {})[row["magnification"]] = float(row["value"])
    return found


def _paper_figures(name: str, metric: str) -> dict[str, float]:
    return _paper().get((name, metric), {})


def _paper_cell(name: str, metric: str, levels: Sequence[str]) -> Cell:
    found = [number(value) for level, value in _paper_figures(name, metric).items() if level in levels]
    if not found:
        return Cell(NOTHING)
    return Cell(min(found) if min(found) == max(found) else f"{min(found)}–{max(found)}")


def _pictures(folder: Path, document: Mapping[str, Any]) -> Iterator[Picture]:
    methods = ", ".join(row_title(document, name) for name in part(document, "methods"))
    for name, title, alt in (
        ("comparison.png", "Figures of the methods", "dots with 95 % intervals; the tables hold the same figures"),
        ("gallery.png", "Gallery", "images, and beside each its map laid over it"),
    ):
        picture = read_picture(folder / name, title, alt, wide=True)
        if picture:
            yield picture
    num_panels = 0
    for image in images_of(document):
        if num_panels == MAX_PANELS:
            return
        path = panel_of(folder, image)
        shown = (_caption(image), f"the image, and its maps by {methods}")
        picture = read_picture(path, *shown, wide=len(part(document, "methods")) > 2) if path else None
        if picture:
            num_panels += 1
            yield picture


def _caption(image: Mapping[str, Any]) -> str:
    words = [str(image.get("image_id") or "image")]
    words += [f"true class {image['label']}"] if image.get("label") else []
    words += [f"predicted {image['predicted']}"] if image.get("predicted") else []
    words += [f"explained {image.get('target')} ({number(image.get('probability'))})"] if image.get("target") else []
    words += [str(image["magnification"])] if image.get("magnification") else []
    words += [f"patient {image['patient']}"] if image.get("patient") else []
    return re.sub(r"\s+", " ", ", ".join(words))
