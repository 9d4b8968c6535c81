"""Dividing images into train, validation and test, or into folds, so that no group is on two sides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from breastcli.config import SPLITS
from breastcli.errors import UserError
from breastcli.records import ImageRecord

RESTART_BUDGET = 20_000  # group placements tried in all; about half a second


def largest_remainder(n: int, ratio: Sequence[int]) -> list[int]:
    """Divide ``n`` into whole parts in the given ratio; ties go to the later part.

    With 6:1:3 this gives the DALAResNet50 paper's totals (Table 6): 1995 is 1197, 199 and 599.
    """
    total = sum(ratio)
    parts = [n * share // total for share in ratio]
    remainders = [(n * share % total, position) for position, share in enumerate(ratio)]
    for _, position in sorted(remainders, reverse=True)[: n - sum(parts)]:
        parts[position] += 1
    return parts


def known_level(records: Sequence[ImageRecord], level: str) -> str:
    """Return the level to group at: ``level``, or "patient" for "exam" where no exam is known.

    Raises:
        UserError: an image has no group at that level.
    """
    if level == "image":
        return level
    if not any(record.exam or record.patient for record in records):
        raise UserError(
            f"--group-by {level}: no patient is known of any of the {len(records):,} images, such as {records[0].path}",
            fix="use --group-by image, whose split is stamped LEAKY",
        )
    if level == "exam" and not any(record.exam for record in records):
        level = "patient"
    group_names(records, level)
    return level


def group_names(records: Sequence[ImageRecord], level: str) -> list[str]:
    """Return the group of each image at ``level`` ("exam", "patient" or "image").

    Raises:
        UserError: an image has no group at that level.
    """
    if level == "image":
        return [record.image_id for record in records]
    names = [getattr(record, level) for record in records]
    if not all(names):
        missing = next(record.path for record, name in zip(records, names, strict=True) if not name)
        raise UserError(f"--group-by {level}: {missing} has no known {level}", fix="use --group-by image")
    return names


def split_records(records: Sequence[ImageRecord], ratio: tuple[int, int, int], level: str, seed: int) -> list[str]:
    """Return "train", "val" or "test" for each image.

    Raises:
        UserError: a class has fewer groups than there are parts.
    """
    return [SPLITS[part] for part in divide(records, ratio, level, seed)]


def fold_records(records: Sequence[ImageRecord], num_folds: int, level: str, seed: int) -> list[int]:
    """Return the fold 0 … K-1 of each image.

    Raises:
        UserError: a class has fewer groups than there are folds.
    """
    return divide(records, (1,) * num_folds, level, seed)


def divide(records: Sequence[ImageRecord], ratio: Sequence[int], level: str, seed: int) -> list[int]:
    """Return the part 0 … P-1 of each image, for P parts in the given ratio; no group is in two parts.

    Raises:
        UserError: a class has fewer groups than there are parts.
    """
    return (_divide_images if level == "image" else _place_groups)(records, ratio, level, seed)


def _divide_images(records: Sequence[ImageRecord], ratio: Sequence[int], level: str, seed: int) -> list[int]:
    """Divide every magnification by itself with exact totals, each class spread evenly over the parts.

    The parts are laid out as evenly as their totals allow along a line on which the images stand sorted by class and
    in random order within a class, so every class gets its share of every part to within about one image.
    """
    _require_groups(records, group_names(records, level), len(ratio), level)
    generator = np.random.default_rng(seed)
    magnifications = np.array([record.magnification or "" for record in records])
    labels = np.array([record.label for record in records])
    parts = np.empty(len(records), dtype=int)
    for magnification in np.unique(magnifications):
        rows = generator.permutation(np.flatnonzero(magnifications == magnification))
        rows = rows[np.argsort(labels[rows], kind="stable")]
        totals = largest_remainder(len(rows), ratio)
        positions = np.concatenate([(np.arange(total) + 0.5) / max(total, 1) for total in totals])
        parts[rows] = np.repeat(np.arange(len(ratio)), totals)[np.argsort(positions, kind="stable")]
    return parts.tolist()


def _place_groups(records: Sequence[ImageRecord], ratio: Sequence[int], level: str, seed: int) -> list[int]:
    """Place whole groups so that every part has its share of every class, as nearly as the groups allow.

    scikit-learn's StratifiedGroupKFold knows only equal parts. This is the same greedy idea (largest group first, to
    where it helps most) for any ratio, restarted from shuffled orders, with the best result improved by single moves.
    """
    groups = group_names(records, level)
    _require_groups(records, groups, len(ratio), level)
    names, member = np.unique(groups, return_inverse=True)
    classes, label = np.unique([record.label for record in records], return_inverse=True)
    counts = np.zeros((len(names), len(classes)))
    np.add.at(counts, (member, label), 1)
    shares = counts / counts.sum(axis=0)  # (G, K) of each class's images
    targets = np.array(ratio, dtype=float)[:, None] / sum(ratio)  # (P, 1)
    generator = np.random.default_rng(seed)
    best, best_loss = None, np.inf
    for _ in range(max(2, RESTART_BUDGET // len(names))):
        placed = _improve(_greedy(shares, targets, generator), shares, targets)
        loss = _loss(_sums(placed, shares, len(targets)), targets)
        if loss < best_loss:
            best, best_loss = placed, loss
    assert best is not None
    _require_every_class(best, counts, classes, level)
    return best[member].tolist()


def _greedy(shares: np.ndarray, targets: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Place groups, roughly the largest first, each where the squared shortfall sinks most."""
    order = np.argsort(-shares.max(axis=1) * generator.uniform(0.5, 1.5, len(shares)))
    sums = np.zeros((len(targets), shares.shape[1]))
    placed = np.empty(len(shares), dtype=int)
    for group in order:
        # (s + g - t)² - (s - t)², weighted so that small parts count as much as large ones
        change = (shares[group] * (2 * (sums - targets) + shares[group]) / targets).sum(axis=1)
        placed[group] = int(change.argmin())
        sums[placed[group]] += shares[group]
    return placed


