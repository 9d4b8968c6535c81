"""Differentiable augmentation of what the critic sees, so that a few hundred images are not learned by heart.

Source: Zhao et al., Differentiable Augmentation for Data-Efficient GAN Training, NeurIPS 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from breastcli.errors import UsageError

SHIFT = 1 / 8  # of the side, the largest translation
HOLE = 1 / 2  # of the side, the side of the cut-out square


def parse_diffaugment(text: str) -> tuple[str, ...]:
    """Return the names in "color,translation,cutout", or none for "none".

    Raises:
        UsageError: an unknown name.
    """
    if text == "none":
        return ()
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in AUGMENTATIONS:
            raise UsageError(f"--diffaugment {name}: not known", fix=f"use none or {','.join(AUGMENTATIONS)}")
    return names


def diffaugment(images: Tensor, names: tuple[str, ...], generator: torch.Generator) -> Tensor:
    """Return augmented images, differentiable with respect to them.

    Args:
        images: (B, 3, H, W) float32 in [-1, 1].
        names: of ``AUGMENTATIONS``, applied in this order.
        generator: source of all randomness, on the images' device.
    """
    for name in names:
        images = AUGMENTATIONS[name](images, generator)
    return images


def color(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift brightness by up to 0.5, scale saturation by 0 to 2 and contrast by 0.5 to 1.5, each image in its way."""

    def draw() -> Tensor:
        return torch.rand((len(images), 1, 1, 1), generator=generator, device=images.device)

    images = images + draw() - 0.5
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * (2 * draw())
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (images - mean) * (0.5 + draw())


def translation(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image by up to an eighth of its side along both axes; zeros (mid-grey) fill what comes in."""
    size, height, width = len(images), *images.shape[2:]
    reach_y, reach_x = round(height * SHIFT), round(width * SHIFT)
    down, right = (_draw_places(size, reach, generator) for reach in (reach_y, reach_x))
    padded = functional.pad(images, (reach_x, reach_x, reach_y, reach_y))
    rows = (torch.arange(height, device=images.device) + reach_y)[None] - down[:, None]  # (B, H)
    columns = (torch.arange(width, device=images.device) + reach_x)[None] - right[:, None]  # (B, W)
    batch = torch.arange(size, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cutout(images: Tensor, generator: torch.Generator) -> Tensor:
    """Set a square of half the side, anywhere and partly outside, to zero (mid-grey)."""
    size, height, width = len(images), *images.shape[2:]
    side_y, side_x = round(height * HOLE), round(width * HOLE)
    top = _draw_starts(size, height, side_y, generator)
    left = _draw_starts(size, width, side_x, generator)
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    in_rows = (y >= top[:, None]) & (y < top[:, None] + side_y)  # (B, H)
    in_columns = (x >= left[:, None]) & (x < left[:, None] + side_x)  # (B, W)
    hole = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return images * ~hole


AUGMENTATIONS = {"color": color, "translation": translation, "cutout": cutout}


def _draw_places(size: int, reach: int, generator: torch.Generator) -> Tensor:
    """Draw whole numbers in [-reach, reach], (size,) int64."""
    return torch.randint(-reach, reach + 1, (size,), generator=generator, device=generator.device)


def _draw_starts(size: int, length: int, side: int, generator: torch.Generator) -> Tensor:
    """Draw where squares begin whose centre lies inside, (size,) int64."""
    return torch.randint(0, length + 1, (size,), generator=generator, device=generator.device) - side // 2
