"""LayerCAM."""

from __future__ import annotations

from torch import Tensor

from breastcli.cams import CAMS, CamKind, CamOptions, maps_and_gradient
from breastcli.models import Classifier


def layer_cam(model: Classifier, images: Tensor, targets: Tensor, options: CamOptions) -> Tensor:
    """Weight each position of each channel by its own positive gradient, which serves early layers too.

    Source: Jiang et al., LayerCAM, IEEE TIP 2021, section III-B.

    Args:
        model: network in evaluation mode.
        images: (B, 3, H, W) in [-1, 1].
        targets: (B,) class numbers.
        options: not used.

    Returns:
        (B, h, w), non-negative; neither scaled nor resized.
    """
    maps, gradient = maps_and_gradient(model, images, targets)
    return (gradient.relu() * maps).sum(dim=1).relu()


CAMS.register("layercam")(CamKind(layer_cam, "LayerCAM", "Jiang et al., IEEE TIP 2021"))
