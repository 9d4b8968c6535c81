"""Steps of critic and generator, and the signs of a collapse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from breastcli.config import SynthesizeConfig
from breastcli.data.augment import Draws, draw_elements, place
from breastcli.data.loading import to_network
from breastcli.data.store import PreparedData
from breastcli.errors import UserError
from breastcli.gan.conditions import Condition
from breastcli.gan.diffaugment import diffaugment
from breastcli.gan.networks import Critic, GanOptions, Generator
from breastcli.gan.objectives import OBJECTIVES, feature_matching, gradient_penalty, r1_penalty
from breastcli.system.distributed import Processes
from breastcli.system.runtime import autocast, mix_seed

BETAS = (0.0, 0.99)
NETWORKS = ("generator", "average", "critic")
STATE_SHAPE = {
    "networks": dict.fromkeys(NETWORKS, dict),
    "optimizers": [dict],
    "steps": int,
    "history": [{"kimg": float, "diversity": float}],
    "timing": [(list, tuple)],
}
R1_EVERY = 16  # critic steps; the penalty counts as many times over then (Karras et al. 2020, appendix B)
EMA_RAMP = 0.05  # the average's half-life is at most this share of the images seen so far
FIGURES = ("critic_loss", "generator_loss", "critic_gap", "gradient_penalty", "r1_penalty", "feature_matching")
COLLAPSE_LIMIT = 0.2  # of the real images' diversity
WARM_UP = 0.25  # of the run, in which a generator may still be all alike
DIVERSITY_IMAGES = 64
DIVERSITY_PX = 8


class RealImages:
    """The training images at the generator's size.

    Args:
        data: prepared folder.
        rows: (n,) its rows to learn from.
        size_px: side to resize to; a copy is kept in memory where the folder has another.
    """

    def __init__(self, data: PreparedData, rows: np.ndarray, size_px: int) -> None:
        self.data = data
        self.rows = rows
        self.resized = None
        if data.size_px != size_px:
            self.resized = np.empty((len(rows), size_px, size_px, 3), dtype=np.uint8)
            for start in range(0, len(rows), 64):
                chunk = torch.from_numpy(data.images[rows[start : start + 64]]).permute(0, 3, 1, 2)
                self.resized[start : start + 64] = resize(chunk, size_px).permute(0, 2, 3, 1).numpy()

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, places: np.ndarray) -> Tensor:
        """Return uint8 images (B, 3, H, W), channels last, of places among the rows."""
        pixels = self.data.images[self.rows[places]] if self.resized is None else self.resized[places]
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def resize(images: Tensor, size_px: int) -> Tensor:
    """Return uint8 images (B, 3, H, W) resized to a square, bicubic with antialiasing."""
    if images.shape[2:] == (size_px, size_px):
        return images
    shape = (size_px, size_px)
    values = functional.interpolate(images.float(), shape, mode="bicubic", antialias=True, align_corners=False)
    return values.round_().clamp_(0, 255).to(torch.uint8)


def to_pixels(images: Tensor) -> Tensor:
    """Return images in [-1, 1] as uint8."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def to_arrays(images: Tensor) -> np.ndarray:
    """Return images (n, 3, H, W) as arrays (n, H, W, 3)."""
    return images.permute(0, 2, 3, 1).contiguous().numpy()


