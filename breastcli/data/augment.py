"""Augmentation of whole batches on the network's device, every image in its own way."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from breastcli.data.loading import to_network

# Rows: optical density of haematoxylin, eosin and diaminobenzidine in red, green and blue.
# Source: Ruifrok and Johnston, Anal. Quant. Cytol. Histol. 23(4), 2001.
STAINS = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
LEVELS = 127.5  # grey levels per unit of a network's input


@dataclass(frozen=True)
class Draws:
    """Random numbers for images of a batch, each the same whoever else of the batch is here.

    Numbers are drawn for the whole batch; where several processes share it, each keeps those of its own images.

    Attributes:
        generator: source of all randomness, on the images' device.
        total: images of the whole batch.
        part: which of them are here.
    """

    generator: torch.Generator
    total: int
    part: slice = field(default_factory=lambda: slice(None))

    def uniform(self, low: float, high: float) -> Tensor:
        """Return (n,) numbers uniform in [low, high)."""
        return low + (high - low) * self._unit()

    def coin(self) -> Tensor:
        """Return (n,) truth values, true with probability 1/2."""
        return self._unit() < 0.5

    def normal(self, width: int) -> Tensor:
        """Return (n, width) standard normal numbers."""
        device = self.generator.device
        return torch.randn((self.total, width), generator=self.generator, device=device)[self.part]

    def _unit(self) -> Tensor:
        return torch.rand(self.total, generator=self.generator, device=self.generator.device)[self.part]


@dataclass(frozen=True)
class Augmentation:
    """How far a policy may change an image.

    Attributes:
        flip: mirror left-right with probability 1/2.
        flip_vertical: mirror top-bottom with probability 1/2.
        turn: mirror both ways and turn by right angles, each of the eight positions equally often.
        rotation_deg: turn by an angle uniform in [-r, r] degrees, reflecting at the border like all that follow.
        min_crop: smallest side of a random crop, as a share of the image's; 1 for none.
        max_zoom: magnify by a factor log-uniform in [1/z, z], the same for both axes; 1 for none.
        shear_deg: shear by an angle uniform in [-s, s] degrees; 0 for none.
        shift: move along each axis by a share of the side uniform in [-t, t]; 0 for none.
        stain: standard deviation by which each stain's density is scaled and shifted; 0 for none.
        copies: positions (see ``dihedral``) in which every training image appears once per epoch; () for once as it
            is. Whoever composes the batches repeats the images and names their positions in the call.
    """

    flip: bool = False
    turn: bool = False
    rotation_deg: float = 0.0
    min_crop: float = 1.0
    stain: float = 0.0
    flip_vertical: bool = False
    max_zoom: float = 1.0
    shear_deg: float = 0.0
    shift: float = 0.0
    copies: tuple[int, ...] = ()

    def __call__(self, images: Tensor, draws: Draws, elements: Tensor | None = None) -> Tensor:
        """Return augmented images.

        Args:
            images: (B, 3, H, W) uint8.
            draws: source of all randomness.
            elements: (B,) int64, the position each image is put in before all else; None leaves them as they are.

        Returns:
            (B, 3, H, W) float32 in [-1, 1].
        """
        if elements is not None:
            images = place(images, elements)
        warps = self.rotation_deg or self.min_crop < 1 or self.max_zoom > 1 or self.shear_deg or self.shift
        if self.turn:
            images = _turn(images, draws)
        elif not warps:
            images = _mirror(images, draws, axis=3) if self.flip else images
            images = _mirror(images, draws, axis=2) if self.flip_vertical else images
        values = to_network(images)
        if warps:
            values = self._warp(values, draws)
        if self.stain:
            values = _jitter_stain(values, self.stain, draws)
        return values

    def _warp(self, values: Tensor, draws: Draws) -> Tensor:
        """Mirror, rotate, crop, shift, shear and zoom by one bilinear sampling.

        The matrix leads from a place in the result to its source, both counted from the centre in half sides, in
        Keras' order: rotation, shift, shear, zoom, mirrors.
        """

        def draw(low: float, high: float) -> Tensor:
            return draws.uniform(low, high)[:, None]

        def draw_sign() -> Tensor:
            return 1 - 2 * draws.coin().float()[:, None]

        # The order of the draws fixes what a seed gives; newer ones come last, and only where switched on.
        angle = draw(-self.rotation_deg, self.rotation_deg) * (math.pi / 180)
        scale = draw(self.min_crop, 1.0)
        mirror_x = draw_sign() if self.flip and not self.turn else 1.0
        room = 1 - scale
        origin = torch.cat([draw(-1.0, 1.0) * room, draw(-1.0, 1.0) * room], dim=1)  # (B, 2), as all below
        right = torch.cat([scale * angle.cos(), scale * angle.sin()], dim=1)  # where a step to the right leads
        down = torch.cat([-scale * angle.sin(), scale * angle.cos()], dim=1)
        if self.shift:
            reach = 2 * self.shift  # a side is two half sides
            origin = origin + draw(-reach, reach) * right + draw(-reach, reach) * down
        if self.shear_deg:
            shear = draw(-self.shear_deg, self.shear_deg) * (math.pi / 180)
            right = shear.cos() * right - shear.sin() * down
        if self.max_zoom > 1:
            zoom = draw(-math.log(self.max_zoom), math.log(self.max_zoom)).exp()
            right, down = right / zoom, down / zoom
        mirror_y = draw_sign() if self.flip_vertical and not self.turn else 1.0
        grid = _make_grid(right * mirror_x, down * mirror_y, origin, *values.shape[2:])
        # Planes, because bilinear sampling is slower across interleaved channels, and returns planes anyway.
        return functional.grid_sample(values.contiguous(), grid, padding_mode="reflection", align_corners=False)


POLICIES = {
    "none": Augmentation(),
    "light": Augmentation(turn=True),
    # "Random rotation and horizontal flipping" (DALAResNet50 paper, IV-C); the range of angles is not given. A field of
    # tissue has no upright position, so every angle is allowed.
    "paper": Augmentation(flip=True, rotation_deg=180.0),
    "strong": Augmentation(turn=True, rotation_deg=45.0, min_crop=0.7, stain=0.1),
    # Deebani et al. 2025, Table 5, in the terms of Keras' ImageDataGenerator: zoom 2, rotation 95, shear 0.5, shifts
    # 0.4, both flips. Differs from the paper: Keras reads zoom 2 as factors uniform in [-1, 3], one for each axis,
    # which include zero and mirror images; ours is one factor, log-uniform in [1/2, 2]. What lies beyond the border
    # Keras fills with the nearest pixel; we reflect.
    "deebani": Augmentation(flip=True, flip_vertical=True, rotation_deg=95.0, max_zoom=2.0, shear_deg=0.5, shift=0.4),
    # Wang et al. 2024, 3.2: the image, turned by 90, 180 and 270 degrees, and mirrored left-right and top-bottom.
    # Differs from the paper: the split comes first, and only training images are copied.
    "wang": Augmentation(copies=(0, 6, 3, 5, 1, 2)),
}


def dihedral(images: Tensor, element: int) -> Tensor:
    """Return images (B, C, H, H) in one of the eight positions of a square.

    Bit 4 of ``element`` swaps rows and columns, then bit 1 mirrors left-right and bit 2 top-bottom. Thus 0 leaves the
    images as they are, 6, 3 and 5 turn them counterclockwise by 90, 180 and 270 degrees (``numpy.rot90``), 1 and 2
    mirror left-right and top-bottom, 4 and 7 mirror at a diagonal.
    """
    moved = images.transpose(2, 3) if element & 4 else images
    axes = [axis for axis, bit in ((3, 1), (2, 2)) if element & bit]
    return moved.flip(axes) if axes else moved


def place(images: Tensor, elements: Tensor) -> Tensor:
    """Put every image in its own one of the eight positions of a square.

    Args:
        images: (B, C, H, W) of any type; H = W where an element swaps rows and columns.
        elements: (B,) int64 in 0..7, numbered as in ``dihedral``.

    Returns:
        (B, C, H, W), a copy with the memory layout of ``images``.
    """
    placed = torch.empty_like(images)
    for number, element in enumerate(elements.tolist()):  # gathering those of one position costs more than it saves
        placed[number] = dihedral(images[number : number + 1], element)[0]
    return placed


def _make_grid(right: Tensor, down: Tensor, origin: Tensor, height: int, width: int) -> Tensor:
    """Return where each pixel comes from, (B, H, W, 2), in half sides from the centre (x, y).

    ``torch.nn.functional.affine_grid`` returns the same, up to rounding, by a matrix product over all pixels; rows and
    columns being added is ten times as fast.

    Args:
        right: (B, 2), where a step of half a side to the right leads.
        down: (B, 2), where one downwards leads.
        origin: (B, 2), where the centre comes from.
        height: of the images in pixels.
        width: of the images in pixels.
    """

    def centres(count: int) -> Tensor:
        return (2 * torch.arange(count, device=origin.device) + 1) / count - 1

    columns = centres(width)[None, :, None] * right[:, None]  # (B, W, 2)
    rows = centres(height)[None, :, None] * down[:, None] + origin[:, None]  # (B, H, 2)
    return rows[:, :, None] + columns[:, None]


def draw_elements(draws: Draws) -> Tensor:
    """Draw a position (see ``dihedral``) for each of n images, all eight equally likely: (n,) int64."""
    left_right, top_bottom, swap = (draws.coin().long() for _ in range(3))
    # The coins mirror before they swap rows and columns, a position afterwards: swapping trades the mirrors' axes.
    return torch.where(swap == 1, 4 + 2 * left_right + top_bottom, left_right + 2 * top_bottom)


def _turn(images: Tensor, draws: Draws) -> Tensor:
    if images.shape[2] != images.shape[3]:
        return _mirror(_mirror(images, draws, axis=3), draws, axis=2)
    return place(images, draw_elements(draws))


def _mirror(images: Tensor, draws: Draws, axis: int) -> Tensor:
    coin = draws.coin()[:, None, None, None]
    return torch.where(coin, images.flip(axis), images)


def _jitter_stain(values: Tensor, strength: float, draws: Draws) -> Tensor:
    """Scale and shift the density of each stain by normal factors of standard deviation ``strength``.

    Source: Tellez et al., Whole-Slide Mitosis Detection in H&E Breast Histology Using PHH3 as a Reference, IEEE TMI
    2018 (HED perturbation); there the factors are uniform.
    """
    stains = torch.tensor(STAINS, device=values.device)
    stains = stains / stains.norm(dim=1, keepdim=True)
    scale = 1 + strength * draws.normal(3)
    shift = strength / 2 * draws.normal(3)
    mixing = torch.linalg.inv_ex(stains).inverse @ (scale[:, :, None] * stains)  # (B, 3, 3)
    # With grey levels p + 1 = 127.5 (v + v0), density d = -log((p + 1) / 256) = -log(v + v0) - log(127.5 / 256). The
    # changed density being mixing' d + shift, the constant joins the shift, and one product does the rest.
    constant = math.log(LEVELS / 256) * mixing.sum(dim=1) - shift @ stains  # (B, 3)
    logs = values.add(1 + 1 / LEVELS).log_().flatten(2)  # (B, 3, HW)
    changed = torch.baddbmm(constant[:, :, None], mixing.transpose(1, 2), logs).exp_()
    return changed.mul_(256 / LEVELS).sub_(1 + 1 / LEVELS).clamp_(-1, 1).view_as(values)
