"""What ``--dry-run`` says of the jobs that work with networks, once all is checked and before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from breastcli.config import BenchmarkConfig, EvaluateConfig, ExplainConfig, PredictConfig, TrainConfig
from breastcli.data.store import PreparedData
from breastcli.files import require_writable
from breastcli.models import Classifier, num_parameters
from breastcli.plan import Plan
from breastcli.records import stamp_of
from breastcli.system.runfolder import Run
from breastcli.system.runtime import describe_device, resolve_device
from breastcli.system.subjects import Subjects
from breastcli.system.training import Session, num_batches

FLOAT32_BYTES = 4
OPTIMIZER_STATES = {"adam": 2, "adamw": 2, "sgd": 1}  # numbers that are kept of each parameter


def plan_training(session: Session, out: Path) -> Plan:
    """Plan a training run whose session is ready."""
    config, card = session.config, session.data.card
    weights, trained = num_parameters(session.model), num_parameters(session.model, trainable=True)
    batches = num_batches(session)
    facts = {
        "data": str(session.data.folder),
        **{split: _count(session.data, session.data.labels[rows]) for split, rows in session.rows.items()},
        "synthetic": sum(session.synthetic["num_images"].values()) if session.synthetic else None,
        "size_px": session.data.size_px,
        "network": config.arch,
        "parameters": weights,
        "trained_parameters": trained,
        "starts_from": _start(config),
        "device": describe_device(session.device),
        "precision": str(session.dtype).removeprefix("torch."),
        "epochs": config.epochs,
        "epochs_done": len(session.history),
        "steps_per_epoch": batches,
        "steps_left": batches * (config.epochs - len(session.history)),
    }
    stamp = stamp_of(card["split"]["leaky"], card["drawn"], session.synthetic is not None)
    # Best, last and resumable weights; the last with the optimiser's state.
    num_bytes = 3 * state_bytes(session.model) + OPTIMIZER_STATES[config.optimizer] * FLOAT32_BYTES * trained
    return Plan("train", out, facts, (), stamp, num_bytes, resumes=config.resume)


def _start(config: TrainConfig) -> str:
    if config.pretrained:
        return "published weights, fetched where they are not in the cache (a dry run does not look)"
    return config.weights or config.init_from or "random weights"


def plan_evaluation(
    runs: list[Run], chosen: list[tuple[PreparedData, np.ndarray]], config: EvaluateConfig, out: Path
) -> Plan:
    """Plan the scores of runs; ``chosen`` has each one's data and the rows (n,) to score."""
    data = chosen[0][0]
    facts = {
        "runs": [str(run.folder) for run in runs],
        "data": str(data.folder),
        "split": config.split,
        "images": sum(len(rows) for _, rows in chosen),
        "of_classes": _count(data, np.concatenate([one.labels[rows] for one, rows in chosen])),
        "device": describe_device(resolve_device(config.device)),
        "threshold": config.threshold,
        "resamples": config.resamples,
    }
    synthetic = any(run.info.get("synthetic") for run in runs)
    return Plan("evaluate", out, facts, (), stamp_of(data.card["split"]["leaky"], data.card["drawn"], synthetic))


def plan_comparison(folders: Sequence[Path], missing: Sequence[Path], config: EvaluateConfig, out: Path) -> Plan:
    """Plan the comparison of two folders, of which some would have to be evaluated first."""
    facts = {
        "compares": [str(folder) for folder in folders],
        "evaluates_first": [str(folder) for folder in missing] or None,
        "split": config.split,
        "resamples": config.resamples,
    }
    return Plan("evaluate", out, facts)


def plan_explanation(
    run: Run,
    model: Classifier,
    methods: Sequence[str],
    subjects: Subjects,
    num_masks: int | None,
    stamp: str,
    config: ExplainConfig,
    out: Path,
) -> Plan:
    """Plan the explanation of images that were read."""
    facts = {
        "run": str(run.folder),
        "images": len(subjects),
        "left_out": len(subjects.rejected),
        "masks": num_masks,
        "methods": list(methods),
        "class_explained": config.target,
        "parameters": num_parameters(model),
        "device": describe_device(resolve_device(config.device)),
        "faithfulness": "measured" if config.faithfulness else "not measured",
    }
    side = subjects.images.shape[1]
    num_bytes = len(methods) * len(subjects) * side * side * 2  # maps in float16; panels are small beside them
    return Plan("explain", out, facts, (), stamp, num_bytes)


def plan_prediction(run: Run, model: Classifier, files: Sequence[Path], config: PredictConfig, out: Path) -> Plan:
    """Plan the prediction of files, which nobody opened.

    Raises:
        UserError: the output could not be written.
    """
    require_writable(out)
    facts = {
        "run": str(run.folder),
        "files": len(files),
        "parameters": num_parameters(model),
        "device": describe_device(resolve_device(config.device)),
    }
    return Plan("predict", out, facts, ("files were not opened: damaged ones are left out when predicting",))


def plan_benchmark(
    networks: dict[str, int],
    compared: Sequence[str],
    training: tuple[TrainConfig, dict[str, int] | None] | None,
    notes: Sequence[str],
    config: BenchmarkConfig,
    out: Path,
) -> Plan:
    """Plan measurements.

    Args:
        networks: name to number of parameters, of those that can be measured.
        compared: names of the comparisons.
        training: the protocol of convergence, and the images of each split where they exist already.
        notes: what cannot be measured.
        config: the job's options.
        out: the folder to write.
    """
    facts: dict[str, Any] = {
        "networks": networks or None,
        "comparisons": list(compared) or None,
        "rounds": config.rounds,
        "device": describe_device(resolve_device(config.device)),
    }
    if training:
        train, images = training
        facts |= {"trained_on": train.data, "epochs": train.epochs, "images": images or "would be drawn"}
    return Plan("benchmark", out, facts, tuple(notes), resumes=config.resume)


def _count(data: PreparedData, labels: np.ndarray) -> dict[str, int]:
    return dict(zip(data.classes, np.bincount(labels, minlength=len(data.classes)).tolist(), strict=True))


def state_bytes(network: nn.Module) -> int:
    """Return what a network's weights and statistics take on the disk."""
    return sum(one.numel() * one.element_size() for one in network.state_dict().values())
