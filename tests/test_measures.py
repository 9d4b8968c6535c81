from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy import ndimage

from breastcli.data import measures
from breastcli.data.measures import measure


def noisy(height_px: int = 70, width_px: int = 90) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8))


def test_figures_are_those_of_the_pixels() -> None:
    image = noisy()
    found = measure(image)
    grey = np.asarray(image.convert("L"), dtype=float)
    assert found.brightness == pytest.approx(grey.mean())
    assert found.contrast == pytest.approx(grey.std())
    density = -np.log10(np.maximum(np.asarray(image, dtype=float), 1) / 255).mean(axis=(0, 1))
    assert found.density == pytest.approx(tuple(density))


@pytest.mark.parametrize("strip_px", [100, 1000, 10**6])
def test_sharpness_is_the_variance_of_the_laplacian(strip_px: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "STRIP_PX", strip_px)
    grey = np.asarray(noisy().convert("L"), dtype=float)
    assert measure(noisy()).sharpness == pytest.approx(ndimage.laplace(grey)[1:-1, 1:-1].var(), rel=1e-6)


def test_blur_lowers_sharpness_and_a_white_image_is_plain() -> None:
    image = noisy()
    assert measure(image.filter(ImageFilter.GaussianBlur(2))).sharpness < measure(image).sharpness / 100
    white = measure(Image.new("RGB", (40, 30), "white"))
    assert (white.brightness, white.contrast, white.plain, white.sharpness) == (255, 0, 1, 0)
    assert white.density == (0, 0, 0)
    half = Image.new("RGB", (40, 30), "white")
    half.paste((0, 0, 0), (0, 0, 10, 30))
    assert measure(half).plain == pytest.approx(0.75)
