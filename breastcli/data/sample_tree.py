"""Write the procedural sample data set: drawn fields in BreakHis's own tree, with a nuclei mask beside each."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from breastcli.config import MAGNIFICATIONS
from breastcli.data.datasets.breakhis import SUBTYPES
from breastcli.data.drawing import STAIN_VECTORS, Look, draw_field
from breastcli.files import write_json, writing

IMAGE_ROOT = Path("BreaKHis_v1")
MASK_ROOT = Path("masks")
CARD_FILE = "sample.json"

SUBTYPE_FOLDERS = {code: name for code, (name, _) in SUBTYPES.items()}
BENIGN = ("A", "F", "PT", "TA")

# Numbers that no BreakHis slide has. Like the real ones, some exams (the leading digits) gave several slides, exam
# 54960 gave two subtypes, and slide 53412 is filed under two subtypes: the label conflict that an audit must find.
SLIDES = {
    "A": "14-52549AB 14-52549CD 14-53117 14-54960CD 14-52549G 14-60212",
    "F": "14-54960AB 14-53060AB 14-59134 14-53060CD 15-60433 14-61007",
    "PT": "14-51704 15-57021 14-56438 14-60518 14-61349EF 14-62290",
    "TA": "14-53200 15-55807 14-911 14-54015 14-60876 14-61563",
    "DC": "14-53412 14-50926 14-58842 14-58842D 15-56716 14-51031 14-57614 14-52523 14-62004 14-62751",
    "LC": "14-53412 14-52204 14-55570 14-55570C 14-54570 15-60690 14-61815 14-62433",
    "MC": "14-50147 14-56456 15-59854C 14-59979 14-53418DE 14-60049 14-61278 15-62118 14-62996",
    "PC": "14-54134 14-54134E 14-59440 15-690EF 14-56184 14-56184CD 14-60327 14-61641 14-62507",
}
ALL_SLIDES_FROM = 240  # smaller draws use about half of the slides, so that a slide still has several images


@dataclass(frozen=True)
class _Plan:
    """One image to draw: its subtype code, slide ("14-52549AB"), magnification ("40X") and number on the slide."""

    subtype: str
    slide: str
    magnification: str
    sequence: int

    @property
    def path(self) -> Path:
        """Return the path below the folder ``BreaKHis_v1``."""
        kind, letter = ("benign", "B") if self.subtype in BENIGN else ("malignant", "M")
        stem = f"SOB_{letter}_{self.subtype}"
        folder = Path("histology_slides/breast", kind, "SOB", SUBTYPE_FOLDERS[self.subtype], f"{stem}_{self.slide}")
        name = f"{stem}-{self.slide}-{self.magnification.removesuffix('X')}-{self.sequence:03d}.png"
        return folder / self.magnification / name


def draw_sample(
    root: Path,
    *,
    num_images: int = 480,
    height_px: int = 184,
    width_px: int = 280,
    seed: int = 0,
    workers: int = 2,
    on_drawn: Callable[[], None] | None = None,
) -> None:
    """Draw the sample data set: images, nuclei masks and, last, ``sample.json``.

    The same arguments give the same files, whatever the number of workers.

    Args:
        root: folder to write below; created where missing.
        num_images: 64 or more, spread evenly over slides and magnifications.
        height_px: height of every image, 32 or more.
        width_px: width of every image, 32 or more.
        seed: of everything drawn.
        workers: number of threads.
        on_drawn: called after every image, in the caller's thread.
    """
    assert num_images >= 64, num_images
    assert min(height_px, width_px) >= 32, (height_px, width_px)

    def draw(plan: _Plan) -> None:
        _draw_one(root, plan, height_px, width_px, seed)

    root.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(draw, _plans(num_images)):
            if on_drawn is not None:
                on_drawn()
    card = {"generator": "breastcli sample", "version": 1, "drawn": True, "seed": seed, "num_images": num_images}
    card |= {"height_px": height_px, "width_px": width_px, "note": "Procedurally drawn; not real tissue."}
    write_json(root / CARD_FILE, card)


def _plans(num_images: int) -> Iterator[_Plan]:
    """Yield every image to draw; slides, and magnifications within a slide, differ by at most one image."""
    slides = []
    for subtype, names in SLIDES.items():
        known = names.split()
        used = len(known) if num_images >= ALL_SLIDES_FROM else len(known) // 2 + 1
        slides += [(subtype, slide) for slide in known[:used]]
    drawn: Counter[tuple[str, str, str]] = Counter()
    for index in range(num_images):
        subtype, slide = slides[index * len(slides) // num_images]
        key = (subtype, slide, MAGNIFICATIONS[index % len(MAGNIFICATIONS)])
        drawn[key] += 1
        yield _Plan(*key, sequence=drawn[key])


def _draw_one(root: Path, plan: _Plan, height_px: int, width_px: int, seed: int) -> None:
    rng = _generator(seed, plan.subtype, plan.slide, plan.magnification, str(plan.sequence))
    look = _look(plan, seed)
    image, mask = draw_field(look, plan.subtype, plan.magnification, height_px, width_px, rng)
    for folder, pixels in ((IMAGE_ROOT, image), (MASK_ROOT, mask)):
        path = root / folder / plan.path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, compress_level=3)


def _look(plan: _Plan, seed: int) -> Look:
    """Return the look of a slide: tissue from its exam, colours from the slide itself."""
    exam = _generator(seed, "exam", re.match(r"\d+-\d+", plan.slide).group())
    slide = _generator(seed, "slide", plan.slide)
    atypia = exam.uniform(0.0, 0.22) if plan.subtype in BENIGN else exam.uniform(0.4, 1.0)
    vectors = STAIN_VECTORS * np.exp(slide.normal(0, (0.07, 0.07), (3, 2)).T)
    vectors = vectors + slide.uniform(0, 0.10, (2, 3))
    return Look(
        stain_vectors=vectors / np.linalg.norm(vectors, axis=1, keepdims=True),
        concentration=(slide.uniform(0.8, 1.5), slide.uniform(0.3, 0.75)),
        lamp=np.array([243.0, 240.0, 245.0]) * slide.uniform((0.93, 0.90, 0.88), 1.0),
        blur_px=slide.uniform(0.4, 0.9),
        noise=slide.uniform(1.0, 2.5),
        atypia=atypia,
        coverage=exam.uniform(0.16, 0.24),
        myxoid=exam.choice([0.0, 0.3, 1.0], p=[0.5, 0.3, 0.2]),
        nucleus_scale=exam.uniform(0.9, 1.1),
    )


def _generator(seed: int, *keys: str) -> np.random.Generator:
    # Built-in hash() differs from run to run; crc32 does not.
    return np.random.default_rng(np.random.SeedSequence([seed, *(zlib.crc32(key.encode()) for key in keys)]))
