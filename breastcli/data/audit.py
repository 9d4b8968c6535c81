"""The first audit of a prepared data set: duplicates, label conflicts and groups that cross splits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from breastcli.records import ImageRecord

LEAKY = "LEAKY: image-level split"
UNKNOWN = f"{LEAKY}, patients unknown, so leakage cannot be excluded"
HELD_OUT = ("val", "test")


@dataclass(frozen=True)
class PreparedRecord:
    """One row of a prepared folder's manifest.

    Attributes:
        record: what the data set's adapter knew.
        split: "train", "val" or "test", or "" where the data set has folds.
        fold: fold number, or None where it has one split.
        width_px: width of the file before resizing.
        height_px: height of the file before resizing.
        pixel_hash: SHA-256 of the full-size pixels.
        stain_fallback: whether stain normalisation left this image as it was.
    """

    record: ImageRecord
    split: str
    fold: int | None
    width_px: int
    height_px: int
    pixel_hash: str
    stain_fallback: bool = False

    @property
    def side(self) -> str:
        """The split, or the fold as text."""
        return self.split if self.fold is None else str(self.fold)


@dataclass(frozen=True)
class Audit:
    """What the audit found.

    Attributes:
        level: the grouping of the split ("exam", "patient" or "image").
        coarsest: the coarsest group that is known ("exam" or "patient"), or "" where none is.
        identical_images: groups of image ids with identical pixels.
        identical_across_splits: those of them that stand on two sides of a split.
        label_conflicts: image ids with identical pixels and different labels.
        groups_with_two_labels: level to {group: labels}, for patients and exams filed under several labels or subtypes.
        crossing: level to the groups whose images stand on two sides.
        shared_with_training: held-out images whose coarsest group also has training images; None where none is known.
        num_held_out: number of validation and test images, or all images where there are folds.
        sizes: "WxH" of the files to their number.
    """

    level: str
    coarsest: str
    identical_images: list[list[str]]
    identical_across_splits: list[list[str]]
    label_conflicts: list[list[str]]
    groups_with_two_labels: dict[str, dict[str, list[str]]]
    crossing: dict[str, list[str]]
    shared_with_training: int | None
    num_held_out: int
    sizes: dict[str, int]

    @property
    def stamp(self) -> str | None:
        """The mark that every artefact of an image-level split carries, else None."""
        if self.level != "image":
            return None
        return LEAKY if self.coarsest else UNKNOWN

    @property
    def leaks(self) -> list[str]:
        """What breaks the promise of a group split, one line each; empty where none was asked for or nothing does."""
        if self.level == "image":
            return []
        found = [f"{self.level} {name} is on two sides of the split" for name in self.crossing.get(self.level, [])]
        return found + [f"identical pixels on two sides: {', '.join(ids)}" for ids in self.identical_across_splits]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-safe dictionary with the verdict."""
        return {"verdict": "leak" if self.leaks else self.stamp or "clean", "leaks": self.leaks, **asdict(self)}

    def warnings(self) -> list[str]:
        """Return one line for each thing a user should know."""
        lines = []
        if self.stamp == UNKNOWN:
            lines.append(f"{UNKNOWN}; any of {self.num_held_out} held-out images may share a patient with training")
        elif self.stamp:
            group = "an exam" if self.coarsest == "exam" else "a patient"
            lines.append(
                f"{LEAKY}; {self.shared_with_training} of {self.num_held_out} held-out images share {group} "
                "with training"
            )
        elif self.shared_with_training:
            exams = len(self.crossing["exam"])
            lines.append(
                f"{exams} exams are on two sides of this {self.level}-level split: {self.shared_with_training} of "
                f"{self.num_held_out} held-out images share an exam with training"
            )
        if self.identical_across_splits:
            lines.append(f"{len(self.identical_across_splits)} sets of identical images are on two sides of the split")
        if self.label_conflicts:
            lines.append(f"{len(self.label_conflicts)} sets of identical images carry different labels")
        for name, labels in self.groups_with_two_labels.get("patient", {}).items():
            # Where exams are known, what the literature calls a patient is a slide.
            lines.append(
                f"{'slide' if self.coarsest == 'exam' else 'patient'} {name} is filed under {' and '.join(labels)}"
            )
        return lines


def audit(rows: Sequence[PreparedRecord], level: str) -> Audit:
    """Audit the rows of a prepared data set whose split was made at ``level``."""
    identical = [group for group in _grouped(rows, lambda row: row.pixel_hash) if len(group) > 1]
    sizes = _grouped(rows, lambda row: f"{row.width_px}x{row.height_px}")
    levels = ("patient", "exam")
    coarsest = next((name for name in reversed(levels) if any(getattr(row.record, name) for row in rows)), "")
    held_out, shared = _shared_with_training(rows, coarsest or "patient")
    return Audit(
        level=level,
        coarsest=coarsest,
        identical_images=[_ids(group) for group in identical],
        identical_across_splits=[_ids(group) for group in identical if len({row.side for row in group}) > 1],
        label_conflicts=[_ids(group) for group in identical if len({row.record.label for row in group}) > 1],
        groups_with_two_labels={name: _two_labels(rows, name) for name in levels},
        crossing={name: _crossing(rows, name) for name in levels},
        shared_with_training=shared if coarsest else None,
        num_held_out=held_out,
        sizes={f"{group[0].width_px}x{group[0].height_px}": len(group) for group in sizes},
    )


def _shared_with_training(rows: Sequence[PreparedRecord], level: str) -> tuple[int, int]:
    """Return the number of held-out images and of those whose group has training images.

    With folds every image is held out once; its group is shared where it also has images in another fold.
    """
    sides: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        sides[getattr(row.record, level)].add(row.side)
    held_out = [row for row in rows if row.fold is not None or row.split in HELD_OUT]
    shared = [
        row
        for row in held_out
        if getattr(row.record, level) and ("train" in sides[getattr(row.record, level)] or row.fold is not None)
        if len(sides[getattr(row.record, level)]) > 1
    ]
    return len(held_out), len(shared)


def _crossing(rows: Sequence[PreparedRecord], level: str) -> list[str]:
    groups = _grouped((row for row in rows if getattr(row.record, level)), lambda row: getattr(row.record, level))
    return sorted(getattr(group[0].record, level) for group in groups if len({row.side for row in group}) > 1)


def _two_labels(rows: Sequence[PreparedRecord], level: str) -> dict[str, list[str]]:
    labels: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        labels[getattr(row.record, level)].add(row.record.subtype or row.record.label)
    return {name: sorted(found) for name, found in sorted(labels.items()) if name and len(found) > 1}


def _grouped(rows: Iterable[PreparedRecord], key: Callable[[PreparedRecord], str]) -> list[list[PreparedRecord]]:
    groups: dict[str, list[PreparedRecord]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return list(groups.values())


def _ids(rows: Sequence[PreparedRecord]) -> list[str]:
    return [row.record.image_id for row in rows]
