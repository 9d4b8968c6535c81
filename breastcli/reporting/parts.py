"""What the sections of a report are made of: tables, pictures, and figures with intervals as text."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from breastcli.data.audit import LEAKY
from breastcli.metrics.classification import METRICS
from breastcli.records import stamp_of

NOTHING = "–"
PNG_END = b"IEND\xaeB`\x82"


@dataclass(frozen=True)
class Cell:
    """One cell of a table: what it says, the interval printed smaller after it, and how it stands out.

    ``tone`` is "best", "leaky" (a figure), "stamp" (the words that say so) or "".
    """

    text: str
    interval: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Table:
    """A table with row heads.

    Attributes:
        caption: what it shows, with n where all rows share it.
        columns: column heads, the one over the row heads first.
        rows: head and cells of each row.
        links: head of a row to where it leads.
    """

    caption: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    links: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """A PNG inside the page.

    Attributes:
        title: what stands below it.
        alt: what it shows, for readers who do not see it.
        source: data URI.
        wide: whether it has a row of its own.
    """

    title: str
    alt: str
    source: str
    wide: bool = False


def read_picture(path: Path, title: str, alt: str, *, wide: bool = False) -> Picture | None:
    """Return a PNG as a data URI, or None where there is no such file, or only a part of it.

    A link is none of ours, and would put into the page whatever it leads to.
    """
    linked = path.is_symlink() or path.parent.is_symlink()
    content = path.read_bytes() if path.is_file() and not linked else b""
    if not content.endswith(PNG_END):
        return None
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return Picture(title, f"{title}: {alt}.", source, wide)


def leak_stamp(card: Mapping[str, Any]) -> str | None:
    """Return the warning of a data set card (in its ``split`` part) or of an evaluation (at its top)."""
    split = card.get("split") if isinstance(card.get("split"), dict) else {}
    stamp = card.get("leaky") or split.get("leaky")
    level = card.get("split_level") or split.get("level")
    return (stamp if isinstance(stamp, str) else LEAKY) if stamp or level == "image" else None


def stamp_on_tables(dataset: Mapping[str, Any]) -> str:
    """Return what an evaluation's or explanation's data says beside every table, or ""; older ones say less."""
    return stamp_of(leak_stamp(dataset), drawn=False, synthetic=bool(dataset.get("synthetic")))


def part(values: Any, *keys: str) -> Mapping[str, Any]:
    """Return the mapping that lies under ``keys``, empty where there is none."""
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values if isinstance(values, Mapping) else {}


def is_finite(value: Any) -> bool:
    """Return whether it is a number, and neither NaN nor infinite."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def is_known(figure: Mapping[str, float | None] | None) -> bool:
    """Return whether a figure of ``value``, ``low`` and ``high`` has its value."""
    return bool(figure) and is_finite(figure.get("value"))


def figure_cell(figure: Mapping[str, float | None] | None) -> Cell:
    """Return "0.853" and "(0.801–0.899)"; a dash stands for what is not known."""
    if not is_known(figure):
        return Cell(NOTHING)
    low, high = figure.get("low"), figure.get("high")
    if not (is_finite(low) and is_finite(high)):
        return Cell(number(figure["value"]), f"({NOTHING})")
    between = " to " if low < 0 else "–"  # a dash beside a minus sign cannot be read
    return Cell(number(figure["value"]), f"({number(low)}{between}{number(high)})")


def number(value: Any) -> str:
    """Return three decimals with a real minus sign, or a dash."""
    return f"{value:.3f}".replace("-", "−") if is_finite(value) else NOTHING


def title_of(name: str) -> str:
    """Return what a figure, or a column of a history, is called."""
    known = {"lr": "Learning rate", "kimg": "Thousand images", "n": "n"}
    known |= {key: metric.title for key, metric in METRICS.items()}
    for prefix, words in (("val_", "Validation "), ("train_", "Training ")):
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            title = known.get(rest, rest.replace("_", " "))
            return words + (title if title[:2].isupper() else title[:1].lower() + title[1:])
    return known.get(name) or name.replace("_", " ").capitalize()


def whole_number(value: Any) -> str:
    """Return a count with its thousands apart, or a dash."""
    return f"{value:,}" if is_finite(value) else NOTHING
