from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from breastcli.data.augment import dihedral
from breastcli.data.likeness import ALIKE, detail, likeness
from breastcli.data.perceptual import near_pairs, perceptual_hash


def texture(seed: int, height_px: int = 120, width_px: int = 180) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height_px, width_px), dtype=np.uint8)
    return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(3)).convert("RGB")


@pytest.mark.parametrize("position", range(8))
def test_a_moved_copy_is_alike_in_its_position_alone(position: int) -> None:
    image = texture(0)
    pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None]
    copy = Image.fromarray(dihedral(pixels, position)[0].permute(1, 2, 0).numpy())
    first, second = detail(image), detail(copy)
    scores = [likeness(first, second, other) for other in range(8)]
    assert scores[position] > 0.99
    assert max(score for other, score in enumerate(scores) if other != position) < 0.5


def test_a_second_photograph_may_be_shifted_and_paler() -> None:
    image = texture(1, 240, 240)
    first = image.crop((0, 0, 220, 220))
    second = image.crop((12, 9, 232, 229)).point(lambda level: int(0.7 * level + 60))
    assert likeness(detail(first), detail(second), 0) > ALIKE
    far = image.crop((20, 20, 240, 240)).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    assert likeness(detail(first), detail(far), 0) < 0.5


def test_one_outline_with_other_tissue_inside_is_not_alike() -> None:
    """Like mammograms: the outline settles the hash, and all the same they are of two people."""
    images = []
    for seed in (2, 3):
        inside = texture(seed)
        mask = Image.new("L", inside.size)
        ImageDraw.Draw(mask).ellipse((-90, 5, 95 + seed, 110 + seed), fill=255)
        images.append(Image.composite(inside, Image.new("RGB", inside.size), mask))
    assert len(near_pairs([perceptual_hash(image.convert("L")) for image in images])) == 1
    assert likeness(detail(images[0]), detail(images[1]), 0) < ALIKE
    assert likeness(detail(images[0]), detail(images[0].resize((90, 60))), 0) > ALIKE


def test_detail_is_normed_and_nothing_is_like_nothing() -> None:
    found = detail(texture(4))
    assert found.shape == (96, 96)
    assert abs(found.mean()) < 1e-6
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-5)
    blank = detail(Image.new("RGB", (50, 40), "white"))
    assert likeness(blank, blank, 0) == pytest.approx(0, abs=1e-6)
