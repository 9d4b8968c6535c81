from __future__ import annotations

import math

import pytest
import torch

from breastcli.config import UsageError
from breastcli.losses import LOSSES

LOGITS = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]])  # probabilities (1/4, 3/4) and (4/5, 1/5)
LABELS = torch.tensor([1, 1])


def test_cross_entropy_by_hand() -> None:
    value = LOSSES.get("cross_entropy")(None)(LOGITS, LABELS)
    assert float(value) == pytest.approx((-math.log(3 / 4) - math.log(1 / 5)) / 2)


def test_weighted_cross_entropy_by_hand() -> None:
    labels = torch.tensor([0, 1])
    value = LOSSES.get("cross_entropy")(torch.tensor([1.0, 3.0]))(LOGITS, labels)
    assert float(value) == pytest.approx((-math.log(1 / 4) - 3 * math.log(1 / 5)) / 4)


def test_focal_by_hand() -> None:
    value = LOSSES.get("focal")(None)(LOGITS, LABELS)
    expected = (-((1 / 4) ** 2) * math.log(3 / 4) - (4 / 5) ** 2 * math.log(1 / 5)) / 2
    assert float(value) == pytest.approx(expected)


@pytest.mark.parametrize("name", LOSSES.names())
def test_every_loss_falls_towards_the_truth(name: str) -> None:
    loss = LOSSES.get(name)(torch.tensor([1.0, 2.0]))
    logits = torch.zeros(6, 2, requires_grad=True)
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    value = loss(logits, labels)
    value.backward()
    assert value.ndim == 0
    right = logits.grad.gather(1, labels[:, None])
    assert (right < 0).all()
    with torch.no_grad():
        assert loss(logits - logits.grad, labels) < value
        shifted = loss(logits + 5.0, labels)  # log-probabilities do as well as logits
    assert shifted.item() == pytest.approx(value.item())


def test_unknown_loss() -> None:
    with pytest.raises(UsageError, match="did you mean 'focal'"):
        LOSSES.get("focl")
