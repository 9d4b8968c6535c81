"""Measurements of size and speed: of networks, and of our code beside what a user would otherwise run."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from breastcli.benchmarks.timing import Pair
from breastcli.registry import Registry

SIZE_PX = 224  # of images where neither the user nor a network says otherwise


@dataclass(frozen=True)
class Setting:
    """What every measurement is told.

    Attributes:
        device: where networks and image operations compute.
        dtype: arithmetic of the networks.
        size_px: side of the images, or None for what is usual.
        batch_size: images per step.
        rounds: figures per measurement.
        workers: threads or processes that read images, or None for one per core.
        seed: of everything random.
        raw: folder of a raw data set; None where no measurement needs images.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    size_px: int | None = None
    batch_size: int = 32
    rounds: int = 5
    workers: int | None = None
    seed: int = 0
    raw: Path | None = None

    @property
    def num_workers(self) -> int:
        """Threads or processes of whoever reads files with all cores."""
        return self.workers or os.cpu_count() or 1

    @property
    def arithmetic(self) -> str:
        """``dtype`` as a title names it."""
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Comparison:
    """Our code beside that of others, by the name of ``breastcli benchmark NAME``.

    Attributes:
        run: does the same work with both.
        needs_images: whether it reads ``Setting.raw``.
    """

    run: Callable[[Setting], list[Pair]]
    needs_images: bool = False


COMPARISONS: Registry[Comparison] = Registry("comparison", "breastcli.benchmarks")
