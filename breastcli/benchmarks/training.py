"""A whole epoch of training, from stored images to updated weights, beside the usual loop in float32."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from breastcli.benchmarks import COMPARISONS, Comparison, Setting
from breastcli.benchmarks.samples import prepare_sample
from breastcli.benchmarks.timing import Pair, Run, Waiting, compare
from breastcli.benchmarks.usual import TRANSFORMS, file_loader
from breastcli.config import TrainConfig
from breastcli.progress import SILENT
from breastcli.system.feeding import ImageFeed
from breastcli.system.runtime import DTYPES
from breastcli.system.session import start_session
from breastcli.system.training import Session, train_epoch

ARCH = "resnet50"
POLICY = "paper"
MAX_IMAGES = 72  # of which every ninth is for validation, and 64 are trained on
NAMES = {dtype: name for name, dtype in DTYPES.items()}  # what ``--precision`` calls an arithmetic


class WatchedFeed(ImageFeed):
    """An ``ImageFeed`` that tells how long training waits for its batches.

    Waiting takes in augmentation as far as the processor does it: all of it there, on a GPU the asking for it.
    """

    def __init__(self, feed: ImageFeed, waiting: Waiting) -> None:
        super().__init__(feed.data, feed.augment, feed.device, feed.dtype, feed.batch_size, feed.workers)
        self.waiting = waiting

    def batches(
        self, rows: list[np.ndarray], elements: list[np.ndarray] | None, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See ``ImageFeed``."""
        return self.waiting.watch(super().batches(rows, elements, generator))


def compare_training(setting: Setting) -> list[Pair]:
    """Time epochs of the same images: ours as ``train`` takes them, theirs from files, in float32, channels first.

    The remark says for which share of the epochs the loops wait for batches. The first one, which no step hides, weighs
    more in these short epochs than in long ones.
    """
    with tempfile.TemporaryDirectory() as folder:
        data, paths = prepare_sample(Path(folder), setting, MAX_IMAGES)
        config = TrainConfig(
            arch=ARCH,
            augment=POLICY,
            batch_size=setting.batch_size,
            precision=NAMES[setting.dtype],
            workers=setting.workers,
            seed=setting.seed,
        )
        session = start_session(config, data, setting.device, SILENT)
        assert isinstance(session.feed, ImageFeed)
        our_waiting, their_waiting = Waiting(), Waiting()
        session.feed = WatchedFeed(session.feed, our_waiting)
        theirs = _usual_loop(session, [paths[row] for row in session.rows["train"]], setting, their_waiting)

        def ours() -> None:
            train_epoch(session, session.model, epoch=1)

        rival = f"loop over files, {setting.num_workers} workers, float32"
        title = f"training of {ARCH} at {data.size_px} px, {setting.arithmetic} / {rival}"
        num_images = len(session.rows["train"])
        pair = compare(title, "images/s", num_images, ours, theirs, setting.rounds, setting.device)
        assert pair.theirs is not None
        shares = our_waiting.share(pair.ours), their_waiting.share(pair.theirs)
        remark = "waiting for input: {:.1%} of ours, {:.1%} of theirs".format(*shares)
        return [dataclasses.replace(pair, remark=remark)]


def _usual_loop(session: Session, paths: list[Path], setting: Setting, waiting: Waiting) -> Run:
    """Return an epoch over files (in the order of the training rows) with the session's network as it is now."""
    device = setting.device
    network = copy.deepcopy(session.model).to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.Adam(network.parameters(), lr=session.config.lr)
    labels = session.data.labels[session.rows["train"]]
    loader = file_loader(paths, labels, session.data.size_px, setting, TRANSFORMS[POLICY], shuffle=True)

    def run() -> None:
        network.train()
        for images, targets in waiting.watch(loader):
            logits = network(images.to(device, non_blocking=True))
            loss = functional.cross_entropy(logits, targets.to(device, non_blocking=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


COMPARISONS.register("training")(Comparison(compare_training, needs_images=True))
