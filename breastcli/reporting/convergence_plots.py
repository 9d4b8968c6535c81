"""Networks by test accuracy over their time to converge and over their size, beside the papers' points."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from breastcli.reporting.contact_sheet import BLACK, BLUE, GREY, VERMILION, short
from breastcli.reporting.parts import is_finite
from breastcli.reporting.plots import _explain, _figure, _n, _styled, _write

MILLION = 1e6
MARGIN = 1.5  # factor between the outermost points and the frame
SIZE, CLEAR = 8, 6  # points: of a label, and between it and its point
# Where a label may lie relative to its point: horizontally, vertically, and at which multiple of CLEAR; of places
# equally good the first is taken.
SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
PLACES = tuple((*side, distance) for distance in (1, 2.5, 4, 6, 8.5, 11.5, 15) for side in SIDES)
REACH, OUTSIDE = 60.0, 10.0  # what a multiple of CLEAR and a pixel outside the frame cost, in pixels covered
ALIGN = {1: ("left", "bottom"), 0: ("center", "center"), -1: ("right", "top")}
LEADER = {"arrowstyle": "-", "color": GREY, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4}
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Point:
    """One network.

    Attributes:
        x: seconds or parameters.
        y: accuracy of any kind.
        label: name of the network.
        low: end of the interval of ``y``, or ``y``.
        high: its other end.
        kind: key of ``LOOKS``.
    """

    x: float
    y: float
    label: str
    low: float
    high: float
    kind: str = "ours"


LOOKS = {
    "ours": ({"marker": "o", "color": BLUE}, "measured here, with the 95 % interval of test images"),
    "late": (
        {"marker": ">", "color": BLUE, "markerfacecolor": "white"},
        "not converged in this time, the whole of its budget",
    ),
    "paper": (
        {"marker": "D", "color": VERMILION, "markerfacecolor": "white", "markersize": 5},
        "as the paper reports: accuracy, on other hardware and divided by image",
    ),
}


@_styled
def plot_time_accuracy(rows: Rows, path: Path, *, stamp: str = "") -> None:
    """Draw each network's balanced accuracy over its time to converge.

    Args:
        rows: the rows of a benchmark: arch, convergence_s, total_s, parameters, image, paper.
        path: PNG file to write.
        stamp: warning to print above.
    """
    ours = (
        _ours(row, row["total_s"], "late") if row["convergence_s"] is None else _ours(row, row["convergence_s"])
        for row in rows
    )
    papers = (_papers(row, row["paper"]["convergence_s"]) for row in rows)
    title = f"Time to converge and accuracy ({_num_images(rows)})"
    _draw([*ours, *papers], path, title, "Time to converge (seconds, logarithmic)", stamp)


@_styled
def plot_size_accuracy(rows: Rows, path: Path, *, stamp: str = "") -> None:
    """Draw each network's balanced accuracy over its number of parameters; arguments as above."""
    ours = (_ours(row, row["parameters"], scale=MILLION) for row in rows)
    papers = (_papers(row, row["paper"]["parameters"], scale=MILLION) for row in rows)
    title = f"Size and accuracy ({_num_images(rows)})"
    _draw([*ours, *papers], path, title, "Parameters (millions, logarithmic)", stamp)


def _ours(row: Mapping[str, Any], x: float | None, kind: str = "ours", scale: float = 1.0) -> Point | None:
    figure = row["image"]["balanced_accuracy"]
    y, low, high = (figure[name] for name in ("value", "low", "high"))
    if x is None or y is None:
        return None
    known = is_finite(low) and is_finite(high)
    return Point(x / scale, y, short(row["arch"]), low if known else y, high if known else y, kind)


def _papers(row: Mapping[str, Any], x: float | None, scale: float = 1.0) -> Point | None:
    y = row["paper"]["accuracy"]
    if x is None or y is None:
        return None
    return Point(x / scale, y, f"{short(row['paper']['reported_as'])} (paper)", y, y, "paper")


def _num_images(rows: Rows) -> str:
    return _n(max((row["image"]["n"] or 0 for row in rows), default=0), "test image")


