"""What critic and generator minimise: Wasserstein and hinge losses, gradient penalties, feature matching.

Each objective is a pair of losses on the critic's scores; the penalties are added to any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Scorer = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """The losses of one kind of GAN.

    Attributes:
        critic: scores of real (B,) and of generated images (B,) to the critic's loss.
        generator: scores of generated images (B,) to the generator's loss.
        n_critic: critic steps for one of the generator unless another number is asked for.
    """

    critic: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]
    n_critic: int


def wasserstein_critic(real: Tensor, generated: Tensor) -> Tensor:
    """Return E[D(G(z, y))] - E[D(x)].

    Source: Arjovsky et al., Wasserstein GAN, ICML 2017, eq. 3. Differs from Deebani et al. 2025, eq. 1, which mixes the
    distance's infimum over couplings with the critic f of its dual form; this is the dual form that critics learn by.
    """
    return generated.mean() - real.mean()


def wasserstein_generator(generated: Tensor) -> Tensor:
    """Return -E[D(G(z, y))].

    Source: Arjovsky et al., Wasserstein GAN, ICML 2017, eq. 3.
    """
    return -generated.mean()


def hinge_critic(real: Tensor, generated: Tensor) -> Tensor:
    """Return E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z, y)))].

    Source: Lim and Ye, Geometric GAN, 2017, eq. 9.
    """
    return functional.relu(1 - real).mean() + functional.relu(1 + generated).mean()


def hinge_generator(generated: Tensor) -> Tensor:
    """Return E[max(0, 1 - D(G(z, y)))], which no longer pulls at images that score above 1.

    Source: Deebani et al. 2025, eq. 2. Differs from the usual hinge GAN, whose generator minimises -D(G(z, y)).
    """
    return functional.relu(1 - generated).mean()


# Five steps: Gulrajani et al., Improved Training of Wasserstein GANs, NeurIPS 2017. docs/results.md compares them.
OBJECTIVES = {
    "wgan-gp": Objective(wasserstein_critic, wasserstein_generator, n_critic=5),
    "hinge": Objective(hinge_critic, hinge_generator, n_critic=2),
    "paper": Objective(wasserstein_critic, hinge_generator, n_critic=5),
}


def gradient_penalty(
    critic: Scorer, real: Tensor, generated: Tensor, conditions: Tensor, generator: torch.Generator
) -> Tensor:
    """Return the mean of (|gradient of D| - 1)² between real and generated images (two-sided).

    Source: Gulrajani et al., Improved Training of Wasserstein GANs, NeurIPS 2017, eq. 3.

    Args:
        critic: scores (B,) of images and conditions.
        real: (B, C, H, W) float32.
        generated: (B, C, H, W) float32; no gradient reaches its maker.
        conditions: (B,) int64 of both.
        generator: source of the places between the two, on the images' device.

    Returns:
        a scalar whose own gradient is exact (double backward).
    """
    place = torch.rand((len(real), 1, 1, 1), generator=generator, device=real.device)
    between = torch.lerp(real.detach(), generated.detach(), place).requires_grad_()
    return (_gradient_norms(critic, between, conditions) - 1).square().mean()


def r1_penalty(critic: Scorer, real: Tensor, conditions: Tensor) -> Tensor:
    """Return half the mean of |gradient of D|² at real images.

    Source: Mescheder et al., Which Training Methods for GANs do actually Converge?, ICML 2018, eq. 9, without gamma.

    Args:
        critic: scores (B,) of images and conditions.
        real: (B, C, H, W) float32.
        conditions: (B,) int64.
    """
    at = real.detach().requires_grad_()
    return _gradient_norms(critic, at, conditions, squared=True).mean() / 2


def feature_matching(real: Tensor, generated: Tensor) -> Tensor:
    """Return the mean squared difference of the mean features (B, D) of real and generated images.

    Source: Salimans et al., Improved Techniques for Training GANs, NeurIPS 2016, section 3.1; stands for the optional
    L_feat of Deebani et al. 2025, eq. 2, which the paper does not define.
    """
    return (real.detach().mean(dim=0) - generated.mean(dim=0)).square().mean()


def _gradient_norms(critic: Scorer, images: Tensor, conditions: Tensor, *, squared: bool = False) -> Tensor:
    """Return the length (B,) of the score's gradient at each image, or its square."""
    scores = critic(images, conditions)
    (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    power = gradient.flatten(1).square().sum(dim=1)
    return power if squared else power.clamp_min(1e-12).sqrt()  # the root has no slope at zero
