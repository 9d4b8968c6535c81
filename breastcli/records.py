"""The values that travel between jobs: image records, predictions, intervals and scores (numpy only)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from breastcli.errors import UserError
from breastcli.files import read_csv, write_csv

PROBABILITY_PREFIX = "prob_"
DRAWN = "drawn by a program, not real tissue"
TRAINED_WITH_SYNTHETIC = "trained with synthetic images"


@dataclass(frozen=True)
class ImageRecord:
    """What a data set's adapter knows about one image.

    Attributes:
        image_id: unique within the data set; stable across machines.
        path: relative to the raw folder, POSIX separators.
        label: class name under the prepared task.
        subtype: finer class name, or "" where the data set has none.
        patient: slide or patient identifier (the literature's "patient"), or "" where unknown.
        exam: identifier of the examination the slide came from, or "" where unknown.
        magnification: such as "100X", or None where the data set has none.
    """

    image_id: str
    path: str
    label: str
    subtype: str = ""
    patient: str = ""
    exam: str = ""
    magnification: str | None = None


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval; ``low`` and ``high`` are NaN where none can be given."""

    value: float
    low: float = float("nan")
    high: float = float("nan")

    def to_json(self) -> dict[str, float | None]:
        """Return a JSON-safe dictionary (NaN becomes null)."""
        return {name: _finite_or_none(getattr(self, name)) for name in ("value", "low", "high")}


@dataclass(frozen=True)
class Scores:
    """Figures of one group of predictions.

    Attributes:
        level: "image" or "patient".
        n: number of images or patients that the figures were computed from.
        num_groups: number of groups that the bootstrap resampled (0 where no bootstrap was made).
        overall: metric name to figure.
        per_class: class name to {metric name: figure}.
        confusion: (K, K) counts, rows true class, columns predicted class.
        classes: K class names in the order of ``confusion``.
        notes: conventions and warnings to print beside the figures.
    """

    level: Literal["image", "patient"]
    n: int
    num_groups: int
    overall: dict[str, Interval]
    per_class: dict[str, dict[str, Interval]]
    confusion: np.ndarray
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-safe dictionary."""
        return {
            "level": self.level,
            "n": self.n,
            "num_groups": self.num_groups,
            "overall": {name: figure.to_json() for name, figure in self.overall.items()},
            "per_class": {
                name: {metric: figure.to_json() for metric, figure in figures.items()}
                for name, figures in self.per_class.items()
            },
            "classes": list(self.classes),
            "confusion": self.confusion.tolist(),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of N images, with what is known about the images.

    Attributes:
        image_ids: (N,) names.
        classes: K class names; column k of ``probs`` belongs to ``classes[k]``.
        probs: (N, K) float64, rows sum to 1.
        predicted: (N,) int64 class index chosen (after any decision threshold).
        labels: (N,) int64 true class index, or None where unknown.
        columns: further (N,) string columns: path, patient, exam, magnification, subtype, and with two classes the
            threshold that the last class's probability had to reach.
    """

    image_ids: np.ndarray
    classes: tuple[str, ...]
    probs: np.ndarray
    predicted: np.ndarray
    labels: np.ndarray | None = None
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.image_ids)

    def column(self, name: str) -> np.ndarray:
        """Return the (N,) column ``name``, or empty strings where the predictions have none."""
        return self.columns.get(name, np.full(len(self), "", dtype=object))

    def groups(self) -> np.ndarray:
        """Return the (N,) coarsest known group of each image: exam, else patient, else the image itself."""
        exam, patient = self.column("exam"), self.column("patient")
        named = zip(exam, patient, self.image_ids, strict=True)
        return np.array([e or p or i for e, p, i in named], dtype=object)

    def select(self, rows: np.ndarray) -> Predictions:
        """Return the predictions of ``rows`` (indices or a boolean mask)."""
        return Predictions(
            image_ids=self.image_ids[rows],
            classes=self.classes,
            probs=self.probs[rows],
            predicted=self.predicted[rows],
            labels=None if self.labels is None else self.labels[rows],
            columns={name: values[rows] for name, values in self.columns.items()},
        )

    def by_patient(self, rule: Literal["mean", "vote"]) -> Predictions:
        """Merge the images of each patient into one prediction.

        "mean" averages the probabilities; "vote" takes the share of the patient's images predicted as each class. Of
        two classes the last is chosen where its result reaches the images' threshold ("mean", 0.5 where none is
        known) or half of the votes ("vote"), so that a tie is called malignant; of more the largest, the first of
        equals. A patient whose images carry two labels (BreakHis slide 13412 under eight classes) counts once per
        label.

        Raises:
            UserError: an image's patient is unknown.
        """
        patients = self.column("patient")
        if not all(patients):
            raise UserError("patient-level figures need a patient for every image", fix="use image-level figures")
        labels = self.labels if self.labels is not None else np.zeros(len(self), dtype=np.int64)
        keys = np.array([f"{patient}\x00{label}" for patient, label in zip(patients, labels, strict=True)])
        _, first, member = np.unique(keys, return_index=True, return_inverse=True)
        values = self.probs if rule == "mean" else np.eye(len(self.classes))[self.predicted]
        num_images = np.bincount(member, minlength=len(first))
        merged = np.stack([np.bincount(member, column, len(first)) / num_images for column in values.T], axis=1)
        predicted = merged.argmax(axis=1)
        if len(self.classes) == 2:
            given = self.columns.get("threshold") if rule == "mean" else None
            thresholds = np.full(len(self), 0.5) if given is None else given.astype(float)
            predicted = (merged[:, 1] >= np.bincount(member, thresholds, len(first)) / num_images).astype(np.int64)
        return Predictions(
            image_ids=patients[first],
            classes=self.classes,
            probs=merged,
            predicted=predicted,
            labels=None if self.labels is None else labels[first],
            columns={name: self.column(name)[first] for name in ("patient", "exam", "subtype") if name in self.columns},
        )

    def to_csv(self, path: Path) -> None:
        """Write one row per image in one step; probabilities keep all their digits."""
        names = ["image_id", *self.columns, *([] if self.labels is None else ["label"]), "predicted"]
        write_csv(
            path, [*names, *(PROBABILITY_PREFIX + name for name in self.classes)], map(self._cells, range(len(self)))
        )

    def _cells(self, row: int) -> list[Any]:
        known = [self.image_ids[row], *(values[row] for values in self.columns.values())]
        if self.labels is not None:
            known.append(self.classes[self.labels[row]])
        return [*known, self.classes[self.predicted[row]], *map(repr, self.probs[row].tolist())]

    @classmethod
    def from_csv(cls, path: Path) -> Predictions:
        """Read what ``to_csv`` wrote.

        Raises:
            UserError: the file is missing or is not a predictions file.
        """
        fix = "pass a predictions.csv that breastcli wrote"
        rows = read_csv(path)
        if not rows or "predicted" not in rows[0] or "image_id" not in rows[0]:
            raise UserError(f"{path} is not a predictions file", fix)
        classes = tuple(
            name.removeprefix(PROBABILITY_PREFIX) for name in rows[0] if name.startswith(PROBABILITY_PREFIX)
        )
        try:
            probs = np.array([[float(row[PROBABILITY_PREFIX + name]) for name in classes] for row in rows])
            predicted = np.array([classes.index(row["predicted"]) for row in rows])
            labels = np.array([classes.index(row["label"]) for row in rows]) if "label" in rows[0] else None
            thresholds = np.array([float(row.get("threshold", 0)) for row in rows])
        except ValueError as error:
            raise UserError(f"{path}: {error}", fix) from error
        if not (((probs >= 0) & (probs <= 1)).all() and np.isfinite(thresholds).all()):
            raise UserError(f"{path}: a probability or threshold is out of range", fix)
        fixed = {"image_id", "label", "predicted", *(PROBABILITY_PREFIX + name for name in classes)}
        columns = {name: strings(row[name] for row in rows) for name in rows[0] if name not in fixed}
        return cls(strings(row["image_id"] for row in rows), classes, probs, predicted, labels, columns)

    @classmethod
    def concatenate(cls, parts: Sequence[Predictions]) -> Predictions:
        """Join predictions over the same classes, keeping the columns that all parts have."""
        first = parts[0]
        shared = [name for name in first.columns if all(name in part.columns for part in parts)]
        labelled = all(part.labels is not None for part in parts)
        return cls(
            image_ids=np.concatenate([part.image_ids for part in parts]),
            classes=first.classes,
            probs=np.concatenate([part.probs for part in parts]),
            predicted=np.concatenate([part.predicted for part in parts]),
            labels=np.concatenate([part.labels for part in parts]) if labelled else None,
            columns={name: np.concatenate([part.columns[name] for part in parts]) for name in shared},
        )


def stamp_of(leaky: str | None, drawn: bool, synthetic: bool = False) -> str:
    """Return the warning that belongs to every artefact, or "" where none is due.

    Args:
        leaky: what is said of a leaky split, or None.
        drawn: whether a program drew the images of the data set.
        synthetic: whether the network was trained with synthetic images beside the data set's own.
    """
    marks = (leaky, DRAWN if drawn else "", TRAINED_WITH_SYNTHETIC if synthetic else "")
    return ", ".join(filter(None, marks))


def strings(values: Iterable[str]) -> np.ndarray:
    """Return values as an (N,) column of strings of any length."""
    return np.array(list(values), dtype=object)


def _finite_or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
