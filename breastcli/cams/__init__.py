"""Class activation maps: functions of a network and images, without hooks, on the ``Classifier`` contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from breastcli.data.loading import to_network
from breastcli.errors import UserError
from breastcli.models import Classifier
from breastcli.registry import Registry
from breastcli.system.runtime import autocast


@dataclass(frozen=True)
class CamOptions:
    """What the methods can be told.

    Attributes:
        noise: DT Grad-CAM: standard deviation of the noise, in units of images in [-1, 1]; 0.1 is 12.75 of 255 grey
            levels.
        samples: DT Grad-CAM: number of noisy copies.
        top_k: Score-CAM: number of channels that it tries, those that vary most over the image; None for all.
        batch_size: largest number of images, noisy copies and masked images included, that go through the network at
            once.
        seed: DT Grad-CAM: of the noise.
    """

    noise: float = 0.1
    samples: int = 10
    top_k: int | None = None
    batch_size: int = 32
    seed: int = 0


# Takes a network in evaluation mode, images (B, 3, H, W) in [-1, 1] on its device, the classes (B,) to explain, and
# options to maps (B, h, w) float32, neither scaled nor resized.
Cam = Callable[[Classifier, Tensor, Tensor, CamOptions], Tensor]


@dataclass(frozen=True)
class CamKind:
    """An explanation method of the registry.

    Attributes:
        function: the method itself.
        title: what a report calls it.
        source: who described it.
        refine: what the method does to its binarised map (H, W), whatever the threshold was; None for nothing.
        needs_gradient: whether it differentiates.
        class_specific: whether its maps depend on the class to explain.
    """

    function: Cam
    title: str
    source: str
    refine: Callable[[np.ndarray], np.ndarray] | None = None
    needs_gradient: bool = True
    class_specific: bool = True


CAMS: Registry[CamKind] = Registry("explanation method", "breastcli.cams")


def saliency_maps(
    model: Classifier,
    images: Tensor,
    targets: Tensor,
    method: str,
    options: CamOptions = CamOptions(),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return what each image owes its class to, at the image's size.

    Each map is scaled by its own minimum and maximum, then resized bilinearly; a constant map becomes zero.

    Args:
        model: network in evaluation mode.
        images: (B, 3, H, W) uint8 on the network's device.
        targets: (B,) class numbers.
        method: name in ``CAMS``.
        options: what the method is told.
        dtype: arithmetic of the network up to the explained maps; what follows, gradients too, is in float32.

    Returns:
        (B, H, W) float32 in [0, 1] on the CPU.

    Raises:
        UsageError: no such method; the nearest one is named.
        UserError: the network's tokens do not lie over the image.
    """
    assert not model.training, "explanations need a network in evaluation mode"
    explain = CAMS.get(method).function
    parts = []
    for some, classes in zip(images.split(options.batch_size), targets.split(options.batch_size), strict=True):
        with autocast(images.device, dtype):
            maps = explain(model, to_network(some), classes.to(images.device), options)
        parts.append(_fit_to_image(maps, images.shape[2], images.shape[3]).cpu())
    return torch.cat(parts)


def _fit_to_image(maps: Tensor, height: int, width: int) -> Tensor:
    """Scale maps (B, h, w) to [0, 1] and resize them: (B, height, width)."""
    if height == width and maps.shape[1] == 1 < maps.shape[2]:  # tokens in a row, in an order that nobody knows
        raise UserError("the tokens of this network do not lie over the image", fix="explain a network that keeps maps")
    if maps[0].numel() == 1:
        raise UserError("the maps to explain are a single cell", fix="use --layer, or prepare with a larger --size")
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    scaled = torch.where(high > low, (maps - low) / (high - low), 0.0)
    return functional.interpolate(scaled[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0]


def maps_of(model: Classifier, images: Tensor) -> Tensor:
    """Return the maps (B, C, h, w) float32 over the images, without gradients."""
    return model.grid(_whole_maps(model, images))


def maps_and_gradient(model: Classifier, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maps over the images and the gradient of the target's logit with respect to them.

    The backward pass ends at the maps; parameters receive no gradient.

    Returns:
        Two (B, C, h, w) float32.
    """
    whole = _whole_maps(model, images).detach()  # another tensor, also where the network returned its input
    with torch.enable_grad():
        score = _target_logits(model, whole.requires_grad_(), targets).sum()
        (gradient,) = torch.autograd.grad(score, whole)
    return model.grid(whole.detach()), model.grid(gradient)


@torch.no_grad()
def scores_of(model: Classifier, images: Tensor, targets: Tensor) -> Tensor:
    """Return the logits (B,) float32 of the targets."""
    return _target_logits(model, _whole_maps(model, images), targets)


def in_batches(function: Callable[[Tensor], Tensor], num: int, options: CamOptions, device: torch.device) -> Tensor:
    """Call a function with the numbers 0 to ``num`` - 1, a batch at a time, and join what it returns."""
    numbers = torch.arange(num, device=device)
    return torch.cat([function(some) for some in numbers.split(options.batch_size)])


@torch.no_grad()
def _whole_maps(model: Classifier, images: Tensor) -> Tensor:
    """Return the maps with the rows of tokens that ``classify`` needs beside them, in the caller's precision."""
    return model.features(images).float()


def _target_logits(model: Classifier, maps: Tensor, targets: Tensor) -> Tensor:
    with torch.autocast(maps.device.type, enabled=False):
        return model.classify(maps).gather(1, targets[:, None])[:, 0]
