"""Pictures of a GAN: what it draws, how it learnt, and how near its images are to the training images.

Images are shown pixel by pixel as far as they fit, so that nobody takes the smoothness of a thumbnail for quality.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image, ImageDraw, ImageFont, ImageOps

from breastcli.data.images import RejectedImageError, open_image
from breastcli.files import replacing
from breastcli.gan.assessment import Assessment, ImageSet
from breastcli.gan.subject import Subject
from breastcli.gan.training import to_arrays
from breastcli.records import stamp_of
from breastcli.reporting.contact_sheet import BLACK, COLOURS, GREY, Line, _font, _type, _widest
from breastcli.reporting.plots import CHANCE, DASHES, History, _explain, _figure, _n, _styled, _write

SHEET_IMAGES = 16  # of each class, generated and real
LEAST_PX, MOST_PX = 64, 128  # sides of a thumbnail
MARGIN, GAP, NAME = 16, 4, 24  # pixels; NAME is the height of a band's name or a pair's caption
BAND_GAP, PAIR_GAP = 12, 14
PAIRS_PER_ROW = 3
FILM_HOLD = 8  # the last frame stays this many times as long
PANELS = {
    "Losses": ("Loss", {"critic_loss": "critic", "generator_loss": "generator"}),
    "Critic: real minus generated": ("Difference of mean scores", {"critic_gap": "critic gap"}),
    "Penalties": ("Penalty", {"gradient_penalty": "gradient penalty", "r1_penalty": "R1 penalty"}),
    "Diversity of generated images": ("Share of real images'", {"diversity": "diversity"}),
}


def sample_grid(images: Mapping[str, np.ndarray], path: Path, *, title: str, columns: int = 8) -> None:
    """Paste generated images into one PNG, a band with its name above for every condition.

    Images are shown pixel by pixel; those below ``LEAST_PX`` are enlarged without smoothing, those above ``MOST_PX``
    are reduced.

    Args:
        images: condition to (n, H, W, 3) uint8; one that has no image is drawn as "none".
        path: PNG file to write.
        title: heading; its further lines are drawn smaller.
        columns: images per row of a band.
    """
    thumbs = {name: [_thumbnail(pixels) for pixels in band] for name, band in images.items()}
    side = max((max(thumb.size) for band in thumbs.values() for thumb in band), default=LEAST_PX)
    across = min(columns, max([1, *map(len, thumbs.values())]))
    heights = [
        NAME + max(1, math.ceil(len(band) / columns)) * (side + GAP) - GAP + BAND_GAP for band in thumbs.values()
    ]
    names = [f"{name} ({_n(len(band), 'image')})" for name, band in thumbs.items()]
    bold = _font(15, bold=True)
    width = max(across * (side + GAP) - GAP, _widest((name, bold) for name in names))
    sheet, pen, top = _sheet(title.splitlines(), width, sum(heights) - BAND_GAP)
    for name, band, height in zip(names, thumbs.values(), heights, strict=True):
        pen.text((MARGIN, top), name, BLACK, bold)
        for number, thumb in enumerate(band):
            row, column = divmod(number, columns)
            sheet.paste(thumb, (MARGIN + column * (side + GAP), top + NAME + row * (side + GAP)))
        if not band:
            pen.text((MARGIN, top + NAME + side // 2 - 10), "none", GREY, bold)
        top += height
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def write_film(
    files: Sequence[Path], path: Path, *, max_frames: int = 40, frame_ms: int = 200, side_px: int = 640
) -> None:
    """Write an endless GIF of pictures in the order given; of none, nothing.

    Args:
        files: pictures; more than ``max_frames`` are thinned evenly, but the first and the last are always there.
        path: GIF file to write.
        max_frames: at least 2.
        frame_ms: time of a frame in milliseconds; the last one stays ``FILM_HOLD`` times as long.
        side_px: pictures whose longer side is longer than this are reduced to it.
    """
    if not files:
        return
    places = np.linspace(0, len(files) - 1, min(max_frames, len(files))).round().astype(int)
    frames = list(_frames([files[place] for place in places], side_px))
    if not frames:
        return
    first, *others = frames
    durations = [frame_ms] * len(others) + [FILM_HOLD * frame_ms]
    with replacing(path) as temporary:
        first.save(temporary, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)


def _frames(files: Sequence[Path], side_px: int) -> Iterator[Image.Image]:
    """Yield pictures of one size, each with its own palette; a smaller one has white on its right and below.

    A damaged one is left out: the film is for looking at.
    """
    sizes = {}
    for file in files:
        with contextlib.suppress(RejectedImageError), open_image(file) as picture:
            sizes[file] = picture.size
    width, height = (max(lengths) for lengths in zip(*sizes.values(), strict=True)) if sizes else (0, 0)
    for file in sizes:
        frame = Image.new("RGB", (width, height), "white")
        try:
            with open_image(file) as picture:
                frame.paste(picture.convert("RGB"))
        except RejectedImageError:
            continue
        frame.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
        yield frame.quantize(256)


@_styled
def plot_gan_curves(history: History, path: Path, *, collapse_limit: float, stamp: str = "") -> None:
    """Draw losses, the critic's gap, penalties and diversity over the images shown to the critic.

    A column without a number is left out, and so are a penalty that is zero throughout and a panel without columns.

    Args:
        history: rows of kimg (thousands of images) and of the columns in ``PANELS``.
        path: PNG file to write.
        collapse_limit: diversity, as a share of the real images', below which training counts as collapsed.
        stamp: warning to print above.
    """
    panels = [(title, label, _present(history, columns)) for title, (label, columns) in PANELS.items()]
    panels = [panel for panel in panels if panel[2]]
    rows = max(1, math.ceil(len(panels) / 2))
    figure = _figure(9.4, 0.4 + 2.8 * rows)
    grid = figure.add_gridspec(rows, 2)
    for place, (title, label, series) in enumerate(panels):
        row, column = divmod(place, 2)
        alone = place == len(panels) - 1 and column == 0
        axes = figure.add_subplot(grid[row, :] if alone else grid[row, column])
        axes.set(title=title, ylabel=label, xlabel="Images shown to the critic (thousands)")
        _draw_columns(axes, history, series)
        if "critic_gap" in series:
            axes.axhline(0, **CHANCE, label="0: it cannot tell them apart")
        if "diversity" in series:
            axes.axhline(collapse_limit, **CHANCE, label=f"collapse: below {collapse_limit:g}")
            axes.set_ylim(bottom=0)
        if "Penalties" in title and all((values[np.isfinite(values)] > 0).all() for _, values in series.values()):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend(frameon=True, framealpha=0.85, edgecolor="none")
    if not panels:
        _explain(figure.add_subplot(grid[:, :]), "Nothing of the training is recorded yet.")
    _write(figure, path, stamp)


def _present(history: History, columns: Mapping[str, str]) -> dict[str, tuple[str, np.ndarray]]:
    """Return the label and values of each column that has a number, of a penalty other than 0."""
    found = {}
    for column, label in columns.items():
        values = np.array([row.get(column, np.nan) for row in history], dtype=float)
        unused = column.endswith("_penalty") & (values == 0)
        if (np.isfinite(values) & ~unused).any():
            found[column] = (label, values)
    return found


def _draw_columns(axes: Axes, history: History, series: Mapping[str, tuple[str, np.ndarray]]) -> None:
    kimg = np.array([row["kimg"] for row in history], dtype=float)
    marker = "o" if len(history) <= 30 else ""
    for index, (label, values) in enumerate(series.values()):
        known = np.isfinite(values)  # a penalty that is not taken at every step must still give a line
        looks = {"color": COLOURS[index], "linestyle": DASHES[index], "marker": marker, "markersize": 3.5}
        axes.plot(kimg[known], values[known], **looks, label=label)


def neighbour_sheet(
    generated: np.ndarray, neighbours: np.ndarray, captions: Sequence[str], path: Path, *, title: str
) -> None:
    """Paste generated images into one PNG, each beside the training image that is nearest to it.

    Args:
        generated: (n, H, W, 3) uint8, in the order in which they are to be shown: the closest first.
        neighbours: (n, H, W, 3) uint8, the training images.
        captions: n texts such as "benign · 3.21"; what does not fit below a pair is cut.
        path: PNG file to write.
        title: heading; its further lines are drawn smaller, and a line that says which is which follows.
    """
    pairs = [[_thumbnail(pixels, enlarge=True) for pixels in pair] for pair in zip(generated, neighbours, strict=True)]
    side = max((max(thumb.size) for pair in pairs for thumb in pair), default=MOST_PX)
    pair_px, row_px, plain = 2 * side + 2, side + NAME + GAP, _font(13)
    rows = max(1, math.ceil(len(pairs) / PAIRS_PER_ROW))
    across = min(PAIRS_PER_ROW, max(1, len(pairs)))
    lines = [*title.splitlines(), "left: generated, right: the training image nearest to it"]
    sheet, pen, top = _sheet(lines, across * (pair_px + PAIR_GAP) - PAIR_GAP, rows * row_px - GAP)
    for number, (pair, caption) in enumerate(zip(pairs, captions, strict=True)):
        left, upper = MARGIN + number % PAIRS_PER_ROW * (pair_px + PAIR_GAP), top + number // PAIRS_PER_ROW * row_px
        for place, thumb in enumerate(pair):
            sheet.paste(thumb, (left + place * (side + 2), upper))
        pen.text((left, upper + side + 3), _cut(caption, plain, pair_px), GREY, plain)
    if not pairs:
        pen.text((MARGIN, top), "none", GREY, plain)
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


@_styled
def plot_distances(series: Mapping[str, np.ndarray], path: Path, *, threshold: float, stamp: str = "") -> None:
    """Draw how many images are at most so far from the nearest training image.

    Args:
        series: name such as "generated to training" to (n,) distances; what is not a number is left out.
        path: PNG file to write.
        threshold: distance below which an image counts as a possible copy.
        stamp: warning to print above.
    """
    figure = _figure(7.2, 4.6)
    axes = figure.subplots()
    axes.set(
        title="Distance to the nearest training image", xlabel="Distance", ylabel="Share of images", ylim=(0, 1.02)
    )
    for index, (name, distances) in enumerate(series.items()):
        distances = np.asarray(distances, dtype=float)
        distances = distances[np.isfinite(distances)]
        if len(distances):
            below = f", {100 * np.mean(distances < threshold):.1f} % below" if np.isfinite(threshold) else ""
            looks = {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}
            axes.ecdf(distances, **looks, label=f"{name} (n = {len(distances):,}{below})")
    if not axes.lines:
        _explain(axes, "There are no distances to draw.")
    elif np.isfinite(threshold):
        axes.axvline(threshold, **CHANCE, label=f"possible copy: below {threshold:.3g}")
        left, right = axes.get_xlim()
        axes.axvspan(left, threshold, color=GREY, alpha=0.12, linewidth=0)
        axes.set_xlim(left, right)
    if axes.lines:
        figure.legend(loc="outside lower center")
    _write(figure, path, stamp)


def draw_assessment(
    out: Path, subject: Subject, training: ImageSet, found: Assessment, document: dict[str, Any]
) -> None:
    """Write the pictures of an assessment: samples beside real images, closest pairs, distances.

    Args:
        out: folder to write into.
        subject: the generated images.
        training: the images that they were learned from.
        found: what the assessment found.
        document: the contents of its ``assessment.json``.
    """
    card = document["dataset"]
    stamp = stamp_of(card["leaky"], card["drawn"])
    classes = [row["class"] for row in document["classes"]]
    bands = {}
    for name, label in zip(classes, np.unique(subject.images.labels), strict=True):
        for kind, one in (("generated", subject.images), ("training", training)):
            bands[f"{name}, {kind}"] = to_arrays(one.images[np.flatnonzero(one.labels == label)[:SHEET_IMAGES]])
    title = f"Generated and real images\n{document['generated']['source']} {stamp}"
    sample_grid(bands, out / "samples.png", title=title)
    pairs = np.array(found.closest)
    captions = [f"{one['class']} · {one['distance']:.2f}" for one in document["neighbours"]["closest"]]
    title = f"Generated images and their nearest training images\n{stamp}".strip()
    generated, real = to_arrays(subject.images.images[pairs[:, 0]]), to_arrays(training.images[pairs[:, 1]])
    neighbour_sheet(generated, real, captions, out / "neighbours.png", title=title)
    plot_distances(found.distances, out / "distances.png", threshold=found.threshold, stamp=stamp)


def _thumbnail(pixels: np.ndarray, *, enlarge: bool = False) -> Image.Image:
    """Return an image that fits ``MOST_PX``; a small one is enlarged, by whole factors as far as there is room."""
    image = Image.fromarray(pixels)
    longest = max(image.size)
    if longest > MOST_PX:
        return ImageOps.contain(image, (MOST_PX, MOST_PX), Image.Resampling.LANCZOS)
    scale = max(MOST_PX // longest if enlarge else 1, LEAST_PX / longest)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.NEAREST)


def _sheet(lines: Sequence[str], width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    """Return a white sheet with a heading, its pen, and where ``width`` by ``height`` free pixels begin."""
    heading: list[Line] = [(line, _font(13) if number else _font(22, bold=True)) for number, line in enumerate(lines)]
    top = MARGIN + 20 * len(heading) + 20
    sheet = Image.new("RGB", (max(width, _widest(heading)) + 2 * MARGIN, top + height + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    _type(pen, MARGIN, MARGIN, heading, skip=10)
    return sheet, pen, top


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return a text of one line that is at most ``width`` pixels wide."""
    text = " ".join(text.split())
    shown = text
    while shown and font.getlength(shown) > width:
        text = text[:-1]
        shown = f"{text}…"
    return shown