def _improve(placed: np.ndarray, shares: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Move single groups to another part while that lowers the loss; one pass."""
    sums = _sums(placed, shares, len(targets))
    loss = _loss(sums, targets)
    for group, share in enumerate(shares):
        for part in range(len(targets)):
            moved = sums.copy()
            moved[placed[group]] -= share
            moved[part] += share
            new_loss = _loss(moved, targets)
            if new_loss < loss - 1e-12:
                placed[group], sums, loss = part, moved, new_loss
    return placed


def _sums(placed: np.ndarray, shares: np.ndarray, num_parts: int) -> np.ndarray:
    sums = np.zeros((num_parts, shares.shape[1]))
    np.add.at(sums, placed, shares)
    return sums


def _loss(sums: np.ndarray, targets: np.ndarray) -> float:
    """Return the weighted squared deviation, and a large sum for every class that a part lacks."""
    return float(((sums - targets) ** 2 / targets).sum() + 1000 * (sums < 1e-9).sum())


def _require_groups(records: Sequence[ImageRecord], groups: Sequence[str], num_parts: int, level: str) -> None:
    """Refuse a request that no placement can meet: a class with fewer groups than parts."""
    by_class: dict[str, set[str]] = {}
    for record, group in zip(records, groups, strict=True):
        by_class.setdefault(record.label, set()).add(group)
    if len(by_class) < 2:
        only = next(iter(by_class), "none")
        raise UserError(
            f"the images show one class only ({only})", fix="use more images, or another --task, --mag or --classes"
        )
    label, names = min(by_class.items(), key=lambda item: (len(item[1]), item[0]))
    if len(names) >= num_parts:
        return
    unit = level if len(names) == 1 else f"{level}s"
    problem = (
        f"class {label} has {len(names)} {unit} ({', '.join(sorted(names)[:5])}), but {num_parts} parts need one each"
    )
    raise UserError(problem, fix=_ways_out(records, label, num_parts, level, len(names)))


def _ways_out(records: Sequence[ImageRecord], label: str, num_parts: int, level: str, num_groups: int) -> str:
    """Name the requests that would work instead."""
    ways = []
    if all(record.label == record.subtype for record in records):
        ways.append("--task binary")
    if 3 <= num_groups < num_parts:
        ways.append(f"--folds {num_groups}")
    patients = {record.patient for record in records if record.label == label}
    if level == "exam" and len(patients) >= num_parts:
        ways.append("--group-by patient (slides of one exam may then be on two sides)")
    if level != "image":
        ways.append("--group-by image (leaky: the papers' protocol)")
    return "use " + ", or ".join(ways) if ways else "use more images"


def _require_every_class(placed: np.ndarray, counts: np.ndarray, classes: np.ndarray, level: str) -> None:
    for part in range(int(placed.max()) + 1):
        lacking = classes[counts[placed == part].sum(axis=0) == 0]
        if len(lacking):
            raise UserError(
                f"no placement by {level} gives every part images of {lacking[0]}",
                fix="use another --split, --folds or a coarser --group-by",
            )
