"""Suspicious pairs of images side by side on one PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from breastcli.data.duplicates import DROPPED, Duplicate
from breastcli.data.images import RejectedImageError, read_rgb
from breastcli.data.perceptual import POSITIONS
from breastcli.files import replacing
from breastcli.reporting.contact_sheet import GREY, VERMILION, _font, _type, short

PAIR_SHEET = "suspicious_pairs.png"
MAX_PAIRS = 24
COLUMNS = 3
THUMB_PX = (180, 132)  # width, height
GAP_PX, MARGIN_PX = 4, 16
CELL_PX = (2 * THUMB_PX[0] + GAP_PX + MARGIN_PX, THUMB_PX[1] + 68)  # with three lines of text


def draw_pairs(duplicates: Sequence[Duplicate], sides: Mapping[str, str], raw: Path, path: Path) -> None:
    """Draw pairs of identical and nearly identical images; without any, no file is there afterwards.

    Pairs on two sides of the split come first, then those with different labels, then the nearest.

    Args:
        duplicates: the pairs.
        sides: image id to split or fold; what is missing was dropped.
        raw: folder that the records' paths start from.
        path: PNG file to write.
    """
    if not duplicates:
        path.unlink(missing_ok=True)
        return

    def grave(pair: Duplicate) -> tuple[bool, bool]:
        """Whether a pair stands on two sides, and whether its labels differ."""
        stands = {sides.get(record.image_id, DROPPED) for record in (pair.first, pair.second)}
        return len(stands - {DROPPED}) > 1, pair.first.label != pair.second.label

    shown = sorted(duplicates, key=lambda pair: (*(not one for one in grave(pair)), pair.distance))[:MAX_PAIRS]
    columns, top = min(COLUMNS, len(shown)), MARGIN_PX + 60
    width = max(columns * CELL_PX[0] + MARGIN_PX, 560)
    sheet = Image.new("RGB", (width, top + math.ceil(len(shown) / columns) * CELL_PX[1]), "white")
    more = f", {len(shown)} of them shown" if len(shown) < len(duplicates) else ""
    heading = f"{len(duplicates)} suspicious pair{'s' if len(duplicates) > 1 else ''}{more}"
    below = "red: on two sides of the split, or with different labels; turns are counterclockwise"
    pen = ImageDraw.Draw(sheet)
    _type(pen, MARGIN_PX, MARGIN_PX, [(heading, _font(20, bold=True)), (below, _font(13))], skip=8)
    for number, pair in enumerate(shown):
        place = (MARGIN_PX + number % columns * CELL_PX[0], top + number // columns * CELL_PX[1])
        _draw_pair(sheet, place, pair, sides, raw, alarm=any(grave(pair)))
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")


def _draw_pair(
    sheet: Image.Image, place: tuple[int, int], pair: Duplicate, sides: Mapping[str, str], raw: Path, *, alarm: bool
) -> None:
    left, top = place
    pen = ImageDraw.Draw(sheet)
    for number, record in enumerate((pair.first, pair.second)):
        sheet.paste(_thumb(raw / record.path), (left + number * (THUMB_PX[0] + GAP_PX), top))
        text = f"{short(record.image_id, 34)} · {sides.get(record.image_id, DROPPED)} · {short(record.label, 14)}"
        pen.text((left, top + THUMB_PX[1] + 4 + 16 * number), text, GREY, _font(11))
    how = "identical pixels" if pair.position is None else f"distance {pair.distance}, {POSITIONS[pair.position]}"
    pen.text((left, top + THUMB_PX[1] + 38), how, VERMILION if alarm else GREY, _font(12, bold=True))


def _thumb(path: Path) -> Image.Image:
    """Return an image in its own proportions on a tile; a file that went away meanwhile is an empty tile."""
    try:
        image = read_rgb(path)
    except (RejectedImageError, OSError):
        return Image.new("RGB", THUMB_PX, GREY)
    return ImageOps.pad(image, THUMB_PX, Image.Resampling.LANCZOS, color="white", centering=(0, 0))
