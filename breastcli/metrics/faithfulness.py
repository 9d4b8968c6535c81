"""How far a saliency map tells what the network uses; needs no masks.

Three questions: does the class's probability follow the pixels that the map marks (``insertion_deletion``), what is
left of it when only they are shown (``confidence_change``), and does the map depend on what the network has learnt at
all (``randomisation_check``)? Every answer keeps its figures per image, for the bootstrap over patients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.v2.functional import gaussian_blur

from breastcli.models import Classifier, num_parameters
from breastcli.system.inference import predict_log_probs
from breastcli.system.runtime import mix_seed

BLUR_SIGMA = 1 / 16  # of the image's shorter side: 14 pixels of 224, more than the width of a nucleus at 400X
BLUR_RADIUS = 3  # standard deviations that the kernel reaches to either side
TIE_SEED = 20180903  # of the order among equally salient pixels; the same for every image and every run
MAX_LEVELS = 8  # of the randomisation check, each of which explains all images once more
MIN_STAGES = 7  # a network with fewer is divided further; ResNets have seven (head, four layers, norm, convolution)
RANKED_SIDE = 64  # maps are averaged down to at most this side before they are ranked
SURVIVAL_LIMIT = 0.5


@dataclass(frozen=True)
class Faithfulness:
    """Probability of the explained class while pixels are removed or put in, the most salient first.

    Attributes:
        deletion_auc: (B,) area under the deletion curve, in [0, 1]; lower is better.
        insertion_auc: (B,) area under the insertion curve, in [0, 1]; higher is better.
        deletion_curves: (B, steps + 1) probability, from the whole image to the baseline.
        insertion_curves: (B, steps + 1) probability, from the baseline to the whole image.
        shares: (steps + 1,) share of the pixels that are changed at each point of the curves, from 0 to 1.
    """

    deletion_auc: np.ndarray
    insertion_auc: np.ndarray
    deletion_curves: np.ndarray
    insertion_curves: np.ndarray
    shares: np.ndarray

    @classmethod
    def concatenate(cls, parts: Sequence[Faithfulness]) -> Faithfulness:
        """Join the results of several calls with the same image size and number of steps."""
        names = ("deletion_auc", "insertion_auc", "deletion_curves", "insertion_curves")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names), parts[0].shares)

    def to_json(self) -> dict[str, Any]:
        """Return the means over images as a JSON-safe dictionary."""
        return {
            "n": len(self.deletion_auc),
            "deletion_auc": _finite_or_none(self.deletion_auc.mean()),
            "insertion_auc": _finite_or_none(self.insertion_auc.mean()),
            "shares": self.shares.tolist(),
            "deletion_curve": [_finite_or_none(value) for value in self.deletion_curves.mean(axis=0)],
            "insertion_curve": [_finite_or_none(value) for value in self.insertion_curves.mean(axis=0)],
        }


@dataclass(frozen=True)
class ConfidenceChange:
    """Probability of the explained class on whole images and on what their maps leave of them.

    Attributes:
        whole: (B,) Y, on the image.
        explained: (B,) O, on the image multiplied by its map.
    """

    whole: np.ndarray
    explained: np.ndarray

    @property
    def drop(self) -> np.ndarray:
        """(B,) max(0, Y - O) / Y, in [0, 1]; its mean is the average drop, lower is better."""
        lost = np.maximum(0, self.whole - self.explained)
        return np.divide(lost, self.whole, out=np.zeros_like(lost), where=self.whole > 0)

    @property
    def increase(self) -> np.ndarray:
        """(B,) 1.0 where O > Y, else 0.0; its mean is the increase in confidence, higher is better."""
        return (self.explained > self.whole).astype(float)

    @classmethod
    def concatenate(cls, parts: Sequence[ConfidenceChange]) -> ConfidenceChange:
        """Join the results of several calls."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("whole", "explained")))

    def to_json(self) -> dict[str, Any]:
        """Return the means over images as a JSON-safe dictionary."""
        return {
            "n": len(self.whole),
            "average_drop": _finite_or_none(self.drop.mean()),
            "increase": _finite_or_none(self.increase.mean()),
        }


