"""What one step of training is fed with: augmented images, or embeddings that were computed before."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from breastcli.data.augment import Augmentation, Draws, draw_elements
from breastcli.data.loading import load_batches, make_batches
from breastcli.data.store import PreparedData
from breastcli.models import Classifier
from breastcli.system.distributed import ALONE, Processes
from breastcli.system.inference import predict_log_probs
from breastcli.system.runtime import autocast


class Feed(ABC):
    """Batches for a network, and what the network does with them."""

    @abstractmethod
    def batches(
        self, rows: list[np.ndarray], elements: list[np.ndarray] | None, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and labels (B,) of each batch of rows, in the positions given or drawn.

        Where several processes share a batch, what is yielded is this one's share of it.
        """

    @abstractmethod
    def logits(self, model: Classifier, inputs: Tensor) -> Tensor:
        """Return logits (B, K) of one batch of inputs."""

    @abstractmethod
    def log_probs(self, model: Classifier, rows: np.ndarray, on_batch: Callable[[int], None]) -> Tensor:
        """Return log-probabilities (n, K) float64, on the CPU, of rows as they are; ``model`` is set to evaluate."""


class ImageFeed(Feed):
    """Images from the store, augmented on the device.

    Args:
        data: prepared folder.
        augment: policy of the training images.
        device: where the network is.
        dtype: arithmetic of the network in evaluation.
        batch_size: images per step in evaluation.
        workers: threads that gather batches.
        processes: those that share every batch of training images.
    """

    def __init__(
        self,
        data: PreparedData,
        augment: Augmentation,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
        workers: int | None,
        processes: Processes = ALONE,
    ) -> None:
        self.data = data
        self.augment = augment
        self.device = device
        self.dtype = dtype
        self.batch_size = batch_size
        self.workers = workers
        self.processes = processes

    def batches(
        self, rows: list[np.ndarray], elements: list[np.ndarray] | None, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See ``Feed``; inputs are (B, 3, H, W) in [-1, 1]."""
        parts = [self.processes.share(len(batch)) for batch in rows]
        own = [batch[part] for batch, part in zip(rows, parts, strict=True)]
        for number, batch in enumerate(load_batches(self.data, own, self.device, self.workers)):
            part = parts[number]
            placed = None if elements is None else torch.from_numpy(elements[number][part]).to(self.device)
            yield self.augment(batch.images, Draws(generator, len(rows[number]), part), placed), batch.labels

    def logits(self, model: Classifier, inputs: Tensor) -> Tensor:
        """See ``Feed``."""
        return model(inputs)

    def log_probs(self, model: Classifier, rows: np.ndarray, on_batch: Callable[[int], None]) -> Tensor:
        """See ``Feed``."""
        batches = load_batches(self.data, make_batches(rows, self.batch_size), self.device, self.workers)
        return predict_log_probs(model, (batch.images for batch in batches), self.device, self.dtype, on_batch=on_batch)


class EmbeddingFeed(Feed):
    """Embeddings of a frozen network; only its head runs, in one process.

    The figures are those of an ``ImageFeed`` with the same policy up to rounding, because the policy shows each image
    in the same positions, drawn from the same random numbers.

    Args:
        table: (V, n, D) embeddings of n images in V positions, on the device.
        labels: (N,) classes of all images of the data set.
        rows: (n,) the row number of each embedding.
        views: the V positions.
        dtype: arithmetic of the network.
    """

    def __init__(
        self, table: Tensor, labels: np.ndarray, rows: np.ndarray, views: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.table = table
        self.dtype = dtype
        self.turning = len(views) == 8
        self.labels = torch.from_numpy(labels).to(table.device)
        self.place_of = np.full(len(labels), -1)
        self.place_of[rows] = np.arange(len(rows))
        self.view_of = torch.zeros(8, dtype=torch.long, device=table.device)
        self.view_of[list(views)] = torch.arange(len(views), device=table.device)

    def batches(
        self, rows: list[np.ndarray], elements: list[np.ndarray] | None, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See ``Feed``; inputs are (B, D)."""
        device = self.table.device
        for number, batch in enumerate(rows):
            placed = torch.zeros(len(batch), dtype=torch.long, device=device)
            if elements is not None:
                placed = torch.from_numpy(elements[number]).to(device)
            elif self.turning:
                placed = draw_elements(Draws(generator, len(batch)))
            chosen = torch.from_numpy(batch).to(device)
            yield (
                self.table[self.view_of[placed], torch.from_numpy(self.place_of[batch]).to(device)],
                self.labels[chosen],
            )

    def logits(self, model: Classifier, inputs: Tensor) -> Tensor:
        """See ``Feed``."""
        return model.head(inputs)

    @torch.inference_mode()
    def log_probs(self, model: Classifier, rows: np.ndarray, on_batch: Callable[[int], None]) -> Tensor:
        """See ``Feed``."""
        model.eval()
        inputs = self.table[self.view_of[0], torch.from_numpy(self.place_of[rows]).to(self.table.device)]
        with autocast(self.table.device, self.dtype):
            logits = model.head(inputs)
        on_batch(len(rows))
        return logits.float().log_softmax(dim=1).cpu().double()
