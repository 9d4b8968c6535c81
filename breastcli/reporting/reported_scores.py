"""What the papers report of test figures, beside those of an evaluation on the same kind of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from breastcli.files import read_csv
from breastcli.metrics.classification import METRICS
from breastcli.reporting.explanation_section import REPORTED
from breastcli.reporting.parts import Cell, Table, figure_cell, is_known, number, part
from breastcli.reporting.reported_convergence import ABOUT_SPLITS, DATASETS, NAMES

RECOGNITION_RATE = "recognition_rate"
TITLES = {name: metric.title for name, metric in METRICS.items()} | {RECOGNITION_RATE: "Patient recognition rate"}
# Their columns that follow the definition of one of ours, and the factor; see docs/fidelity.md for the others.
COLUMNS = {
    "accuracy": ("accuracy", 1.0),
    "accuracy_pct": ("accuracy", 0.01),
    "image_accuracy_pct": ("accuracy", 0.01),
    "patient_accuracy_pct": (RECOGNITION_RATE, 0.01),
    "f1_second": ("f1_weighted", 1.0),
    "gmean": ("gmean", 1.0),
    "iba": ("iba_unsquared", 1.0),
    "sensitivity": ("sensitivity", 1.0),
    "recall": ("sensitivity", 1.0),
    "specificity": ("specificity", 1.0),
    "tnr": ("specificity", 1.0),
    "fpr": ("fpr", 1.0),
    "ppv": ("ppv", 1.0),
    "precision": ("precision", 1.0),
    "npv": ("npv", 1.0),
    "f1": ("f1", 1.0),
    "kappa": ("cohen_kappa", 1.0),
    "mcc": ("mcc", 1.0),
}


@dataclass(frozen=True)
class Paper:
    """Whose figures they are.

    Attributes:
        title: as it is cited.
        own: the network that it proposes, as its tables name it.
        tables: where its test figures stand.
    """

    title: str
    own: str
    tables: tuple[str, ...]


PAPERS = {
    "dalaresnet50-2024": Paper("DALAResNet50 paper (2024)", "dalaresnet50", ("7", "8", "11")),
    "wang-2024": Paper("Wang et al. (2024)", "densenet_se_two_stage", ("3",)),
    "deebani-2025": Paper("Deebani et al. (2025)", "multiscale+tradaug+cwgan", ("11", "12", "14")),
}
ABOUT_TABLE_11 = (
    "In the DALAResNet50 paper sensitivity, specificity and accuracy nearly coincide in every row, which figures of "
    "two unequal classes rarely do."
)
Network = tuple[str, str]  # paper, and name in its tables


def paper_table(document: Mapping[str, Any], arch: str | None) -> Table | None:
    """Return the figures of an evaluation beside those that papers print for the same data set; None where none does.

    Each paper has the column of the network that it proposes, and that of the evaluated network where it has one. A
    magnification is compared with the same magnification, all together with what a paper prints of all together.

    Args:
        document: the contents of ``metrics.json``.
        arch: the evaluated network as ``train --arch`` takes it, where that is known.
    """
    dataset, image = part(document, "dataset"), part(document, "image")
    printed, num_classes = DATASETS.get(str(dataset.get("name")), ("", 0))
    classes = image.get("classes")
    if not isinstance(classes, list) or len(classes) != num_classes or dataset.get("drawn"):
        return None
    places = _places(document, printed)
    networks = [one for one in _networks(arch) if any(_printed(one, printed, place) for place, _, _ in places)]
    rows = []
    for place, title, figures in places:
        for name, figure in figures.items():
            theirs = [_printed(network, printed, place).get(name) for network in networks]
            if is_known(figure) and any(value is not None for value in theirs):
                cells = [Cell(number(value)) for value in theirs]
                rows.append((f"{TITLES[name]}{title}", [figure_cell(figure), *cells]))
    heads = [f"{PAPERS[source].title}: {name}" for source, name in networks]
    caption = "Beside the papers' figures (their splits are by image, which leaks)"
    return Table(caption, ["Figure", "This evaluation", *heads], rows) if rows else None


def paper_notes(table: Table) -> list[str]:
    """Return what makes a table's figures hard to compare."""
    cited = [paper for paper in PAPERS.values() if any(head.startswith(paper.title) for head in table.columns)]
    notes = [f"{paper.title}: Table{'s' * (len(paper.tables) > 1)} {', '.join(paper.tables)}" for paper in cited]
    of_table_11 = (TITLES["sensitivity"], TITLES["specificity"])
    printed = any(paper.own == "dalaresnet50" for paper in cited) and any(head in of_table_11 for head, _ in table.rows)
    return ["; ".join([*notes, ABOUT_SPLITS]), *[ABOUT_TABLE_11] * printed]


def _networks(arch: str | None) -> list[Network]:
    """Return the networks to set beside ours: the same one and the paper's own, of every paper."""
    same = NAMES.get(str(arch), str(arch))
    return [(source, name) for source, paper in PAPERS.items() for name in dict.fromkeys((same, paper.own))]


def _places(document: Mapping[str, Any], printed: str) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Return each magnification as the papers' tables have it ("" for all), what to call it, and our figures there."""
    levels = part(document, "by_magnification")
    rate = part(document, "patient", "recognition_rate")
    whole = {**part(document, "image", "overall"), RECOGNITION_RATE: rate}
    if printed == "breakhis" and len(levels) == 1:
        return [(next(iter(levels)), "", whole)]
    accuracy = {level: {"accuracy": part(levels, level, "overall", "accuracy")} for level in levels}
    return [("", "", whole), *((level, f", {level}", figures) for level, figures in accuracy.items())]


def _printed(network: Network, dataset: str, magnification: str) -> dict[str, float]:
    source, name = network
    return _reported().get((source, dataset, magnification, name), {})


@cache
def _reported() -> dict[tuple[str, str, str, str], dict[str, float]]:
    """Return (source, data set, magnification or "", network) to our names of figures and their values."""
    found: dict[tuple[str, str, str, str], dict[str, float]] = {}
    for row in read_csv(REPORTED):
        paper = PAPERS.get(row["source"])
        if paper and row["table"] in paper.tables and row["metric"] in COLUMNS:
            metric, factor = COLUMNS[row["metric"]]
            key = row["source"], row["dataset"], row["magnification"], row["arch"]
            found.setdefault(key, {})[metric] = factor * float(row["value"])
    return found
