"""What the papers report of a network's time to converge, its accuracy and its size, and on what hardware."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from breastcli.files import read_csv
from breastcli.reporting.explanation_section import REPORTED

# Their names of our networks, where they differ, and of our data sets, with the number of classes that they told apart.
NAMES = {"densenet121_se": "densenet_se", "torchvision/densenet121": "densenet"}
TWO_STAGES = {"densenet_se": "densenet_se_two_stage"}
DATASETS = {"breakhis": ("breakhis", 2), "bach": ("bach", 4), "mini_ddsm": ("miniddsm", 3)}
UNITS = {  # metric as in the table: ours, and the factor
    "convergence_time_s": ("convergence_s", 1.0),
    "convergence_time_min": ("convergence_s", 60.0),
    "accuracy": ("accuracy", 1.0),
    "image_accuracy_pct": ("accuracy", 0.01),
    "parameters": ("parameters", 1.0),
}
NOTHING = {
    "source": "",
    "reported_as": "",
    "convergence_s": None,
    "images_per_s": None,
    "accuracy": None,
    "parameters": None,
    "hardware": "",
}
ABOUT_SPLITS = "the papers divide by image, which leaks: their accuracies are no measure for an honest split"


@dataclass(frozen=True)
class Paper:
    """How a paper measured.

    Attributes:
        title: as it is cited.
        tables: where the figures stand.
        hardware: what it names.
        epochs: its fixed number.
        train_images: data set and magnification to the number of training images, where it is stated.
        silence: what it does not say.
    """

    title: str
    tables: str
    hardware: str
    epochs: int
    train_images: dict[tuple[str, str], int]
    silence: str


PAPERS = {
    "dalaresnet50-2024": Paper(
        title="DALAResNet50 paper (2024)",
        tables="Tables 7 to 10",
        hardware="one NVIDIA RTX A4000 with 16 GB",
        epochs=50,
        train_images={  # section IV-C
            ("breakhis", "40X"): 1197,
            ("breakhis", "100X"): 1249,
            ("breakhis", "200X"): 1208,
            ("breakhis", "400X"): 1092,
            ("bach", ""): 240,
            ("miniddsm", ""): 1200,
        },
        silence="no rule of convergence is stated; images/s are those of 50 epochs in the printed time",
    ),
    "wang-2024": Paper(
        title="Wang et al. (2024)",
        tables="Tables 3 and 5",
        hardware="NVIDIA GeForce RTX 4090, Intel Core i9-9900",
        epochs=200,
        train_images={},
        silence="neither a rule of convergence, nor the magnification that was timed, nor the number of its images is "
        "stated",
    ),
}


def paper_figures(
    arch: str, *, dataset: str, num_classes: int, magnification: str | None, two_stages: bool = False
) -> dict[str, Any]:
    """Return what a paper reports of the same network on the same images; ``NOTHING`` where none does.

    Args:
        arch: as ``train --arch`` takes it.
        dataset: name of the data set.
        num_classes: how many classes are told apart.
        magnification: such as "100X"; None for all, which the papers never train on at once.
        two_stages: whether training starts from a run on other images, as Wang et al. do.
    """
    printed_as, classes = DATASETS.get(dataset, ("", 0))
    if classes != num_classes or (dataset == "breakhis" and magnification is None):
        return NOTHING
    name = NAMES.get(arch, arch)
    name = TWO_STAGES.get(name, name) if two_stages else name
    for source, paper in PAPERS.items():
        found = _figures(source, printed_as, name, "") | _figures(source, printed_as, name, magnification or "")
        if "convergence_s" in found or "accuracy" in found:
            num_images = paper.train_images.get((printed_as, magnification or ""))
            seconds = found.get("convergence_s")
            speed = paper.epochs * num_images / seconds if seconds and num_images else None
            cited = {"source": paper.title, "reported_as": name, "hardware": paper.hardware}
            return NOTHING | found | cited | {"images_per_s": speed}
    return NOTHING


def paper_notes(figures: Iterable[dict[str, Any]]) -> list[str]:
    """Return a line on each paper whose figures are there, and what makes them hard to compare."""
    cited = {one["source"] for one in figures}
    notes = [
        f"{paper.title}, {paper.tables}: {paper.hardware}; {paper.silence}"
        for paper in PAPERS.values()
        if paper.title in cited
    ]
    return [*notes, ABOUT_SPLITS] if notes else []


def _figures(source: str, dataset: str, name: str, magnification: str) -> dict[str, float]:
    return _reported().get((source, dataset, name, magnification), {})


@cache
def _reported() -> dict[tuple[str, str, str, str], dict[str, float]]:
    """Return (source, data set, network, magnification or "") to the figures in our units."""
    found: dict[tuple[str, str, str, str], dict[str, float]] = {}
    for row in read_csv(REPORTED):
        if row["metric"] in UNITS and row["source"] in PAPERS:
            metric, factor = UNITS[row["metric"]]
            key = row["source"], row["dataset"], row["arch"], row["magnification"]
            found.setdefault(key, {})[metric] = factor * float(row["value"])
    return found
