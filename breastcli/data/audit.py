"""The audit of a prepared data set: duplicates, label conflicts, groups that cross splits, odd images, colours."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from breastcli.data.counts import count_groups, count_shared
from breastcli.data.duplicates import DROPPED, Duplicate
from breastcli.data.measures import Measures
from breastcli.data.outliers import HELD_OUT, Drift, Outlier, colour_drift, find_outliers
from breastcli.data.perceptual import POSITIONS
from breastcli.records import ImageRecord

LEAKY = "LEAKY: image-level split"
UNKNOWN = f"{LEAKY}, patients unknown, so leakage cannot be excluded"


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
class Inspection:
    """What looking at the pixels gave.

    Attributes:
        measures: one for each row.
        duplicates: pairs of images, those that were dropped included.
        num_dropped: images left out as duplicates.
    """

    measures: Sequence[Measures]
    duplicates: Sequence[Duplicate]
    num_dropped: int


@dataclass(frozen=True)
class NearDuplicate:
    """Two images that show the same in other pixels.

    Attributes:
        images: their ids.
        distance: bits in which their hashes differ, of 255.
        likeness: correlation of their details, at most 1.
        position: how the second shows the first; turns are counterclockwise.
        sides: where they stand: a split, a fold or "dropped".
        labels: their labels.
    """

    images: tuple[str, str]
    distance: int
    likeness: float
    position: str
    sides: tuple[str, str]
    labels: tuple[str, str]

    @property
    def crosses(self) -> bool:
        """Whether the two stand on two sides."""
        return len(set(self.sides)) > 1 and DROPPED not in self.sides

    @property
    def conflicts(self) -> bool:
        """Whether the two carry different labels."""
        return len(set(self.labels)) > 1


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
        shared_exams: exams of several patients (in BreakHis: slides) to those.
        shared_with_training: held-out images whose coarsest group also has training images; None where none is known.
        num_held_out: number of validation and test images, or all images where there are folds.
        shared_by_class: images of each held-out side and class, and those whose group is elsewhere (``count_shared``).
        sizes: "WxH" of the files to their number.
        near_duplicates: pairs of images that show the same in other pixels; None where nobody looked.
        num_dropped: images left out because another shows the same.
        num_not_compared: images that show too little for a comparison; None where nobody counted.
        outliers: blank, blurred and odd-sized images.
        drift: how far the colours of each held-out side are from training.
        counts: images per class, magnification and coarsest group.
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
    shared_by_class: list[dict[str, Any]] = field(default_factory=list)
    shared_exams: dict[str, list[str]] = field(default_factory=dict)
    near_duplicates: list[NearDuplicate] | None = None
    num_dropped: int = 0
    num_not_compared: int | None = None
    outliers: list[Outlier] = field(default_factory=list)
    drift: list[Drift] = field(default_factory=list)
    counts: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Audit:
        """Read what ``to_json`` gave, in this version or an older one."""
        known = {one.name: values[one.name] for one in fields(cls) if one.name in values}
        if known.get("near_duplicates") is not None:
            pairs = (
                {name: tuple(one[name]) for name in ("images", "sides", "labels")} for one in known["near_duplicates"]
            )
            known["near_duplicates"] = [
                NearDuplicate(**(one | pair)) for one, pair in zip(known["near_duplicates"], pairs, strict=True)
            ]
        kinds = {"outliers": Outlier, "drift": Drift}
        return cls(**known | {name: [kind(**one) for one in known.get(name, [])] for name, kind in kinds.items()})

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
        found += [f"identical pixels on two sides: {', '.join(ids)}" for ids in self.identical_across_splits]
        return found + [
            f"near-duplicates on two sides: {', '.join(pair.images)} (distance {pair.distance}, {pair.position})"
            for pair in self.near_across_splits
        ]

    @property
    def first_leak(self) -> str:
        """The first of ``leaks``, of which there must be one, and how many more there are."""
        first, *others = self.leaks
        return f"{first} and {len(others)} more" if others else first

    @property
    def near_across_splits(self) -> list[NearDuplicate]:
        """Near-duplicates that stand on two sides."""
        return [pair for pair in self.near_duplicates or () if pair.crosses]

    @property
    def near_conflicts(self) -> list[NearDuplicate]:
        """Near-duplicates that carry different labels."""
        return [pair for pair in self.near_duplicates or () if pair.conflicts]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-safe dictionary with the verdict."""
        return {
            "verdict": "leak" if self.leaks else self.stamp or "clean",
            "leaks": self.leaks,
            **asdict(self),
            "near_duplicates_across_splits": [pair.images for pair in self.near_across_splits],
            "near_duplicates_with_two_labels": [pair.images for pair in self.near_conflicts],
        }

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
        return lines + self._warnings_of_pixels()

    def _warnings_of_pixels(self) -> list[str]:
        lines = []
        if self.num_dropped:
            lines.append(f"images left out because others are identical or nearly so: {self.num_dropped}")
        elif self.near_duplicates:
            sides, labels = len(self.near_across_splits), len(self.near_conflicts)
            lines.append(
                f"nearly identical pairs of images: {len(self.near_duplicates)}, of them {sides} on two sides of the "
                f"split and {labels} with different labels"
            )
        if self.num_not_compared:
            images = "1 image shows" if self.num_not_compared == 1 else f"{self.num_not_compared} images show"
            lines.append(f"{images} too little contrast to be compared with others")
        odd = (("blank", "nearly blank"), ("blurred", "probably blurred"), ("size", "not of the usual size"))
        for finding, text in odd:
            names = [one.image for one in self.outliers if one.finding == finding]
            if names:
                more = ", …" if len(names) > 3 else ""
                lines.append(f"images {text}: {len(names)} ({', '.join(names[:3])}{more})")
        unit = self.coarsest or "image"
        return lines + [
            f"colours of {one.name} differ from training by {abs(one.shift):.1f} standard deviations between {unit}s "
            f"({one.channel})"
            for one in self.drift
            if one.notable
        ]