@dataclass
class GanSession:
    """Everything that one training of a GAN works with.

    Attributes:
        config: the run's configuration.
        options: what the networks were built from.
        conditions: what an image can be asked for by.
        members: places of the training images of each condition.
        images: the training images.
        device: where to compute.
        dtype: arithmetic of the forward passes; penalties are in float32.
        processes: those that share the work.
        generator: learns.
        average: the generator's exponential moving average, which draws the images.
        critic: learns.
        generator_optimizer: of the generator.
        critic_optimizer: of the critic.
        augmentations: names of what is done to all that the critic sees.
        sums: (2, figures) sums and numbers of the figures since the last snapshot.
        steps: critic steps done.
        history: one row per snapshot.
        timing: kimg, seconds and images per second of each snapshot.
    """

    config: SynthesizeConfig
    options: GanOptions
    conditions: list[Condition]
    members: list[np.ndarray]
    images: RealImages
    device: torch.device
    dtype: torch.dtype
    processes: Processes
    generator: Generator
    average: Generator
    critic: Critic
    generator_optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer
    augmentations: tuple[str, ...]
    sums: Tensor
    steps: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    timing: list[tuple[float, float, float]] = field(default_factory=list)

    @property
    def images_seen(self) -> int:
        """Real images that the critic was shown, by all processes."""
        return self.steps * self.config.batch_size

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs: tensors and plain values."""
        return {
            "networks": {name: getattr(self, name).state_dict() for name in NETWORKS},
            "optimizers": [self.generator_optimizer.state_dict(), self.critic_optimizer.state_dict()],
            "steps": self.steps,
            "history": self.history,
            "timing": self.timing,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        for name in NETWORKS:
            getattr(self, name).load_state_dict(saved["networks"][name])
        self.generator_optimizer.load_state_dict(saved["optimizers"][0])
        self.critic_optimizer.load_state_dict(saved["optimizers"][1])
        self.steps = saved["steps"]
        self.history.extend(saved["history"])
        self.timing.extend(tuple(row) for row in saved["timing"])


def num_steps(config: SynthesizeConfig) -> int:
    """Return how many critic steps a fit takes."""
    return max(1, round(config.kimg * 1000 / config.batch_size))


def take_step(session: GanSession) -> None:
    """Take one step of the critic, and one of the generator where it is its turn.

    All randomness comes from the seed, the step's number and the process' rank.
    """
    config, device = session.config, session.device
    seeds = (config.seed, session.steps, session.processes.rank)
    rng, draw = np.random.default_rng(mix_seed(*seeds, 1)), torch.Generator(device).manual_seed(mix_seed(*seeds, 2))
    real, conditions = _draw_real(session, rng, draw)
    found = _critic_step(session, real, conditions, draw)
    session.steps += 1
    if session.steps % config.n_critic == 0:
        found |= _generator_step(session, real, conditions, draw)
        _average(session)
    for number, name in enumerate(FIGURES):
        if name in found:  # added up on the device: reading a value would wait for it
            session.sums[0, number] += found[name]
            session.sums[1, number] += 1


def _draw_real(session: GanSession, rng: np.random.Generator, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw real images (B, 3, H, W) in [-1, 1] and conditions (B,), all conditions equally often."""
    size = session.config.batch_size // session.processes.count
    conditions = rng.integers(len(session.conditions), size=size)
    places = np.array([rng.choice(session.members[condition]) for condition in conditions])
    images = session.images.take(places).to(session.device, non_blocking=True)
    if session.config.turn:
        images = place(images, draw_elements(Draws(draw, size)))
    values = to_network(images).contiguous(memory_format=torch.channels_last)
    return values, torch.from_numpy(conditions).to(session.device)


