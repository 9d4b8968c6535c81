"""Sample images of every split and class on one PNG, and the colours that all pictures share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from breastcli.config import SPLITS
from breastcli.files import replacing

# Okabe and Ito's palette without its yellow, which is too faint for a line on white.
BLUE, VERMILION, SKY, BLACK = "#0072B2", "#D55E00", "#56B4E9", "#000000"
COLOURS = (BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", SKY, BLACK)
GREY = "#5F6B76"
Line = tuple[str, ImageFont.FreeTypeFont]


def contact_sheet(
    cells: Mapping[tuple[str, str], np.ndarray],
    path: Path,
    *,
    title: str,
    thumb_px: int = 112,
    captions: Mapping[tuple[str, str], str] | None = None,
) -> None:
    """Paste sample images of every split and class into one PNG, one row per split and class.

    Args:
        cells: (split, class) to (n, H, W, 3) uint8; a pair that is absent or has no image is drawn as "none".
        path: PNG file to write.
        title: heading; its further lines are drawn smaller.
        thumb_px: side of a thumbnail in pixels.
        captions: (split, class) to a second line under the row's name, such as "312 images, 9 exams".
    """
    captions = captions or {}
    found = list(dict.fromkeys(split for split, _ in cells))
    splits = [split for split in SPLITS if split in found] + [split for split in found if split not in SPLITS]
    rows = [(split, name) for split in splits for name in dict.fromkeys(name for _, name in cells)]
    bold, plain = _font(15, bold=True), _font(13)
    heading = [(line, plain if number else _font(22, bold=True)) for number, line in enumerate(title.splitlines())]
    names = {row: [(" · ".join(map(short, row)), bold), (captions.get(row, ""), plain)] for row in rows}
    margin, gap, indent = 16, 6, 30
    top = margin + 20 + 20 * len(heading)
    left = indent + margin + _widest(line for lines in names.values() for line in lines)
    row_px, num_columns = max(thumb_px, 44) + gap, max([1, *map(len, cells.values())])
    width = max(left + num_columns * (thumb_px + gap) - gap, margin + _widest(heading)) + margin
    sheet = Image.new("RGB", (width, top + len(rows) * row_px - gap + margin), "white")
    pen = ImageDraw.Draw(sheet)
    _type(pen, margin, margin, heading, skip=10)
    for row in rows:
        pen.rectangle((margin, top, margin + 5, top + row_px - gap - 1), COLOURS[splits.index(row[0]) % len(COLOURS)])
        _type(pen, indent, top + (row_px - gap) // 2 - 20, names[row])
        for column, pixels in enumerate(cells.get(row, ())):
            thumb = ImageOps.pad(Image.fromarray(pixels), (thumb_px, thumb_px), Image.Resampling.LANCZOS, color="white")
            sheet.paste(thumb, (left + column * (thumb_px + gap), top))
        if len(cells.get(row, ())) == 0:
            pen.text((left, top + (row_px - gap) // 2 - 10), "none", GREY, bold)
        top += row_px
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def short(text: str, limit: int = 26) -> str:
    """Return a name that fits a label; the middle is what a long one can spare."""
    text = " ".join(str(text).split())
    return text if len(text) <= limit else f"{text[: limit // 2 - 1]}…{text[-limit // 2 :]}"


def _type(pen: ImageDraw.ImageDraw, left: int, top: int, lines: Sequence[Line], skip: int = 0) -> None:
    """Write lines 20 pixels apart, with ``skip`` more after the first, which is black; the others are grey."""
    for number, (text, font) in enumerate(lines):
        pen.text((left, top + number * 20 + bool(number) * skip), text, GREY if number else BLACK, font)


def _font(size_px: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return the font that matplotlib brings along, so that the sheet looks the same everywhere."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size_px)


def _widest(lines: Iterable[Line]) -> int:
    return max((math.ceil(font.getlength(text)) for text, font in lines), default=0)
