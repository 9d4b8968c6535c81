"""Predictions of an earlier evaluation, taken again where nothing that they depend on has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from breastcli import __version__
from breastcli.data.store import PreparedData
from breastcli.errors import UserError
from breastcli.files import read_json
from breastcli.records import Predictions
from breastcli.shapes import check_shape
from breastcli.system.checkpoint import require_checkpoint
from breastcli.system.runfolder import BEST, METRICS, PREDICTIONS, Run

READ_AT_ONCE = 1 << 20  # bytes of a file that is hashed


def hash_weights(run: Run) -> str:
    """Return a hash of the weights that a run's predictions are made with.

    Raises:
        UserError: the run has no checkpoint yet.
    """
    require_checkpoint(run.best)
    return _hash_of(run.best)


def prediction_key(
    weights: str,
    data: PreparedData,
    ids: np.ndarray,
    *,
    tta: str,
    calibrate: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> str:
    """Return a name for everything that a run's probabilities depend on, from weights and images to calibration.

    Args:
        weights: hash of the run's weights.
        data: where the images are.
        ids: (N,) names of the images in the order of the predictions, which a copy of the data need not keep.
        tta: test-time augmentation.
        calibrate: whether the probabilities are calibrated.
        dtype: arithmetic of the network.
        device: where it computes.
    """
    known: dict[str, Any] = {
        "weights": weights,
        "images": data.card["fingerprint"],
        "ids": ids.tolist(),
        "tta": tta,
        "calibrate": calibrate,
        "arithmetic": [str(dtype), device.type, torch.__version__, __version__],
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def describe_predictions(file: Path, weights: Mapping[str, str], key: str | None) -> dict[str, Any]:
    """Return what ``metrics.json`` keeps to tell whether predictions are still those of these runs.

    Args:
        file: the predictions.
        weights: run folder to the hash of its weights.
        key: by which one run's can be taken again; None for several.
    """
    return {"key": key, "sha256": _hash_of(file), "weights": dict(weights)}


def refuse_stale(folder: Path, document: dict[str, Any]) -> None:
    """Refuse an evaluation whose predictions were changed, or whose runs were trained further since.

    Args:
        folder: of ``metrics.json`` and ``predictions.csv``.
        document: the contents of the former.

    Raises:
        UserError: it is stale.
    """
    fix = "evaluate again with --overwrite"
    check_shape(document, {"predictions?": (dict, None)}, folder / METRICS, fix)
    known = document.get("predictions")
    if not known:
        return  # of an older version, which did not keep it
    check_shape(known, {"sha256": str, "weights?": dict}, folder / METRICS, fix)
    if known["sha256"] != _hash_of(folder / PREDICTIONS):
        raise UserError(f"{folder / PREDICTIONS} is not what was evaluated", fix)
    for run, weights in known.get("weights", {}).items():
        best = Path(run) / BEST
        if best.is_file() and _hash_of(best) != weights:
            fix = "evaluate it again with --overwrite"
            raise UserError(f"{run} has other weights than when {folder} was written", fix=fix)


def find_predictions(run: Run, split: str, key: str, ids: np.ndarray) -> Predictions | None:
    """Return what an earlier evaluation in the run's own folder predicted under the same key, or None.

    A file that was changed since, or is of other images than ``ids`` (N,), is not taken.
    """
    folder = run.folder / "evaluate" / split
    try:
        known = read_json(folder / METRICS)["predictions"]
        if known["key"] == key and known["sha256"] == _hash_of(folder / PREDICTIONS):
            found = Predictions.from_csv(folder / PREDICTIONS)
            return found if np.array_equal(found.image_ids, ids) else None
    except (UserError, OSError, KeyError, TypeError):
        pass  # there is none, or it is of an older version
    return None


def _hash_of(file: Path) -> str:
    if not file.is_file():
        raise UserError(f"{file}: no such file", fix="evaluate again with --overwrite")
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(READ_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()
