"""Stain normalisation of a prepared folder's images, with a reference that sees training images only."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from breastcli.config import PrepareConfig
from breastcli.data.audit import PreparedRecord
from breastcli.data.images import RejectedImageError, read_rgb
from breastcli.data.stain import PUBLISHED_MACENKO, StainReference, fit_reference, normalise_file
from breastcli.data.store import STAINED, open_array
from breastcli.errors import UserError
from breastcli.progress import Progress
from breastcli.system.runtime import resolve_device

logger = logging.getLogger(__name__)

REFERENCE_IMAGES = 64  # training images whose median stain is the reference


def normalise_rows(
    rows: list[PreparedRecord], array: Path, config: PrepareConfig, progress: Progress
) -> tuple[list[PreparedRecord], dict[str, Any]]:
    """Write ``stained.npy`` beside ``array``; return the rows with their fallbacks marked and the reference."""
    device = resolve_device(config.device)
    reference = _stain_reference(rows, array, config)
    if config.exact:
        reference = dataclasses.replace(reference, max_pixels=None)
    progress.begin("stain", len(rows), "images")
    fell_back = normalise_file(
        array,
        array.with_name(STAINED),
        len(rows),
        config.size,
        reference,
        device,
        on_chunk=lambda count: progress.advance("stain", count),
    )
    if any(fell_back):
        logger.warning("%d of %d images show too little tissue to normalise", sum(fell_back), len(rows))
    marked = [dataclasses.replace(row, stain_fallback=bad) for row, bad in zip(rows, fell_back, strict=True)]
    return marked, reference.to_json()


def _stain_reference(rows: list[PreparedRecord], array: Path, config: PrepareConfig) -> StainReference:
    """Return the reference of a given image or of training images; with folds, which leave none, a published one."""
    if config.stain_reference != "auto":
        path = Path(config.stain_reference)
        if not path.is_file():
            raise UserError(f"--stain-reference {path}: no such file", fix="give an image file, or auto")
        try:
            pixels = np.asarray(read_rgb(path))
        except RejectedImageError as rejection:
            raise UserError(f"--stain-reference {path}: {rejection}", fix="give another image") from rejection
        images = torch.tensor(pixels).permute(2, 0, 1)[None]
        return fit_reference(images, config.stain, source=path.name)
    if config.folds is not None:
        if config.stain == "macenko":
            return PUBLISHED_MACENKO
        raise UserError(
            f"--stain {config.stain} with --folds has no training images of its own: every image is tested once",
            fix="give --stain-reference FILE, or use macenko (its published reference)",
        )
    training = [number for number, row in enumerate(rows) if row.split == "train"]
    chosen = np.random.default_rng(config.seed).permutation(training)[:REFERENCE_IMAGES]
    decoded = open_array(array)
    images = torch.tensor(decoded[np.sort(chosen)]).permute(0, 3, 1, 2)
    return fit_reference(images, config.stain, source=f"median of {len(chosen)} training images")