@dataclass(frozen=True)
class RandomisationLevel:
    """How alike the maps still are when the network is random from the head down to here.

    Attributes:
        name: modules that became random at this level, those of the levels before it being random already.
        correlations: (B,) Spearman's rank correlation with the original network's map, in [-1, 1]; NaN where one of
            the two maps is constant or not finite.
    """

    name: str
    correlations: np.ndarray

    @property
    def num_undefined(self) -> int:
        """Number of images without a correlation."""
        return int(np.isnan(self.correlations).sum())

    @property
    def mean(self) -> float:
        """Mean over the images that have a correlation; NaN where none has."""
        defined = self.correlations[~np.isnan(self.correlations)]
        return float(defined.mean()) if len(defined) else float("nan")

    def to_json(self) -> dict[str, Any]:
        """Return the mean and its count as a JSON-safe dictionary."""
        return {
            "name": self.name,
            "n": len(self.correlations),
            "num_undefined": self.num_undefined,
            "correlation": _finite_or_none(self.mean),
        }


def insertion_deletion(
    model: Classifier,
    images: Tensor,
    saliency: Tensor,
    targets: Tensor,
    *,
    dtype: torch.dtype,
    steps: int = 32,
    batch_size: int = 64,
    on_batch: Callable[[int], None] = lambda count: None,
) -> Faithfulness:
    """Follow the class's probability while pixels give way to a blurred image (deletion), or it to them (insertion).

    Source: Petsiuk et al., RISE, BMVC 2018, section 4.2, areas by the trapezoid rule.

    Differs from the paper: there deletion puts a constant colour in the pixels' place, which draws sharp edges that the
    tissue has not; here both curves use the baseline of ``blur``. Pixels change in ``steps`` equal portions (to a
    pixel), and equally salient ones in a fixed random order: by position, a map's empty part would always be changed
    from the same corner.

    Args:
        model: network on the images' device; it is put into evaluation mode.
        images: (B, 3, H, W) uint8.
        saliency: (B, H, W) float in [0, 1] on the same device.
        targets: (B,) class index that the maps explain.
        dtype: arithmetic of the network.
        steps: number of portions.
        batch_size: most images that go through the network at once, steps of several images together.
        on_batch: called with the size of every finished batch; 2 B (steps + 1) in all.
    """
    _check(images, saliency, targets)
    baseline = blur(images)
    ranks = rank_pixels(saliency)
    counts = torch.arange(steps + 1) * ranks[0].numel() // steps
    shares = (counts / ranks[0].numel()).double().numpy()
    targets = targets.repeat_interleave(steps + 1)

    def curves(start: Tensor, end: Tensor) -> np.ndarray:
        batches = _mixtures(start, end, ranks, counts.to(ranks.device), batch_size)
        return _probabilities(model, batches, targets, dtype, on_batch).reshape(-1, steps + 1)

    deletion, insertion = curves(images, baseline), curves(baseline, images)
    areas = [((each[:, 1:] + each[:, :-1]) / 2 * np.diff(shares)).sum(axis=1) for each in (deletion, insertion)]
    return Faithfulness(*areas, deletion, insertion, shares)


def confidence_change(
    model: Classifier,
    images: Tensor,
    saliency: Tensor,
    targets: Tensor,
    *,
    dtype: torch.dtype,
    batch_size: int = 64,
    on_batch: Callable[[int], None] = lambda count: None,
) -> ConfidenceChange:
    """Compare the class's probability on each image with that on the image multiplied by its map.

    Source: Chattopadhay et al., Grad-CAM++, WACV 2018, section 4.1 (who print both figures in percent).

    The product is taken of pixel values in [0, 1], as there: what the map leaves out turns black, which on a bright
    slide is a change of its own. It is rounded to whole grey levels. The arguments are those of ``insertion_deletion``;
    ``on_batch`` counts 2 B images in all.
    """
    _check(images, saliency, targets)
    shown = (images * saliency[:, None]).round().to(torch.uint8)
    whole, explained = (
        _probabilities(model, each.split(batch_size), targets, dtype, on_batch) for each in (images, shown)
    )
    return ConfidenceChange(whole, explained)


