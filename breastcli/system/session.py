"""The start of a training run: images chosen, network built, weights loaded, parts frozen."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from breastcli.config import TrainConfig
from breastcli.data.augment import POLICIES
from breastcli.data.store import PreparedData
from breastcli.errors import UsageError, UserError
from breastcli.losses import LOSSES, Loss, class_weights_of, log_prior_of, make_loss, margin_and_scale
from breastcli.models import Classifier, ModelOptions, build_model, num_parameters, require_published
from breastcli.models.backbones import LIBRARIES
from breastcli.models.foundation import complete
from breastcli.models.freezing import freeze
from breastcli.parsing import parse_magnification
from breastcli.progress import Progress
from breastcli.system.batch_norm import share_batch_norm
from breastcli.system.checkpoint import damaged_resume, described_options
from breastcli.system.distributed import ALONE, Processes
from breastcli.system.embeddings import embed_rows, views_of
from breastcli.system.extra import describe_extra, join_extra
from breastcli.system.feeding import EmbeddingFeed, Feed, ImageFeed
from breastcli.system.runfolder import RESUME
from breastcli.system.runtime import resolve_precision, seed_everything
from breastcli.system.training import Session, check_shares, make_optimizer
from breastcli.system.transfer import load_start

logger = logging.getLogger(__name__)

SMOKE_IMAGES = 64


def start_session(
    config: TrainConfig,
    data: PreparedData,
    device: torch.device,
    progress: Progress,
    saved: dict[str, Any] | None = None,
    processes: Processes = ALONE,
) -> Session:
    """Choose the images, build the network and everything around it.

    Args:
        config: the run's configuration.
        data: prepared folder.
        device: where to compute.
        progress: what to tell about embeddings being computed.
        saved: what an interrupted run left: its weights take the place of those to start from.
        processes: those that share the work.

    Raises:
        UsageError: options that do not go together, or more processes than images to share.
        UserError: the data or weights cannot be used.
        LeakError: the run to start from was trained on another split of this data set, or synthetic images were made
            from one.
    """
    _check_options(config, saved, processes)
    data, rows = _choose_rows(config, data)
    counts = _count_classes(data, rows)
    seed_everything(config.seed)
    model, options, ancestors = _build(config, data, saved)
    model = _place(model, config, device, processes)
    dtype = resolve_precision(config.precision, device)
    session = Session(
        config=config,
        data=data,
        rows=rows,
        device=device,
        dtype=dtype,
        model=model,
        options=options,
        optimizer=make_optimizer(model, config, device),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        loss=_make_loss(config, counts, device),
        feed=_make_feed(config, model, options, data, rows, dtype, progress, saved, processes),
        synthetic=describe_extra(data, rows["train"]),
        ancestors=ancestors,
        progress=progress,
        processes=processes,
    )
    check_shares(session)
    return session


def _build(
    config: TrainConfig, data: PreparedData, saved: dict[str, Any] | None
) -> tuple[Classifier, ModelOptions, list[dict[str, Any]]]:
    """Return the network with the weights to start or go on from, its options, and what it was trained on before."""
    if saved is None:
        options = complete(_model_options(config, data))
        if config.pretrained:
            require_published(config.arch)
        model = build_model(options, pretrained=config.pretrained and not config.dry_run)  # which would be downloaded
        return model, options, load_start(model, config, data.card)
    try:
        options = described_options(saved["options"])
        model = build_model(options)
        model.load_state_dict(saved["model"])
    except Exception as error:  # what is in a damaged file makes torch raise almost anything
        raise damaged_resume(Path(RESUME), error) from error
    return model, options, saved["ancestors"]


def _place(model: Classifier, config: TrainConfig, device: torch.device, processes: Processes) -> Classifier:
    """Freeze what shall not learn, and return the network where it will be trained."""
    num_frozen = freeze(model, config.freeze)
    logger.info("%s: %s parameters, %s frozen", config.arch, f"{num_parameters(model):,}", f"{num_frozen:,}")
    if processes.count > 1:
        share_batch_norm(model, processes)
    return model.to(device=device, memory_format=torch.channels_last)


def _check_options(config: TrainConfig, saved: dict[str, Any] | None, processes: Processes) -> None:
    """Refuse options that do not go together, and what several processes cannot do."""
    if config.unfreeze_at and config.freeze == "none":
        raise UsageError(f"--unfreeze-at {config.unfreeze_at}: nothing is frozen", fix="add --freeze")
    if config.unfreeze_at and config.unfreeze_at > config.epochs:
        fix = f"give at most {config.epochs}, or leave it out"
        raise UsageError(f"--unfreeze-at {config.unfreeze_at}: there are {config.epochs} epochs", fix=fix)
    if processes.count == 1:
        return
    fix = "start one process, or leave it out"
    if config.compile:
        raise UsageError("--compile: batch norm over several processes cannot be compiled", fix)
    if config.cache_embeddings == "on":
        raise UsageError("--cache-embeddings on: the head trains in one process", fix)
    if saved and saved["cached"]:
        raise UserError("this run trains its head on cached embeddings", fix="resume it with one process")


def _choose_rows(config: TrainConfig, data: PreparedData) -> tuple[PreparedData, dict[str, np.ndarray]]:
    """Return the rows to train and to validate on, and the data that they belong to: with ``--extra``, joined data."""
    magnification = parse_magnification(config.mag)
    rows = {split: data.select(split, fold=config.fold, magnification=magnification) for split in ("train", "val")}
    joined, training = join_extra(config, data, rows["train"])
    if config.smoke:
        rows = _draw_few(rows, config.seed)  # of real images, so that --extra does not change what is validated on
        training = _draw_few({"train": training}, config.seed)["train"]
    return joined, rows | {"train": training}


def _draw_few(rows: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {name: np.sort(generator.permutation(chosen)[:SMOKE_IMAGES]) for name, chosen in rows.items()}


def _count_classes(data: PreparedData, rows: dict[str, np.ndarray]) -> torch.Tensor:
    """Return the number of training images of each class (K,).

    Raises:
        UserError: a class has none. Validation images of one class only are worth a warning, not a refusal.
    """
    counts = {name: np.bincount(data.labels[chosen], minlength=len(data.classes)) for name, chosen in rows.items()}
    if not counts["train"].all():
        lacking = data.classes[int(counts["train"].argmin())]
        raise UserError(f"no training image shows {lacking}", fix="choose another --mag or --fold")
    if not counts["val"].all():
        lacking = data.classes[int(counts["val"].argmin())]
        logger.warning("no validation image shows %s: the best epoch is chosen on the other classes alone", lacking)
    return torch.from_numpy(counts["train"])


def _model_options(config: TrainConfig, data: PreparedData) -> ModelOptions:
    kind = LOSSES.get(config.loss)
    _, scale = margin_and_scale(config.loss, config.margin, config.scale)
    native = config.normalisation == "native"
    if config.normalisation == "auto":
        native = config.arch.startswith((*LIBRARIES, "hf-hub:"))
    return ModelOptions(
        arch=config.arch,
        num_classes=len(data.classes),
        size_px=data.size_px,
        dropout=config.dropout,
        attention_stage=config.attention_stage,
        reduction=config.reduction,
        head=config.head,
        last_layer=kind.last_layer,
        scale=scale,
        native_scaling=native,
        trunks=config.trunks,
        fusion=config.fusion,
    )


def _make_loss(config: TrainConfig, counts: torch.Tensor, device: torch.device) -> Loss:
    """Return the loss for training images of which each class has so many (K,)."""
    weights = class_weights_of(counts, config.imbalance)
    log_prior = log_prior_of(counts).to(device) if config.imbalance == "logit_adjustment" else None
    margin, scale = margin_and_scale(config.loss, config.margin, config.scale)
    return make_loss(config.loss, margin, scale, None if weights is None else weights.to(device), log_prior)


def _make_feed(
    config: TrainConfig,
    model: Classifier,
    options: ModelOptions,
    data: PreparedData,
    rows: dict[str, np.ndarray],
    dtype: torch.dtype,
    progress: Progress,
    saved: dict[str, Any] | None,
    processes: Processes,
) -> Feed:
    """Return what training is fed with: embeddings where only the head learns and it pays, else images.

    A resumed run goes on as it began, also when its number of epochs has changed.
    """
    policy = POLICIES[config.augment]
    device = next(model.parameters()).device
    views = views_of(policy)
    learns = {name.split(".")[0] for name, one in model.named_parameters() if one.requires_grad} - {"head"}
    if config.cache_embeddings == "on":
        _check_caching(config, learns, views)
    fits = not learns and not config.unfreeze_at and processes.count == 1
    pays = config.cache_embeddings == "on" or (config.cache_embeddings == "auto" and len(views or ()) <= config.epochs)
    pays = saved["cached"] if saved else pays
    if views is None or not (fits and pays):
        return ImageFeed(data, policy, device, dtype, config.batch_size, config.workers, processes)
    logger.info("only the head learns: each image is embedded once in %d positions", len(views))
    if config.dry_run:  # embeddings are written
        return ImageFeed(data, policy, device, dtype, config.batch_size, config.workers, processes)
    every = np.concatenate([rows["train"], rows["val"]])
    progress.begin("embeddings", len(every) * len(views), "images")
    table = embed_rows(
        model,
        options,
        data,
        every,
        views,
        dtype,
        config.batch_size,
        config.workers,
        on_batch=lambda count: progress.advance("embeddings", count),
    )
    return EmbeddingFeed(table.to(device), data.labels, every, views, dtype)


def _check_caching(config: TrainConfig, learns: set[str], views: tuple[int, ...] | None) -> None:
    """Refuse ``--cache-embeddings on`` where an embedding would not stay what it is."""
    if learns or config.unfreeze_at:
        parts = f" ({', '.join(sorted(learns))})" if learns else ""
        fix = "use --freeze trunk, no --unfreeze-at, and a network whose other parts do not learn"
        raise UsageError(f"--cache-embeddings on: more than the head learns{parts}", fix=fix)
    if views is None:
        fix = "use --augment none, light or wang"
        raise UsageError(f"--cache-embeddings on: --augment {config.augment} makes every image a new one", fix=fix)
