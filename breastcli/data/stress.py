"""What laboratories, microscopes and files do to images, at fixed strengths: plain functions on prepared batches.

Nothing here is random, and nothing is computed across images. The idea of a fixed table of graded perturbations:
Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations, ICLR 2019.
Theirs are for photographs; these are for stained sections, at strengths of our own choice.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from breastcli.data.datasets import DATASETS
from breastcli.data.stain import (
    PIXELS_AT_ONCE,
    SAMPLED_PIXELS,
    TRANSMITTED,
    _combine,
    _macenko_statistics,
    _stride,
    _to_bytes,
    _unmixing,
)

STRENGTHS = ("mild", "moderate", "severe")
BLUR_REACH = 4.0  # standard deviations after which the kernel is cut off
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as JPEG and Pillow weigh red, green and blue


@dataclass(frozen=True)
class Perturbation:
    """One way to change images.

    Attributes:
        title: what it is called.
        kind: "stain" needs images stained with haematoxylin and eosin.
        label: how a level is written.
        levels: one for each of STRENGTHS.
        apply: images (B, 3, H, W) uint8 and a level to images of the same shape and type.
    """

    title: str
    kind: Literal["stain", "sharpness", "light"]
    label: str
    levels: tuple[float, float, float]
    apply: Callable[[Tensor, float], Tensor]


def scale_stains(images: Tensor, haematoxylin: float, eosin: float) -> Tensor:
    """Multiply the concentrations of each image's own two stains; images without measurable stain stay as they are.

    The stain vectors are those that Macenko normalisation finds. What they do not explain of the optical density is
    kept, so that factors of 1 change nothing.

    Args:
        images: (B, 3, H, W) uint8 RGB, on any device.
        haematoxylin: factor, such as 2 for twice as much.
        eosin: factor.

    Returns:
        (B, 3, H, W) uint8.
    """
    height, width = images.shape[2:]
    stride = _stride(height * width, width, SAMPLED_PIXELS)
    results = []
    for chunk in _chunks(images):
        pixels = chunk.flatten(2).contiguous()  # (b, 3, N)
        vectors, _, usable = _macenko_statistics(pixels[:, :, ::stride])
        added = vectors * vectors.new_tensor((haematoxylin - 1, eosin - 1))
        matrix = torch.eye(3, device=images.device) + _combine(added, _unmixing(vectors))  # (b, 3, 3)
        offset = math.log(TRANSMITTED) * (1 - matrix.sum(dim=2, keepdim=True))  # (b, 3, 1)
        levels = _combine(matrix, pixels.float().add_(1).log_()).add_(offset).exp_()
        changed = _to_bytes(levels.sub_(0.5))  # minus the one, plus a half to round
        usable &= matrix.isfinite().flatten(1).all(dim=1)
        results.append(torch.where(usable[:, None, None], changed, pixels).unflatten(2, (height, width)))
    return torch.cat(results)


def blur(images: Tensor, sigma_px: float) -> Tensor:
    """Blur with a Gaussian, repeating the border's pixels beyond it.

    A sum of shifted images instead of a library's convolution, which is ten times as slow for wide kernels and would
    drop to TF32 on a GPU.

    Args:
        images: (B, 3, H, W) uint8.
        sigma_px: standard deviation; 0 for none.
    """
    reach = int(BLUR_REACH * sigma_px + 0.5)
    kernel = [math.exp(-0.5 * (offset / sigma_px) ** 2) if offset else 1.0 for offset in range(-reach, reach + 1)]
    return torch.cat([_blur(chunk, [weight / sum(kernel) for weight in kernel]) for chunk in _chunks(images)])


def _blur(images: Tensor, kernel: list[float]) -> Tensor:
    values, reach = images.float(), len(kernel) // 2
    for axis in (2, 3):
        size = images.shape[axis]
        places = torch.arange(-reach, size + reach, device=images.device).clamp_(0, size - 1)
        padded = values.index_select(axis, places)
        values = torch.zeros_like(values)
        for start, weight in enumerate(kernel):
            values.add_(padded.narrow(axis, start, size), alpha=weight)
    return _to_bytes(values.add_(0.5))


def recompress(images: Tensor, quality: float) -> Tensor:
    """Save as JPEG and read again, on the CPU whatever the device, so that all devices see the same images.

    Args:
        images: (B, 3, H, W) uint8 RGB.
        quality: Pillow's, 1 to 95; colours have half the resolution (4:2:0).
    """
    saved = images.permute(0, 2, 3, 1).cpu().numpy()
    return torch.from_numpy(np.stack([_recompress(one, int(quality)) for one in saved])).permute(0, 3, 1, 2).to(images)


def _recompress(pixels: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality, subsampling="4:2:0")
    with Image.open(buffer) as image:
        return np.asarray(image)


def scale_brightness(images: Tensor, factor: float) -> Tensor:
    """Multiply all grey levels of (B, 3, H, W) uint8 images; what leaves the range is cut off."""
    return _to_bytes(images.float().mul_(factor).add_(0.5))


def scale_contrast(images: Tensor, factor: float) -> Tensor:
    """Multiply all distances from each image's mean luma, for (B, 3, H, W) uint8 images."""
    weights = torch.tensor(LUMA, device=images.device)
    means = (images.float().mean(dim=(2, 3)) * weights).sum(dim=1)[:, None, None, None]
    return _to_bytes(images.float().sub_(means).mul_(factor).add_(means).add_(0.5))


def _chunks(images: Tensor) -> tuple[Tensor, ...]:
    """Return parts whose float copies stay in a processor's cache."""
    return images.split(max(1, PIXELS_AT_ONCE // (images.shape[2] * images.shape[3])))


PERTURBATIONS = {
    "haematoxylin": Perturbation(
        "More haematoxylin", "stain", "× {:g}", (1.25, 1.5, 2), lambda images, level: scale_stains(images, level, 1)
    ),
    "eosin": Perturbation(
        "More eosin", "stain", "× {:g}", (1.25, 1.5, 2), lambda images, level: scale_stains(images, 1, level)
    ),
    "pale": Perturbation(
        "Less of both", "stain", "× {:g}", (0.8, 0.65, 0.5), lambda images, level: scale_stains(images, level, level)
    ),
    "blur": Perturbation("Blur", "sharpness", "σ {:g} px", (1, 2, 4), blur),
    "jpeg": Perturbation("JPEG", "sharpness", "quality {:g}", (60, 30, 10), recompress),
    "dark": Perturbation("Darker", "light", "× {:g}", (0.9, 0.75, 0.5), scale_brightness),
    "bright": Perturbation("Brighter", "light", "× {:g}", (1.1, 1.25, 1.5), scale_brightness),
    "contrast": Perturbation("Less contrast", "light", "× {:g}", (0.8, 0.6, 0.4), scale_contrast),
}


def suitable_perturbations(dataset: str) -> tuple[dict[str, Perturbation], dict[str, str]]:
    """Return the perturbations that make sense for a data set's images, and why each of the others is left out."""
    if DATASETS.get(dataset).stained:
        return PERTURBATIONS, {}
    kept = {name: one for name, one in PERTURBATIONS.items() if one.kind != "stain"}
    return kept, {name: f"{dataset} is not H&E-stained" for name in PERTURBATIONS if name not in kept}
