"""predict: probabilities for any image files, prepared as the run's own data set was."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from breastcli.config import PredictConfig
from breastcli.data.datasets import DATASETS, Rejection
from breastcli.data.reading import FileReader, find_files
from breastcli.errors import UsageError, UserError
from breastcli.metrics.classification import choose_threshold, decide
from breastcli.plan import Plan
from breastcli.progress import SILENT, Progress
from breastcli.records import Predictions, strings
from breastcli.system.checkpoint import load_checkpoint
from breastcli.system.inference import predict_log_probs
from breastcli.system.planning import plan_prediction
from breastcli.system.runfolder import find_run
from breastcli.system.runtime import resolve_device, resolve_precision

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


def predict(config: PredictConfig, progress: Progress = SILENT) -> PredictResult | Plan:
    """Predict image files or folders with the best checkpoint of a run.

    Files are resized and stain-normalised as the run's data set was. Unreadable ones are listed and left out.

    Raises:
        UsageError: no image was named, or the threshold does not fit.
        UserError: the run or the output cannot be used, or no image can be read.
    """
    started = time.monotonic()
    out = Path(config.out or "predictions.csv")
    _check_output(out, overwrite=config.overwrite)
    if not config.images:
        raise UsageError("predict needs images", fix="breastcli predict RUN IMAGE_OR_FOLDER…")
    files = find_files(config.images)
    run = find_run(config.run)
    device = resolve_device(config.device)
    model, facts = load_checkpoint(run.best, device)
    classes = tuple(facts["classes"])
    threshold = _threshold(config.threshold, len(classes))
    if config.dry_run:
        return plan_prediction(run, model, files, config, out)
    reader = FileReader(files, facts["model"]["size_px"], facts["stain"], config.workers)
    progress.begin("predicting", len(files), "images")
    batches = reader.batches(config.batch_size, device, on_file=lambda: progress.advance("predicting"))
    log_probs = predict_log_probs(model, batches, device, resolve_precision(config.precision, device), config.tta)
    probs = log_probs.exp().numpy()
    predicted = decide(probs, threshold)
    predictions = _describe(reader.kept, classes, probs, predicted, threshold, facts["dataset"]["name"])
    predictions.to_csv(out)
    known = all(predictions.column("patient"))
    patients = predictions.by_patient("mean") if known else None
    return PredictResult(out, predictions, patients, reader.rejected, time.monotonic() - started)


def _check_output(out: Path, *, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise UserError(f"{out} is there already", fix="use --overwrite or another --out")
    Predictions.from_csv(out)  # refuses to replace a file of another kind


def _threshold(text: str | None, num_classes: int) -> float | None:
    if num_classes != 2:
        if text is not None:
            raise UsageError(f"--threshold {text}: needs two classes, not {num_classes}")
        return None
    if text is not None and text.startswith("val-"):
        raise UsageError(f"--threshold {text}: predict has no validation images", fix="give a number")
    return choose_threshold(np.zeros(0), np.zeros(0), text or "0.5")


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
