"""What an evaluation under perturbations leaves behind: a table, a plot, and a section of the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from breastcli.data.stress import PERTURBATIONS, STRENGTHS
from breastcli.files import write_csv
from breastcli.metrics.robustness import FIGURES, FLIPPED, TITLES
from breastcli.reporting.contact_sheet import COLOURS, GREY
from breastcli.reporting.parts import Cell, Picture, Table, figure_cell, read_picture
from breastcli.reporting.plots import _explain, _figure, _n, _styled, _write
from breastcli.system.runfolder import STRESS_PLOT, STRESS_TABLE

COLUMNS = ("perturbation", "strength", "level", "n", "num_unchanged", "figure", "value", "low", "high")
COLUMNS += ("difference", "difference_low", "difference_high", "stamp")
DRAWN = ("roc_auc", "balanced_accuracy")
SHIFTED = ("sensitivity", "specificity")  # one may gain what the other loses, which balanced accuracy hides
KINDS = {"stain": "Stain", "sharpness": "Focus and file", "light": "Light"}
MARKERS = ("o", "s", "^")
APART = 0.11  # between points of one strength, so that their intervals can be told apart


@dataclass(frozen=True)
class StressSection:
    """What the page says of perturbed images."""

    table: Table
    picture: Picture | None
    notes: list[str]


def write_stress(out: Path, document: Mapping[str, Any], stamp: str) -> None:
    """Write ``stress.csv`` and ``stress.png``.

    Args:
        out: folder to write into.
        document: what ``describe_stress`` returned.
        stamp: warning that every row and the plot carry, or "".
    """
    rows = [[*("" if value is None else value for value in row), stamp] for row in _rows(document)]
    write_csv(out / STRESS_TABLE, COLUMNS, rows)
    plot_stress(document, out / STRESS_PLOT, stamp=stamp)


def _rows(document: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Yield one row for each figure of the clean images and of each condition."""
    for name, figure in document["clean"].items():
        yield ["clean", "", "", document["n"], "", name, *figure.values(), "", "", ""]
    for one in document["conditions"]:
        known = [one[key] for key in ("perturbation", "strength", "level", "n", "num_unchanged")]
        yield [*known, FLIPPED, *one[FLIPPED].values(), "", "", ""]
        for name in FIGURES:
            yield [*known, name, *one["figures"][name].values(), *one["differences"][name].values()]


@_styled
def plot_stress(document: Mapping[str, Any], path: Path, *, stamp: str = "") -> None:
    """Draw ROC AUC and balanced accuracy over the strength of each perturbation, one panel per kind.

    Args:
        document: what ``describe_stress`` returned.
        path: PNG file to write.
        stamp: warning to print above.
    """
    conditions = document["conditions"]
    kinds = [kind for kind in KINDS if any(one["kind"] == kind for one in conditions)]
    figure = _figure(3.5 * len(kinds), 7.2)
    panels = figure.subplots(len(DRAWN), len(kinds), sharex=True, sharey="row", squeeze=False)
    for row, name in zip(panels, DRAWN, strict=True):
        row[0].set_ylabel(f"{TITLES[name]}, 95 % interval")
        for axes, kind in zip(row, kinds, strict=True):
            _draw_panel(axes, document, name, kind)
    for axes, kind in zip(panels[0], kinds, strict=True):
        axes.set_title(f"{KINDS[kind]} ({_n(document['n'], 'image')})")
    for axes in panels[-1]:
        axes.set_xticks(range(1 + len(STRENGTHS)), ["clean", *STRENGTHS])
        if axes.lines:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1))
    _write(figure, path, stamp)


def _draw_panel(axes: Axes, document: Mapping[str, Any], name: str, kind: str) -> None:
    clean = _numbers(document["clean"][name])
    if np.isnan(clean[0]):
        _explain(axes, "The figure is undefined: it needs images of two classes.")
        return
    axes.axhline(clean[0], color=GREY, linewidth=1.1, linestyle=(0, (2, 2)), label="clean, with its interval")
    axes.axhspan(*clean[1:], color=GREY, alpha=0.12, linewidth=0)
    names = [known for known, one in PERTURBATIONS.items() if one.kind == kind]
    for number, perturbation in enumerate(names):
        conditions = [one for one in document["conditions"] if one["perturbation"] == perturbation]
        values, lows, highs = np.array([_numbers(one["figures"][name]) for one in conditions]).T
        places = np.arange(1, 1 + len(conditions)) + APART * (number - (len(names) - 1) / 2)
        looks = {"color": COLOURS[number], "marker": MARKERS[number], "markersize": 5}
        levels = ", ".join(f"{one['level']:g}" for one in conditions)
        label = f"{conditions[0]['title']}: {PERTURBATIONS[perturbation].label.replace('{:g}', levels)}"
        axes.plot([0, *places], [clean[0], *values], **looks, label=label)
        axes.vlines(places, lows, highs, color=COLOURS[number], linewidth=1.1)


def _numbers(figure: Mapping[str, float | None]) -> list[float]:
    return [np.nan if figure[key] is None else figure[key] for key in ("value", "low", "high")]


def stress_section(folder: Path, document: Mapping[str, Any]) -> StressSection | None:
    """Return what the report shows of an evaluation under perturbations, or None where there was none.

    Args:
        folder: of the evaluation.
        document: what ``describe_stress`` returned, or empty.
    """
    if not document:
        return None
    clean = [part for name in DRAWN for part in (figure_cell(document["clean"][name]), Cell(""))]
    rows = [("clean", [*clean, *(Cell("") for _ in (*SHIFTED, FLIPPED))])]
    for one in document["conditions"]:
        pairs = [figure_cell(one[part][name]) for name in DRAWN for part in ("figures", "differences")]
        shifts = [figure_cell(one["differences"][name]) for name in SHIFTED]
        cells = [*pairs, *shifts, figure_cell(one[FLIPPED])]
        rows.append((f"{one['title']} {one['label']} ({one['strength']})", cells))
    heads = [head for name in DRAWN for head in (TITLES[name], "Minus clean")]
    heads += [f"{TITLES[name]} minus clean" for name in SHIFTED]
    caption = f"Perturbed images, image level (n = {document['n']:,}, 95 % intervals)"
    table = Table(caption, ["Perturbation", *heads, TITLES[FLIPPED]], rows)
    picture = read_picture(folder / STRESS_PLOT, "Robustness", "ROC AUC and balanced accuracy over each strength")
    return StressSection(table, picture, list(document["notes"]))
