"""DT Grad-CAM: Grad-CAM averaged over noisy copies, thresholded by Otsu and smoothed."""

from __future__ import annotations

import numpy as np
import torch
from skimage.morphology import closing, disk, opening
from torch import Tensor

from breastcli.cams import CAMS, CamKind, CamOptions, in_batches
from breastcli.cams.grad_cam import grad_cam
from breastcli.models import Classifier

LAST_WEIGHT = 0.5
RADIUS_PX = 3  # of the disk that opens and closes the mask


def dt_grad_cam(model: Classifier, images: Tensor, targets: Tensor, options: CamOptions) -> Tensor:
    """Average Grad-CAM over copies of the image with noise, with weights that fall linearly from 1 to 0.5.

    Source: DALAResNet50 paper (2024), section V-A, eq. 5-8. Steps 4 and 5, Otsu's threshold and the morphological
    operations, apply to the mean map at the image's size: ``refine`` follows whatever threshold the caller applies, and
    ``shown`` is the heat map of Figure 7.

    The paper prints neither the number of copies nor the level of the noise nor its unit; it scales images to [-1, 1],
    and the level is taken to be in that unit. It scales no copy's map before averaging, and clips no copy; nor do we.

    All images get the same noise, drawn from the seed for each copy: a map then depends neither on the batch that its
    image is in nor on the image's number, and two images, classes or layers differ by themselves and not by chance.

    Args:
        model: network in evaluation mode.
        images: (B, 3, H, W) in [-1, 1].
        targets: (B,) class numbers.
        options: ``noise``, ``samples``, ``seed``, ``batch_size``.

    Returns:
        (B, h, w), non-negative; neither scaled nor resized.
    """
    num = options.samples
    generator = torch.Generator().manual_seed(options.seed)  # on the CPU, so that every device sees the same noise
    noise = options.noise * torch.randn(num, *images.shape[1:], generator=generator)
    noise = noise.to(images.device)

    def explain(numbers: Tensor) -> Tensor:
        owners = numbers // num
        return grad_cam(model, images[owners] + noise[numbers % num], targets[owners], options)

    maps = in_batches(explain, len(images) * num, options, images.device).unflatten(0, (len(images), num))
    weights = torch.linspace(1, LAST_WEIGHT, num, device=images.device)[:, None, None]
    return (weights * maps).sum(dim=1) / weights.sum()


def refine(mask: np.ndarray) -> np.ndarray:
    """Open, then close a mask (H, W) bool: specks and threads go, then holes and cracks.

    The paper names no structuring element; ours is a disk of radius 3 pixels.
    """
    element = disk(RADIUS_PX)
    return closing(opening(mask, element, mode="ignore"), element, mode="ignore")


def shown(saliency: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the heat map (H, W) that the paper shows: the mean map inside the mask, zero outside."""
    return np.where(mask, saliency, 0)


CAMS.register("dtgradcam")(CamKind(dt_grad_cam, "DT Grad-CAM", "DALAResNet50 paper, 2024, section V-A", refine))
