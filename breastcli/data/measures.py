"""What an audit needs to know of an image's pixels: a few numbers, taken while it is decoded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from breastcli.data.perceptual import perceptual_hash

PLAIN_LEVELS = 8  # grey levels about the most frequent one that count as the same
STRIP_PX = 65_536  # fits a processor's cache, and a huge image needs no more memory than a small one


@dataclass(frozen=True)
class Measures:
    """Numbers about one image at full size.

    Attributes:
        perceptual_hash: what it looks like, as ``perceptual.perceptual_hash`` gives it.
        brightness: mean grey level, 0-255.
        contrast: standard deviation of the grey levels.
        plain: share of pixels within a few grey levels of the most frequent one.
        sharpness: variance of the Laplacian of the grey levels.
        red_density: mean optical density of the red channel, -log10(level / 255).
        green_density: of the green channel.
        blue_density: of the blue channel.
    """

    perceptual_hash: str
    brightness: float
    contrast: float
    plain: float
    sharpness: float
    red_density: float
    green_density: float
    blue_density: float

    @property
    def density(self) -> tuple[float, float, float]:
        """Mean optical density of red, green and blue."""
        return self.red_density, self.green_density, self.blue_density


def measure(image: Image.Image) -> Measures:
    """Measure an RGB image of any size."""
    grey = image.convert("L")
    levels = np.arange(256)
    shares = np.array(grey.histogram()) / (grey.width * grey.height)
    brightness = float(shares @ levels)
    about_most = np.abs(levels - shares.argmax()) <= PLAIN_LEVELS
    # A histogram of 256 levels gives the mean of any function of them without another pass over the pixels.
    densities = np.array(image.histogram()).reshape(3, 256) @ -np.log10(np.maximum(levels, 1) / 255)
    return Measures(
        perceptual_hash(grey),
        brightness,
        float(np.sqrt(shares @ (levels - brightness) ** 2)),
        float(shares[about_most].sum()),
        _sharpness(np.asarray(grey)),
        *(densities / (grey.width * grey.height)).tolist(),
    )


def _sharpness(grey: np.ndarray) -> float:
    """Return the variance of the Laplacian of (H, W) uint8, strip by strip.

    Source: Pech-Pacheco et al., Diatom autofocusing in brightfield microscopy, ICPR 2000.
    """
    height = max(1, STRIP_PX // grey.shape[1])
    count, total, squares = 0, 0.0, 0.0
    for top in range(1, grey.shape[0] - 1, height):
        strip = grey[top - 1 : min(top + height, grey.shape[0] - 1) + 1].astype(np.float32)
        curve = strip[1:-1, 1:-1] * np.float32(-4)
        for neighbour in (strip[:-2, 1:-1], strip[2:, 1:-1], strip[1:-1, :-2], strip[1:-1, 2:]):
            curve += neighbour
        count += curve.size
        total += float(curve.sum(dtype=np.float64))
        squares += float(curve.ravel() @ curve.ravel())
    return squares / count - (total / count) ** 2
