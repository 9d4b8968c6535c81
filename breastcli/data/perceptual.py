"""Hashes of what an image looks like, and an exact search for those that are nearly alike in any position."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from PIL import Image

SIDE_PX = 32  # the grey image that is hashed
FREQUENCIES = 16
NUM_BITS = FREQUENCIES * FREQUENCIES
# Of 255 bits, copies of BreakHis fields (half the size, turned, JPEG quality 50) differ in 20 at most, two photographs
# of a field in 60, fields of different places in 89 or more. What lies within is a candidate for ``likeness``: images
# that are mostly outline (mammograms, slices of a body) come as near without being copies.
RADIUS = 64
FLATTEST = 2.0  # standard deviation in grey levels below which noise would decide the bits
BLOCK = 512
# The position numbered i is ``augment.dihedral(image, i)``; turns are counterclockwise.
POSITIONS = (
    "same position",
    "mirrored left-right",
    "mirrored top-bottom",
    "turned 180",
    "mirrored at the diagonal",
    "turned 270",
    "turned 90",
    "mirrored at the other diagonal",
)


def perceptual_hash(grey: Image.Image) -> str:
    """Return the signs of an image's lowest frequencies as 64 hexadecimal digits, or "" where it shows nothing.

    The image is resized to a small square, whatever its shape, so that copies of another size or aspect ratio agree.
    Signs of the discrete cosine transform need no median: mirroring an image flips the signs of the odd frequencies of
    one axis and transposing it swaps the axes, so one hash gives those of all eight positions.

    Source: after Zauner, Implementation and benchmarking of perceptual image hash functions, 2010, section 3.2.1.
    Differs from it: signs instead of a comparison with the median, and 16 x 16 frequencies instead of 8 x 8.

    Args:
        grey: mode "L", any size.
    """
    small = np.asarray(grey.resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR), dtype=np.float64)
    if small.std() < FLATTEST:
        return ""
    cosines = _cosines()
    bits = cosines @ (small - small.mean()) @ cosines.T > 0
    bits[0, 0] = True  # the mean, which says nothing
    return np.packbits(bits).tobytes().hex()


def near_pairs(
    hashes: Sequence[str], radius: int = RADIUS, on_block: Callable[[int], None] = lambda count: None
) -> list[tuple[int, int, int, int]]:
    """Return every pair of hashes that differ in at most ``radius`` bits in the best of the eight positions.

    Hashes as rows of +1 and -1 make the search a matrix product, whose whole numbers float32 holds exactly: nothing is
    missed, and 25,000 hashes take seconds.

    Args:
        hashes: N results of ``perceptual_hash``; an empty one is like none.
        radius: number of bits.
        on_block: called with the number of hashes compared with all later ones.

    Returns:
        (first, second, distance, position) with first < second: the second image is the first one in that position.
    """
    known = np.array([number for number, text in enumerate(hashes) if text], dtype=int)
    signs = _signs([hashes[number] for number in known])
    flat = signs.reshape(len(known), NUM_BITS)
    found: list[tuple[int, int, int, int]] = []
    for start in range(0, len(known), BLOCK):
        block = signs[start : start + BLOCK]
        turned = np.stack([_moved(block, position) for position in range(8)]).reshape(-1, NUM_BITS)
        for other in range(start, len(known), BLOCK):
            products = (turned @ flat[other : other + BLOCK].T).reshape(8, len(block), -1)
            near = products.max(axis=0) >= NUM_BITS - 2 * radius
            for one, two in np.argwhere(near):
                first, second = start + int(one), other + int(two)
                if first < second:
                    position = int(products[:, one, two].argmax())
                    distance = (NUM_BITS - int(products[position, one, two])) // 2
                    found.append((int(known[first]), int(known[second]), distance, position))
        on_block(len(block))
    on_block(len(hashes) - len(known))
    return sorted(found)


def inverse(position: int) -> int:
    """Return the position that takes an image back: quarter turns change places, the others undo themselves."""
    return {5: 6, 6: 5}.get(position, position)


@cache
def _cosines() -> np.ndarray:
    """Return the (frequencies, pixels) matrix of the discrete cosine transform (DCT-II, unscaled)."""
    places = np.arange(SIDE_PX) * 2 + 1
    return np.cos(math.pi / (2 * SIDE_PX) * np.arange(FREQUENCIES)[:, None] * places)


def _signs(hashes: Sequence[str]) -> np.ndarray:
    """Return (N, 16, 16) float32 of +1 and -1."""
    packed = np.frombuffer(bytes.fromhex("".join(hashes)), dtype=np.uint8)
    bits = np.unpackbits(packed).reshape(-1, FREQUENCIES, FREQUENCIES)
    return bits.astype(np.float32) * 2 - 1


def _moved(signs: np.ndarray, position: int) -> np.ndarray:
    """Return the hashes (N, 16, 16) that the images would have in one of the eight positions."""
    odd = np.where(np.arange(FREQUENCIES) % 2, np.float32(-1), np.float32(1))
    moved = signs.transpose(0, 2, 1) if position & 4 else signs
    moved = moved * odd if position & 1 else moved
    return moved * odd[:, None] if position & 2 else moved
