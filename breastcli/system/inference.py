"""Probabilities of many images from one network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from breastcli.data.augment import dihedral
from breastcli.data.loading import load_batches, make_batches, to_network
from breastcli.data.store import PreparedData
from breastcli.errors import UserError
from breastcli.models import Classifier
from breastcli.progress import Progress
from breastcli.system.distributed import ALONE, Processes
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


@dataclass(frozen=True)
class Predictor:
    """A network, the images that it can be asked about, and how it is asked.

    Attributes:
        model: network on ``device``.
        data: where the images are.
        device: where to compute.
        dtype: arithmetic of the network.
        tta: test-time augmentation, as in ``predict_log_probs``.
        batch_size: images per step.
        workers: threads that gather images; None for one.
        progress: told of every batch.
        processes: those that share the images; every one gets all probabilities.
    """

    model: Classifier
    data: PreparedData
    device: torch.device
    dtype: torch.dtype
    tta: str
    batch_size: int
    workers: int | None
    progress: Progress
    processes: Processes = ALONE

    def __call__(
        self,
        rows: np.ndarray,
        task: str,
        change: Callable[[Tensor], Tensor] = lambda images: images,
        on_embedding: Callable[[Tensor], None] = lambda embedding: None,
    ) -> np.ndarray:
        """Return the class probabilities (n, K) float64 of images.

        Args:
            rows: (n,) row numbers.
            task: what progress calls it.
            change: applied to every batch (B, 3, H, W) uint8 before all else.
            on_embedding: as in ``predict_log_probs``, for this process' own images.

        Raises:
            UserError: there are more processes than images.
        """
        if self.processes.count > len(rows):
            problem = f"{self.processes.count} processes cannot share the {len(rows)} images of {task}"
            raise UserError(problem, fix="start fewer")
        own = rows[self.processes.share(len(rows))]
        batches = make_batches(own, self.batch_size)
        self.progress.begin(task, len(own), "images")
        log_probs = predict_log_probs(
            self.model,
            (change(batch.images) for batch in load_batches(self.data, batches, self.device, self.workers)),
            self.device,
            self.dtype,
            self.tta,
            on_batch=lambda count: self.progress.advance(task, count),
            on_embedding=on_embedding,
        )
        return self.processes.gather(log_probs.exp(), len(rows)).numpy()
