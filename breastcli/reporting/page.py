"""A page that is one file: rendered from a template, and kept below a size that mail and phones take."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image, UnidentifiedImageError

MAX_BYTES = 9_900_000  # of a page
MAX_SIDE_PX = 1800  # of a picture: twice what a page shows side by side
MIN_SIDE_PX = 240  # below it a picture is left out, and its description stands in its place
# Quotation marks in text are escaped, so nothing but an attribute looks like this.
PICTURE = re.compile(r'(?<=src=")data:image/png;base64,[A-Za-z0-9+/=]*(?=")')
LEFT_OUT = "data:,"


def render_page(template: str, values: Mapping[str, Any]) -> str:
    """Render a template into self-contained HTML below ``MAX_BYTES``.

    Pictures with a side above ``MAX_SIDE_PX`` are scaled down to it. Where the page would still be too large, the
    largest pictures are scaled down until it is not: no picture may then take more bytes than a share that is the same
    for all.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(values)
    sources = PICTURE.findall(page)
    fitted = iter(fit_pictures(sources, MAX_BYTES - len(page.encode()) + sum(map(len, sources))))
    return PICTURE.sub(lambda _: next(fitted), page)


def fit_pictures(sources: Sequence[str], budget: int) -> list[str]:
    """Return data URIs of PNGs whose lengths add up to at most ``budget``; those that are small enough stay."""
    sources = [_shrink(source, len(source)) for source in sources]
    share = _fair_share([len(source) for source in sources], budget)
    return [source if len(source) <= share else _shrink(source, share) for source in sources]


def _fair_share(sizes: Sequence[int], budget: int) -> float:
    """Return the largest size that each may have so that all together keep to the budget."""
    left = max(budget, 0)
    for number, size in enumerate(sorted(sizes)):
        if size * (len(sizes) - number) > left:
            return left / (len(sizes) - number)
        left -= size
    return math.inf


def _shrink(source: str, limit: float) -> str:
    """Return the picture at most ``MAX_SIDE_PX`` wide and high and at most ``limit`` long."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as opened:
            longest = max(opened.size)
            if longest <= MAX_SIDE_PX and len(source) <= limit:
                return source
            image = opened.convert("RGBA" if "A" in opened.mode or "transparency" in opened.info else "RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return source if len(source) <= limit else LEFT_OUT
    side, found = min(MAX_SIDE_PX, longest), source
    while side >= MIN_SIDE_PX:
        smaller = image.copy()
        smaller.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        smaller.save(buffer, format="PNG")
        found = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        if len(found) <= limit:
            return found
        side = int(side * min(0.95, max(0.5, 0.98 * math.sqrt(limit / len(found)))))
    return LEFT_OUT
