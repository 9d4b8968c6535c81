"""evaluate: what a trained network gets right on images it never saw, with intervals."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from breastcli.config import EvaluateConfig
from breastcli.configfile import to_document
from breastcli.data.store import PreparedData
from breastcli.errors import UsageError
from breastcli.files import claimed_folder, refuse_links, write_json
from breastcli.launch import num_processes
from breastcli.metrics.calibration import describe_calibration, fit_temperature, temper
from breastcli.metrics.classification import (
    PatientScores,
    choose_threshold,
    decide,
    describe_spread,
    score_images,
    score_patients,
    score_subsets,
)
from breastcli.metrics.robustness import Stressed, describe_stress
from breastcli.plan import Plan
from breastcli.progress import SILENT, Progress
from breastcli.records import Predictions, Scores, stamp_of, strings
from breastcli.reporting import plots
from breastcli.reporting.cases import draw_errors
from breastcli.reporting.comparison import write_comparison
from breastcli.reporting.embedding_plot import plot_embedding
from breastcli.reporting.report import write_report
from breastcli.reporting.stress import write_stress
from breastcli.system.checkpoint import load_checkpoint, read_facts
from breastcli.system.comparing import ComparisonResult, compare_folders, find_sides, is_evaluated
from breastcli.system.distributed import Processes, joined_processes
from breastcli.system.inference import Predictor
from breastcli.system.planning import plan_comparison, plan_evaluation
from breastcli.system.reuse import describe_predictions, find_predictions, hash_weights, prediction_key
from breastcli.system.rows import choose_rows, refuse_overlap, select_rows
from breastcli.system.runfolder import (
    EMBEDDING_PLOT,
    METRICS,
    PREDICTIONS,
    STRESS_PLOT,
    STRESS_TABLE,
    Run,
    describe_pool,
    find_run,
    reading_run,
)
from breastcli.system.runtime import resolve_device, resolve_precision
from breastcli.system.stressing import predict_stressed
from breastcli.system.transfer import saw_synthetic

logger = logging.getLogger(__name__)

COLUMNS = ("path", "patient", "exam", "magnification", "subtype")


@dataclass(frozen=True)
class EvaluateResult:
    """What ``evaluate`` found.

    Attributes:
        out: folder of ``metrics.json``, ``predictions.csv`` and the plots.
        report: the page that shows it.
        document: the contents of ``metrics.json``.
        image: figures that count images.
        patient: figures that count patients, or None where patients are unknown.
        by_magnification: figures of each magnification, where there are several.
        by_subtype: figures of each subtype.
        seconds: wall-clock time.
    """

    out: Path
    report: Path
    document: dict[str, Any]
    image: Scores
    patient: PatientScores | None
    by_magnification: dict[str, Scores]
    by_subtype: dict[str, Scores]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-safe dictionary."""
        return {**self.document, "seconds": self.seconds, "report": str(self.report)}


@dataclass(frozen=True)
class _Evaluated:
    """One run's predictions; ``embeddings`` is (N, D), or (N, 0) where nobody asked for them.

    ``uncalibrated`` holds the probabilities (N, K) before they were scaled by ``temperature``, which is None where
    nobody asked for that. ``synthetic`` tells whether it was trained with synthetic images; ``weights`` is
    the hash of the weights, and ``key`` names all that the probabilities depend on. ``stressed`` is what was predicted
    of the images when perturbed, none where nobody asked for that.
    """

    run: Run
    data: PreparedData
    predictions: Predictions
    uncalibrated: np.ndarray
    temperature: float | None
    threshold: float | None
    epoch: int
    synthetic: bool
    embeddings: np.ndarray
    weights: str
    key: str
    stressed: list[Stressed]


