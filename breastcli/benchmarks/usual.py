"""The usual way to read images, which ours is compared with: a DataLoader over files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from breastcli.benchmarks import Setting

# What torchvision offers for two of our policies. Its "light" mirrors only and does not turn by right angles, less work
# than ours does; its rotation takes the nearest pixel and leaves corners black, where ours interpolates and reflects.
TRANSFORMS = {
    "paper": (v2.RandomHorizontalFlip(), v2.RandomRotation(180)),
    "light": (v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()),
}


class Files(Dataset):
    """Image files with their labels: decoded, resized and augmented one at a time."""

    def __init__(self, paths: Sequence[Path], labels: np.ndarray, transform: v2.Transform) -> None:
        self.paths, self.labels, self.transform = paths, labels, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.open(self.paths[index]).convert("RGB")), int(self.labels[index])


def file_loader(
    paths: Sequence[Path],
    labels: np.ndarray,
    size_px: int,
    setting: Setting,
    transforms: Sequence[v2.Transform] = (),
    *,
    shuffle: bool = False,
) -> DataLoader:
    """Return a loader of batches (B, 3, size, size) float32 in [-1, 1] and labels (B,), with a process per core.

    Args:
        paths: n files.
        labels: (n,) class indices.
        size_px: side that images are resized to.
        setting: says batch size, workers and device.
        transforms: augmentation of each resized uint8 image.
        shuffle: whether each pass has another order.
    """
    steps = [v2.ToImage(), v2.Resize((size_px, size_px), antialias=True), *transforms]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    return DataLoader(
        Files(paths, labels, v2.Compose(steps)),
        setting.batch_size,
        shuffle=shuffle,
        num_workers=setting.num_workers,
        pin_memory=setting.device.type == "cuda",
        persistent_workers=True,
    )
