from __future__ import annotations

import pytest
import torch
from torch import Tensor

from breastcli.gan.objectives import OBJECTIVES, feature_matching, gradient_penalty, r1_penalty

ZEROS = torch.zeros(6, dtype=torch.long)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def linear_critic(weight: Tensor):
    return lambda images, conditions: images.flatten(1) @ weight


@pytest.mark.parametrize("length", [0.5, 1.0, 3.0])
def test_gradient_penalty_of_a_linear_critic(length: float) -> None:
    weight = torch.randn(12)
    weight = (weight / weight.norm() * length).requires_grad_()
    real, generated = torch.randn(6, 3, 2, 2), torch.randn(6, 3, 2, 2)
    penalty = gradient_penalty(linear_critic(weight), real, generated, ZEROS, torch.Generator().manual_seed(0))
    assert float(penalty.detach()) == pytest.approx((length - 1) ** 2, abs=1e-5)  # two-sided: also below one
    (slope,) = torch.autograd.grad(penalty, weight)
    expected = 2 * (length - 1) * weight / length  # of (|w| - 1)²
    torch.testing.assert_close(slope, expected.detach(), atol=1e-4, rtol=1e-4)


def test_gradient_penalty_lies_between_real_and_generated_and_reaches_neither() -> None:
    seen = []

    def critic(images: Tensor, conditions: Tensor) -> Tensor:
        seen.append(images.detach())
        return images.flatten(1).square().sum(dim=1)

    real, generated = torch.zeros(6, 3, 2, 2), torch.ones(6, 3, 2, 2, requires_grad=True)
    gradient_penalty(critic, real, generated, ZEROS, torch.Generator().manual_seed(0)).backward()
    places = seen[0][:, 0, 0, 0]
    assert ((places > 0) & (places < 1)).all()
    assert len(places.unique()) == 6  # each image has its own place
    assert (seen[0] == places[:, None, None, None]).all()
    assert generated.grad is None


def test_r1_of_a_linear_critic() -> None:
    weight = torch.randn(12, requires_grad=True)
    penalty = r1_penalty(linear_critic(weight), torch.randn(6, 3, 2, 2), ZEROS)
    assert float(penalty.detach()) == pytest.approx(float(weight.detach().square().sum()) / 2, rel=1e-5)
    (slope,) = torch.autograd.grad(penalty, weight)
    torch.testing.assert_close(slope, weight.detach(), atol=1e-5, rtol=1e-5)


def test_r1_of_a_quadratic_critic_is_taken_at_the_real_images() -> None:
    real = torch.randn(6, 3, 2, 2)
    penalty = r1_penalty(lambda images, conditions: images.flatten(1).square().sum(dim=1), real, ZEROS)
    slope = 2 * real.detach()
    assert penalty.item() == pytest.approx(slope.square().flatten(1).sum(dim=1).mean().item() / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "critic", "generator"),
    [
        ("wgan-gp", (-2 + 0.5 + 3) / 3 - (1 + 4 + 0) / 3, -(-2 + 0.5 + 3) / 3),
        ("hinge", (0 + 0 + 1) / 3 + (0 + 1.5 + 4) / 3, (3 + 0.5 + 0) / 3),
        ("paper", (-2 + 0.5 + 3) / 3 - (1 + 4 + 0) / 3, (3 + 0.5 + 0) / 3),
    ],
)
def test_objectives_by_hand(name: str, critic: float, generator: float) -> None:
    real, generated = torch.tensor([1.0, 4.0, 0.0]), torch.tensor([-2.0, 0.5, 3.0])
    assert float(OBJECTIVES[name].critic(real, generated)) == pytest.approx(critic)
    assert float(OBJECTIVES[name].generator(generated)) == pytest.approx(generator)


def test_feature_matching_compares_means_and_pulls_at_generated_only() -> None:
    real = torch.tensor([[0.0, 2.0], [2.0, 2.0]], requires_grad=True)
    generated = torch.tensor([[3.0, 0.0], [1.0, 0.0]], requires_grad=True)
    difference = feature_matching(real, generated)
    assert difference.item() == pytest.approx((1**2 + 2**2) / 2)
    difference.backward()
    assert real.grad is None
    assert generated.grad is not None