def evaluate(config: EvaluateConfig, progress: Progress = SILENT) -> EvaluateResult | ComparisonResult | Plan | None:
    """Predict the held-out images of one run, or of the folds of a cross-validation, and score them.

    Several runs are pooled: every image is predicted once, by the run that did not train on it, and the figures of the
    single runs are given beside the pooled ones. What a run's own evaluation predicted before with the same weights,
    images and arithmetic is taken again instead of computed.

    With ``compare`` the two folders' evaluations are set beside each other; a run without one is evaluated first.

    Several processes of torchrun share the images; the first scores and writes, the others return None.

    Raises:
        UsageError: an option that cannot be accepted.
        UserError: a run, its data or the output folder cannot be used, or there are more processes than images.
    """
    started = time.monotonic()
    if config.compare and num_processes() > 1:
        raise UsageError("--compare runs in one process", fix="start it without torchrun")
    if config.compare:
        return _compare(config, progress, started)
    runs = _find_runs(config)
    root = _root(runs)
    out = Path(config.out) if config.out else root / "evaluate" / config.split
    if not config.out:
        refuse_links(root, f"evaluate/{config.split}")
    with contextlib.ExitStack() as stack:
        processes, device = stack.enter_context(joined_processes(resolve_device(config.device)))
        runs = [stack.enter_context(reading_run(run, dry_run=config.dry_run)) for run in runs]
        if processes.writes:
            stack.enter_context(claimed_folder(out, allowed=config.overwrite, dry_run=config.dry_run))
        processes.wait()  # until the folder is claimed
        chosen = [choose_rows(run, config) for run in runs]
        refuse_overlap(runs, chosen)
        if config.dry_run:
            return plan_evaluation(runs, chosen, config, out)
        shared = (config, processes, device, progress)
        parts = [_evaluate_run(run, *one, *shared) for run, one in zip(runs, chosen, strict=True)]
        return _score(parts, runs, root, out, config, started) if processes.writes else None


def _score(
    parts: list[_Evaluated], runs: list[Run], root: Path, out: Path, config: EvaluateConfig, started: float
) -> EvaluateResult:
    """Score what was predicted, and write everything into a claimed folder."""
    predictions = Predictions.concatenate([part.predictions for part in parts])
    settings = {"resamples": config.resamples, "seed": config.seed}
    image, patient = score_images(predictions, **settings), score_patients(predictions, **settings)
    by_magnification = score_subsets(predictions, "magnification", **settings)
    by_subtype = score_subsets(predictions, "subtype", **settings)
    before, calibration = _calibration(parts, predictions, settings) if config.calibrate else (None, None)
    stressed = [part.stressed for part in parts]
    (out / METRICS).unlink(missing_ok=True)  # its figures must not stand beside anything new
    document = {
        **_provenance(parts, config),
        "image": image.to_json(),
        "patient": patient.to_json() if patient else None,
        "by_magnification": {name: scores.to_json() for name, scores in by_magnification.items()},
        "by_subtype": {name: scores.to_json() for name, scores in by_subtype.items()},
        **describe_spread({str(part.run.folder): part.predictions for part in parts}, **settings),
        "calibration": calibration,
        "embedding": _draw_embedding(out, parts[0]) if config.embedding else None,
        "stress": describe_stress(predictions, stressed, parts[0].data.card, **settings) if config.stress else None,
    }
    document["predictions"] = _write_predictions(out, predictions, parts)
    _draw_plots(out, predictions, before, image, document)
    draw_errors(out, predictions, {part.run.folder.name: part.data for part in parts})
    write_json(out / METRICS, document, durable=True)
    if len(runs) > 1:
        describe_pool(root, runs, resolve_device(config.device), config.seed, time.monotonic() - started)
    found = (document, image, patient, by_magnification, by_subtype)
    return EvaluateResult(out, write_report(root), *found, time.monotonic() - started)


def _write_predictions(out: Path, predictions: Predictions, parts: list[_Evaluated]) -> dict[str, Any]:
    """Write ``predictions.csv``; return what tells later whether the predictions are still those of the runs."""
    predictions.to_csv(out / PREDICTIONS)
    weights = {str(part.run.folder): part.weights for part in parts}
    return describe_predictions(out / PREDICTIONS, weights, parts[0].key if len(parts) == 1 else None)


