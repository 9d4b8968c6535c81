"""Pictures of saliency maps: one image under several methods, a sheet of many images, figures of the methods.

Maps are laid over the image in the upper, lighter part of inferno, and the image beneath is greyed and darkened: strong
values are the brightest, so that nobody needs to see hues. Weak values let the tissue through.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patheffects import Normal, Stroke

from breastcli.reporting.contact_sheet import BLACK, BLUE, GREY, short
from breastcli.reporting.explanation_section import is_baseline, row_title, rows_of
from breastcli.reporting.parts import is_finite, is_known, part
from breastcli.reporting.plots import CHANCE, RED, _explain, _figure, _n, _styled, _write

SHEET_DPI = 110
HEAT, FAINTEST = colormaps["inferno"], 0.35  # below it inferno is darker than the tissue
MOST_OPAQUE = 0.85  # at the strongest value, so that tissue stays visible below it
LUMA = 0.55 * np.array((0.299, 0.587, 0.114))  # ITU-R BT.601, darkened
MARKED = ("#FFFFFF", "-")
TRUTH = ("#00E5FF", (0, (4, 1.2)))  # cyan lies opposite to both haematoxylin-eosin and inferno
MAX_TILES = 24
METHOD, BASELINE = {"color": BLUE, "marker": "o"}, {"color": GREY, "marker": "s"}
TEXT = 9
MARGIN, GAP, BAR, LINE = 0.15, 0.1, 0.72, 0.17  # inches; BAR is the colour bar with its labels
OVERLAP = {"iou": "IoU", "dice": "Dice", "average_precision": "Average precision"}
AREAS = {"deletion_auc": "Deletion AUC, lower is better", "insertion_auc": "Insertion AUC, higher is better"}


@dataclass(frozen=True)
class Overlay:
    """One method's explanation of an image.

    Attributes:
        title: name of the method.
        saliency: (S, S) float32 in [0, 1].
        mask: (S, S) bool, the map after binarisation.
        inside_mask: show the map inside the mask only, as DT Grad-CAM does.
    """

    title: str
    saliency: np.ndarray
    mask: np.ndarray | None
    inside_mask: bool = False


class _Sheet:
    """A figure that is laid out in inches from its upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=SHEET_DPI, facecolor="white")
        FigureCanvasAgg(self.figure)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        box = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(box)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set(xticks=[], yticks=[])
        return axes

    def write(self, lines: Sequence[str], left: float, top: float, *, ha: str = "left", **looks: Any) -> None:
        looks = {"size": TEXT} | looks
        for number, line in enumerate(lines):
            height = 1 - (top + number * LINE) / self.height
            self.figure.text(left / self.width, height, line, ha=ha, va="top", **looks)

    def colour_bar(self, left: float, top: float, height: float) -> None:
        """Draw the colours as they look over pale tissue."""
        axes = self.axes(left + 0.12, top, 0.13, height)
        strength = np.linspace(0, 1, 256, dtype=np.float32)[:, None]
        axes.imshow(blend(np.full((256, 1, 3), 225, np.uint8), strength), aspect="auto", origin="lower")
        axes.set_yticks([0, 127.5, 255], ["0", "0.5", "1"], size=8)
        axes.set_ylabel("Saliency", size=8, labelpad=2)
        axes.yaxis.tick_right()
        axes.yaxis.set_label_position("right")
        axes.tick_params(length=2, pad=2)


