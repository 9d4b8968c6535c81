"""One epoch of training and one of validation."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from breastcli.config import TrainConfig, UserError
from breastcli.data.augment import POLICIES
from breastcli.data.loading import load_batches, make_batches
from breastcli.data.store import PreparedData
from breastcli.losses import Loss
from breastcli.metrics.figures import ranking_areas
from breastcli.models import Classifier, ModelOptions, set_training_mode
from breastcli.progress import Progress
from breastcli.system.inference import predict_log_probs
from breastcli.system.runtime import autocast, mix_seed

SECONDS_BETWEEN_FIGURES = 0.5  # reading the loss waits for the device, so it is not done at every step
MOMENTUM = 0.9
FINAL_LR_SHARE = 0.01  # of the initial rate, reached by the exponential schedule in the last epoch


@dataclass
class Session:
    """Everything that one training run works with."""

    config: TrainConfig
    data: PreparedData
    rows: dict[str, np.ndarray]
    device: torch.device
    dtype: torch.dtype
    model: Classifier
    options: ModelOptions
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loss: Loss
    progress: Progress
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    timing: list[tuple[int, float, float]] = dataclasses.field(default_factory=list)


def make_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """Return the optimiser of the parameters that are not frozen."""
    trained = [one for one in model.parameters() if one.requires_grad]
    settings = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(trained, momentum=MOMENTUM, **settings)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(trained, fused=device.type != "mps", **settings)


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """Return the learning rate of an epoch (counted from 1)."""
    position = (epoch - 1) / max(config.epochs - 1, 1)
    if config.schedule == "cosine":
        return config.lr * (1 + math.cos(math.pi * position)) / 2
    if config.schedule == "exponential":
        return config.lr * FINAL_LR_SHARE**position
    return config.lr


def train_epoch(session: Session, model: nn.Module, epoch: int) -> float:
    """Take one pass over the training images; return the mean loss.

    Raises:
        UserError: the loss of a step is not finite.
    """
    config, device = session.config, session.device
    set_training_mode(session.model, batch_norm=config.batch_norm)
    generator = torch.Generator(device).manual_seed(mix_seed(config.seed, epoch, 1))
    augment = POLICIES[config.augment]
    order = _order(session.data.labels, session.rows["train"], config, epoch)
    batches = make_batches(order, config.batch_size)
    losses = torch.zeros(len(batches), device=device)
    task = f"epoch {epoch}"
    session.progress.begin(task, len(order), "images")
    shown = time.monotonic()
    for step, batch in enumerate(load_batches(session.data, batches, device, config.workers)):
        with autocast(device, session.dtype):
            logits = model(augment(batch.images, generator))
        loss = session.loss(logits.float(), batch.labels)
        session.optimizer.zero_grad(set_to_none=True)
        session.scaler.scale(loss).backward()
        session.scaler.step(session.optimizer)
        session.scaler.update()
        losses[step] = loss.detach()
        figures = {}
        if time.monotonic() - shown > SECONDS_BETWEEN_FIGURES:
            shown = time.monotonic()
            figures = {"loss": float(losses[: step + 1].mean())}
        session.progress.advance(task, len(batch.labels), **figures)
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        raise UserError(
            f"the loss is not a finite number in epoch {epoch}, step {int(bad[0]) + 1}",
            fix="lower --lr or use --precision fp32; earlier checkpoints are kept",
        )
    sizes = torch.tensor([len(batch) for batch in batches], device=device)
    return float((losses.double() * sizes).sum() / sizes.sum())


def _order(labels: np.ndarray, rows: np.ndarray, config: TrainConfig, epoch: int) -> np.ndarray:
    """Return the training rows of one epoch, shuffled; oversampled to equal classes if asked for."""
    seed = mix_seed(config.seed, epoch, 2)
    if config.imbalance == "oversample":
        from imblearn.over_sampling import RandomOverSampler  # takes a second to import, and few runs need it

        sampler = RandomOverSampler(random_state=seed % 2**32)
        rows = sampler.fit_resample(rows[:, None], labels[rows])[0][:, 0]
    return np.random.default_rng(seed).permutation(rows)


def validate(session: Session, epoch: int) -> dict[str, float]:
    """Return the validation figures after an epoch."""
    rows = session.rows["val"]
    batches = make_batches(rows, session.config.batch_size)
    task = f"validation {epoch}"
    session.progress.begin(task, len(rows), "images")
    log_probs = predict_log_probs(
        session.model,
        (batch.images for batch in load_batches(session.data, batches, session.device, session.config.workers)),
        session.device,
        session.dtype,
        on_batch=lambda count: session.progress.advance(task, count),
    )
    labels = session.data.labels[rows]
    # A loss of logits is the same for log-probabilities, which differ from them by a constant per image.
    loss = session.loss(log_probs.float().to(session.device), torch.from_numpy(labels).to(session.device))
    probs = log_probs.exp().numpy()
    right = probs.argmax(axis=1) == labels
    present = np.unique(labels)
    return {
        "val_loss": float(loss),
        "val_accuracy": float(right.mean()),
        "val_balanced_accuracy": float(np.mean([right[labels == label].mean() for label in present])),
        "val_roc_auc": _roc_auc(labels, probs, present),
    }


def _roc_auc(labels: np.ndarray, probs: np.ndarray, present: np.ndarray) -> float:
    """Return the area under the ROC curve (macro one-vs-rest), NaN where a class or a finite probability is missing."""
    if len(present) < probs.shape[1] or not np.isfinite(probs).all():
        return math.nan
    once = np.ones((len(labels), 1))
    positive_classes = [1] if probs.shape[1] == 2 else present
    return float(np.mean([ranking_areas(probs[:, k], labels == k, once)[0] for k in positive_classes]))