def randomisation_check(
    model: Classifier, explain: Callable[[Classifier], Tensor | np.ndarray], *, seed: int
) -> list[RandomisationLevel]:
    """Make a copy of the network random from the head to the input and see whether its maps change.

    Source: Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS 2018, section 3.1 (cascading randomisation).

    Differs from the paper: neighbouring stages become random together where there are many (see ``find_stages``), and
    maps are averaged down to at most 64 pixels a side before they are ranked. Batch norm's statistics are reset along
    with its weights. Maps here are never negative, so the plain correlation says it all.

    Args:
        model: it is left as it is.
        explain: gives the maps (B, H, W) of always the same images and classes for the network it is handed, which is
            in evaluation mode on ``model``'s device. It must not choose the class from that network's prediction.
        seed: of the random weights, drawn on the CPU so that they are the same on every device.

    Returns:
        One level after another, the whole network being random at the last.
    """
    network = deepcopy(model).eval()
    device = next(network.parameters()).device
    original = _shrink(explain(network))
    levels = []
    for number, (name, modules) in enumerate(find_stages(network)):
        network.cpu()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(seed, number))
            for module in modules:
                _make_random(module)
        network.to(device)
        correlations = rank_correlation(original, _shrink(explain(network)))
        levels.append(RandomisationLevel(name, correlations.numpy()))
    return levels


def survives(levels: Sequence[RandomisationLevel], limit: float = SURVIVAL_LIMIT) -> bool:
    """Return whether the maps outlive the network: a mean correlation above ``limit`` when all of it is random.

    Such maps show the image rather than what was learnt. Maps that all turn constant have not survived.
    """
    return levels[-1].mean > limit


def blur(images: Tensor) -> Tensor:
    """Return uint8 images (B, 3, H, W) under a Gaussian of 1/16 of their shorter side, mirrored at the border."""
    sigma = BLUR_SIGMA * min(images.shape[2:])
    size = 2 * math.ceil(BLUR_RADIUS * sigma) + 1
    rows = gaussian_blur(images.float(), [size, 1], [sigma, sigma])  # one axis after the other: the kernel is large
    return gaussian_blur(rows, [1, size], [sigma, sigma]).round().to(torch.uint8)


def rank_pixels(saliency: Tensor) -> Tensor:
    """Return (B, H, W) int32 ranks of saliency maps (B, H, W): 0 for the most salient pixel, ties in a random order."""
    flat = saliency.flatten(1)
    shuffle = torch.randperm(flat.shape[1], generator=torch.Generator().manual_seed(TIE_SEED)).to(flat.device)
    order = shuffle[flat[:, shuffle].argsort(dim=1, descending=True, stable=True)]
    position = torch.arange(flat.shape[1], dtype=torch.int32, device=flat.device).expand_as(order)
    return torch.empty_like(position).scatter_(1, order, position).view_as(saliency)


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Return Spearman's correlation of each row of two (B, N) tensors: (B,) float64.

    Ties share their mean rank. NaN where a row is constant or not finite.
    """
    ranks = [_mean_ranks(rows.double()) for rows in (first, second)]
    one, other = (rank - rank.mean(dim=1, keepdim=True) for rank in ranks)
    correlation = (one * other).sum(dim=1) / (one.square().sum(dim=1) * other.square().sum(dim=1)).sqrt()
    finite = first.isfinite().all(dim=1) & second.isfinite().all(dim=1)
    return correlation.where(finite, torch.nan)


def find_stages(model: Classifier) -> list[tuple[str, list[nn.Module]]]:
    """Divide a network into at most ``MAX_LEVELS`` stages, from the head to the input.

    The order is the reverse of that in which the modules are defined, which is how they run in all our networks. The
    largest part (never the head) is divided into its children until there are ``MIN_STAGES``; neighbours are then
    joined where there are too many. Parameters that a divided module holds itself, such as class tokens and positions,
    come after its children.

    Returns:
        Name and modules of each stage; of each module, the parameters that it holds itself belong to the stage.
    """
    model = getattr(model, "whole", model)  # a view of a network cut elsewhere holds every module twice
    parts = sorted(_Part("", model, whole=True).divide(), key=lambda part: part.name != "head")
    while len(parts) < MIN_STAGES:
        at = max(range(len(parts)), key=lambda i: parts[i].divisible_size)
        if not parts[at].divisible_size:
            break
        parts[at : at + 1] = parts[at].divide()
    rest = parts[1:]
    num = min(len(rest), MAX_LEVELS - 1)
    groups = [parts[:1], *(rest[len(rest) * i // num : len(rest) * (i + 1) // num] for i in range(num))]
    return [(_span(group), [module for part in group for module in part.modules()]) for group in groups]


@dataclass(frozen=True)
class _Part:
    """A module with all that is below it (``whole``), or with its own parameters alone."""

    name: str
    module: nn.Module
    whole: bool

    @property
    def divisible_size(self) -> int:
        """Number of parameters, or 0 where there is nothing to divide."""
        divisible = self.whole and self.name != "head" and any(_children(self.module))
        return num_parameters(self.module) if divisible else 0

    def divide(self) -> list[_Part]:
        """Return the children in reverse order of definition, then what the module holds itself."""
        prefix = f"{self.name}." if self.name else ""
        parts = [_Part(prefix + name, child, whole=True) for name, child in reversed(_children(self.module))]
        if list(self.module.parameters(recurse=False)):
            parts.append(_Part(f"{self.name or 'network'} (own)", self.module, whole=False))
        return parts

    def modules(self) -> list[nn.Module]:
        """Return the modules whose own parameters belong to this part."""
        return list(self.module.modules()) if self.whole else [self.module]


def _span(group: Sequence[_Part]) -> str:
    return group[0].name if len(group) == 1 else f"{group[0].name} to {group[-1].name}"


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in module.named_children() if num_parameters(child)]


@torch.no_grad()
def _make_random(module: nn.Module) -> None:
    """Start a module's own parameters anew, or draw them with their own mean and spread where it cannot."""
    parameters = list(module.parameters(recurse=False))
    if hasattr(module, "reset_parameters") and (parameters or list(module.buffers(recurse=False))):
        module.reset_parameters()
        return
    for parameter in parameters:
        # The mean stays, so that a scale near one remains a scale and does not switch its block off.
        parameter.normal_(parameter.mean().item(), parameter.std(correction=0).item())