def _draw(found: Iterable[Point | None], path: Path, title: str, xlabel: str, stamp: str) -> None:
    points = [point for point in found if point is not None]
    figure = _figure(8.2, 5.4)
    axes = figure.subplots()
    axes.set_title(title)
    if points:
        ylabel = "Test balanced accuracy" + (" (papers: accuracy)" if _of_kind(points, "paper") else "")
        axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log")
        _draw_points(axes, points)
        figure.legend(loc="outside lower center")
        if stamp:
            figure.suptitle(textwrap.fill(stamp, 62), size=11)  # its room is taken before labels are placed
        _place_labels(figure, axes, points)
    else:
        _explain(axes, "No network has both figures.")
    _write(figure, path, stamp)


def _of_kind(points: Sequence[Point], kind: str) -> list[Point]:
    return [point for point in points if point.kind == kind]


def _draw_points(axes: Axes, points: Sequence[Point]) -> None:
    for kind, (looks, label) in LOOKS.items():
        chosen = _of_kind(points, kind)
        if chosen:
            x, y, low, high = (np.array([getattr(one, name) for one in chosen]) for name in ("x", "y", "low", "high"))
            # High and low by themselves: an interval need not lie around its value.
            axes.vlines(x, low, high, color=looks["color"], linewidth=1.2, alpha=0.6)
            axes.plot(x, y, linestyle="none", **looks, label=label)
    xs, lows, highs = (np.array([getattr(one, name) for one in points]) for name in ("x", "low", "high"))
    axes.set_xlim(xs.min() / MARGIN, xs.max() * MARGIN)
    room = 0.06 * max(highs.max() - lows.min(), 0.1)
    axes.set_ylim(max(lows.min() - room, -0.02), min(highs.max() + room, 1.02))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _place_labels(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Write each point's name near it, where it covers no other point, interval or name as far as there is room."""
    figure.draw_without_rendering()  # settles where everything lies
    frame = axes.get_window_extent()
    taken = [box for point in points for box in _obstacles(axes, point)]
    for point in sorted(points, key=lambda one: one.x):
        text = axes.annotate(point.label, (point.x, point.y), **_looks(point), xytext=(0, 0))
        width, height = text.get_window_extent().size
        text.remove()
        centre = axes.transData.transform((point.x, point.y))
        places = {place: _label_box(centre, width, height, *place, figure.dpi / 72) for place in PLACES}

        def cost(place: tuple[int, int, float], boxes: dict = places) -> float:
            box = boxes[place]
            outside = box.width * box.height - _overlap(box, frame)
            return sum(_overlap(box, other) for other in taken) + OUTSIDE * outside + REACH * place[2]

        horizontal, vertical, distance = best = min(places, key=cost)
        taken.append(places[best])
        text = axes.annotate(
            point.label,
            (point.x, point.y),
            **_looks(point),
            xytext=(CLEAR * distance * horizontal, CLEAR * distance * vertical),
            ha=ALIGN[horizontal][0],
            va=ALIGN[vertical][1],
            arrowprops=LEADER | {"relpos": ((1 - horizontal) / 2, (1 - vertical) / 2)} if distance > 1 else None,
        )
        text.set_in_layout(False)  # nothing may move once it is placed


def _looks(point: Point) -> dict[str, Any]:
    colour = VERMILION if point.kind == "paper" else BLACK
    return {"textcoords": "offset points", "size": SIZE, "color": colour}


def _label_box(
    centre: np.ndarray, width: float, height: float, horizontal: int, vertical: int, distance: float, scale: float
) -> Bbox:
    """Return the box in pixels of a label whose nearest edge or corner lies at a distance from its point."""
    sides = np.array([horizontal, vertical])
    size = np.array([width, height])
    corner = centre + scale * CLEAR * distance * sides + (sides - 1) / 2 * size
    return Bbox([corner, corner + size])


def _obstacles(axes: Axes, point: Point) -> Iterator[Bbox]:
    """Yield the boxes in pixels of a point and of its interval."""
    scale = axes.figure.dpi / 72
    (x, low), (_, y), (_, high) = axes.transData.transform([(point.x, one) for one in (point.low, point.y, point.high)])
    for half_width, bottom, top in ((4 * scale, y - 4 * scale, y + 4 * scale), (scale / 2, low, high)):
        yield Bbox([[x - half_width, bottom], [x + half_width, top]])


def _overlap(first: Bbox, second: Bbox) -> float:
    """Return the area in pixels that two boxes share."""
    shared = Bbox.intersection(first, second)
    return 0.0 if shared is None else shared.width * shared.height
