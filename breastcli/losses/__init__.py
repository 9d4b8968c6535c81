"""Training objectives: functions of logits and labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from breastcli.errors import UsageError
from breastcli.registry import Registry

# A criterion takes (B, K) logits and (B,) labels to a scalar; it is built from (K,) class weights, or None.
Criterion = Callable[[Tensor, Tensor], Tensor]
# A margin takes (B, K) logits, (B,) labels and the share of the training that is done, in [0, 1), to (B, K) logits; it
# is built from the size of the margin and the scale of the logits.
Margin = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class LossKind:
    """A loss of the registry.

    Attributes:
        criterion: builds the criterion from class weights.
        source: who described it.
        last_layer: the last layer that it belongs to: "linear", "cosine" or "angle".
        margin: builds the margin; None where there is none.
        default_margin: size of the margin; its unit is the margin's own.
        default_scale: scale of the cosines or angles.
        neutral_margin: the smallest margin, at which it does nothing.
        largest_margin: the largest margin; pi / 2 for those in radians, so that degrees are not taken for radians.
    """

    criterion: Callable[[Tensor | None], Criterion]
    source: str
    last_layer: str = "linear"
    margin: Callable[[float, float], Margin] | None = None
    default_margin: float = 0.0
    default_scale: float = 1.0
    neutral_margin: float = 0.0
    largest_margin: float = math.inf


LOSSES: Registry[LossKind] = Registry("loss", "breastcli.losses")


class Loss:
    """A criterion, with a margin and an adjustment of the logits that apply in training only.

    Args:
        criterion: what is minimised.
        margin: changes the logits of the true class.
        log_prior: (K,) logarithms of the class frequencies, added to the logits (logit adjustment; Menon et al.,
            Long-Tail Learning via Logit Adjustment, ICLR 2021, eq. 10 with tau 1).
    """

    def __init__(self, criterion: Criterion, margin: Margin | None = None, log_prior: Tensor | None = None) -> None:
        self.criterion = criterion
        self.margin = margin
        self.log_prior = log_prior

    def training(self, logits: Tensor, labels: Tensor, progress: float) -> Tensor:
        """Return the training loss.

        Args:
            logits: (B, K) float32.
            labels: (B,) class numbers.
            progress: share of the whole training that is done, in [0, 1).
        """
        if self.margin:
            logits = self.margin(logits, labels, progress)
        if self.log_prior is not None:
            logits = logits + self.log_prior
        return self.criterion(logits, labels)

    def validation(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of logits (B, K), or of log-probabilities, as they are used for prediction."""
        return self.criterion(logits, labels)


def margin_and_scale(name: str, margin: float | None, scale: float | None) -> tuple[float, float]:
    """Return the margin and scale of a loss, its defaults where None is given.

    Raises:
        UsageError: the loss has no margin, or the margin or scale lies outside its range.
    """
    kind = LOSSES.get(name)
    for flag, value in (("--margin", margin), ("--scale", scale)):
        if value is not None and kind.margin is None:
            raise UsageError(f"{flag} {value:g}: {name} has none", fix="use it with an angular-margin loss")
    chosen = kind.default_margin if margin is None else margin
    if not chosen >= kind.neutral_margin:  # refuses NaN too
        raise UsageError(f"--margin {chosen:g}: too small for {name}", fix=f"use {kind.neutral_margin:g} or more")
    if chosen > kind.largest_margin:
        raise UsageError(
            f"--margin {chosen:g}: too large for {name}", fix=f"give radians, up to {kind.largest_margin:.2f}"
        )
    if scale is not None and not 0 < scale < math.inf:
        raise UsageError(f"--scale {scale:g}: not a scale", fix="use a number above 0")
    return chosen, kind.default_scale if scale is None else scale


def make_loss(
    name: str, margin: float, scale: float, class_weights: Tensor | None = None, log_prior: Tensor | None = None
) -> Loss:
    """Build a loss; margin and scale come from ``margin_and_scale``."""
    kind = LOSSES.get(name)
    return Loss(kind.criterion(class_weights), kind.margin(margin, scale) if kind.margin else None, log_prior)


def class_weights_of(counts: Tensor, rule: str) -> Tensor | None:
    """Return weights (K,) of mean 1 over the training images, or None.

    Args:
        counts: (K,) training images of each class.
        rule: "weights" for the inverse frequency; "class_balanced" for the inverse effective number (1 - b^n) / (1 - b)
            with b = (N - 1) / N (Cui et al., Class-Balanced Loss, CVPR 2019, eq. 2, N the number of images); anything
            else for None.
    """
    counts = counts.double()
    if rule == "weights":
        weights = 1 / counts
    elif rule == "class_balanced":
        beta = 1 - 1 / counts.sum()
        weights = (1 - beta) / (1 - beta**counts)
    else:
        return None
    return (weights * counts.sum() / (weights * counts).sum()).float()


def log_prior_of(counts: Tensor) -> Tensor:
    """Return the logarithms (K,) of the class frequencies."""
    return torch.log(counts / counts.sum())
