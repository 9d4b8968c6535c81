"""The start of a GAN's training: options checked, images chosen, networks built."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from breastcli.config import SynthesizeConfig
from breastcli.data.store import PreparedData, difference
from breastcli.errors import UsageError, UserError
from breastcli.gan.conditions import Condition, find_conditions, keep_rows
from breastcli.gan.diffaugment import parse_diffaugment
from breastcli.gan.networks import SIZES_PX, Critic, GanOptions, Generator
from breastcli.gan.objectives import OBJECTIVES
from breastcli.gan.training import BETAS, FIGURES, STATE_SHAPE, GanSession, RealImages
from breastcli.parsing import parse_classes, parse_magnification
from breastcli.shapes import check_shape
from breastcli.system.checkpoint import damaged_resume, load_resume
from breastcli.system.distributed import Processes
from breastcli.system.runtime import mix_seed, resolve_precision

logger = logging.getLogger(__name__)

RESUMED_SHAPE = STATE_SHAPE | dict.fromkeys(("fingerprint", "split_fingerprint", "precision"), str)
RESUMED_SHAPE |= {"collapse": (str, None)}


def check_fit(config: SynthesizeConfig, processes: Processes) -> None:
    """Refuse options that a fit cannot accept.

    Raises:
        UsageError: one of them.
    """
    if config.size not in SIZES_PX:
        raise UsageError(f"--size {config.size}: not supported", fix=f"use one of {', '.join(map(str, SIZES_PX))}")
    if config.precision == "fp16":
        raise UsageError("--precision fp16: gradient penalties overflow in it", fix="use bf16, fp32 or auto")
    if config.batch_size % processes.count:
        fix = "make it divide"
        raise UsageError(f"--batch-size {config.batch_size}: there are {processes.count} processes", fix)


def with_defaults(config: SynthesizeConfig) -> SynthesizeConfig:
    """Return the configuration with the objective's own number of critic steps where none is given."""
    return replace(config, n_critic=config.n_critic or OBJECTIVES[config.objective].n_critic)


def start_fit(
    config: SynthesizeConfig, data: PreparedData, processes: Processes, device: torch.device
) -> tuple[GanSession, dict[str, Any]]:
    """Choose the training images and build the networks; return them with what a checkpoint must know."""
    rows = data.select("train", fold=config.fold, magnification=parse_magnification(config.mag))
    counts = np.bincount(data.labels[rows], minlength=len(data.classes)).tolist()
    subtypes = sorted({data.rows[row].record.subtype for row in rows} - {""})
    kept = parse_classes(config.classes, (*subtypes, *data.classes))
    rows = keep_rows(data, rows, kept)
    if not len(rows):
        raise UserError(
            f"{data.folder} has no training images of {config.classes}", fix="choose another --mag or --fold"
        )
    conditions, members = find_conditions(data, rows, config.condition)
    options = GanOptions(config.size, len(conditions), config.width)
    images = RealImages(data, rows, config.size)
    dtype = resolve_precision(config.precision, device)
    session = start_gan(config, options, conditions, members, images, device, dtype, processes)
    logger.info("%d images of %s", len(rows), ", ".join(f"{one.name} ({one.num_images})" for one in conditions))
    facts = {
        "data": str(data.folder),
        "dataset": data.card,
        "fold": config.fold,
        "mag": config.mag,
        "classes": list(kept),
        "class_counts": dict(zip(data.classes, counts, strict=True)),
        "turn": config.turn,
        "smoke": config.smoke,
        "collapse": None,
    }
    return session, facts


def start_gan(
    config: SynthesizeConfig,
    options: GanOptions,
    conditions: list[Condition],
    members: np.ndarray,
    images: RealImages,
    device: torch.device,
    dtype: torch.dtype,
    processes: Processes,
) -> GanSession:
    """Build networks and optimisers; the same in every process, since all draw from the same seed."""
    torch.manual_seed(mix_seed(config.seed))
    generator, critic = Generator(options), Critic(options)
    placed = [one.to(device=device, memory_format=torch.channels_last) for one in (generator, critic)]
    average = copy.deepcopy(generator).requires_grad_(False)
    fused = device.type != "mps"
    optimizers = [torch.optim.Adam(one.parameters(), config.lr, BETAS, fused=fused) for one in placed]
    return GanSession(
        config=config,
        options=options,
        conditions=conditions,
        members=[np.flatnonzero(members == number) for number in range(len(conditions))],
        images=images,
        device=device,
        dtype=dtype,
        processes=processes,
        generator=generator,
        average=average,
        critic=critic,
        generator_optimizer=optimizers[0],
        critic_optimizer=optimizers[1],
        augmentations=parse_diffaugment(config.diffaugment),
        sums=torch.zeros(2, len(FIGURES), device=device),
    )


def resume_fit(session: GanSession, file: Path, facts: dict[str, Any]) -> None:
    """Put a session where an interrupted fit stopped.

    Args:
        session: freshly started.
        file: ``resume.pt`` of the fit.
        facts: of the session; they name the data set, and get the collapse that was seen before.

    Raises:
        UserError: the file is damaged, or of a fit to other images or in other arithmetic.
    """
    saved = load_resume(file, session.device)
    check_shape(saved, RESUMED_SHAPE, file, "start again with --overwrite")
    what = difference(saved, facts["dataset"])
    if what:
        raise UserError(f"{file.parents[1]} was fitted to {what} of {facts['data']}", fix="use --overwrite")
    if saved["precision"] != str(session.dtype):
        raise UserError(f"{file.parents[1]} was fitted in {saved['precision']}", fix="resume with the same --precision")
    try:
        session.restore(saved)
    except Exception as error:  # what is in a damaged file makes torch raise almost anything
        raise damaged_resume(file, error) from error
    facts["collapse"] = saved["collapse"]
    logger.info("resuming after %.1f kimg", session.images_seen / 1000)
