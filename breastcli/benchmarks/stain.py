"""Macenko's stain normalisation beside torchstain's."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from breastcli.benchmarks import COMPARISONS, Comparison, Setting
from breastcli.benchmarks.samples import HEIGHT_PX, WIDTH_PX, choose_records
from breastcli.benchmarks.timing import Pair, Run, compare, find_rival
from breastcli.data.images import RejectedImageError, read_rgb
from breastcli.data.stain import StainReference, fit_reference, normalise_stain
from breastcli.errors import UserError

NUM_IMAGES = 16
STATISTICS = {"20,000 pixels": 20_000, "every pixel": None}  # what ours measures the stain on; torchstain on all


def compare_stain(setting: Setting) -> list[Pair]:
    """Time the normalisation of fields of BreakHis' size, from and to 8-bit images on the device.

    Raises:
        UserError: the images are not H&E-stained, or show too little tissue.
    """
    assert setting.raw is not None
    adapter, records = choose_records(setting.raw, NUM_IMAGES)
    if not adapter.stained:
        raise UserError(f"{adapter.name} is not H&E-stained", fix="choose another --raw")
    fields = []
    for record in records:
        with contextlib.suppress(RejectedImageError):
            fields.append(read_rgb(setting.raw / record.path))
    if not fields:
        raise UserError(f"{setting.raw}: no readable image", fix="choose another --raw")
    arrays = [np.asarray(field.resize((WIDTH_PX, HEIGHT_PX), Image.Resampling.BICUBIC)) for field in fields]
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous().to(setting.device)
    reference = fit_reference(images[:1], "macenko", source="benchmark")
    theirs = find_rival("torchstain", lambda: _torchstain(images))
    pairs = []
    for name, max_pixels in STATISTICS.items():

        def ours(measured: StainReference = dataclasses.replace(reference, max_pixels=max_pixels)) -> None:  # noqa: B008
            normalise_stain(images, measured)

        title = f"Macenko at {WIDTH_PX}x{HEIGHT_PX}, {name} / torchstain"
        pairs.append(compare(title, "images/s", len(images), ours, theirs, setting.rounds, setting.device))
    return pairs


def _torchstain(images: Tensor) -> Run:
    """Return torchstain's normalisation of each image, on the device of the images."""
    from torchstain.torch.normalizers.macenko import TorchMacenkoNormalizer

    rival = TorchMacenkoNormalizer()
    rival.fit(images[0])

    def run() -> None:
        for image in images:
            rival.normalize(image, stains=False)

    return run


COMPARISONS.register("stain")(Comparison(compare_stain, needs_images=True))
