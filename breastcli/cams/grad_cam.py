"""Grad-CAM."""

from __future__ import annotations

from torch import Tensor

from breastcli.cams import CAMS, CamKind, CamOptions, maps_and_gradient
from breastcli.models import Classifier


def grad_cam(model: Classifier, images: Tensor, targets: Tensor, options: CamOptions) -> Tensor:
    """Weight each channel by its mean gradient.

    Source: Selvaraju et al., Grad-CAM, ICCV 2017, eq. 1-2.

    Args:
        model: network in evaluation mode.
        images: (B, 3, H, W) in [-1, 1].
        targets: (B,) class numbers.
        options: not used.

    Returns:
        (B, h, w), non-negative; neither scaled nor resized.
    """
    maps, gradient = maps_and_gradient(model, images, targets)
    weights = gradient.mean(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
    return (weights * maps).sum(dim=1).relu()


CAMS.register("gradcam")(CamKind(grad_cam, "Grad-CAM", "Selvaraju et al., ICCV 2017"))
