"""One page that sets several runs beside each other, and says where they cannot be compared."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from breastcli.files import read_csv, write_json, write_text
from breastcli.metrics.comparison import LOWER_IS_BETTER, RECOGNITION_RATE, TITLES
from breastcli.records import stamp_of
from breastcli.reporting.evaluation_section import PLOTS
from breastcli.reporting.page import render_page
from breastcli.reporting.parts import (
    NOTHING,
    Cell,
    Picture,
    Table,
    figure_cell,
    is_finite,
    leak_stamp,
    number,
    part,
    read_picture,
    whole_number,
)
from breastcli.reporting.run_files import RunFiles
from breastcli.reporting.runs_plot import plot_runs
from breastcli.system.runfolder import HISTORY, PAGE

DOCUMENT, PLOT = "report.json", "figures.png"
IMAGE_FIGURES = (
    "balanced_accuracy",
    "accuracy",
    "sensitivity",
    "specificity",
    "f1_weighted",
    "roc_auc",
    "brier",
    "ece",
)
VOTE_FIGURES = ("accuracy", "balanced_accuracy", "sensitivity", "specificity")
KEY_PLOTS = ("confusion.png", "roc.png", "reliability.png")
# What two runs must share so that their figures answer the same question.
SAME_IMAGES = {
    "dataset": "data set",
    "classes": "classes",
    "split_fingerprint": "split",
    "fold": "fold",
    "magnification": "magnification",
    "n": "number of tested images",
}
ABOUT_BEST = (
    "A figure is printed bold where it is the best and its interval overlaps with that of no other run. None is where "
    "a split leaks, where the runs were tested on different images, or where an interval is unknown."
)
ABOUT_OVERLAP = (
    "Intervals that overlap do not prove that two runs are equally good: breastcli evaluate --compare A B gives the "
    "difference on the same images with its interval."
)


def describe_run(files: RunFiles, split: str) -> dict[str, Any]:
    """Return what a table of several runs says of one, safe for JSON; what is not known is None."""
    info, card, document = files.info, files.card, part(files.evaluations.get(split))
    dataset, image, patient = (part(document, name) for name in ("dataset", "image", "patient"))
    vote, best = part(patient, "vote"), part(info, "best").get("epoch")
    threshold, history = part(document, "threshold"), files.folder / HISTORY
    leaky = leak_stamp(dataset) or leak_stamp(card)
    return {
        "run": str(files.folder),
        "report": str(files.folder / PAGE),
        "dataset": card.get("name"),
        "classes": ", ".join(map(str, card.get("classes") or ())) or None,
        "split_level": part(card, "split").get("level"),
        "leaky": leaky,
        "stamp": stamp_of(leaky, files.drawn, files.synthetic) or None,
        "fingerprint": card.get("fingerprint"),
        "split_fingerprint": card.get("split_fingerprint"),
        "fold": files.settings.get("fold") if not files.is_pooled else "pooled",
        "magnification": files.magnification,
        "arch": files.arch,
        "parameters": part(info, "num_parameters").get("all"),
        "epochs": len(read_csv(history)) if history.is_file() else None,
        "best_epochs": document.get("epochs") or ([best] if best else None),
        "synthetic": files.synthetic,
        "threshold": threshold.get("rule"),
        "threshold_value": threshold.get("value"),
        "seconds": info.get("seconds"),
        "n": image.get("n"),
        "num_groups": image.get("num_groups"),
        "num_patients": vote.get("n"),
        "image": {name: part(image, "overall").get(name) for name in IMAGE_FIGURES},
        "patient": {
            RECOGNITION_RATE: patient.get(RECOGNITION_RATE),
            **{name: part(vote, "overall").get(name) for name in VOTE_FIGURES},
        },
    }


def compare_runs(runs: Sequence[RunFiles], split: str) -> dict[str, Any]:
    """Return the contents of ``report.json``: every run, and in what the tested images differ."""
    rows = [describe_run(files, split) for files in runs]
    names = names_of(runs)
    evaluated = [(name, row) for name, row in zip(names, rows, strict=True) if row["n"]]
    apart = {
        title: {name: row[key] for name, row in evaluated}
        for key, title in SAME_IMAGES.items()
        if len({row[key] for _, row in evaluated}) > 1
    }
    return {"split": split, "names": names, "apart": apart, "runs": rows}


def names_of(runs: Sequence[RunFiles]) -> list[str]:
    """Return what each run is called: its folder's name, or its path where two have the same."""
    names = [files.name for files in runs]
    return names if len(set(names)) == len(names) else [str(files.folder) for files in runs]


def write_runs_page(out: Path, runs: Sequence[RunFiles], document: Mapping[str, Any]) -> Path:
    """Write ``figures.png``, ``report.json`` and the page.

    Args:
        out: folder to write into; it must exist.
        runs: two or more.
        document: what ``compare_runs`` found.

    Returns:
        the page's path.
    """
    names, rows, split = document["names"], document["runs"], document["split"]
    plot_runs(names, rows, out / PLOT)
    write_json(out / DOCUMENT, document)
    links = {name: _link(row["report"], out) for name, row in zip(names, rows, strict=True)}
    values = {
        "name": f"{len(runs)} runs, {split} split",
        "leaks": {name: row["leaky"] for name, row in zip(names, rows, strict=True) if row["leaky"]},
        "drawn": [name for name, files in zip(names, runs, strict=True) if files.drawn],
        "synthetic": [name for name, row in zip(names, rows, strict=True) if row["synthetic"]],
        "missing": [name for name, row in zip(names, rows, strict=True) if not row["n"]],
        "apart": list(_differences(document)),
        "tables": [
            _runs_table(names, rows, links),
            _figures_table("image", names, document, links),
            _figures_table("patient", names, document, links),
        ],
        "notes": [*_preparations(names, rows), ABOUT_BEST, ABOUT_OVERLAP],
        "overview": read_picture(out / PLOT, "Figures with 95 % intervals", "a dot and a line for each run"),
        "plots": {name: _plots(files, split, name) for name, files in zip(names, runs, strict=True)},
    }
    write_text(out / PAGE, render_page("runs.html.j2", values))
    return out / PAGE


