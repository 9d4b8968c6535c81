"""How well the siblings of LC25000 would be found, on siblings made from real BreakHis fields by its recipe:

    python docs/sibling_clustering.py FOLDER     simulated siblings; FOLDER holds BreakHis files
    python docs/sibling_clustering.py --cost     seconds and memory for 25,000 images of noise, of five classes

Every field's centre square is an original. Turns, mirrorings and how often an original is drawn follow Augmentor: whole
degrees, left or right with equal chance, each mirroring with probability 0.5, originals drawn with replacement. Files
are JPEG of Pillow's default quality, as Augmentor writes them. The threshold was chosen on one half of the exams.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from breastcli.data.datasets import DATASETS, image_files
from breastcli.data.datasets.breakhis import describe
from breastcli.data.siblings import (
    ALIKE,
    CONFIRM,
    PROPOSE,
    THUMBNAIL_PX,
    group_pairs,
    group_thumbnails,
    likenesses,
    propose,
    read_thumbnail,
    undo,
)

RECIPE = DATASETS.get("lc25000").recipe
PER_ORIGINAL = 20
THRESHOLDS = (0.5, 0.6, 0.65, 0.7, ALIKE, 0.8, 0.85)


def make_sibling(original: Image.Image, degrees: int, left_right: bool, top_bottom: bool) -> Image.Image:
    """Return a square original turned counterclockwise, cut out about the centre, enlarged and mirrored."""
    side, turned = original.width, original.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    width, height = (round(share * side) for share in RECIPE.kept(degrees))
    left, top = round((turned.width - width) / 2), round((turned.height - height) / 2)
    cut = turned.crop((left, top, left + width, top + height)).resize((side, side), Image.Resampling.BICUBIC)
    cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if left_right else cut
    return cut.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if top_bottom else cut


def make_thumbnails(path: Path, count: int, seed: int) -> np.ndarray:
    """Return what is read of ``count`` siblings' files: (count, 4096) uint8."""
    generator = np.random.default_rng(seed)
    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    original = image.crop((left, top, left + side, top + side))
    thumbnails = np.empty((count, THUMBNAIL_PX**2), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sibling.jpeg"
        for number in range(count):
            degrees = int(generator.integers(0, RECIPE.max_degrees + 1)) * int(generator.choice([-1, 1]))
            make_sibling(original, degrees, *(generator.random(2) < 0.5)).save(file)
            thumbnails[number] = read_thumbnail(file)
    return thumbnails


def simulate(files: Sequence[Path], generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the thumbnails (N, 4096) and originals (N,) of siblings of the files, in random order."""
    counts = np.bincount(generator.integers(0, len(files), PER_ORIGINAL * len(files)), minlength=len(files))
    seeds = generator.integers(0, 2**32, len(files))
    with ProcessPoolExecutor() as pool:
        thumbnails = np.concatenate(list(pool.map(make_thumbnails, files, counts.tolist(), seeds.tolist())))
    order = generator.permutation(len(thumbnails))
    return thumbnails[order], np.repeat(np.arange(len(files)), counts)[order]


def num_pairs(names: Sequence[object]) -> int:
    """Return how many pairs of equal names there are."""
    return sum(count * (count - 1) // 2 for count in Counter(names).values())


def scores(groups: np.ndarray, originals: np.ndarray) -> str:
    """Return the row of the table that says how well groups agree with originals."""
    both = list(zip(groups.tolist(), originals.tolist(), strict=True))
    right = num_pairs(both)
    largest: dict[int, int] = {}
    for (group, _), count in Counter(both).items():
        largest[group] = max(largest.get(group, 0), count)
    split = sum(count > 1 for count in Counter(original for _, original in set(both)).values())
    mixed = sum(count > 1 for count in Counter(group for group, _ in set(both)).values())
    figures = [f"{right / one:.5f}" for one in (num_pairs(groups.tolist()), num_pairs(originals.tolist()))]
    figures += [f"{sum(largest.values()) / len(both):.5f}", f"{len(largest)} of {len(set(originals.tolist()))}"]
    return " | ".join([*figures, str(split), str(mixed)])


def validate(folder: Path) -> None:
    """Print likenesses and groups at several thresholds on one half of the exams, at the one chosen on the other."""
    files = {path: describe(path.name) for path in image_files(folder)}
    exams = sorted({record.exam for record in files.values() if record})
    generator = np.random.default_rng(0)
    first_half = set(generator.permutation(exams)[: len(exams) // 2].tolist())
    for half in (True, False):
        chosen = [path for path, record in files.items() if record and (record.exam in first_half) == half]
        thumbnails, originals = simulate(chosen, generator)
        pairs = propose(undo(thumbnails, RECIPE, PROPOSE))
        alike = likenesses(undo(thumbnails, RECIPE, CONFIRM), pairs)
        same = originals[pairs[:, 0]] == originals[pairs[:, 1]]
        print(f"\n{'choosing' if half else 'reporting'}: {len(originals)} siblings of {len(chosen)} fields")
        print(f"sibling pairs that were proposed: {same.sum() / num_pairs(originals.tolist()):.5f}")
        low, high = np.quantile(alike[same], (0, 0.001, 0.01)), np.quantile(alike[~same], (1, 0.999, 0.99))
        print("likeness of siblings, least, 0.1 %, 1 %:", *(f"{one:.3f}" for one in low))
        print("likeness of other proposed pairs, most, 99.9 %, 99 %:", *(f"{one:.3f}" for one in high))
        print("| threshold | pair precision | pair recall | purity | groups | originals split | groups mixed |")
        for threshold in THRESHOLDS if half else (ALIKE,):
            groups = group_pairs(len(originals), pairs[alike >= threshold])
            print(f"| {threshold} | {scores(groups, originals)} |", flush=True)
        groups = group_pairs(len(originals), pairs[alike >= ALIKE])
        for group in np.unique(groups):
            members = np.unique(originals[groups == group])
            if len(members) > 1:
                print("in one group:", ", ".join(chosen[member].stem for member in members))


def cost() -> None:
    """Print what grouping 25,000 images of five classes costs, without reading files."""
    generator = np.random.default_rng(0)
    started, worked = time.perf_counter(), time.process_time()
    for _ in range(5):
        group_thumbnails(generator.integers(0, 256, (5000, THUMBNAIL_PX**2), np.uint8), RECIPE)
    seconds, busy = time.perf_counter() - started, time.process_time() - worked
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{seconds:.0f} s, {busy:.0f} s of processors' time, peak {peak_mb:.0f} MB")


def main() -> None:
    """Validate or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--cost", action="store_true")
    arguments = parser.parse_args()
    if arguments.cost:
        cost()
    elif arguments.folder:
        validate(arguments.folder)
    else:
        parser.error("give a folder, or --cost")


if __name__ == "__main__":
    main()
