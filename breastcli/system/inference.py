"""Probabilities of many images from one network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from breastcli.data.augment import dihedral
from breastcli.data.loading import to_network
from breastcli.models import Classifier
from breastcli.system.runtime import autocast

NUM_VIEWS = {"none": 1, "d4": 8}


@torch.inference_mode()
def predict_log_probs(
    model: Classifier,
    batches: Iterable[Tensor],
    device: torch.device,
    dtype: torch.dtype,
    tta: str = "none",
    on_batch: Callable[[int], None] = lambda count: None,
    on_embedding: Callable[[Tensor], None] = lambda embedding: None,
) -> Tensor:
    """Return the logarithms of the class probabilities of many images.

    Args:
        model: network on ``device``; it is put into evaluation mode.
        batches: uint8 images (B, 3, H, W) on ``device``.
        device: where to compute.
        dtype: arithmetic of the network; the softmax is in float32.
        tta: "none", or "d4" for the mean probability over the eight flips and turns of each image.
        on_batch: called with the size of every finished batch.
        on_embedding: called with the embedding (B, D) float32 of every batch as it is.

    Returns:
        (N, K) float64 on the CPU.
    """
    model.eval()
    parts = []
    for images in batches:
        views = []
        for element in range(NUM_VIEWS[tta]):
            with autocast(device, dtype):
                embedding = model.embed(model.features(to_network(dihedral(images, element))))
                logits = model.head(embedding)
            if element == 0:
                on_embedding(embedding.float())
            views.append(logits.float().log_softmax(dim=1))
        parts.append(torch.stack(views).logsumexp(dim=0) - math.log(len(views)))
        on_batch(len(images))
    return torch.cat(parts).cpu().double()
