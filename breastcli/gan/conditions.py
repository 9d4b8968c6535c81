"""What an image is asked for by: its class, its subtype, or its class at a magnification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from breastcli.data.store import PreparedData
from breastcli.errors import UsageError, UserError


@dataclass(frozen=True)
class Condition:
    """One kind of image.

    Attributes:
        name: what ``--label`` calls it.
        label: class under the prepared task.
        subtype: finer class, or "" where the condition does not fix it.
        magnification: such as "100X", or None where the condition does not fix it.
        num_images: training images of this kind.
    """

    name: str
    label: str
    subtype: str
    magnification: str | None
    num_images: int


def find_conditions(data: PreparedData, rows: np.ndarray, kind: str) -> tuple[list[Condition], np.ndarray]:
    """Return the conditions that rows of a data set have, in alphabetical order, and each row's own.

    Args:
        data: prepared folder.
        rows: (n,) row numbers.
        kind: "class", "subtype" or "class+magnification".

    Returns:
        K conditions; (n,) int64 indices into them.

    Raises:
        UserError: the data set does not know the subtype or magnification of some image.
    """
    keys = []
    for row in rows:
        record = data.rows[row].record
        subtype = record.subtype if kind == "subtype" else ""
        magnification = record.magnification if kind == "class+magnification" else None
        if (kind == "subtype" and not subtype) or (kind == "class+magnification" and not magnification):
            lacking = kind.removeprefix("class+")
            fix = "use --condition class"
            raise UserError(f"--condition {kind}: {data.folder} does not know the {lacking} of {record.image_id}", fix)
        keys.append(
            (subtype or " ".join(filter(None, (record.label, magnification))), record.label, subtype, magnification)
        )
    found = sorted(set(keys), key=lambda key: key[0])
    if len({name for name, *_ in found}) < len(found):
        raise UserError(f"{data.folder} files one subtype under two classes", fix="use --condition class")
    place = {key: number for number, key in enumerate(found)}
    members = np.array([place[key] for key in keys], dtype=np.int64)
    counts = np.bincount(members, minlength=len(found))
    return [Condition(*key, int(count)) for key, count in zip(found, counts, strict=True)], members


def keep_rows(data: PreparedData, rows: np.ndarray, kept: Sequence[str]) -> np.ndarray:
    """Return those of the rows (n,) that are of some classes or subtypes; a name that is both means the subtype.

    Args:
        data: prepared folder.
        rows: (n,) row numbers.
        kept: names; none for all.
    """
    classes = set(kept) - {row.record.subtype for row in data.rows}
    records = [data.rows[row].record for row in rows]
    return rows[[not kept or one.subtype in kept or one.label in classes for one in records]]


def choose_numbers(
    text: str, num: int | None, conditions: Sequence[Condition], class_counts: Mapping[str, int]
) -> dict[int, int]:
    """Return how many images to draw of which condition.

    A class stands for its conditions, in the shares that they have among its training images.

    Args:
        text: "minority", "all", or names of classes and conditions, separated by commas.
        num: images of each name; None for as many as bring its class to the largest one's number.
        conditions: what the generator knows.
        class_counts: training images of each class of the data set, also of those that the generator does not know.

    Raises:
        UsageError: an unknown name, or nothing to draw.
    """
    labels = [label for label in class_counts if any(one.label == label for one in conditions)]
    largest = max(class_counts.values())
    if text == "minority":
        names = [label for label in labels if class_counts[label] < largest]
        if not names:
            raise UsageError("--label minority: the generator knows no minority class", fix="name a class, or use all")
    else:
        names = labels if text == "all" else list(dict.fromkeys(name.strip() for name in text.split(",")))
    chosen: dict[int, int] = {}
    for name in names:
        members = [number for number, one in enumerate(conditions) if name in (one.label, one.name)]
        if not members:
            known = ", ".join(dict.fromkeys([*labels, *(one.name for one in conditions)]))
            raise UsageError(
                f"--label {name}: not known to this generator", fix=f"use minority, all or some of {known}"
            )
        wanted = largest - class_counts[conditions[members[0]].label] if num is None else num
        shares = np.array([conditions[number].num_images for number in members])
        for number, count in zip(members, _apportion(wanted, shares), strict=True):
            chosen[number] = chosen.get(number, 0) + count
    chosen = {number: count for number, count in chosen.items() if count}
    if not chosen:
        raise UsageError(f"--label {text}: no class needs more images to be balanced", fix="give --num")
    return chosen


def _apportion(total: int, shares: np.ndarray) -> list[int]:
    """Divide a number in given shares, the largest remainders rounded up."""
    exact = total * shares / shares.sum()
    counts = np.floor(exact).astype(int)
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: total - counts.sum()]] += 1
    return counts.tolist()