def _mean_ranks(rows: Tensor) -> Tensor:
    """Return (B, N) ranks from 1 on of each row of (B, N), ties at their mean rank."""
    ordered = rows.sort(dim=1).values
    rows = rows.contiguous()
    return (torch.searchsorted(ordered, rows) + torch.searchsorted(ordered, rows, right=True) + 1).double() / 2


def _shrink(maps: Tensor | np.ndarray) -> Tensor:
    """Return maps (B, H, W) at no more than 64 x 64 pixels, as rows (B, N).

    In float64 the mean of equal float32 values is that value, so plateaus stay ties whatever the size of their window.
    """
    maps = torch.as_tensor(maps).detach().float().cpu().double()
    size = tuple(min(side, RANKED_SIDE) for side in maps.shape[1:])
    return functional.adaptive_avg_pool2d(maps[:, None], size).flatten(1)


def _mixtures(start: Tensor, end: Tensor, ranks: Tensor, counts: Tensor, batch_size: int) -> Iterator[Tensor]:
    """Yield batches of the images between ``start`` and ``end``, all points of one curve after the other."""
    for rows in torch.arange(len(ranks) * len(counts), device=ranks.device).split(batch_size):
        image, point = rows // len(counts), rows % len(counts)
        changed = ranks[image] < counts[point][:, None, None]
        yield torch.where(changed[:, None], end[image], start[image])


def _probabilities(
    model: Classifier, batches: Iterable[Tensor], targets: Tensor, dtype: torch.dtype, on_batch: Callable[[int], None]
) -> np.ndarray:
    """Return the probability of each image's target: (N,) float64."""
    log_probs = predict_log_probs(model, batches, targets.device, dtype, on_batch=on_batch)
    return log_probs.gather(1, targets.cpu()[:, None])[:, 0].exp().numpy()


def _check(images: Tensor, saliency: Tensor, targets: Tensor) -> None:
    assert images.dtype == torch.uint8, images.dtype
    assert saliency.shape == (len(images), *images.shape[2:]), (saliency.shape, images.shape)
    assert targets.shape == images.shape[:1], (targets.shape, images.shape)
    assert bool((saliency >= -1e-6).all() and (saliency <= 1 + 1e-6).all()), "saliency is not in [0, 1]"


def _finite_or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