def best_of(figures: Sequence[Any], *, lower: bool = False) -> int | None:
    """Return which figure is better than all others by intervals that do not overlap, or None."""
    bounds = [tuple(part(figure).get(end) for end in ("low", "high")) for figure in figures]
    if len(bounds) < 2 or not all(is_finite(bound) for pair in bounds for bound in pair):
        return None
    bounds = [(-high, -low) if lower else (low, high) for low, high in bounds]
    best = max(range(len(bounds)), key=lambda place: bounds[place][0])
    return best if all(bounds[best][0] > high for place, (_, high) in enumerate(bounds) if place != best) else None


def _runs_table(names: Sequence[str], rows: Sequence[Mapping[str, Any]], links: dict[str, str]) -> Table:
    """Return what was trained on what, and how."""
    columns = {
        "Data set": lambda row: Cell(_text(row["dataset"])),
        "Split by": lambda row: Cell(_text(row["split_level"])),
        "Stamp": lambda row: Cell(_text(row["stamp"]), tone="stamp" if row["leaky"] else ""),
        "Fold": lambda row: Cell(_text(row["fold"])),
        "Magnification": lambda row: Cell(_text(row["magnification"])),
        "Network": lambda row: Cell(_text(row["arch"])),
        "Parameters": lambda row: Cell(whole_number(row["parameters"])),
        "Epochs": lambda row: Cell(whole_number(row["epochs"])),
        "Best epoch": lambda row: Cell(", ".join(map(str, row["best_epochs"] or ())) or NOTHING),
        "Synthetic images": lambda row: Cell("yes" if row["synthetic"] else "no"),
        "Threshold": lambda row: Cell(number(row["threshold_value"]), f"({row['threshold']})" * bool(row["threshold"])),
        "Seconds": lambda row: Cell(f"{row['seconds']:,.0f}" if is_finite(row["seconds"]) else NOTHING),
    }
    cells = [(name, [make(row) for make in columns.values()]) for name, row in zip(names, rows, strict=True)]
    return Table("Runs", ["Run", *columns], cells, links)


def _figures_table(level: str, names: Sequence[str], document: Mapping[str, Any], links: dict[str, str]) -> Table:
    """Return the figures that count images, or patients, with the best one marked where there is one."""
    rows = document["runs"]
    contest = not document["apart"] and not any(row["leaky"] for row in rows)
    metrics = [name for name in rows[0][level] if any(row[level][name] for row in rows)]
    best = {
        name: best_of([row[level][name] for row in rows], lower=name in LOWER_IS_BETTER) if contest else None
        for name in metrics
    }
    lines = []
    for place, (name, row) in enumerate(zip(names, rows, strict=True)):
        cells = [figure_cell(row[level][metric]) for metric in metrics]
        tones = ["leaky" if row["leaky"] else "best" if best[metric] == place else "" for metric in metrics]
        cells = [Cell(cell.text, cell.interval, tone) for cell, tone in zip(cells, tones, strict=True)]
        n = row["n"] if level == "image" else row["num_patients"]
        mark = Cell(row["leaky"], tone="stamp") if row["leaky"] else Cell(NOTHING)
        lines.append((name, [mark, Cell(whole_number(n)), Cell(whole_number(row["num_groups"])), *cells]))
    counted = {"image": "Images", "patient": "Patients; all but the recognition rate by majority vote"}[level]
    heads = [f"{TITLES[name]}{' (lower is better)' if name in LOWER_IS_BETTER else ''}" for name in metrics]
    caption = f"{counted}: {document['split']} split, with 95 % intervals"
    return Table(caption, ["Run", "Leak", "n", "Groups", *heads], lines if metrics else [], links)


def _differences(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for everything in which the tested images differ."""
    for title, values in document["apart"].items():
        yield f"{title}: " + ", ".join(f"{_text(value)} ({name})" for name, value in values.items())


def _preparations(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a note where the same split was prepared in several ways, such as another stain or size."""
    if len({row["fingerprint"] for row in rows}) == 1 or len({row["split_fingerprint"] for row in rows}) > 1:
        return []
    prints = ", ".join(f"{_text(row['fingerprint'])} ({name})" for name, row in zip(names, rows, strict=True))
    return [f"The same images and split were prepared in several ways (stain, size): {prints}."]


def _plots(files: RunFiles, split: str, name: str) -> list[Picture]:
    found = [
        read_picture(files.folder / "evaluate" / split / file, f"{PLOTS[file][0]} of {name}", PLOTS[file][1])
        for file in KEY_PLOTS
    ]
    return [picture for picture in found if picture]


def _link(page: str, out: Path) -> str:
    """Return a page's address as seen from the folder, so that both can be moved together."""
    return quote(Path(os.path.relpath(page, out)).as_posix())


def _text(value: Any) -> str:
    return NOTHING if value is None else str(value)