@_styled
def plot_panel(
    file: Path,
    image: np.ndarray,
    overlays: Sequence[Overlay],
    truth: np.ndarray | None,
    caption: str,
    *,
    stamp: str | None,
) -> None:
    """Draw an image, and beside it each method's map over the greyed image with the outline of its mask.

    Below each map lies its mask in black and white, with the share of the image that it covers.

    Args:
        file: PNG file to write.
        image: (S, S, 3) uint8.
        overlays: the methods, one column each.
        truth: (S, S) bool, the region to be found; its outline is drawn everywhere.
        caption: text below; what does not fit into three lines is cut.
        stamp: warning to print above.
    """
    tile, columns = (2.2 if len(overlays) <= 3 else 1.75), 1 + len(overlays)
    width = 2 * MARGIN + columns * (tile + GAP) - GAP + BAR
    titles = [_fit(title, tile, size=9.5, weight="bold") for title in ("Image", *(one.title for one in overlays))]
    warning, below = _fit(stamp or "", width - 2 * MARGIN, 4, weight="bold"), _fit(caption, width - 2 * MARGIN, 3)
    has_masks = any(overlay.mask is not None for overlay in overlays)
    drawn = has_masks or truth is not None
    heads = MARGIN + LINE * len(warning)
    first = heads + LINE * max(map(len, titles)) + 0.04
    second = first + tile + GAP
    legend = second + drawn * (0.5 * tile + LINE + 0.08)
    sheet = _Sheet(width, legend + drawn * (LINE + 0.06) + LINE * len(below) + MARGIN - 0.03)
    sheet.write(warning, MARGIN, MARGIN - 0.03, color=RED, weight="bold")
    for number, overlay in enumerate([None, *overlays]):
        left = MARGIN + number * (tile + GAP)
        sheet.write(titles[number], left + tile / 2, heads, ha="center", size=9.5, weight="bold")
        _draw_tile(sheet.axes(left, first, tile, tile), image, overlay, truth)
        _draw_mask(sheet, left + tile / 4, second, tile / 2, overlay, truth)
    sheet.colour_bar(width - MARGIN - BAR, first, tile)
    _draw_legend(sheet, legend, marked=has_masks, truth=truth is not None)
    sheet.write(below, MARGIN, legend + drawn * (LINE + 0.06))
    _write(sheet.figure, file, "")


@_styled
def plot_gallery(
    file: Path,
    images: np.ndarray,
    saliency: np.ndarray,
    masks: np.ndarray | None,
    truths: Sequence[np.ndarray | None],
    captions: Sequence[str],
    title: str,
    *,
    stamp: str | None,
) -> None:
    """Draw images beside their maps by one method, up to ``MAX_TILES``; the title says when some are left out.

    Args:
        file: PNG file to write.
        images: (n, S, S, 3) uint8.
        saliency: (n, S, S) float32 in [0, 1].
        masks: (n, S, S) bool, outlined.
        truths: n times (S, S) bool or None, outlined.
        captions: n texts; what does not fit into two lines is cut.
        title: heading.
        stamp: warning to print above.
    """
    count, side = min(len(images), MAX_TILES), 1.4
    columns = min(4, max(2, math.ceil(math.sqrt(count / 2))))
    width = 2 * MARGIN + columns * (2 * side + 2 * GAP) - 2 * GAP + BAR
    below = [_fit(caption, 2 * side, size=8) for caption in captions[:count]]
    row = side + LINE * max(map(len, below), default=1) + GAP + 0.05
    left_out = f" (the first {count} of {len(images):,} images)" if count < len(images) else ""
    warning = _fit(stamp or "", width - 2 * MARGIN, 4, weight="bold")
    heading = _fit(title + left_out, width - 2 * MARGIN, size=11, weight="bold")
    legend = MARGIN + LINE * (len(warning) + len(heading)) + 0.06
    outlined = (masks is not None, any(truth is not None for truth in truths[:count]))
    top = legend + any(outlined) * (LINE + 0.06)
    sheet = _Sheet(width, top + max(1, math.ceil(count / columns)) * row + MARGIN - GAP)
    sheet.write(warning, MARGIN, MARGIN - 0.03, color=RED, weight="bold")
    sheet.write(heading, MARGIN, MARGIN + LINE * len(warning), size=11, weight="bold")
    _draw_legend(sheet, legend, marked=outlined[0], truth=outlined[1])
    for number in range(count):
        left, upper = MARGIN + number % columns * (2 * side + 2 * GAP), top + number // columns * row
        overlay = Overlay("", saliency[number], None if masks is None else masks[number])
        _draw_tile(sheet.axes(left, upper, side, side), images[number], None, None)
        beside = sheet.axes(left + side, upper, side, side)
        _draw_tile(beside, images[number], overlay, truths[number], thinner=0.7)
        sheet.write(below[number], left, upper + side + 0.04, size=8)
    if count:
        sheet.colour_bar(width - MARGIN - BAR, top, side)
    else:
        _explain(sheet.axes(MARGIN, top, width - 2 * MARGIN, row - GAP), "No image was explained.")
    _write(sheet.figure, file, "")