def _compare(config: EvaluateConfig, progress: Progress, started: float) -> ComparisonResult | Plan:
    folders = find_sides(config)
    names = [folder.resolve().name for folder in folders]
    name = "-".join(["compare", *names, *([config.split] if config.split != "test" else [])])
    out = Path(config.out) if config.out else folders[0].parent / name
    with claimed_folder(out, allowed=config.overwrite, dry_run=config.dry_run):
        missing = [folder for folder in folders if not is_evaluated(folder, config.split)]
        if config.dry_run:
            return plan_comparison(folders, missing, config, out)
        for folder in missing:
            evaluate(dataclasses.replace(config, runs=(str(folder),), compare=False, out=None), progress)
        document, found = compare_folders(folders, config)
        write_comparison(out, document, found)
    return ComparisonResult(out, document, found, time.monotonic() - started)


def _find_runs(config: EvaluateConfig) -> list[Run]:
    if config.runs and config.run:
        raise UsageError("run folders are given twice", fix="give them as arguments or with --run, not both")
    names = config.runs or ((config.run,) if config.run else ())
    if not names:
        raise UsageError("evaluate needs a run folder", fix="breastcli evaluate RUN, or --run latest")
    if config.embedding and len(names) > 1:
        raise UsageError("--embedding: several networks have no embedding in common", fix="evaluate one run at a time")
    fitted = "--calibrate" if config.calibrate else f"--threshold {config.threshold}"
    if config.split == "val" and _needs_validation(config):
        raise UsageError(f"{fitted}: would be fitted on the images it scores", fix="score the test split")
    return [find_run(name) for name in names]


def _needs_validation(config: EvaluateConfig) -> bool:
    """Return whether something is fitted on validation images."""
    return config.calibrate or config.threshold.startswith("val-")


def _root(runs: list[Run]) -> Path:
    """Return the folder whose report shows the result: the run's own, or one named after what several share."""
    if len(runs) == 1:
        return runs[0].folder
    shared = re.sub(r"-fold\d+$", "", runs[0].folder.name)
    return runs[0].folder.parent / f"{shared}-pooled"


def _evaluate_run(
    run: Run,
    data: PreparedData,
    rows: np.ndarray,
    config: EvaluateConfig,
    processes: Processes,
    device: torch.device,
    progress: Progress,
) -> _Evaluated:
    dtype = resolve_precision(config.precision, device)
    records = [data.rows[row].record for row in rows]
    ids = strings(record.image_id for record in records)
    weights = hash_weights(run)
    key = prediction_key(weights, data, ids, tta=config.tta, calibrate=config.calibrate, dtype=dtype, device=device)
    only_scores = not config.embedding and not config.stress and not _needs_validation(config)
    earlier = find_predictions(run, config.split, key, ids) if only_scores else None
    if not processes.agree(earlier is None):
        earlier = None
    model, facts = (None, read_facts(run.best)) if earlier else load_checkpoint(run.best, device)
    assert facts is not None  # what cannot be read has no earlier predictions, and is not loaded
    settings = (device, dtype, config.tta, config.batch_size, config.workers, progress, processes)
    predictor = None if model is None else Predictor(model, data, *settings)
    kept: list[torch.Tensor] = []
    if earlier is not None:
        logger.info("%s: predictions of the earlier evaluation are taken again", run.folder)
        probs = earlier.probs
    else:
        keep = (lambda embedding: kept.append(embedding.cpu())) if config.embedding else (lambda embedding: None)
        probs = predictor(rows, f"{run.folder.name} {config.split}", on_embedding=keep)
    uncalibrated = probs
    temperature, threshold, probs = _fit(run, data, probs, predictor, config)
    columns = {name: strings(getattr(record, name) or "" for record in records) for name in COLUMNS}
    columns["run"] = strings(run.folder.name for _ in records)
    if threshold is not None:
        columns["threshold"] = strings(repr(threshold) for _ in records)
    predictions = Predictions(ids, data.classes, probs, decide(probs, threshold), data.labels[rows], columns)
    asked = (predictor, rows, f"{run.folder.name} {config.split}", predictions, temperature, threshold)
    stressed = predict_stressed(*asked) if config.stress else []
    embeddings = processes.gather(torch.cat(kept), len(rows)).numpy() if kept else np.zeros((len(rows), 0), np.float32)
    epoch, synthetic = int(facts["epoch"]), saw_synthetic(facts)
    fitted = (uncalibrated, temperature, threshold)
    return _Evaluated(run, data, predictions, *fitted, epoch, synthetic, embeddings, weights, key, stressed)


