"""predict: probabilities for any image files, prepared as the run's own data set was."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from breastcli.config import PredictConfig, UsageError, UserError
from breastcli.data.datasets import DATASETS, Rejection, image_files
from breastcli.data.images import Decoded, decode_in_order
from breastcli.data.stain import StainReference, normalise_stain
from breastcli.files import replacing
from breastcli.metrics.classification import choose_threshold
from breastcli.progress import SILENT, Progress
from breastcli.records import Predictions, strings
from breastcli.system.checkpoint import load_checkpoint
from breastcli.system.inference import predict_log_probs
from breastcli.system.runfolder import find_run
from breastcli.system.runtime import resolve_device, resolve_precision

logger = logging.getLogger(__name__)

COLUMNS = ("path", "patient", "exam", "magnification")


@dataclass(frozen=True)
class PredictResult:
    """What ``predict`` found.

    Attributes:
        out: the predictions file.
        predictions: one row per readable image, in the order given.
        patients: mean probabilities per patient, or None where the file names do not tell every patient.
        rejected: files that could not be read.
        seconds: wall-clock time.
    """

    out: Path
    predictions: Predictions
    patients: Predictions | None
    rejected: list[Rejection]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-safe dictionary."""
        patients = self.patients
        return {
            "num_images": len(self.predictions),
            "images": _rows(self.predictions, "path", self.predictions.column("path")),
            "patients": _rows(patients, "patient", patients.image_ids) if patients is not None else None,
            "rejected": [dataclasses.asdict(one) for one in self.rejected],
            "seconds": self.seconds,
        }


def predict(config: PredictConfig, progress: Progress = SILENT) -> PredictResult:
    """Predict image files or folders with the best checkpoint of a run.

    Files are resized and stain-normalised as the run's data set was. Unreadable ones are listed and left out.

    Raises:
        UsageError: no image was named, or the threshold does not fit.
        UserError: the run or the output cannot be used, or no image can be read.
    """
    started = time.monotonic()
    out = Path(config.out or "predictions.csv")
    _check_output(out, overwrite=config.overwrite)
    files = _files(config.images)
    run = find_run(config.run)
    device = resolve_device(config.device)
    model, facts = load_checkpoint(run.best, device)
    classes = tuple(facts["classes"])
    threshold = _threshold(config.threshold, len(classes))
    kept: list[Path] = []
    rejected: list[Rejection] = []
    size_px = facts["model"]["size_px"]
    decoded = decode_in_order(files, size_px, config.workers or os.cpu_count() or 1)
    progress.begin("predicting", len(files), "images")
    images = _readable(zip(files, decoded, strict=True), kept, rejected, progress)
    batches = _batches(images, config.batch_size, facts["stain"], device)
    first = next(batches, None)
    if first is None:
        raise UserError(f"none of the {len(files)} files is a readable image", fix=f"see why: {rejected[0].reason}")
    log_probs = predict_log_probs(
        model, chain([first], batches), device, resolve_precision(config.precision, device), config.tta
    )
    probs = log_probs.exp().numpy()
    predicted = probs.argmax(axis=1) if threshold is None else (probs[:, 1] >= threshold).astype(np.int64)
    predictions = _describe(kept, classes, probs, predicted, threshold, facts["dataset"]["name"])
    with replacing(out) as temporary:
        predictions.to_csv(temporary)
    known = all(predictions.column("patient"))
    patients = predictions.by_patient("mean") if known else None
    return PredictResult(out, predictions, patients, rejected, time.monotonic() - started)


def _check_output(out: Path, *, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"{out} is there already", fix="use --overwrite or another --out")
    Predictions.from_csv(out)  # refuses to replace a file of another kind


def _files(names: tuple[str, ...]) -> list[Path]:
    """Return the named files and the images below the named folders."""
    if not names:
        raise UsageError("predict needs images", fix="breastcli predict RUN IMAGE_OR_FOLDER…")
    files: list[Path] = []
    for path in map(Path, names):
        if path.is_dir():
            files += image_files(path)
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    if not files:
        raise UserError(f"no image file below {', '.join(names)}", fix="give PNG, JPEG, TIFF or BMP files")
    return list(dict.fromkeys(files))


def _threshold(text: str | None, num_classes: int) -> float | None:
    if num_classes != 2:
        if text is not None:
            raise UsageError(f"--threshold {text}: needs two classes, not {num_classes}")
        return None
    if text is not None and text.startswith("val-"):
        raise UsageError(f"--threshold {text}: predict has no validation images", fix="give a number")
    return choose_threshold(np.zeros(0), np.zeros(0), text or "0.5")


def _readable(
    decoded: Iterable[tuple[Path, Decoded]], kept: list[Path], rejected: list[Rejection], progress: Progress
) -> Iterator[Decoded]:
    """Yield the images that could be read, sorting the files into ``kept`` and ``rejected``."""
    for file, image in decoded:
        progress.advance("predicting")
        if image.pixels is None:
            rejected.append(Rejection(str(file), image.reason))
            logger.warning("left out %s: %s", file, image.reason)
        else:
            kept.append(file)
            yield image


def _batches(
    images: Iterator[Decoded], batch_size: int, stain: dict[str, Any] | None, device: torch.device
) -> Iterator[Tensor]:
    """Yield uint8 batches (B, 3, H, W) on the device, stain-normalised where the data set was."""
    reference = StainReference.from_json(stain) if stain else None
    while chunk := list(islice(images, batch_size)):
        pixels = torch.from_numpy(np.stack([image.pixels for image in chunk])).to(device).permute(0, 3, 1, 2)
        if reference is not None:
            pixels, failed = normalise_stain(pixels, reference)
            if failed.any():
                logger.warning("%d images show too little tissue to normalise", int(failed.sum()))
        yield pixels.contiguous(memory_format=torch.channels_last)


def _describe(
    files: list[Path],
    classes: tuple[str, ...],
    probs: np.ndarray,
    predicted: np.ndarray,
    threshold: float | None,
    dataset: str,
) -> Predictions:
    """Put probabilities beside what the file names tell."""
    adapter = DATASETS.get(dataset)
    known = [adapter.describe(str(file)) for file in files]
    columns = {name: strings((getattr(one, name) or "") if one else "" for one in known) for name in COLUMNS[1:]}
    columns = {"path": strings(map(str, files)), **columns}
    if threshold is not None:
        columns["threshold"] = np.full(len(files), repr(threshold), dtype=object)
    ids = strings(file.stem for file in files)
    return Predictions(ids, classes, probs, predicted, None, columns)


def _rows(predictions: Predictions, name: str, values: np.ndarray) -> list[dict[str, Any]]:
    return [
        {
            name: value,
            "predicted": predictions.classes[chosen],
            "probabilities": dict(zip(predictions.classes, map(float, probs), strict=True)),
        }
        for value, chosen, probs in zip(values, predictions.predicted, predictions.probs, strict=True)
    ]
