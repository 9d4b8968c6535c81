"""What a comparison of two evaluations leaves behind: a document, a table and a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from breastcli.files import write_csv, write_json
from breastcli.metrics.comparison import LEVELS, TITLES, Comparison, Level
from breastcli.reporting.contact_sheet import BLUE, GREY, VERMILION
from breastcli.reporting.plots import _figure, _styled, _write

DOCUMENT, TABLE, PLOT = "comparison.json", "comparison.csv", "comparison.png"
COLUMNS = ("level", "figure", "a", "b", "difference", "low", "high", "leaves_out_zero", "stamp_a", "stamp_b")


def write_comparison(out: Path, document: Mapping[str, Any], comparison: Comparison) -> None:
    """Write ``comparison.csv``, ``comparison.png`` and, last, ``comparison.json``.

    Args:
        out: folder to write into.
        document: the contents of ``comparison.json``, with "a" and "b" as ``Side.to_json`` gives them.
        comparison: what was found.
    """
    stamps = [document[side]["stamp"] for side in "ab"]
    rows = []
    for level, values in document["levels"].items():
        for name, one in values["figures"].items():
            known = (one["a"], one["b"], *one["difference"].values(), one["leaves_out_zero"])
            rows.append((level, name, *("" if value is None else value for value in known), *stamps))
    write_csv(out / TABLE, COLUMNS, rows)
    names = [Path(document[side]["folder"]).name for side in "ab"]
    plot_comparison(comparison, (names[0], names[1]), out / PLOT, stamp=document["stamp"])
    write_json(out / DOCUMENT, document, durable=True)


@_styled
def plot_comparison(comparison: Comparison, names: tuple[str, str], path: Path, *, stamp: str = "") -> None:
    """Draw B - A of every figure with its interval beside the line of no difference, one panel per level.

    Args:
        comparison: what was found.
        names: what A and B are called.
        path: PNG file to write.
        stamp: warning to print above.
    """
    figure = _figure(3.4 + 3.0 * len(comparison.levels), 7.4)
    panels = figure.subplots(1, len(comparison.levels), sharex=True, sharey=True, squeeze=False)[0]
    rows = list(dict.fromkeys(name for level in comparison.levels.values() for name in level.figures))
    rows.sort(key=list(TITLES).index)
    for axes, (key, level) in zip(panels, comparison.levels.items(), strict=True):
        axes.set_title(f"{LEVELS[key].capitalize()}\n{_counts(level)}")
        axes.set_xlabel("B − A")
        axes.axvline(0, color=GREY, linewidth=1.1)
        _draw_differences(axes, level, rows)
    panels[0].set_yticks(range(len(rows)), [TITLES[name] for name in rows])
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    how = f"paired on {comparison.num_common:,} images" if comparison.paired else "unpaired"
    title = f"A: {names[0]}, B: {names[1]} ({how})"
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, title=title)
    _write(figure, path, stamp)


def _counts(level: Level) -> str:
    return f"n = {level.n[0]:,}" if level.n[0] == level.n[1] else f"n = {level.n[0]:,} (A), {level.n[1]:,} (B)"


def _draw_differences(axes: Axes, level: Level, rows: list[str]) -> None:
    looks = {
        True: (VERMILION, "o", "interval leaves out zero"),
        False: (BLUE, "o", "interval holds zero"),
        None: (GREY, "D", "no interval"),
    }
    for verdict, (colour, marker, label) in looks.items():
        figures = {rows.index(name): one for name, one in level.figures.items() if one.leaves_out_zero is verdict}
        heights, values = list(figures), [one.difference.value for one in figures.values()]
        bounds = [(one.difference.low, one.difference.high) for one in figures.values()]
        if verdict is not None and bounds:
            axes.hlines(heights, *zip(*bounds, strict=True), color=colour)
        axes.plot(values, heights, marker, color=colour, markersize=5, label=label)