def _fit(
    run: Run, data: PreparedData, probs: np.ndarray, predictor: Predictor | None, config: EvaluateConfig
) -> tuple[float | None, float | None, np.ndarray]:
    """Return temperature, decision threshold and the probabilities (n, K) that the threshold acts on.

    What is fitted is fitted on validation images, never on those to be scored: first the temperature, then the
    threshold on the probabilities that it gives.
    """
    labels, held_out, temperature = np.zeros(0), np.zeros((0, len(data.classes))), None
    if _needs_validation(config):
        assert predictor is not None  # whoever asks for such a rule loads the network
        rows = select_rows(run, data, "val")
        labels, held_out = data.labels[rows], predictor(rows, f"{run.folder.name} val")
    if config.calibrate:
        temperature = fit_temperature(held_out, labels)
        if temperature is None:
            logger.warning("%s: no temperature fits its validation images; nothing is calibrated", run.folder)
        probs, held_out = temper(probs, temperature), temper(held_out, temperature)
    if len(data.classes) != 2:
        return temperature, None, probs
    return temperature, choose_threshold(labels, held_out[:, 1], config.threshold), probs


def _provenance(parts: list[_Evaluated], config: EvaluateConfig) -> dict[str, Any]:
    """Return where the figures come from."""
    card = parts[0].data.card
    thresholds = [part.threshold for part in parts]
    return {
        "runs": [str(part.run.folder) for part in parts],
        "epochs": [part.epoch for part in parts],
        "split": config.split,
        "config": to_document(config),
        "threshold": {
            "rule": config.threshold,
            "value": thresholds[0] if len(set(thresholds)) == 1 else None,
            "per_run": thresholds,
        },
        "tta": config.tta,
        "dataset": {
            "name": card["name"],
            "drawn": card["drawn"],
            "leaky": card["split"]["leaky"],
            "synthetic": any(part.synthetic for part in parts),
            "split_level": card["split"]["level"],
            "fingerprint": card["fingerprint"],
            "split_fingerprint": card["split_fingerprint"],
            "notes": card["notes"],
        },
    }


def _calibration(
    parts: list[_Evaluated], predictions: Predictions, settings: dict[str, int]
) -> tuple[Predictions, dict[str, Any]]:
    """Return the predictions as they were before calibration, and what it did to them."""
    before = dataclasses.replace(predictions, probs=np.concatenate([part.uncalibrated for part in parts]))
    temperatures = [part.temperature for part in parts]
    return before, describe_calibration(before, predictions, temperatures, **settings)


def _draw_plots(
    out: Path, predictions: Predictions, before: Predictions | None, image: Scores, document: dict[str, Any]
) -> None:
    """Draw what was found, and remove what an earlier evaluation drew and this one was not asked for."""
    dataset = document["dataset"]
    stamp = stamp_of(dataset["leaky"], dataset["drawn"], dataset["synthetic"])
    plots.plot_confusion(image, out / "confusion.png", stamp=stamp)
    plots.plot_roc(predictions, out / "roc.png", stamp=stamp)
    plots.plot_precision_recall(predictions, out / "precision_recall.png", stamp=stamp)
    plots.plot_reliability(predictions, out / "reliability.png", before, stamp=stamp)
    if all(predictions.column("patient")):
        plots.plot_patients(predictions, out / "patients.png", stamp=stamp)
    if document["stress"]:
        write_stress(out, document["stress"], stamp)
    drawn = {EMBEDDING_PLOT: document["embedding"], STRESS_TABLE: document["stress"], STRESS_PLOT: document["stress"]}
    for name, found in drawn.items():
        if not found:
            (out / name).unlink(missing_ok=True)


def _draw_embedding(out: Path, part: _Evaluated) -> dict[str, float | None]:
    """Draw the embedding of one run; return its angles, None where they are undefined."""
    card = part.data.card
    stamp = stamp_of(card["split"]["leaky"], card["drawn"], part.synthetic)
    labels = part.predictions.labels
    assert labels is not None
    angles = plot_embedding(part.embeddings, labels, part.data.classes, out / EMBEDDING_PLOT, stamp=stamp)
    return {name: None if math.isnan(value) else value for name, value in angles.items()}
