"""How many images, groups and relatives there are of every class on every side of a split."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from breastcli.data.outliers import HELD_OUT

if TYPE_CHECKING:
    from breastcli.data.audit import PreparedRecord


def count_groups(rows: Sequence[PreparedRecord], coarsest: str) -> list[dict[str, Any]]:
    """Return the number of images of every class, magnification and group (None where unknown)."""
    found = Counter(
        (row.record.label, row.record.magnification or "", getattr(row.record, coarsest) if coarsest else "")
        for row in rows
    )
    return [
        {"class": label, "magnification": magnification or None, "group": group or None, "images": count}
        for (label, magnification, group), count in sorted(found.items())
    ]


def counts_by_side(rows: Sequence[PreparedRecord]) -> list[dict[str, Any]]:
    """Return the number of images, exams and patients of every class on every side; None where a group is unknown."""
    images = Counter((row.side, row.record.label) for row in rows)

    def groups(level: str) -> Counter[tuple[str, str]]:
        found = {(row.side, row.record.label, getattr(row.record, level)) for row in rows}
        return Counter((side, label) for side, label, name in found if name)

    exams, patients = groups("exam"), groups("patient")
    counts = []
    for (side, label), count in sorted(images.items()):
        known = {"exams": exams[side, label] or None, "patients": patients[side, label] or None}
        counts.append({"side": side, "class": label, "images": count, **known})
    return counts


def count_shared(rows: Sequence[PreparedRecord], level: str) -> list[dict[str, Any]]:
    """Return the images of each class on each held-out side, and how many of them have relatives elsewhere.

    Elsewhere is where the network learns or is chosen: training, for test images also validation, and any other fold.

    Args:
        rows: of a prepared data set.
        level: the group that relatives share ("exam" or "patient").
    """
    seen = {"val": {"train"}, "test": {"train", "val"}}
    sides: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        sides[getattr(row.record, level)].add(row.side)
    images: Counter[tuple[str, str]] = Counter()
    shared: Counter[tuple[str, str]] = Counter()
    for row in rows:
        if row.fold is None and row.split not in HELD_OUT:
            continue
        group, key = getattr(row.record, level), (row.side, row.record.label)
        elsewhere = sides[group] - {row.side} if row.fold is not None else sides[group] & seen[row.split]
        images[key] += 1
        shared[key] += bool(group and elsewhere)
    return [
        {"side": side, "class": label, "images": count, "shared": shared[side, label]}
        for (side, label), count in sorted(images.items())
    ]
