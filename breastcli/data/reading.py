"""Image files that belong to no prepared folder, read and prepared as a run's own data set was."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from breastcli.data.datasets import Rejection, survey
from breastcli.data.images import Decoded, decode_in_order
from breastcli.data.stain import StainReference, normalise_stain
from breastcli.errors import UserError, visible

logger = logging.getLogger(__name__)


def find_files(names: Iterable[str]) -> list[Path]:
    """Return the named files and the images below the named folders, each once.

    Raises:
        UserError: a name does not exist, or there is no image.
    """
    files: list[Path] = []
    for path in map(Path, names):
        if path.is_dir():
            found, obstacles = survey(path)
            files += found
            for one in obstacles:
                logger.warning("left out %s: %s", path / one.path, one.reason)
        elif os.path.lexists(path):
            files.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    if not files:
        raise UserError(f"no image file below {', '.join(names)}", fix="give PNG, JPEG, TIFF or BMP files")
    return list(dict.fromkeys(files))


class FileReader:
    """Reads, resizes and stain-normalises image files, leaving out those that cannot be read.

    Args:
        files: to read.
        size_px: side of the resized images.
        stain: the reference of the run's data set as its checkpoint keeps it, or None.
        workers: threads that decode; None for one per core.

    Attributes:
        kept: the files that were read so far, in order.
        sizes: their width and height before resizing.
        rejected: the others so far.
    """

    def __init__(self, files: list[Path], size_px: int, stain: dict[str, Any] | None, workers: int | None) -> None:
        self.files = files
        self.size_px = size_px
        self.reference = StainReference.from_json(stain) if stain else None
        self.workers = workers or os.cpu_count() or 1
        self.kept: list[Path] = []
        self.sizes: list[tuple[int, int]] = []
        self.rejected: list[Rejection] = []

    def batches(
        self, batch_size: int, device: torch.device, on_file: Callable[[], None] = lambda: None
    ) -> Iterator[Tensor]:
        """Yield uint8 batches (B, 3, H, W) on the device; ``on_file`` is called after every file.

        Raises:
            UserError: no file can be read.
        """
        batches = self._batches(batch_size, device, on_file)
        first = next(batches, None)
        if first is None:
            raise UserError(
                f"none of the {len(self.files)} files is a readable image", fix=f"see why: {self.rejected[0].reason}"
            )
        return chain([first], batches)

    def _batches(self, batch_size: int, device: torch.device, on_file: Callable[[], None]) -> Iterator[Tensor]:
        images = self._readable(on_file)
        while chunk := list(islice(images, batch_size)):
            pixels = torch.from_numpy(np.stack([image.pixels for image in chunk])).to(device).permute(0, 3, 1, 2)
            if self.reference is not None:
                pixels, failed = normalise_stain(pixels, self.reference)
                if failed.any():
                    logger.warning("%d images show too little tissue to normalise", int(failed.sum()))
            yield pixels.contiguous(memory_format=torch.channels_last)

    def _readable(self, on_file: Callable[[], None]) -> Iterator[Decoded]:
        """Yield the images that could be read, sorting the files."""
        decoded = decode_in_order(self.files, self.size_px, self.workers, inspect=False)
        for file, image in zip(self.files, decoded, strict=True):
            on_file()
            if image.pixels is None:
                self.rejected.append(Rejection(visible(str(file)), image.reason))
                logger.warning("left out %s: %s", file, image.reason)
            else:
                self.kept.append(file)
                self.sizes.append((image.width_px, image.height_px))
                yield image
