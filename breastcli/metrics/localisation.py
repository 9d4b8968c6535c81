"""How well saliency maps find a region: overlap after binarisation, ranking of pixels, and baselines to beat.

An image whose mask is empty has no region to find: its figures are NaN, and it counts in no mean and no pool.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from skimage.filters import threshold_otsu

from breastcli.errors import UsageError, UserError
from breastcli.metrics.classification import Metric
from breastcli.metrics.intervals import percentile_interval, resampled_weights
from breastcli.records import Interval

RuleName = Literal["otsu", "fixed", "val", "quantile"]
NUM_LEVELS = 101  # that ``fit_threshold`` tries: 0, 0.01, ..., 1
NOISE_CELLS = 7  # side of the last feature maps of most networks at 224 pixels
LUMA = (299, 587, 114)  # in thousandths: ITU-R BT.601, as Pillow's grey

METRICS = {
    "iou": Metric("IoU", "intersection over union of selected pixels and region"),
    "dice": Metric("Dice", "twice the intersection over the sum of both areas"),
    "f1": Metric("F1", "of pixels; the same number as Dice"),
    "precision": Metric("Precision", "share of the selected pixels inside the region; 0 where none is selected"),
    "recall": Metric("Recall", "share of the region that is selected"),
    "average_precision": Metric("AP", "average precision over all levels; by chance the region's share of the image"),
    "pointing": Metric("Pointing game", "is the largest value inside the region; of several, the share inside"),
    "energy_inside": Metric("Energy inside", "share of the map's sum inside the region; a map of zeros is uniform"),
    "region_share": Metric("Region", "share of the image that the region covers"),
    "selected_share": Metric("Selected", "share of the image that is selected"),
}
POOLED = ("iou", "dice", "f1", "precision", "recall")  # what can be had from summed pixel counts
RANKED = ("average_precision", "pointing", "energy_inside")  # what needs no binarisation

Refine = Callable[[np.ndarray], np.ndarray]  # (H, W) bool -> (H, W) bool


@dataclass(frozen=True)
class Rule:
    """How maps become selections: the rule, and the number of "fixed" and "quantile"."""

    name: RuleName
    value: float | None = None

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}={self.value:g}"


@dataclass(frozen=True)
class LocalisationScores:
    """How well one method's maps find the regions of n images.

    Attributes:
        rule: how the maps were binarised.
        threshold: the level fitted on validation masks, for the rule "val".
        n: images that were scored.
        num_groups: groups that the bootstrap resampled (0 where no bootstrap was made).
        num_empty: images left out because their mask is empty.
        num_unselected: scored images in which no pixel was selected.
        per_image: (n + num_empty,) per name in METRICS, NaN where the mask is empty.
        mean: mean over images of each.
        pooled: the figures of POOLED for all pixels of all images together.
    """

    rule: str
    threshold: float | None
    n: int
    num_groups: int
    num_empty: int
    num_unselected: int
    per_image: dict[str, np.ndarray]
    mean: dict[str, Interval]
    pooled: dict[str, Interval]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-safe dictionary, without the figures of each image."""
        counts = ("rule", "threshold", "n", "num_groups", "num_empty", "num_unselected")
        figures = {
            part: {name: figure.to_json() for name, figure in getattr(self, part).items()}
            for part in ("mean", "pooled")
        }
        return {name: getattr(self, name) for name in counts} | figures


def parse_rule(text: str) -> Rule:
    """Return the rule called "otsu", "val", "fixed=LEVEL" or "quantile=SHARE".

    Raises:
        UsageError: there is no such rule, its level is not in [0, 1], or its share is not between 0 and 1.
    """
    name, equals, number = text.partition("=")
    try:
        value = float(number) if equals else None
    except ValueError:
        value = float("nan")
    takes_number = name in ("fixed", "quantile")
    fits = name in get_args(RuleName) and takes_number == (value is not None)
    if value is not None:
        fits &= 0 <= value <= 1 and (name == "fixed" or 0 < value < 1)
    if not fits:
        raise UsageError(
            f"no rule {text!r} to binarise maps", fix="use otsu, val, fixed=0.5 (in [0, 1]) or quantile=0.8 (in (0, 1))"
        )
    return Rule(name, value)


