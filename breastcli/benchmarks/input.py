"""Augmented batches from the prepared array, beside a DataLoader over image files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from breastcli.benchmarks import COMPARISONS, SIZE_PX, Comparison, Setting
from breastcli.benchmarks.samples import choose_records
from breastcli.benchmarks.timing import Pair, compare
from breastcli.data.audit import PreparedRecord
from breastcli.data.augment import POLICIES, Draws
from breastcli.data.journal import decode_into
from breastcli.data.loading import load_batches, make_batches
from breastcli.data.store import PARTIAL, PreparedData
from breastcli.errors import UserError
from breastcli.progress import SILENT

MAX_IMAGES = 256
# What torchvision offers for two of our policies; its "light" does not turn by right angles.
TRANSFORMS = {
    "paper": (v2.RandomHorizontalFlip(), v2.RandomRotation(180)),
    "light": (v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()),
}


class Files(Dataset):
    """The usual input path: decode, resize and augment one file at a time."""

    def __init__(self, paths: list[Path], transform: v2.Transform) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


def compare_input(setting: Setting) -> list[Pair]:
    """Time one pass over the images, augmented and on the device, for two policies.

    The decoding into the array is not part of our time: ``prepare`` pays it once, a DataLoader at every epoch.
    """
    assert setting.raw is not None
    with tempfile.TemporaryDirectory() as folder:
        data, paths = _prepare(setting.raw, Path(folder), setting)
        return [_compare_policy(policy, data, paths, setting) for policy in TRANSFORMS]


def _prepare(raw: Path, folder: Path, setting: Setting) -> tuple[PreparedData, list[Path]]:
    """Decode the images into an array as ``prepare`` does; return it with their files.

    Raises:
        UserError: no file can be read.
    """
    adapter, records = choose_records(raw, MAX_IMAGES)
    size_px, workers = setting.size_px or SIZE_PX, setting.workers or os.cpu_count() or 1
    partial = folder / PARTIAL
    entries = decode_into(partial, records, raw, size_px, workers, resume=False, progress=SILENT)
    rows = [
        PreparedRecord(record, "train", None, entry.width_px, entry.height_px, entry.pixel_hash)
        for record, entry in zip(records, entries, strict=True)
        if not entry.reason
    ]
    if not rows:
        raise UserError(f"{raw}: no readable image", fix="choose another --raw")
    data = PreparedData(partial, {"classes": list(adapter.classes), "size_px": size_px}, rows)
    return data, [raw / row.record.path for row in rows]


def _compare_policy(policy: str, data: PreparedData, paths: list[Path], setting: Setting) -> Pair:
    device, side = setting.device, data.size_px
    processes = setting.workers or os.cpu_count() or 1
    steps = [v2.ToImage(), v2.Resize((side, side), antialias=True), *TRANSFORMS[policy]]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    loader = DataLoader(
        Files(paths, v2.Compose(steps)),
        setting.batch_size,
        num_workers=processes,
        pin_memory=device.type == "cuda",
        persistent_workers=True,
    )
    generator = torch.Generator(device).manual_seed(setting.seed)
    batches = make_batches(np.random.default_rng(setting.seed).permutation(len(paths)), setting.batch_size)

    def ours() -> None:
        for batch in load_batches(data, batches, device, setting.workers):
            POLICIES[policy](batch.images, Draws(generator, len(batch.images)))

    def theirs() -> None:
        for images in loader:
            images.to(device, non_blocking=True)

    title = f"batches of {side} px, augmentation {policy} / DataLoader over files, {processes} workers"
    return compare(title, "images/s", len(paths), ours, theirs, setting.rounds, device)


COMPARISONS.register("input")(Comparison(compare_input, needs_images=True))
