"""Cross-entropy."""

from __future__ import annotations

from torch import Tensor, nn

from breastcli.losses import LOSSES, Criterion, LossKind


def cross_entropy(class_weights: Tensor | None) -> Criterion:
    """Return the mean cross-entropy, weighted by class where weights (K,) are given."""
    return nn.CrossEntropyLoss(weight=class_weights)


LOSSES.register("cross_entropy")(LossKind(cross_entropy, "plain softmax cross-entropy"))
