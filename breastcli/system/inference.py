"""Probabilities of many images from one network."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from breastcli.data.augment import dihedral
from breastcli.data.loading import to_network
from breastcli.models import Classifier
from breastcli.system.runtime import autocast

NUM_VIEWS = {"none": 1, "d4": 8}


@torch.inference_mode()
def predict_logits(
    model: Classifier,
    batches: Iterable[Tensor],
    device: torch.device,
    dtype: torch.dtype,
    on_batch: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """Return the logits (N, K) float32, on the CPU, of uint8 batches (B, 3, H, W)."""
    model.eval()
    parts = []
    for images in batches:
        with autocast(device, dtype):
            parts.append(model(to_network(images)).float())
        on_batch(len(images))
    return torch.cat(parts).cpu()


@torch.inference_mode()
def predict_probs(
    model: Classifier,
    batches: Iterable[Tensor],
    device: torch.device,
    dtype: torch.dtype,
    tta: str = "none",
    on_batch: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """Return class probabilities (N, K) float64 of uint8 batches (B, 3, H, W).

    With ``tta="d4"`` they are the mean over the eight flips and turns of each image.
    """
    model.eval()
    parts = []
    for images in batches:
        views = []
        for element in range(NUM_VIEWS[tta]):
            with autocast(device, dtype):
                logits = model(to_network(dihedral(images, element)))
            views.append(logits.double().softmax(dim=1))
        parts.append(torch.stack(views).mean(dim=0))
        on_batch(len(images))
    return torch.cat(parts).cpu().numpy()
