"""The figures of several runs, each as a dot on its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from breastcli.metrics.comparison import RECOGNITION_RATE, TITLES
from breastcli.reporting.contact_sheet import BLUE, VERMILION, short
from breastcli.reporting.parts import is_finite, part
from breastcli.reporting.plots import _explain, _figure, _styled, _write

SHOWN = {"balanced_accuracy": "image", "roc_auc": "image", RECOGNITION_RATE: "patient"}


@_styled
def plot_runs(names: Sequence[str], rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a panel for each of the figures to look at first, and in it a row for each run; leaky ones are marked.

    Args:
        names: what the runs are called.
        rows: what ``describe_run`` says of each.
        path: PNG file to write.
    """
    figure = _figure(10.4, 2.3 + 0.34 * len(rows))
    panels = figure.subplots(1, len(SHOWN), sharey=True)
    for axes, (metric, level) in zip(panels, SHOWN.items(), strict=True):
        axes.set(title=TITLES[metric], xlim=(-0.02, 1.02), xlabel=f"{level} level")
        for place, row in enumerate(rows):
            value, low, high = (part(row, level, metric).get(key) for key in ("value", "low", "high"))
            colour, marker = (VERMILION, "D") if row["leaky"] else (BLUE, "o")
            if is_finite(low) and is_finite(high):
                axes.hlines(place, low, high, color=colour)
            if is_finite(value):
                axes.plot(value, place, marker, color=colour, markersize=7)
        if not any(is_finite(part(row, level, metric).get("value")) for row in rows):
            _explain(axes, "No run has this figure.")
    panels[0].set_yticks(range(len(rows)), [short(name) for name in names])
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    for leaky, (colour, marker, label) in {
        False: (BLUE, "o", "split without a known leak"),
        True: (VERMILION, "D", "leaky split"),
    }.items():
        if any(bool(row["leaky"]) is leaky for row in rows):
            panels[0].plot([], [], marker, color=colour, label=label)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    _write(figure, path, "")