def audit(rows: Sequence[PreparedRecord], level: str, inspection: Inspection | None = None) -> Audit:
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
        shared_by_class=count_shared(rows, coarsest) if coarsest else [],
        shared_exams=_shared_exams(rows),
        counts=count_groups(rows, coarsest),
        **(_inspected(rows, coarsest, inspection) if inspection else {}),
    )


def _inspected(rows: Sequence[PreparedRecord], coarsest: str, inspection: Inspection) -> dict[str, Any]:
    """Return the fields of an audit that come from pixels."""
    sides = {row.record.image_id: row.side for row in rows}
    groups = [getattr(row.record, coarsest or "image_id") for row in rows]
    return {
        "near_duplicates": [
            NearDuplicate(
                (pair.first.image_id, pair.second.image_id),
                pair.distance,
                round(pair.likeness, 3),
                POSITIONS[pair.position],
                (sides.get(pair.first.image_id, DROPPED), sides.get(pair.second.image_id, DROPPED)),
                (pair.first.label, pair.second.label),
            )
            for pair in inspection.duplicates
            if pair.position is not None
        ],
        "num_dropped": inspection.num_dropped,
        "num_not_compared": sum(not one.perceptual_hash for one in inspection.measures),
        "outliers": find_outliers(
            [row.record.image_id for row in rows],
            [row.record.magnification or "" for row in rows],
            [f"{row.width_px}x{row.height_px}" for row in rows],
            inspection.measures,
        ),
        "drift": colour_drift(
            [row.side for row in rows], groups, np.array([one.density for one in inspection.measures])
        ),
    }


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


def _shared_exams(rows: Sequence[PreparedRecord]) -> dict[str, list[str]]:
    patients: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        patients[row.record.exam].add(row.record.patient)
    return {exam: sorted(found) for exam, found in sorted(patients.items()) if exam and len(found) > 1}


def _grouped(rows: Iterable[PreparedRecord], key: Callable[[PreparedRecord], str]) -> list[list[PreparedRecord]]:
    groups: dict[str, list[PreparedRecord]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return list(groups.values())


def _ids(rows: Sequence[PreparedRecord]) -> list[str]:
    return [row.record.image_id for row in rows]
