"""The geometry that angular margins argue with: directions of embeddings, and the angles between images.

Source: the histograms of angles are those by which Deng et al., ArcFace, CVPR 2019, compare losses.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Circle

from breastcli.reporting.contact_sheet import BLACK, COLOURS, GREY, short
from breastcli.reporting.plots import _explain, _figure, _n, _styled, _write

MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
MAX_IMAGES = 2000  # up to which every pair is taken
NUM_PAIRS = 200_000  # drawn where there are more images
CHUNK = 4096  # pairs at a time, so that long embeddings fit in memory
DECIMALS = 4  # of degrees: rounding noise of the cosine must not break ties between equal angles


@_styled
def plot_embedding(
    embeddings: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], file: Path, *, stamp: str | None
) -> dict[str, float]:
    """Draw embeddings as directions, and the angles between images of the same class and of different classes.

    On the left the vectors are brought to unit length and projected onto the plane through the origin that holds most
    of their squared length (principal components without centring). Images whose embedding is zero or not finite have
    no direction; they are counted in a title and left out.

    Args:
        embeddings: (N, D).
        labels: (N,) class numbers.
        classes: K names.
        file: PNG file to write.
        stamp: warning to print above the plot.

    Returns:
        "within_deg" and "between_deg", the median angle of a pair of images of the same class and of different classes;
        "auc", the probability that a pair of different classes is further apart than one of the same class (ties count
        half). NaN where there is no such pair.
    """
    lengths = np.linalg.norm(np.asarray(embeddings, dtype=np.float64), axis=1)
    usable = np.isfinite(lengths) & (lengths > 0)
    directions, labels = embeddings[usable] / lengths[usable, None], np.asarray(labels)[usable]
    angles, alike = _pairs(directions, labels)
    within, between = angles[alike], angles[~alike]

    figure = _figure(10.6, 5.9 + 0.2 * max(2, math.ceil(len(classes) / 2)))
    left, right = figure.subplots(1, 2)
    left_out = f"\nleft out, without a direction: {_n(len(usable) - len(labels), 'image')}" if not usable.all() else ""
    left.set_title(f"Directions of embeddings ({_n(len(labels), 'image')}){left_out}")
    if len(labels):
        _draw_plane(left, directions, labels, classes)
    else:
        _explain(left, "No image has an embedding with a direction.")
    figures = {"within_deg": _median(within), "between_deg": _median(between), "auc": _auc(within, between)}
    if len(angles):
        _draw_angles(right, within, between, figures)
    else:
        _explain(right, "An angle needs two images.")
    sampled = f"\na sample of all {math.comb(len(labels), 2):,} pairs" if len(labels) > MAX_IMAGES else ""
    right.set_title(f"Angles between images ({_n(len(angles), 'pair')}){sampled}")
    _write(figure, file, stamp or "")
    return figures


def _pairs(directions: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the angles in degrees between pairs of unit vectors (N, D), and whether their labels are the same."""
    count = len(directions)
    if count <= MAX_IMAGES:
        first, second = np.triu_indices(count, k=1)
        cosines = (directions @ directions.T)[first, second]
    else:
        generator = np.random.default_rng(0)
        first = generator.integers(count, size=NUM_PAIRS)
        second = (first + generator.integers(1, count, size=NUM_PAIRS)) % count
        parts = [slice(start, start + CHUNK) for start in range(0, NUM_PAIRS, CHUNK)]
        cosines = np.concatenate(
            [np.einsum("nd,nd->n", directions[first[part]], directions[second[part]]) for part in parts]
        )
    angles = np.degrees(np.arccos(cosines.clip(-1, 1))).round(DECIMALS)
    return angles, labels[first] == labels[second]


def _median(angles: np.ndarray) -> float:
    return float(np.median(angles)) if len(angles) else math.nan


def _auc(within: np.ndarray, between: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score  # imported late, because that takes a second

    if not len(within) or not len(between):
        return math.nan
    return float(
        roc_auc_score(np.repeat([False, True], [len(within), len(between)]), np.concatenate([within, between]))
    )


def _plane(directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (N, 2) projections of unit vectors (N, D) and the share (2,) of their squared length on each axis."""
    from sklearn.utils.extmath import randomized_svd

    num_axes = min(2, *directions.shape)
    left, lengths, _ = randomized_svd(directions, num_axes, n_iter=10, random_state=0)
    points = np.zeros((len(directions), 2))
    points[:, :num_axes] = left * lengths
    points *= np.where(points.sum(axis=0) < 0, -1, 1)  # singular vectors have no sign of their own
    return points, (points**2).sum(axis=0) / len(points)


def _draw_plane(axes: Axes, directions: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> None:
    points, shares = _plane(directions)
    axes.add_artist(Circle((0, 0), 1, fill=False, edgecolor=GREY, linewidth=1.1, linestyle=(0, (2, 2))))
    axes.plot(0, 0, "+", color=GREY, markersize=12, markeredgewidth=1.4)
    size = float(np.clip(4000 / len(labels), 9, 46))
    for number, name in enumerate(classes):
        chosen = points[labels == number]
        looks = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        axes.scatter(*chosen.T, **looks, s=size, alpha=0.65, linewidths=0)
        axes.scatter([], [], s=40, **looks, linewidths=0, label=f"{short(name)} (n = {len(chosen):,})")
    radii = np.linalg.norm(points, axis=1, keepdims=True)
    axes.update_datalim(points / np.maximum(radii, 1e-12))  # the circle's part beyond the points is always in view
    axes.set_aspect("equal", adjustable="datalim")
    axes.set(xlabel=f"First axis ({100 * shares[0]:.1f} % of squared length)")
    axes.set_ylabel(f"Second axis ({100 * shares[1]:.1f} %)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def _draw_angles(axes: Axes, within: np.ndarray, between: np.ndarray, figures: dict[str, float]) -> None:
    widest = max(angles.max() for angles in (within, between) if len(angles))
    limit = min(180.0, 15 * (math.floor(widest / 15) + 1))
    bins = np.linspace(0, limit, 61)
    for name, angles, median, looks, dashes in (
        ("same class", within, figures["within_deg"], {"histtype": "stepfilled", "color": GREY, "alpha": 0.45}, "-"),
        ("different classes", between, figures["between_deg"], {"histtype": "step", "color": BLACK}, "--"),
    ):
        if len(angles):
            label = f"{name}: median {median:.1f}° ({_n(len(angles), 'pair')})"
            axes.hist(angles, bins, density=True, **looks, linewidth=1.5, label=label)
            axes.axvline(median, color=looks["color"], linestyle=dashes)
        else:
            axes.plot([], [], " ", label=f"{name}: no pair")
    if not math.isnan(figures["auc"]):
        axes.plot([], [], " ", label=f"different classes further apart: AUC {figures['auc']:.3f}")
    axes.set(xlim=(0, limit), xlabel="Angle (degrees)", ylabel="Density (per degree)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13))