def binarise(saliency: np.ndarray, rule: Rule, threshold: float | None = None) -> np.ndarray:
    """Select pixels of each map.

    "otsu": above the image's own Otsu threshold; a constant map has none, and nothing is selected. "fixed" and "val":
    at or above the level. "quantile": the 1 - q of the image's pixels with the largest values; pixels that equal the
    first one left out are left out too, so that fewer are selected where values are tied.

    Source: Otsu, A threshold selection method from gray-level histograms, IEEE Trans. SMC 1979 (256 bins).

    Args:
        saliency: (n, H, W) in [0, 1].
        rule: see above.
        threshold: level of the rule "val", from ``fit_threshold``.

    Returns:
        (n, H, W) bool.

    Raises:
        UserError: the rule is "val" and there is no level.
    """
    if rule.name == "otsu":
        return _each(_above_otsu, saliency)
    if rule.name == "quantile":
        return _each(lambda one: _largest(one, 1 - rule.value), saliency)
    level = rule.value if rule.name == "fixed" else threshold
    if level is None:
        raise UserError("the rule val needs validation images with masks", fix="use otsu, fixed=0.5 or quantile=0.8")
    return saliency >= np.float32(level)


def fit_threshold(saliencies: np.ndarray, masks: np.ndarray) -> float:
    """Return the level of 0, 0.01, ..., 1 with the largest pooled Dice, the lowest such in a tie.

    Args:
        saliencies: (n, H, W) in [0, 1]; validation images, never test images.
        masks: (n, H, W) bool. No refinement is applied.

    Raises:
        UserError: the masks hold no region.
    """
    levels = (np.arange(NUM_LEVELS) / (NUM_LEVELS - 1)).astype(np.float32)  # as ``binarise`` compares
    inside, everywhere = np.zeros((2, NUM_LEVELS), dtype=np.int64)
    for saliency, mask in zip(saliencies, masks, strict=True):
        reached = np.searchsorted(levels, saliency.astype(np.float32), side="right") - 1
        everywhere += np.bincount(reached.ravel(), minlength=NUM_LEVELS)
        inside += np.bincount(reached[mask], minlength=NUM_LEVELS)
    if not inside.any():
        raise UserError("no validation mask holds a region", fix="use otsu, fixed=0.5 or quantile=0.8")
    hits, selected = np.cumsum(inside[::-1])[::-1], np.cumsum(everywhere[::-1])[::-1]
    return int(np.argmax(2 * hits / (selected + inside.sum()))) / (NUM_LEVELS - 1)


def average_precision(saliency: np.ndarray, mask: np.ndarray) -> float:
    """Return the mean over the region's pixels of the precision at each one's own level; exact, as in scikit-learn.

    Args:
        saliency: map of any shape.
        mask: bool of that shape.

    Returns:
        in [0, 1]; 1 for a mask without outside, NaN for one without region.
    """
    inside, outside = np.sort(saliency[mask]), np.sort(saliency[~mask])
    if len(inside) == 0:
        return float("nan")
    hits = len(inside) - np.searchsorted(inside, inside)
    false_alarms = len(outside) - np.searchsorted(outside, inside)
    return float((hits / (hits + false_alarms)).mean())