@_styled
def plot_comparison(file: Path, document: Mapping[str, Any], *, stamp: str | None) -> None:
    """Draw every method's and every baseline's figures as dots with their 95 % intervals.

    Writes nothing where the document has neither localisation nor faithfulness.

    Args:
        file: PNG file to write.
        document: contents of ``explain.json``.
        stamp: warning to print above.
    """
    localisation, faithfulness = rows_of(document, "localisation"), rows_of(document, "faithfulness")
    overlap = {name: part(document, "localisation", "methods", name, "mean") for name in localisation}
    areas = {name: part(document, "faithfulness", "methods", name) for name in faithfulness}
    n = part(document, "localisation").get("n")
    rows = [row for row in ((OVERLAP, overlap, n), (AREAS, areas, document.get("n"))) if row[1]]
    if not rows:
        return
    heights = [0.9 + 0.27 * max(3, len(figures)) for _, figures, _ in rows]
    figure = _figure(10.4, 0.6 + sum(heights))
    grid = figure.add_gridspec(len(rows), 6, height_ratios=heights)
    for row, (columns, figures, n) in enumerate(rows):
        width, first = 6 // len(columns), None
        for place, (metric, title) in enumerate(columns.items()):
            axes = figure.add_subplot(grid[row, place * width : (place + 1) * width], sharey=first)
            shown = {name: part(values, metric) for name, values in figures.items()}
            _draw_dots(axes, document, shown, best=min if metric == "deletion_auc" else max)
            axes.tick_params(labelleft=first is None)
            axes.set_title(f"{title} ({_n(n, 'image')})" if first is None and isinstance(n, int) else title)
            first = first or axes
    figure.legend(handles=_keys(rows, document), loc="outside lower center", ncols=3)
    _write(figure, file, stamp or "")


def blend(image: np.ndarray, saliency: np.ndarray, shown: np.ndarray | None = None) -> np.ndarray:
    """Lay a map over a greyed image; the stronger, the more opaque.

    Args:
        image: (H, W, 3) uint8.
        saliency: (H, W) in [0, 1]; what is not a number counts as 0.
        shown: (H, W) bool, where the map is shown; None for everywhere.

    Returns:
        (H, W, 3) uint8.
    """
    strength = np.clip(np.nan_to_num(saliency, nan=0.0), 0, 1)
    grey = (image @ LUMA)[..., None]
    opacity = MOST_OPAQUE * strength[..., None] * (1 if shown is None else shown[..., None])
    colours = 255 * HEAT(FAINTEST + (1 - FAINTEST) * strength)[..., :3]
    return np.rint((1 - opacity) * grey + opacity * colours).astype(np.uint8)


def _draw_tile(
    axes: Axes, image: np.ndarray, overlay: Overlay | None, truth: np.ndarray | None, *, thinner: float = 1
) -> None:
    mask = None if overlay is None else overlay.mask
    if overlay is not None:
        image = blend(image, overlay.saliency, mask if overlay.inside_mask else None)
    axes.imshow(image)
    limits = {"xlim": axes.get_xlim(), "ylim": axes.get_ylim()}
    for region, (colour, dashes) in ((mask, MARKED), (truth, TRUTH)):
        if region is not None and region.any():
            # The frame closes outlines at the border; without it, one could not tell the inside from the outside.
            framed, at = np.pad(region, 1).astype(float), np.arange(-1, len(region) + 1)
            axes.contour(at, at, framed, levels=[0.5], colors=BLACK, linewidths=1.8 * thinner, alpha=0.7)
            axes.contour(at, at, framed, levels=[0.5], colors=colour, linewidths=1.1 * thinner, linestyles=[dashes])
    axes.set(**limits)


