"""Predictions of an earlier evaluation, taken again where nothing that they depend on has changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from breastcli import __version__
from breastcli.data.store import PreparedData
from breastcli.errors import UserError
from breastcli.files import read_json
from breastcli.records import Predictions
from breastcli.system.runfolder import METRICS, PREDICTIONS, Run

READ_AT_ONCE = 1 << 20  # bytes of a file that is hashed


def prediction_key(
    run: Run, data: PreparedData, *, split: str, tta: str, calibrate: bool, dtype: torch.dtype, device: torch.device
) -> str:
    """Return a name for everything that a run's probabilities depend on, from weights and images to calibration.

    Raises:
        UserError: the run has no checkpoint yet.
    """
    if not run.best.is_file():
        raise UserError(f"{run.best}: no such checkpoint", fix="finish or --resume the training first")
    known: dict[str, Any] = {
        "weights": _hash_of(run.best),
        "images": data.card["fingerprint"],
        "division": data.card["split_fingerprint"],
        "fold": run.config.fold,
        "mag": run.config.mag,
        "split": split,
        "tta": tta,
        "calibrate": calibrate,
        "arithmetic": [str(dtype), device.type, torch.__version__, __version__],
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def describe_predictions(file: Path, key: str | None) -> dict[str, str] | None:
    """Return what ``metrics.json`` keeps so that a file's predictions can be taken again; None for several runs'."""
    return None if key is None else {"key": key, "sha256": _hash_of(file)}


def find_predictions(run: Run, split: str, key: str) -> Predictions | None:
    """Return what an earlier evaluation in the run's own folder predicted under the same key, or None.

    A file that was changed since is not taken.
    """
    folder = run.folder / "evaluate" / split
    try:
        known = read_json(folder / METRICS)["predictions"]
        if known["key"] == key and known["sha256"] == _hash_of(folder / PREDICTIONS):
            return Predictions.from_csv(folder / PREDICTIONS)
    except (UserError, OSError, KeyError, TypeError):
        pass  # there is none, or it is of an older version
    return None


def _hash_of(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(READ_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()