def score_localisation(
    saliency: np.ndarray,
    masks: np.ndarray,
    groups: np.ndarray,
    rule: Rule,
    *,
    threshold: float | None = None,
    refine: Refine | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> LocalisationScores:
    """Score one method's maps, with bootstrap intervals over groups.

    The resamples depend on the groups and the seed alone, so methods scored on the same images share them. Average
    precision, pointing game and energy look at the map as it is: neither the rule nor the refinement touches them.

    Args:
        saliency: (n, H, W) float32 in [0, 1].
        masks: (n, H, W) bool.
        groups: (n,) group (patient) of each image.
        rule: how maps are binarised.
        threshold: level of the rule "val".
        refine: the method's own clean-up of each selection.
        resamples: bootstrap resamples.
        seed: of the resampling: the same seed gives the same intervals.

    Raises:
        UserError: the rule is "val" and there is no level.
    """
    selected = binarise(saliency, rule, threshold)
    if refine is not None:
        selected = _each(refine, selected)
    counts = np.array([[(one & mask).sum(), one.sum(), mask.sum()] for one, mask in zip(selected, masks, strict=True)])
    has_region = counts[:, 2] > 0
    scored = counts[has_region]
    per_image = _per_image(saliency, masks, counts)
    weights, member = resampled_weights(groups[has_region], resamples, seed)
    pooled = overlap(*(weights @ _sum_by_group(scored, member, weights.shape[1])).T)
    return LocalisationScores(
        rule=str(rule),
        threshold=threshold if rule.name == "val" else None,
        n=len(scored),
        num_groups=weights.shape[1] if len(weights) > 1 else 0,
        num_empty=len(counts) - len(scored),
        num_unselected=int((scored[:, 1] == 0).sum()),
        per_image=per_image,
        mean={name: _mean(per_image[name][has_region], weights, member) for name in METRICS},
        pooled={name: percentile_interval(pooled[name][0], pooled[name][1:]) for name in POOLED},
    )


def paired_difference(
    a: np.ndarray, b: np.ndarray, groups: np.ndarray, *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Return the mean of ``a - b`` over images with its bootstrap interval over groups.

    Args:
        a: (n,) a figure of each image by one method; images where either is NaN are left out.
        b: (n,) the same figure by another method.
        groups: (n,) group (patient) of each image.
        resamples: bootstrap resamples.
        seed: of the resampling.
    """
    difference = a - b
    known = ~np.isnan(difference)
    return _mean(difference[known], *resampled_weights(groups[known], resamples, seed))


def overlap(hits: np.ndarray, num_selected: np.ndarray, num_region: np.ndarray) -> dict[str, np.ndarray]:
    """Return the figures of POOLED from pixel counts of any one shape: NaN without region, 0 where none is selected."""
    with np.errstate(divide="ignore", invalid="ignore"):
        dice = np.where(num_region > 0, 2 * hits / (num_selected + num_region), np.nan)
        return {
            "iou": np.where(num_region > 0, hits / (num_selected + num_region - hits), np.nan),
            "dice": dice,
            "f1": dice,
            "precision": np.where(num_region > 0, hits / np.maximum(num_selected, 1), np.nan),
            "recall": hits / num_region,
        }


def baseline_maps(images: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Return maps that know nothing of any network, for methods to beat.

    "uniform": 1 everywhere, so that the average precision is the region's share; it stands for selecting everything,
    which no rule that looks for two sorts of pixels does: score it with ``refine=select_everything``. "centre": a
    Gaussian, a quarter of the side wide. "luminance": the darker the larger, as nuclei
    are, scaled to [0, 1] image by image (0 where all is equal); "brightness": the brighter the larger, as lesions of
    mammograms are. "random": noise of 7 x 7 cells enlarged bilinearly, as the class activation maps of a network at 224
    pixels are, and scaled likewise.

    Args:
        images: (n, H, W, 3) uint8.
        seed: of the noise.

    Returns:
        (n, H, W) float32 in [0, 1] each; the first two are read-only views.
    """
    num_images, height, width, _ = images.shape
    shape = (num_images, height, width)
    rows, columns = (np.linspace(-2, 2, 2 * side + 1)[1::2] for side in (height, width))  # pixel centres, in widths
    centre = np.exp(-(rows[:, None] ** 2 + columns**2) / 2).astype(np.float32)
    darkness = np.stack([255_000 - image @ np.array(LUMA, np.int32) for image in images]).astype(np.float32)
    cells = np.random.default_rng(seed).random((num_images, NOISE_CELLS, NOISE_CELLS), dtype=np.float32)
    noise = _enlarging(height) @ cells @ _enlarging(width).T
    return {
        "uniform": np.broadcast_to(np.float32(1), shape),
        "centre": np.broadcast_to(centre, shape),
        "luminance": _scaled(darkness),
        "brightness": _scaled(-darkness),
        "random": _scaled(noise),
    }


def select_everything(selected: np.ndarray) -> np.ndarray:
    """Return a selection of every pixel: the refinement that makes "uniform" a baseline under every rule."""
    return np.ones_like(selected)


def _per_image(saliency: np.ndarray, masks: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return (n,) per name in METRICS; (n, 3) pixel counts are those of hits, selection and region."""
    ranked = [_ranking(*pair) for pair in zip(saliency, masks, strict=True)]
    figures = overlap(*counts.T) | {name: np.array([one[name] for one in ranked]) for name in RANKED}
    shares = np.where(counts[:, 2:] > 0, counts / masks[0].size, np.nan)
    figures |= {"selected_share": shares[:, 1], "region_share": shares[:, 2]}
    return {name: figures[name] for name in METRICS}


def _ranking(saliency: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Return the figures of RANKED for one image, NaN where its mask is empty.

    Source of the pointing game: Zhang et al., Top-down neural attention by excitation backprop, IJCV 2018. Differs from
    it: no tolerance around the region, and tied maxima count by their share inside. Energy inside: Wang et al.,
    Score-CAM, CVPRW 2020, its energy-based pointing game.
    """
    if not mask.any():
        return dict.fromkeys(RANKED, float("nan"))
    mass = saliency.sum(dtype=np.float64)
    return {
        "average_precision": average_precision(saliency, mask),
        "pointing": float(mask[saliency == saliency.max()].mean()),
        "energy_inside": float(saliency[mask].sum(dtype=np.float64) / mass) if mass > 0 else float(mask.mean()),
    }


def _each(select: Refine, stack: np.ndarray) -> np.ndarray:
    selected = np.empty(stack.shape, dtype=bool)
    for row, one in enumerate(stack):
        selected[row] = select(one)
    return selected


def _above_otsu(saliency: np.ndarray) -> np.ndarray:
    if saliency.min() == saliency.max():
        return np.zeros(saliency.shape, dtype=bool)
    wide = saliency.astype(np.float64)  # 256 bins do not fit into a narrow range of float32
    return wide > threshold_otsu(wide)


def _largest(saliency: np.ndarray, share: float) -> np.ndarray:
    """Select at most ``share`` of the pixels, leaving out those that equal the first one left out."""
    num_selected = int(share * saliency.size + 1e-6)  # 1 - 0.8 falls short of 0.2
    left_out = max(saliency.size - num_selected - 1, 0)
    return saliency > np.partition(saliency, left_out, axis=None)[left_out]


def _sum_by_group(values: np.ndarray, member: np.ndarray, num_groups: int) -> np.ndarray:
    """Return (G, M) sums of (N, M) values."""
    return np.stack([np.bincount(member, column, num_groups) for column in values.T], axis=1)


def _mean(values: np.ndarray, weights: np.ndarray, member: np.ndarray) -> Interval:
    by_group = _sum_by_group(np.stack([values, np.ones(len(values))], axis=1), member, weights.shape[1])
    sums, counts = (weights @ by_group).T
    with np.errstate(invalid="ignore"):
        means = sums / counts
    return percentile_interval(means[0], means[1:])


def _enlarging(side_px: int) -> np.ndarray:
    """Return (side, 7) bilinear weights: corners not aligned, edges repeated."""
    cells = np.arange(NOISE_CELLS)
    centres = (np.arange(side_px) + 0.5) * NOISE_CELLS / side_px - 0.5
    return np.stack([np.interp(centres, cells, one) for one in np.eye(NOISE_CELLS)], axis=1).astype(np.float32)


def _scaled(maps: np.ndarray) -> np.ndarray:
    """Scale each of (n, H, W) maps to [0, 1]; zeros where a map is constant."""
    low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
    return (maps - low) / np.where(high > low, high - low, 1)
