"""Focal loss."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from breastcli.losses import LOSSES, Criterion, LossKind

GAMMA = 2.0  # the paper's best setting


def focal(class_weights: Tensor | None) -> Criterion:
    """Return the focal loss with gamma 2, which turns down the share of images that are already right.

    Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, eq. 5. Class weights (K,) take the place of
    the paper's alpha; the mean is over the weights, as in weighted cross-entropy.
    """

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        log_probs = functional.log_softmax(logits, dim=1).gather(1, labels[:, None]).squeeze(1)
        per_image = -((1 - log_probs.exp()) ** GAMMA) * log_probs
        weights = per_image.new_ones(len(labels)) if class_weights is None else class_weights[labels]
        return (weights * per_image).sum() / weights.sum()

    return loss


LOSSES.register("focal")(LossKind(focal, "Lin et al., ICCV 2017"))
