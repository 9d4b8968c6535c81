"""The cases that deserve a look: the patients that come out worst, and the images whose wrong answers are most sure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from breastcli.data.store import PreparedData
from breastcli.files import replacing
from breastcli.records import Predictions
from breastcli.system.runfolder import ERRORS, remove_errors

MAX_ERRORS = 12
MAX_THUMB_PX = 256


@dataclass(frozen=True)
class PatientCase:
    """The images of one patient that carry one label.

    Attributes:
        patient: its name.
        label: index of the true class.
        members: (n,) rows of its images.
        num_right: how many of them were predicted right.
        given: mean probability that they gave to the true class.
    """

    patient: str
    label: int
    members: np.ndarray
    num_right: int
    given: float


def rank_patients(predictions: Predictions) -> list[PatientCase]:
    """Return the patients, worst first: fewest of their images right, then least probability of the true class.

    A patient whose images carry two labels counts once per label, as in ``Predictions.by_patient``; images of unknown
    patients are left out.
    """
    patients, labels = predictions.column("patient"), predictions.labels
    assert labels is not None
    right, given = predictions.predicted == labels, predictions.probs[np.arange(len(predictions)), labels]
    members: dict[tuple[str, int], list[int]] = {}
    for row, pair in enumerate(zip(patients, labels.tolist(), strict=True)):
        if pair[0]:
            members.setdefault(pair, []).append(row)
    cases = [
        PatientCase(patient, label, np.array(rows), int(right[rows].sum()), float(given[rows].mean()))
        for (patient, label), rows in members.items()
    ]
    return sorted(cases, key=lambda case: (case.num_right / len(case.members), case.given, case.patient, case.label))


def confident_errors(predictions: Predictions) -> np.ndarray:
    """Return the rows of wrong predictions, the most probable wrong class first; at most ``MAX_ERRORS``."""
    wrong = np.flatnonzero(predictions.predicted != predictions.labels)
    confidence = predictions.probs[wrong, predictions.predicted[wrong]]
    return wrong[np.argsort(-confidence, kind="stable")][:MAX_ERRORS]


def thumbnail_name(image_id: str) -> str:
    """Return the file name of an image's thumbnail: what can be told from its id, and a hash that is its own."""
    readable = re.sub(r"[^A-Za-z0-9._-]", "_", image_id)[:80].lstrip(".")
    return f"{readable}-{hashlib.sha256(image_id.encode()).hexdigest()[:8]}.png"


def draw_errors(folder: Path, predictions: Predictions, data: Mapping[str, PreparedData]) -> None:
    """Write a thumbnail of each of the most confident errors in place of an earlier evaluation's.

    Args:
        folder: of the evaluation; the thumbnails go into ``errors/``.
        predictions: N labelled images; their column "run" names the run that predicted them.
        data: name of a run to the images that it predicted.
    """
    remove_errors(folder)
    for name, one in data.items():
        rows = {record.record.image_id: row for row, record in enumerate(one.rows)}
        for error in confident_errors(predictions):
            if predictions.column("run")[error] == name:
                image = Image.fromarray(one.images[rows[predictions.image_ids[error]]])
                image.thumbnail((MAX_THUMB_PX, MAX_THUMB_PX), Image.Resampling.LANCZOS)
                with replacing(folder / ERRORS / thumbnail_name(predictions.image_ids[error])) as temporary:
                    image.save(temporary, format="PNG")
