"""One epoch of training and one of validation."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from breastcli.config import TrainConfig
from breastcli.data.augment import POLICIES
from breastcli.data.loading import make_batches
from breastcli.data.store import PreparedData
from breastcli.errors import UsageError, UserError
from breastcli.losses import Loss
from breastcli.metrics.figures import ranking_areas
from breastcli.models import Classifier, ModelOptions
from breastcli.models.freezing import set_training_mode
from breastcli.progress import Progress
from breastcli.system.distributed import ALONE, Processes
from breastcli.system.feeding import Feed
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
    feed: Feed
    progress: Progress
    processes: Processes = ALONE
    synthetic: dict[str, Any] | None = None
    ancestors: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    timing: list[tuple[int, float, float, float | None]] = dataclasses.field(default_factory=list)


def make_optimizer(model: Classifier, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """Return the optimiser of the parameters that learn at any time of the run; each group knows its ``initial_lr``."""
    learning = [one for one in model.parameters() if one.requires_grad or config.unfreeze_at]
    groups = [{"params": learning, "initial_lr": config.lr}]
    if config.trunk_lr is not None:
        if not any(one.requires_grad or config.unfreeze_at for one in model.trunk.parameters()):
            raise UsageError(f"--trunk-lr {config.trunk_lr:g}: the trunk is frozen", fix="leave one of the two out")
        trunk = {id(one) for module in model.published_parts() for one in module.parameters()}
        groups = [
            {"params": [one for one in learning if id(one) not in trunk], "initial_lr": config.lr},
            {"params": [one for one in learning if id(one) in trunk], "initial_lr": config.trunk_lr},
        ]
    settings = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=MOMENTUM, **settings)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, fused=device.type != "mps", **settings)


def learning_rate_factor(config: TrainConfig, epoch: int) -> float:
    """Return what the initial learning rates are multiplied with in an epoch (counted from 1)."""
    position = (epoch - 1) / max(config.epochs - 1, 1)
    if config.schedule == "cosine":
        return (1 + math.cos(math.pi * position)) / 2
    if config.schedule == "exponential":
        return FINAL_LR_SHARE**position
    return 1.0


def check_shares(session: Session) -> None:
    """Refuse more processes than a batch, or the validation set, has images.

    Raises:
        UsageError: there are more.
    """
    if session.processes.count == 1:
        return
    rows, _ = _order(session.data.labels, session.rows["train"], session.config, 1)
    batches = make_batches(rows, session.config.batch_size)
    smallest = min(len(one) for one in (*batches, session.rows["val"]))
    if smallest < session.processes.count:
        problem = f"{session.processes.count} processes cannot share a batch or validation set of {smallest} images"
        raise UsageError(problem, fix="start fewer, or raise --batch-size")


def num_batches(session: Session) -> int:
    """Return the number of steps of an epoch."""
    rows, _ = _order(session.data.labels, session.rows["train"], session.config, 1)
    return len(make_batches(rows, session.config.batch_size))


def train_epoch(session: Session, model: nn.Module, epoch: int) -> tuple[float, int]:
    """Take one pass over the training images; return the mean loss, and how many images were shown, repeats included.

    Where several processes share a batch, each runs its own images, and the loss is that of all of them: it is worked
    out from the logits of all in every process, of which only the own ones lead back into the network, so that the
    processes' gradients add up to that of the whole batch.

    Raises:
        UserError: the loss of a step is not finite.
    """
    config, device = session.config, session.device
    set_training_mode(session.model, batch_norm=config.batch_norm)
    generator = torch.Generator(device).manual_seed(mix_seed(config.seed, epoch, 1))
    rows, elements = _order(session.data.labels, session.rows["train"], config, epoch)
    batches = make_batches(rows, config.batch_size)
    placed = None if elements is None else make_batches(elements, config.batch_size)
    losses = torch.zeros(len(batches), device=device)
    task = f"epoch {epoch}"
    session.progress.begin(task, len(rows), "images")
    shown = time.monotonic()
    for step, (inputs, labels) in enumerate(session.feed.batches(batches, placed, generator)):
        with autocast(device, session.dtype):
            logits = session.feed.logits(model, inputs)
        logits, labels = (session.processes.gather(one, len(batches[step])) for one in (logits.float(), labels))
        progress = (epoch - 1 + step / len(batches)) / config.epochs
        loss = session.loss.training(logits, labels, progress)
        session.optimizer.zero_grad(set_to_none=True)
        session.scaler.scale(loss).backward()
        session.processes.sum_gradients(session.model.parameters())  # scaled, so that all see the same overflows
        session.scaler.step(session.optimizer)
        session.scaler.update()
        losses[step] = loss.detach()
        figures = {}
        if time.monotonic() - shown > SECONDS_BETWEEN_FIGURES:
            shown = time.monotonic()
            figures = {"loss": float(losses[: step + 1].mean())}
        session.progress.advance(task, len(labels), **figures)
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        raise UserError(
            f"the loss is not a finite number in epoch {epoch}, step {int(bad[0]) + 1}",
            fix="lower --lr or use --precision fp32; earlier checkpoints are kept",
        )
    sizes = torch.tensor([len(batch) for batch in batches], device=device)
    return float((losses.double() * sizes).sum() / sizes.sum()), len(rows)


def _order(
    labels: np.ndarray, rows: np.ndarray, config: TrainConfig, epoch: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the training rows of one epoch, shuffled, and the position of each image where the policy lists them.

    Rows are oversampled to equal classes if asked for, and repeated once for each listed position.
    """
    seed = mix_seed(config.seed, epoch, 2)
    if config.imbalance == "oversample":
        from imblearn.over_sampling import RandomOverSampler  # takes a second to import, and few runs need it

        sampler = RandomOverSampler(random_state=seed % 2**32)
        rows = sampler.fit_resample(rows[:, None], labels[rows])[0][:, 0]
    copies = POLICIES[config.augment].copies
    generator = np.random.default_rng(seed)
    if not copies:
        return generator.permutation(rows), None
    order = generator.permutation(len(rows) * len(copies))
    return np.repeat(rows, len(copies))[order], np.tile(np.array(copies), len(rows))[order]


def validate(session: Session, epoch: int) -> dict[str, float]:
    """Return the validation figures after an epoch."""
    rows = session.rows["val"]
    task = f"validation {epoch}"
    session.progress.begin(task, len(rows), "images")
    log_probs = session.feed.log_probs(
        session.model,
        rows[session.processes.share(len(rows))],
        on_batch=lambda count: session.progress.advance(task, count),
    )
    log_probs = session.processes.gather(log_probs, len(rows))
    labels = session.data.labels[rows]
    # A loss of logits is the same for log-probabilities, which differ from them by a constant per image.
    loss = session.loss.validation(log_probs.float().to(session.device), torch.from_numpy(labels).to(session.device))
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
