"""Cross-entropy."""

from __future__ import annotations

from torch import Tensor, nn

from breastcli.losses import LOSSES, Loss


@LOSSES.register("cross_entropy")
def cross_entropy(class_weights: Tensor | None) -> Loss:
    """Return the mean cross-entropy, weighted by class where weights (K,) are given."""
    return nn.CrossEntropyLoss(weight=class_weights)
