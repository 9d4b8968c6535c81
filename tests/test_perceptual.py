from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from breastcli.data.augment import dihedral
from breastcli.data.perceptual import NUM_BITS, POSITIONS, RADIUS, inverse, near_pairs, perceptual_hash
from breastcli.data.sample_tree import draw_sample


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> list[Image.Image]:
    """64 drawn fields of 210 x 138 pixels."""
    folder = tmp_path_factory.mktemp("fields")
    draw_sample(folder, num_images=64, height_px=138, width_px=210, seed=3)
    return [Image.open(file).convert("RGB") for file in sorted((folder / "BreaKHis_v1").rglob("*.png"))]


def placed(image: Image.Image, position: int) -> Image.Image:
    """Return the image as the project's augmentation would show it."""
    pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)[None]
    return Image.fromarray(dihedral(pixels, position)[0].permute(1, 2, 0).numpy())


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def hashed(*images: Image.Image) -> list[str]:
    return [perceptual_hash(image.convert("L")) for image in images]


@pytest.mark.parametrize("position", range(8), ids=POSITIONS)
def test_flips_and_turns_are_found_with_their_position(fields: list[Image.Image], position: int) -> None:
    for image in fields[::8]:
        ((_, _, distance, found),) = near_pairs(hashed(image, placed(image, position)))
        assert (found, distance <= 8) == (position, True)
        ((_, _, _, back),) = near_pairs(hashed(placed(image, position), image))
        assert back == inverse(position)


def test_names_of_positions_are_those_of_pillow() -> None:
    corner = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3)).convert("RGB")
    moves = Image.Transpose
    named = {
        "mirrored left-right": moves.FLIP_LEFT_RIGHT,
        "mirrored top-bottom": moves.FLIP_TOP_BOTTOM,
        "turned 90": moves.ROTATE_90,
        "turned 180": moves.ROTATE_180,
        "turned 270": moves.ROTATE_270,
        "mirrored at the diagonal": moves.TRANSPOSE,
        "mirrored at the other diagonal": moves.TRANSVERSE,
    }
    for name, move in named.items():
        assert np.array_equal(placed(corner, POSITIONS.index(name)), corner.transpose(move)), name


@pytest.mark.parametrize("quality", [50, 75, 95])
@pytest.mark.parametrize("size", [(210, 138), (105, 69), (128, 128), (420, 276)], ids=str)
def test_resized_and_recompressed_copies_are_found(
    fields: list[Image.Image], quality: int, size: tuple[int, int]
) -> None:
    for number, image in enumerate(fields[::8]):
        copy = jpeg(placed(image.resize(size, Image.Resampling.BICUBIC), number), quality)
        ((_, _, distance, position),) = near_pairs(hashed(image, copy))
        assert (position, distance < RADIUS // 2) == (number, True)


def test_unrelated_fields_are_not_alike(fields: list[Image.Image]) -> None:
    assert near_pairs(hashed(*fields)) == []


def test_an_image_that_shows_nothing_has_no_hash_and_is_like_none() -> None:
    noise = np.random.default_rng(0).integers(239, 242, (60, 80, 3), dtype=np.uint8)
    blank = hashed(Image.new("RGB", (80, 60), "white"), Image.fromarray(noise))
    assert blank == ["", ""]
    assert near_pairs(blank) == []
    assert near_pairs([]) == []


def as_text(bits: np.ndarray) -> str:
    return np.packbits(bits).tobytes().hex()


def moved(bits: np.ndarray, position: int) -> np.ndarray:
    """Return the hash of a moved image by the symmetry of the cosines, entry by entry."""
    out = np.zeros_like(bits)
    for row in range(16):
        for column in range(16):
            value = bits[column, row] if position & 4 else bits[row, column]
            value ^= bool(position & 1) and column % 2 == 1
            out[row, column] = value ^ (bool(position & 2) and row % 2 == 1)
    return out


def test_search_finds_what_comparing_every_pair_finds() -> None:
    """Random hashes with neighbours planted at the radius and one bit beyond it, across blocks of the search."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (540, 16, 16)).astype(bool)
    radius, planted = 30, {}
    for number in range(16):
        source, target, position, flips = number, 539 - 30 * number, number % 8, radius + number // 8
        copy = moved(bits[source], position)
        copy.ravel()[rng.choice(NUM_BITS, flips, replace=False)] ^= True
        bits[target] = copy
        if flips <= radius:
            planted[source, target] = (flips, position)
    expected = {}
    for position in range(8):
        turned = np.stack([moved(one, position) for one in bits]).reshape(len(bits), -1)
        distances = (turned[:, None] != bits.reshape(1, len(bits), -1)).sum(axis=2)
        for first, second in np.argwhere(np.triu(distances <= radius, 1)):
            near = (int(distances[first, second]), position)
            expected[int(first), int(second)] = min(near, expected.get((int(first), int(second)), near))
    texts = [as_text(one) for one in bits]
    seen = []
    found = {(one, two): near for one, two, *near in near_pairs(texts, radius, seen.append)}
    assert {pair: tuple(near) for pair, near in found.items()} == expected
    assert planted.items() <= expected.items()
    assert len(planted) == 8
    assert len(near_pairs(texts, radius + 1)) == 16
    assert sum(seen) == 540


def test_hashes_without_content_keep_the_numbering() -> None:
    bits = np.random.default_rng(1).integers(0, 2, (3, 16, 16)).astype(bool)
    texts = ["", as_text(bits[0]), "", as_text(bits[1]), as_text(bits[0])]
    assert near_pairs(texts) == [(1, 4, 0, 0)]


@pytest.mark.real
def test_no_two_real_fields_are_alike(real_data: Path) -> None:
    files = sorted((real_data / "breakhis_original").rglob("*.png"))
    images = [Image.open(file).convert("RGB") for file in files]
    assert near_pairs(hashed(*images)) == []
    copies = [jpeg(placed(image.resize((350, 230)), number % 8), 50) for number, image in enumerate(images)]
    found = near_pairs(hashed(*images, *copies))
    half = len(images)
    expected = {(number, half + number): number % 8 for number in range(half)}
    assert {(one, two): position for one, two, _, position in found} == expected
    assert max(distance for _, _, distance, _ in found) <= 20