def _critic_step(session: GanSession, real: Tensor, conditions: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
    """Let the critic learn from real images (B, 3, H, W) of conditions (B,) and from as many generated ones."""
    config, critic = session.config, session.critic
    noise = _noise(session, len(real), draw)
    with torch.no_grad(), autocast(session.device, session.dtype):
        generated = session.generator(noise, conditions)
    real = diffaugment(real, session.augmentations, draw)
    generated = diffaugment(generated, session.augmentations, draw)
    with autocast(session.device, session.dtype):
        real_scores, generated_scores = critic(real, conditions), critic(generated, conditions)
    real_scores, generated_scores = real_scores.float(), generated_scores.float()
    loss = OBJECTIVES[config.objective].critic(real_scores, generated_scores)
    gap = (real_scores.mean() - generated_scores.mean()).detach()
    found = {"critic_loss": loss.detach(), "critic_gap": gap}
    if config.gp_weight:
        penalty = gradient_penalty(critic, real, generated, conditions, draw)
        loss = loss + config.gp_weight * penalty
        found["gradient_penalty"] = penalty.detach()
    if config.gamma and session.steps % R1_EVERY == 0:
        penalty = r1_penalty(critic, real, conditions)
        loss = loss + R1_EVERY * config.gamma * penalty
        found["r1_penalty"] = penalty.detach()
    _descend(session, loss, critic, session.critic_optimizer)
    return found


def _generator_step(session: GanSession, real: Tensor, conditions: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
    """Let the generator learn from the critic's scores of new images of conditions (B,)."""
    config, critic = session.config, session.critic
    noise = _noise(session, len(real), draw)
    critic.requires_grad_(False)
    with autocast(session.device, session.dtype):
        generated = session.generator(noise, conditions)
    generated = diffaugment(generated, session.augmentations, draw)
    with autocast(session.device, session.dtype):
        features = critic.features(generated)
        scores = critic.judge(features, conditions)
    loss = OBJECTIVES[config.objective].generator(scores.float())
    found = {"generator_loss": loss.detach()}
    if config.feature_weight:
        with torch.no_grad(), autocast(session.device, session.dtype):
            wanted = critic.features(diffaugment(real, session.augmentations, draw))
        difference = feature_matching(wanted.float(), features.float())
        loss = loss + config.feature_weight * difference
        found["feature_matching"] = difference.detach()
    _descend(session, loss, session.generator, session.generator_optimizer)
    critic.requires_grad_(True)
    return found


def _descend(session: GanSession, loss: Tensor, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    session.processes.average_gradients(network.parameters())
    optimizer.step()


@torch.no_grad()
def _average(session: GanSession) -> None:
    """Move the averaged generator towards the learning one."""
    half_life = min(session.config.ema * 1000, EMA_RAMP * session.images_seen)
    step = session.config.batch_size * session.config.n_critic
    share = 0.5 ** (step / half_life) if half_life > 0 else 0.0
    for kept, learned in zip(session.average.parameters(), session.generator.parameters(), strict=True):
        kept.lerp_(learned, 1 - share)


def _noise(session: GanSession, size: int, draw: torch.Generator) -> Tensor:
    return torch.randn((size, session.options.noise_dim), generator=draw, device=session.device)


def mean_figures(session: GanSession) -> dict[str, float]:
    """Return the mean of every figure since the last call, NaN where there was none, and begin anew.

    Raises:
        UserError: a figure was not a finite number.
    """
    sums, counts = session.processes.average(session.sums).cpu()
    session.sums = torch.zeros_like(session.sums)
    if not sums.isfinite().all():
        raise UserError(
            f"the loss is not a finite number after {session.images_seen / 1000:.1f} kimg",
            fix="lower --lr or use --precision fp32; the last snapshot is kept",
        )
    return {
        name: float(total / count) if count else math.nan
        for name, total, count in zip(FIGURES, sums, counts, strict=True)
    }


@torch.inference_mode()
def diversity_share(session: GanSession) -> float:
    """Return how far generated images of a condition lie apart, as a share of how far real ones do.

    The mean Euclidean distance between pairs of images of 8 × 8 pixels, so that noise does not count as diversity, in
    the condition that is worst off: one class may collapse alone. The learning generator is looked at, since its
    average would show a collapse later. A condition of one real image, which has no diversity, is left out.
    """
    shares = [1.0]
    for number, members in enumerate(session.members):
        if len(members) < 2:
            continue
        rng, draw = np.random.default_rng(number), torch.Generator(session.device).manual_seed(number)
        real = session.images.take(rng.permutation(members)[:DIVERSITY_IMAGES]).to(session.device)
        conditions = torch.full((DIVERSITY_IMAGES,), number, device=session.device)
        with autocast(session.device, session.dtype):
            generated = session.generator(_noise(session, DIVERSITY_IMAGES, draw), conditions)
        spread = _mean_distance(to_network(real))
        shares.append(_mean_distance(generated) / spread if spread else 1.0)
    return float(min(shares[1:], default=shares[0]))


def _mean_distance(images: Tensor) -> float:
    """Return the mean distance between pairs of different images (B, 3, H, W)."""
    return float(functional.pdist(functional.adaptive_avg_pool2d(images, DIVERSITY_PX).flatten(1).cpu()).mean())


def is_healthy(row: dict[str, float], kimg: float, size_px: int) -> bool:
    """Return whether a snapshot shows no sign of a collapse.

    Two signs are known. The images are nearly all alike: after the first quarter of the run, their diversity is below a
    fifth of the real images'. Or the critic has run away: the scores of real and generated images differ by more than
    the diameter of image space, which no critic of slope one can do.

    Args:
        row: ``kimg``, ``diversity`` and ``critic_gap`` of a snapshot.
        kimg: length of the whole run.
        size_px: side of the images.
    """
    alike = row["kimg"] >= WARM_UP * kimg and row["diversity"] < COLLAPSE_LIMIT
    return not alike and abs(row["critic_gap"]) <= 2 * math.sqrt(3 * size_px**2)


def find_collapse(
    history: Sequence[dict[str, float]], kimg: float, size_px: int, *, finished: bool = False
) -> str | None:
    """Return what is wrong with a training whose last two snapshots (at its end: whose last) are not healthy, or None.

    Args:
        history: the snapshots so far.
        kimg: length of the whole run.
        size_px: side of the images.
        finished: whether the run ends here.
    """
    looked_at = history[-1:] if finished else history[-2:]
    if len(looked_at) < 2 - finished or any(is_healthy(row, kimg, size_px) for row in looked_at):
        return None
    last = history[-1]
    if is_healthy({**last, "critic_gap": 0.0}, kimg, size_px):
        gap = abs(last["critic_gap"])
        return f"the critic has run away: its scores of real and generated images differ by {gap:.3g}"
    return f"the images are nearly all alike: their diversity is {last['diversity']:.2f} of the real images'"
