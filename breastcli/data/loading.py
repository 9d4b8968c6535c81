"""Batches from the memory-mapped array, gathered one step ahead of the network."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from breastcli.data.store import PreparedData

LOOKAHEAD = 2  # batches ready beyond those being gathered


@dataclass(frozen=True)
class Batch:
    """Images and labels on the network's device.

    Attributes:
        images: (B, 3, H, W) uint8 with channels-last strides.
        labels: (B,) int64.
    """

    images: Tensor
    labels: Tensor


def make_batches(order: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Cut row numbers into batches of nearly equal size, at most ``batch_size``.

    Nearly equal, because a last batch of one image cannot go through batch norm.
    """
    return np.array_split(order, -(-len(order) // batch_size))


def load_batches(
    data: PreparedData, batches: list[np.ndarray], device: torch.device, workers: int | None = None
) -> Iterator[Batch]:
    """Yield the batches in order; threads (one unless told otherwise) gather the next while the network works."""
    threads = workers or 1
    lookahead = LOOKAHEAD + threads

    def gather(rows: np.ndarray) -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(data.images[rows])  # a copy: fancy indexing reads the pages now
        labels = torch.from_numpy(data.labels[rows])
        return (images.pin_memory(), labels.pin_memory()) if device.type == "cuda" else (images, labels)

    with ThreadPoolExecutor(threads) as pool:
        waiting: deque = deque()
        for position in range(len(batches) + lookahead):
            if position < len(batches):
                waiting.append(pool.submit(gather, batches[position]))
            if position >= lookahead:
                images, labels = waiting.popleft().result()
                yield Batch(
                    images.to(device, non_blocking=True).permute(0, 3, 1, 2), labels.to(device, non_blocking=True)
                )


def to_network(images: Tensor) -> Tensor:
    """Return (B, 3, H, W) uint8 images as float32 in [-1, 1], keeping their memory layout."""
    return images.float().mul_(2 / 255).sub_(1)
