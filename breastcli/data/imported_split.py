"""Splits that others published: which images stand on which side, read from their list."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from breastcli.config import SPLITS, PrepareConfig
from breastcli.data.datasets import Rejection
from breastcli.data.lists import ImageList, read_list
from breastcli.data.splits import divide
from breastcli.errors import UsageError, UserError
from breastcli.records import ImageRecord

HEADINGS = {
    "split": ("split", "grp", "set", "subset", "partition", "phase"),
    "fold": ("fold", "fold_id"),
    "magnification": ("mag", "magnification"),
}
# The official lists of BreakHis: file, magnification, number of the fold, side; also seen without the number.
HEADLESS = (
    ("image", "split"),
    ("image", "magnification", "split"),
    ("image", "magnification", "fold", "split"),
)
WORDS = {
    **dict.fromkeys(("train", "training", "tr"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "ts"), "test"),
}
NOT_LISTED = "not in the split list"


@dataclass(frozen=True)
class ImportedSplit:
    """A published split.

    Attributes:
        listed: its lines.
        fold: which of several splits of the file was taken, or None.
        num_folds: the number of cross-validation folds that the list gives, or None where it gives one split.
        digest: SHA-256 of the file.
    """

    listed: ImageList
    fold: str | None
    num_folds: int | None
    digest: str

    def place(self, records: Sequence[ImageRecord]) -> tuple[dict[str, str], list[Rejection]]:
        """Return the side of each listed image by its path ("train", "val", "test" or the fold), and the others.

        Raises:
            UserError: the list names none of the images, or names one twice.
        """
        sides, others = {}, []
        for record, row in zip(records, self.listed.match(records), strict=True):
            if row is None:
                others.append(Rejection(record.path, NOT_LISTED))
            else:
                sides[record.path] = row["split"]
        if not sides:
            raise UserError(
                f"{self.listed.path} names none of the {len(records):,} images",
                fix=f"compare its first line ({self.listed.rows[0]['image']}) with {records[0].path}",
            )
        return sides, others

    def describe(self, sides: dict[str, str]) -> str:
        """Return a line on what was imported."""
        counts = Counter(sides.values())
        names = sorted(counts, key=lambda name: SPLITS.index(name) if name in SPLITS else -1)
        found = ", ".join(f"{counts[name]:,} {name}" if name in SPLITS else f"{counts[name]:,}" for name in names)
        fold = f", fold {self.fold}" if self.fold else ""
        folds = f" in {self.num_folds} folds" if self.num_folds else ""
        missing = len(self.listed.rows) - len(sides)
        text = f"split imported from {self.listed.path.name}{fold}: {found} images{folds}"
        if not self.num_folds and not counts["val"]:
            text += "; validation images are drawn from its training images"
        return f"{text}; {missing:,} of its lines name no image that is prepared" if missing else text

    def to_json(self) -> dict[str, Any]:
        """Return what the data set's card keeps of it."""
        return {"file": self.listed.path.name, "fold": self.fold, "sha256": self.digest}


def read_split(config: PrepareConfig) -> ImportedSplit | None:
    """Read the list of ``--import-split``; None where there is none.

    Raises:
        UsageError: options that do not go with it.
        UserError: the file is no list of a split.
    """
    if config.import_split is None:
        if config.import_fold is not None:
            raise UsageError("--import-fold: there is no --import-split", fix="give one, or leave it out")
        return None
    if config.folds is not None:
        raise UsageError("--folds: the split is imported", fix="leave one of them out")
    path = Path(config.import_split)
    listed = read_list(path, HEADINGS, HEADLESS)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if "split" not in listed.columns:
        return _folds(listed, config, digest)
    found = sorted({row.get("fold", "") for row in listed.rows})
    if config.import_fold is None and len(found) > 1:
        raise UsageError(f"{path} holds {len(found)} splits", fix=f"choose one with --import-fold {'|'.join(found)}")
    fold = found[0] if config.import_fold is None else str(config.import_fold)
    if fold not in found:
        known = ", ".join(filter(None, found))
        raise UsageError(
            f"--import-fold {fold}: {path} has no such fold", fix=f"use {known}" if known else "leave it out"
        )
    rows = [_with_side(row, path) for row in listed.rows if row.get("fold", "") == fold]
    present = {row["split"] for row in rows}
    for needed in ("train", "test"):
        if needed not in present:
            raise UserError(f"{path} has no {needed} images", fix="give a list of training and test images")
    return ImportedSplit(ImageList(path, ("image", "split"), rows), fold or None, None, digest)


def _folds(listed: ImageList, config: PrepareConfig, digest: str) -> ImportedSplit:
    """Return the cross-validation of a list that has a number for each image and no sides."""
    if "fold" not in listed.columns:
        raise UserError(f"{listed.path} has no column of splits", fix="head it split (train, val, test) or fold")
    if config.import_fold is not None:
        fix = "leave --import-fold out, and give train and evaluate --fold"
        raise UsageError(f"--import-fold: {listed.path} divides the images into folds", fix=fix)
    names = sorted({row["fold"] for row in listed.rows}, key=lambda name: (len(name), name))
    if len(names) < 3:
        raise UserError(f"{listed.path} has {len(names)} folds", fix="three or more are needed: test, val and train")
    rows = [{"image": row["image"], "split": str(names.index(row["fold"]))} for row in listed.rows]
    return ImportedSplit(ImageList(listed.path, ("image", "split"), rows), None, len(names), digest)


def _with_side(row: dict[str, str], path: Path) -> dict[str, str]:
    side = WORDS.get(row["split"].casefold())
    if side is None:
        raise UserError(f"{path}: {row['image']} stands on {row['split']!r}", fix="use train, val or test")
    return {"image": row["image"], "split": side}


def fill_validation(
    records: Sequence[ImageRecord], sides: list[str], ratio: tuple[int, int, int], level: str, seed: int
) -> list[str]:
    """Return the sides with some of the training groups moved to validation, where the list has no validation images.

    Published lists often have training and test images only; the best epoch must not be chosen on test images.

    Args:
        records: N images.
        sides: (N,) "train", "val" or "test".
        ratio: train to val is kept; the test part is the list's.
        level: what never crosses from training to validation.
        seed: of the choice.

    Raises:
        UserError: a class has too few training groups.
    """
    if "val" in sides:
        return sides
    rows = [place for place, side in enumerate(sides) if side == "train"]
    parts = divide([records[row] for row in rows], ratio[:2], level, seed)
    filled = list(sides)
    for row, part in zip(rows, parts, strict=True):
        filled[row] = SPLITS[part]
    return filled
