"""Eigen-CAM."""

from __future__ import annotations

import torch
from torch import Tensor

from breastcli.cams import CAMS, CamKind, CamOptions, maps_of
from breastcli.models import Classifier


def eigen_cam(model: Classifier, images: Tensor, targets: Tensor, options: CamOptions) -> Tensor:
    """Project the channels onto their first principal direction, whatever the class.

    Source: Bany Muhammad and Yeasin, Eigen-CAM, IJCNN 2020: with O the positions by channels, O v, v the first
    right singular vector of O. O is not centred, as in the paper; the grad-cam package subtracts each channel's mean.

    The paper leaves the sign of v open: ours makes the projection agree with the length of the channels' vector at each
    position. Maps after a ReLU then have projections that are never negative; others may keep some.

    Args:
        model: network in evaluation mode.
        images: (B, 3, H, W) in [-1, 1].
        targets: not used.
        options: not used.

    Returns:
        (B, h, w); neither scaled nor resized.
    """
    maps = maps_of(model, images)
    positions = maps.flatten(2).mT  # (B, h * w, C)
    few_positions = positions.shape[1] <= positions.shape[2]
    with torch.autocast(maps.device.type, enabled=False):
        shorter = positions if few_positions else positions.mT
        squares, directions = torch.linalg.eigh(shorter @ shorter.mT)  # cheaper than the singular values of O itself
        leading = directions[:, :, -1]  # (B, the smaller of h * w and C)
        if few_positions:  # O v is the first left singular vector times the first singular value
            projection = leading * squares[:, -1:].clamp(min=0).sqrt()
        else:
            projection = (positions @ leading[:, :, None])[:, :, 0]
    agreement = (projection * positions.norm(dim=2)).sum(dim=1, keepdim=True)
    return torch.where(agreement < 0, -projection, projection).view(len(maps), *maps.shape[2:])


CAMS.register("eigencam")(
    CamKind(eigen_cam, "Eigen-CAM", "Bany Muhammad and Yeasin, IJCNN 2020", needs_gradient=False, class_specific=False)
)
