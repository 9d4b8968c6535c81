"""Augmented batches from the prepared array, beside a DataLoader over image files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from breastcli.benchmarks import COMPARISONS, Comparison, Setting
from breastcli.benchmarks.samples import prepare_sample
from breastcli.benchmarks.timing import Pair, compare
from breastcli.benchmarks.usual import TRANSFORMS, file_loader
from breastcli.data.augment import POLICIES, Draws
from breastcli.data.loading import load_batches, make_batches
from breastcli.data.store import PreparedData

MAX_IMAGES = 256


def compare_input(setting: Setting) -> list[Pair]:
    """Time one pass over the images, augmented and on the device, for two policies.

    The decoding into the array is not part of our time: ``prepare`` pays it once, a DataLoader at every epoch. For the
    policy of right angles the rival does less than we do, see ``TRANSFORMS``.
    """
    with tempfile.TemporaryDirectory() as folder:
        data, paths = prepare_sample(Path(folder), setting, MAX_IMAGES)
        return [_compare_policy(policy, data, paths, setting) for policy in TRANSFORMS]


def _compare_policy(policy: str, data: PreparedData, paths: list[Path], setting: Setting) -> Pair:
    device, side = setting.device, data.size_px
    loader = file_loader(paths, data.labels, side, setting, TRANSFORMS[policy])
    generator = torch.Generator(device).manual_seed(setting.seed)
    batches = make_batches(np.random.default_rng(setting.seed).permutation(len(paths)), setting.batch_size)

    def ours() -> None:
        for batch in load_batches(data, batches, device, setting.workers):
            POLICIES[policy](batch.images, Draws(generator, len(batch.images)))

    def theirs() -> None:
        for images, labels in loader:
            images.to(device, non_blocking=True)
            labels.to(device, non_blocking=True)

    title = f"batches of {side} px, augmentation {policy} / DataLoader over files, {setting.num_workers} workers"
    return compare(title, "images/s", len(paths), ours, theirs, setting.rounds, device)


COMPARISONS.register("input")(Comparison(compare_input, needs_images=True))
