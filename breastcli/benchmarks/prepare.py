"""From image files to one array, with and without stain normalisation, beside a loop over the files."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from breastcli.benchmarks import COMPARISONS, Comparison, Setting
from breastcli.benchmarks.samples import prepare_sample
from breastcli.benchmarks.timing import CPU, Pair, Run, compare, find_rival, measure
from breastcli.data.datasets import find_dataset
from breastcli.data.journal import decode_into
from breastcli.data.stain import PUBLISHED_MACENKO, normalise_file
from breastcli.data.store import IMAGES, PARTIAL, STAINED
from breastcli.progress import SILENT
from breastcli.records import ImageRecord

logger = logging.getLogger(__name__)

MAX_IMAGES = 64


def compare_prepare(setting: Setting) -> list[Pair]:
    """Time ours as ``prepare`` does it, with all cores, and theirs as scripts do it, one file after another.

    Both normalise to the published reference: we after resizing, as ``prepare`` does, torchstain's users before. We
    also hash the files' pixels and keep a journal. A data set that is not H&E-stained is only decoded and resized.
    """
    assert setting.raw is not None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, paths = prepare_sample(folder, setting, MAX_IMAGES)  # tells which files can be read
        records, size_px = [row.record for row in data.rows], data.size_px

        def pair(title: str, theirs: Run | str, *, stained: bool) -> Pair:
            def ours() -> None:
                make_array(records, folder, size_px, setting, stained=stained)

            return compare(title, "images/s", len(paths), ours, theirs, setting.rounds, setting.device)

        what, target = f"files to {size_px} px, {setting.num_workers} threads", folder / "theirs.npy"
        plain = pair(f"{what} / Pillow, one by one", _loop(paths, size_px, target), stained=False)
        decoding = measure(lambda: _decode(paths, setting.num_workers), CPU, len(plain.ours.seconds))
        share = decoding.median_s / plain.ours.median_s
        plain = dataclasses.replace(plain, remark=f"decoding alone, by all threads, takes {share:.0%} of our time")
        if not find_dataset("auto", setting.raw).stained:
            logger.warning("%s is not H&E-stained: prepared without normalisation only", setting.raw)
            return [plain]
        theirs = find_rival("torchstain", lambda: _loop(paths, size_px, target, _torchstain(setting.device)))
        return [pair(f"{what}, Macenko / torchstain and Pillow, one by one", theirs, stained=True), plain]


def make_array(records: list[ImageRecord], folder: Path, size_px: int, setting: Setting, *, stained: bool) -> Path:
    """Return the array file that ``prepare`` makes of readable files, and how it makes it."""
    assert setting.raw is not None
    partial = folder / PARTIAL
    decode_into(partial, records, setting.raw, size_px, setting.num_workers, resume=False, progress=SILENT)
    if not stained:
        return partial / IMAGES
    array = partial / STAINED
    normalise_file(partial / IMAGES, array, len(records), size_px, PUBLISHED_MACENKO, setting.device)
    return array


def _decode(paths: Sequence[Path], workers: int) -> None:
    def decode(path: Path) -> None:
        with Image.open(path) as image:
            image.load()

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(decode, paths))


def _loop(
    paths: Sequence[Path],
    size_px: int,
    target: Path,
    normalise: Callable[[Image.Image], Image.Image] = lambda image: image,
) -> Run:
    """Return the usual script: each file decoded, normalised and resized in turn, all saved as one array."""

    def run() -> None:
        arrays = []
        for path in paths:
            image = normalise(Image.open(path).convert("RGB"))
            arrays.append(np.asarray(image.resize((size_px, size_px), Image.Resampling.BICUBIC)))
        np.save(target, np.stack(arrays))

    return run


def _torchstain(device: torch.device) -> Callable[[Image.Image], Image.Image]:
    """Return torchstain's normalisation to its built-in reference, which is the published one, on a device."""
    from torchstain.torch.normalizers.macenko import TorchMacenkoNormalizer

    rival = TorchMacenkoNormalizer()
    rival.HERef, rival.maxCRef = rival.HERef.to(device), rival.maxCRef.to(device)

    def normalise(image: Image.Image) -> Image.Image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(device)
        normalised, _, _ = rival.normalize(pixels, stains=False)
        return Image.fromarray(normalised.to(torch.uint8).cpu().numpy())

    return normalise


COMPARISONS.register("prepare")(Comparison(compare_prepare, needs_images=True))
