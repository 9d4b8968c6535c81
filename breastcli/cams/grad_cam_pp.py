"""Grad-CAM++."""

from __future__ import annotations

from torch import Tensor

from breastcli.cams import CAMS, CamKind, CamOptions, maps_and_gradient
from breastcli.models import Classifier


def grad_cam_pp(model: Classifier, images: Tensor, targets: Tensor, options: CamOptions) -> Tensor:
    """Weight each channel by a weighted sum of its positive gradients, so that small regions count as much as large.

    Source: Chattopadhay et al., Grad-CAM++, WACV 2018, eq. 19. With g the gradient of the logit, the weight of a
    position is g² / (2 g² + g³ S), S the sum of the channel; we divide by g².

    Differs from the paper: its score is the exponential of the logit, whose gradient is g times that exponential; the
    factor is the same all over an image and is left out. The formula takes maps that are never negative for granted;
    where S is negative (transformers), zero takes its place, so that no denominator reaches zero.

    Args:
        model: network in evaluation mode.
        images: (B, 3, H, W) in [-1, 1].
        targets: (B,) class numbers.
        options: not used.

    Returns:
        (B, h, w), non-negative; neither scaled nor resized.
    """
    maps, gradient = maps_and_gradient(model, images, targets)
    rising = gradient.relu()
    sums = maps.sum(dim=(2, 3), keepdim=True).clamp(min=0)
    weights = (rising / (2 + rising * sums)).sum(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
    return (weights * maps).sum(dim=1).relu()


CAMS.register("gradcampp")(CamKind(grad_cam_pp, "Grad-CAM++", "Chattopadhay et al., WACV 2018"))
