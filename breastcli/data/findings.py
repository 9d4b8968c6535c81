"""What an audit found, in words: one line for each kind of finding."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from breastcli.config import SPLITS
from breastcli.data.audit import Audit
from breastcli.data.checking import AUDIT
from breastcli.errors import UserError
from breastcli.files import read_json

MAX_NAMES = 10


def describe_findings(audit: Audit) -> dict[str, str]:
    """Return kind of finding to how many there are, with names where they help; the notes name what matters."""
    found = {}
    sides, labels = len(audit.identical_across_splits), len(audit.label_conflicts)
    found["identical images"] = _and_worse(len(audit.identical_images), "set", sides, labels)
    if audit.near_duplicates is None:
        found["near-duplicates"] = "not looked for: prepared by an older breastcli"
    else:
        sides, labels = len(audit.near_across_splits), len(audit.near_conflicts)
        blind = f"; images not compared: {audit.num_not_compared}" if audit.num_not_compared else ""
        found["near-duplicates"] = _and_worse(len(audit.near_duplicates), "pair", sides, labels) + blind
    if audit.shared_exams:
        found["exams of several patient ids"] = f"{len(audit.shared_exams)} ({_first(list(audit.shared_exams))})"
    for level, names in audit.crossing.items():
        if names:
            found[f"{level}s on two sides"] = f"{len(names)} ({_first(names)})"
    for side in dict.fromkeys(row["side"] for row in audit.shared_by_class):
        rows = [row for row in audit.shared_by_class if row["side"] == side]
        if any(row["shared"] for row in rows):
            name = side if side in SPLITS else f"fold {side}"
            found[f"{name}: {audit.coarsest} also on other sides"] = _shares(rows)
    odd = Counter(one.finding for one in audit.outliers)
    found["odd images"] = f"{odd['blank']} blank, {odd['blurred']} blurred, {odd['size']} of another size"
    unit = f"SD between {audit.coarsest or 'image'}s"
    for one in audit.drift:
        found[f"colour of {one.name}"] = f"{one.shift:+.1f} {unit} ({one.channel}; ±{one.by_chance:.1f} by chance)"
    return found


def read_findings(folder: Path) -> dict[str, Any] | None:
    """Return the verdict on a prepared folder and its findings; None where it has no audit that can be read."""
    try:
        values = read_json(folder / AUDIT)
        return {"verdict": values["verdict"], "findings": describe_findings(Audit.from_json(values))}
    except (UserError, KeyError, TypeError, AttributeError):
        return None  # none is there, or one of another version


def _and_worse(count: int, unit: str, sides: int, labels: int) -> str:
    unit = unit if count == 1 else f"{unit}s"
    return f"{count} {unit}, {sides} on two sides, {labels} with two labels" if count else "none"


def _shares(rows: list[dict[str, Any]]) -> str:
    """Return "27 % of 120 images (benign 50 % of 24, malignant 21 % of 96)"."""
    shared, images = sum(row["shared"] for row in rows), sum(row["images"] for row in rows)
    classes = ", ".join(f"{row['class']} {row['shared'] / row['images']:.0%} of {row['images']:,}" for row in rows)
    return f"{shared / images:.0%} of {images:,} images ({classes})"


def _first(names: list[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + (", …" if len(names) > MAX_NAMES else "")