def _draw_mask(
    sheet: _Sheet, left: float, top: float, side: float, overlay: Overlay | None, truth: np.ndarray | None
) -> None:
    region = truth if overlay is None else overlay.mask
    if region is None:
        return
    axes = sheet.axes(left, top, side, side)
    axes.imshow(region, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.spines[:].set(visible=True, color=GREY, linewidth=0.8)
    words = f"{'truth' if overlay is None else 'mask'}: {100 * region.mean():.1f} %"
    words += " (map inside)" if overlay is not None and overlay.inside_mask else " of the image"
    sheet.write([words], left + side / 2, top + side + 0.05, ha="center", size=8)


def _draw_legend(sheet: _Sheet, top: float, *, marked: bool, truth: bool) -> None:
    lines = []
    for drawn, words, (colour, dashes) in (
        (marked, "outline of the method's mask", MARKED),
        (truth, "outline of the ground truth", TRUTH),
    ):
        if drawn:
            around = [Stroke(linewidth=3.2, foreground=BLACK), Normal()]
            lines.append(Line2D([], [], color=colour, linestyle=dashes, label=words, path_effects=around))
    if lines:
        at = (MARGIN / sheet.width, 1 - top / sheet.height)
        looks = {"loc": "upper left", "borderpad": 0, "borderaxespad": 0, "fontsize": 8, "handlelength": 2.6}
        sheet.figure.legend(handles=lines, bbox_to_anchor=at, ncols=2, **looks)


def _draw_dots(
    axes: Axes, document: Mapping[str, Any], figures: Mapping[str, Mapping[str, Any]], best: Callable[..., float]
) -> None:
    """Draw one row per method, and the baselines below them in grey with the best one as a line."""
    baselines = [name for name in figures if is_baseline(document, name)]
    for row, (name, known) in enumerate(figures.items()):
        looks = BASELINE if name in baselines else METHOD
        if not is_known(known):
            place = axes.get_yaxis_transform()
            axes.text(0.03, row, "no figure", transform=place, va="center", size=8, color=looks["color"])
            continue
        if is_finite(known.get("low")) and is_finite(known.get("high")):
            axes.plot([known["low"], known["high"]], [row, row], solid_capstyle="butt", color=looks["color"])
        axes.plot(known["value"], row, markersize=6, **looks)
    values = [figures[name]["value"] for name in baselines if is_known(figures[name])]
    if values:
        axes.axvline(best(values), **CHANCE, zorder=1)
    if 0 < len(baselines) < len(figures):
        axes.axhline(len(figures) - len(baselines) - 0.5, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(figures)), [short(row_title(document, name), 30) for name in figures])
    axes.set(ylim=(len(figures) - 0.4, -0.6), xlim=(-0.02, 1.02))
    axes.grid(axis="y", visible=False)


def _keys(rows: Sequence[tuple[Any, Mapping[str, Any], Any]], document: Mapping[str, Any]) -> list[Line2D]:
    """Return what the legend explains."""
    baselines = {is_baseline(document, name) for _, figures, _ in rows for name in figures}
    keys = [Line2D([], [], **METHOD, label="method, with its 95 % interval")] if False in baselines else []
    if True in baselines:
        keys.append(Line2D([], [], **BASELINE, label="baseline, with its 95 % interval"))
        keys.append(Line2D([], [], **CHANCE, label="the best baseline"))
    return keys


@cache
def _renderer() -> RendererAgg:
    return RendererAgg(1, 1, SHEET_DPI)


def _fit(text: str, width: float, max_lines: int = 2, *, size: float = TEXT, weight: str = "normal") -> list[str]:
    """Return the lines of a text that is at most ``width`` inches wide; what does not fit is cut."""
    text, font = " ".join(text.split()), FontProperties(size=size, weight=weight)
    for length in range(max(8, int(16 * width)), 0, -1):
        lines = textwrap.wrap(text, length, max_lines=max_lines, placeholder="…")
        widths = [_renderer().get_text_width_height_descent(line, font, ismath=False)[0] for line in lines]
        if max(widths, default=0) <= width * SHEET_DPI:
            return lines
    return ["…"]
