"""Score-CAM."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from breastcli.cams import CAMS, CamKind, CamOptions, in_batches, maps_of, scores_of
from breastcli.models import Classifier


def score_cam(model: Classifier, images: Tensor, targets: Tensor, options: CamOptions) -> Tensor:
    """Weight each channel by what the image scores where that channel alone says what is shown.

    Source: Wang et al., Score-CAM, CVPR workshops 2020, Algorithm 1: each channel, resized to the image and scaled to
    [0, 1], masks the image; the weights are the softmax over the channels of the masked images' logits. The score of a
    baseline image, which the paper subtracts, is the same for every channel and drops out of that softmax. What is
    masked turns mid-grey, 0 in images of [-1, 1]. Section 3.3 of the paper and its authors' program take the
    probability among the classes instead; we keep to the algorithm.

    It takes as many forward passes per image as there are channels; ``top_k`` takes only the channels whose values vary
    most over the image, an economy that the paper does not have.

    Args:
        model: network in evaluation mode.
        images: (B, 3, H, W) in [-1, 1].
        targets: (B,) class numbers.
        options: ``top_k``, ``batch_size``.

    Returns:
        (B, h, w), non-negative; neither scaled nor resized.
    """
    maps = maps_of(model, images)
    if options.top_k is not None and options.top_k < maps.shape[1]:
        chosen = maps.flatten(2).var(dim=2, correction=0).topk(options.top_k).indices  # (B, k)
        maps = maps[torch.arange(len(maps), device=maps.device)[:, None], chosen]
    num_channels = maps.shape[1]
    channels = maps.flatten(0, 1)  # (B * k, h, w)

    def score(numbers: Tensor) -> Tensor:
        owners = numbers // num_channels
        return scores_of(model, images[owners] * _as_masks(channels[numbers], images), targets[owners])

    scores = in_batches(score, len(channels), options, images.device).view(len(maps), num_channels)
    weights = scores.softmax(dim=1)[:, :, None, None]
    return (weights * maps).sum(dim=1).relu()


def _as_masks(channels: Tensor, images: Tensor) -> Tensor:
    """Resize channels (N, h, w) to the images and scale each to [0, 1]: (N, 1, H, W); a constant one becomes zero."""
    masks = functional.interpolate(channels[:, None], images.shape[2:], mode="bilinear", align_corners=False)
    low, high = masks.amin(dim=(2, 3), keepdim=True), masks.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, (masks - low) / (high - low), 0.0)


CAMS.register("scorecam")(CamKind(score_cam, "Score-CAM", "Wang et al., CVPR workshops 2020", needs_gradient=False))
