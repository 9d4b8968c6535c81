"""Augmentation of whole batches on the network's device, every image in its own way."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from breastcli.data.loading import to_network

# Rows: optical density of haematoxylin, eosin and diaminobenzidine in red, green and blue.
# Source: Ruifrok and Johnston, Anal. Quant. Cytol. Histol. 23(4), 2001.
STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))


@dataclass(frozen=True)
class Augmentation:
    """How far a policy may change an image.

    Attributes:
        flip: mirror left-right with probability 1/2.
        turn: also mirror top-bottom and turn by right angles, each of the eight positions equally often.
        rotation_deg: turn by an angle uniform in [-r, r], reflecting at the border.
        min_crop: smallest side of a random crop, as a share of the image's; 1 for none.
        stain: standard deviation by which each stain's density is scaled and shifted; 0 for none.
    """

    flip: bool = False
    turn: bool = False
    rotation_deg: float = 0.0
    min_crop: float = 1.0
    stain: float = 0.0

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return augmented images.

        Args:
            images: (B, 3, H, W) uint8.
            generator: source of all randomness, on the images' device.

        Returns:
            (B, 3, H, W) float32 in [-1, 1].
        """
        if self.turn:
            images = _turn(images, generator)
        elif self.flip and not self.rotation_deg:
            images = _mirror(images, generator, axis=3)
        values = to_network(images)
        if self.rotation_deg or self.min_crop < 1:
            values = self._warp(values, generator)
        if self.stain:
            values = _jitter_stain(values, self.stain, generator)
        return values

    def _warp(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """Mirror, rotate and crop by one bilinear sampling."""
        size, device = len(values), values.device
        angle = _uniform(size, -self.rotation_deg, self.rotation_deg, generator, device) * (math.pi / 180)
        scale = _uniform(size, self.min_crop, 1.0, generator, device)
        mirror = (
            1 - 2 * _coin(size, generator, device).float() if self.flip and not self.turn else torch.ones_like(scale)
        )
        room = 1 - scale
        shift_x = _uniform(size, -1.0, 1.0, generator, device) * room
        shift_y = _uniform(size, -1.0, 1.0, generator, device) * room
        cosine, sine = scale * angle.cos(), scale * angle.sin()
        rows = [cosine * mirror, -sine, shift_x, sine * mirror, cosine, shift_y]
        grid = functional.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(values.shape), align_corners=False)
        return functional.grid_sample(values, grid, padding_mode="reflection", align_corners=False)


POLICIES = {
    "none": Augmentation(),
    "light": Augmentation(turn=True),
    # "Random rotation and horizontal flipping" (DALAResNet50 paper, IV-C); the range of angles is not given. A field of
    # tissue has no upright position, so every angle is allowed.
    "paper": Augmentation(flip=True, rotation_deg=180.0),
    "strong": Augmentation(turn=True, rotation_deg=45.0, min_crop=0.7, stain=0.1),
}


def dihedral(images: Tensor, element: int) -> Tensor:
    """Return images (B, C, H, H) in one of the eight positions of a square; 0 leaves them as they are."""
    moved = images.transpose(2, 3) if element & 4 else images
    axes = [axis for axis, bit in ((3, 1), (2, 2)) if element & bit]
    return moved.flip(axes) if axes else moved


def _turn(images: Tensor, generator: torch.Generator) -> Tensor:
    turned = _mirror(_mirror(images, generator, axis=3), generator, axis=2)
    if images.shape[2] != images.shape[3]:
        return turned
    coin = _coin(len(images), generator, images.device)[:, None, None, None]
    return torch.where(coin, turned.transpose(2, 3), turned)


def _mirror(images: Tensor, generator: torch.Generator, axis: int) -> Tensor:
    coin = _coin(len(images), generator, images.device)[:, None, None, None]
    return torch.where(coin, images.flip(axis), images)


def _jitter_stain(values: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Scale and shift the density of each stain by normal factors of standard deviation ``strength``.

    Source: Tellez et al., Whole-Slide Mitosis Detection in H&E Breast Histology Using PHH3 as a Reference, IEEE TMI
    2018 (HED perturbation); there the factors are uniform.
    """
    stains = torch.tensor(STAINS, device=values.device)
    stains = stains / stains.norm(dim=1, keepdim=True)
    size = (len(values), 3)
    scale = 1 + strength * torch.randn(size, generator=generator, device=values.device)
    shift = strength / 2 * torch.randn(size, generator=generator, device=values.device)
    density = -(values.add(1).mul(127.5).add(1) / 256).log()  # (B, 3, H, W)
    mixing = torch.linalg.inv_ex(stains).inverse @ (scale[:, :, None] * stains)  # (B, 3, 3)
    changed = torch.einsum("bchw,bcd->bdhw", density, mixing) + (shift @ stains)[:, :, None, None]
    return changed.neg().exp().mul(256).sub(1).div(127.5).sub(1).clamp(-1, 1)


def _coin(size: int, generator: torch.Generator, device: torch.device) -> Tensor:
    return torch.rand(size, generator=generator, device=device) < 0.5


def _uniform(size: int, low: float, high: float, generator: torch.Generator, device: torch.device) -> Tensor:
    return low + (high - low) * torch.rand(size, generator=generator, device=device)
