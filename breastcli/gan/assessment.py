"""How good generated images are: distances to training and held-out images, overlap, copies, diversity."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from breastcli.errors import UserError
from breastcli.gan.features import FeatureNetwork
from breastcli.gan.fidelity import (
    coverage_figures,
    diversity,
    frechet_distance,
    kernel_distance,
    nearest,
    unbiased_mmd,
)
from breastcli.metrics.intervals import wilson

KID_SUBSET = 1000
COPY_QUANTILE = 0.01  # of the distances from a training image to the nearest other one
COPY_LIMIT = 0.05  # share of images below that distance from which on copies are reported
NUM_CLOSEST = 24
NEIGHBOURS = 5  # of the balls behind precision, recall, density and coverage


@dataclass(frozen=True)
class ImageSet:
    """Images of one origin.

    Attributes:
        images: (n, 3, S, S) uint8 on the CPU.
        labels: (n,) int64 class numbers.
        names: (n,) image ids.
    """

    images: Tensor
    labels: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Assessment:
    """What was found, and what the pictures show.

    Attributes:
        figures: the JSON-safe part that concerns features.
        distances: name to the distances from each image to the nearest training image.
        threshold: distance below which an image counts as a possible copy.
        closest: (generated, training) places of the pairs that lie closest, the closest first.
    """

    figures: dict[str, Any]
    distances: dict[str, np.ndarray]
    threshold: float
    closest: list[tuple[int, int]]


def assess_images(
    generated: ImageSet,
    training: ImageSet,
    held_out: ImageSet,
    classes: Sequence[str],
    network: FeatureNetwork,
    *,
    draws: int,
    seed: int,
    batch_size: int,
    turn: bool = True,
    on_batch: Callable[[int], None] = lambda count: None,
) -> Assessment:
    """Compare generated images with those that they were learned from and with others.

    FID depends on the number of images, so every figure is of sets of one size and one class mixture: generated,
    training images in two disjoint halves, and held-out images. Real against real is the baseline: the halves show what
    new images of the same patients reach, training against held-out how far away other patients are.

    Args:
        generated: images of the generator, ``training`` those it learned from, ``held_out`` real ones of other groups.
        classes: K class names; ``network`` makes the features, ``seed`` the draws.
        turn: whether the generator saw training images in all eight positions, so that a copy may be turned.
        on_batch: called with the size of every batch of ``batch_size`` images.

    Raises UserError where there are too few images.
    """
    sizes = _sizes(generated, training, held_out)
    own, predicted = network(generated.images, batch_size, on_batch)
    real, other = (network(one.images, batch_size, on_batch)[0] for one in (training, held_out))
    turned = [network(training.images, batch_size, on_batch, element)[0] for element in range(1, 8 * turn)]
    rng = np.random.default_rng(seed)
    drawn = [_draw(generated, training, held_out, sizes, rng) for _ in range(draws)]
    rows = []
    for label, size in sizes.items():
        mine, theirs = generated.labels == label, training.labels == label
        known = {"class": classes[label], "n": int(mine.sum())}
        known["agreement"] = _agreement(predicted, mine, classes[label], network.classes)
        rows.append(known | _class_figures(own[mine], real[theirs], size, draws, rng))
    num = sum(sizes.values())
    figures = {
        "dimensions": own.shape[1],
        "n_per_draw": num,
        "draws": draws,
        "kid_subset": min(KID_SUBSET, num),
        "comparisons": _comparisons(own, real, other, drawn),
        "coverage": _coverage(own, real, other, drawn),
        "classes": rows,
    }
    return _with_neighbours(figures, *_distances(own, real, other, turned), generated, training, classes)


def _sizes(generated: ImageSet, training: ImageSet, held_out: ImageSet) -> dict[int, int]:
    """Return how many images of each class a draw has: what every set can give, the training images halved."""
    sizes = {}
    for label in np.unique(generated.labels).tolist():
        limits = [
            (generated.labels == label).sum(),
            (training.labels == label).sum() // 2,
            (held_out.labels == label).sum(),
        ]
        sizes[label] = int(min(limits))
    if sum(sizes.values()) <= NEIGHBOURS:
        raise UserError(
            f"too few images: {len(generated)} generated, {len(training)} training, {len(held_out)} held out",
            fix=f"{NEIGHBOURS + 1} are needed of each, twice as many for training; prepare another --split",
        )
    return sizes


def _draw(
    generated: ImageSet, training: ImageSet, held_out: ImageSet, sizes: Mapping[int, int], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Return places of each of the four sets, all of one size and class mixture, in random order."""
    parts: dict[str, list[np.ndarray]] = {"generated": [], "training": [], "second": [], "held_out": []}
    for label, size in sizes.items():
        parts["generated"].append(rng.permutation(np.flatnonzero(generated.labels == label))[:size])
        halves = rng.permutation(np.flatnonzero(training.labels == label))[: 2 * size]
        parts["training"].append(halves[:size])
        parts["second"].append(halves[size:])
        parts["held_out"].append(rng.permutation(np.flatnonzero(held_out.labels == label))[:size])
    return {name: rng.permutation(np.concatenate(one)) for name, one in parts.items()}


def _comparisons(
    own: np.ndarray, real: np.ndarray, other: np.ndarray, drawn: Sequence[Mapping[str, np.ndarray]]
) -> list[dict[str, Any]]:
    """Return FID and KID of generated and of real images against training and held-out images, over all draws."""
    tables = {"generated": own, "training": real, "second": real, "held_out": other}
    pairs = {
        "generated / training": ("generated", "training"),
        "generated / held-out": ("generated", "held_out"),
        "training / training": ("second", "training"),
        "training / held-out": ("training", "held_out"),
    }
    rows = []
    for name, (first, second) in pairs.items():
        fid, kid = [], []
        for draw in drawn:
            one, two = tables[first][draw[first]], tables[second][draw[second]]
            fid.append(frechet_distance(one, two))
            kid.append(unbiased_mmd(one[:KID_SUBSET], two[:KID_SUBSET]))
        kind = "generated" if first == "generated" else "real"
        rows.append({"name": name, "kind": kind, "fid": _mean_and_sd(fid), "kid": _mean_and_sd(kid)})
    return rows


def _coverage(
    own: np.ndarray, real: np.ndarray, other: np.ndarray, drawn: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, dict[str, Any]]:
    """Return precision, recall, density and coverage over all draws; "baseline" is training against held-out."""
    pairs = {
        "training": [(real[draw["training"]], own[draw["generated"]]) for draw in drawn],
        "held_out": [(other[draw["held_out"]], own[draw["generated"]]) for draw in drawn],
        "baseline": [(other[draw["held_out"]], real[draw["training"]]) for draw in drawn],
    }
    found = {}
    for name, sets in pairs.items():
        k = min(NEIGHBOURS, len(sets[0][0]) - 1)
        rows = [dataclasses.asdict(coverage_figures(target, candidate, k=k)) for target, candidate in sets]
        figures = {key: _mean_and_sd([row[key] for row in rows]) for key in rows[0]}
        found[name] = figures | {"n": len(sets[0][0])}
    return found


def _agreement(
    predicted: np.ndarray | None, rows: np.ndarray, name: str, known: Sequence[str]
) -> dict[str, float | None] | None:
    """Return the share of rows that the feature network takes for a class, and its interval; None if it cannot tell."""
    if predicted is None or name not in known:
        return None
    return wilson(int((predicted[rows] == known.index(name)).sum()), int(rows.sum())).to_json()


def _class_figures(
    own: np.ndarray, real: np.ndarray, size: int, draws: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Return the spread of a class, generated and real, and the distance between the two."""
    mean, deviation = math.nan, math.nan
    if size >= 2:
        settings = {"subset_size": min(size, KID_SUBSET), "num_subsets": draws, "rng": rng}
        mean, deviation = kernel_distance(own, real, **settings)
    return {
        "diversity": diversity(own) if len(own) > 1 else None,
        "real_diversity": diversity(real) if len(real) > 1 else None,
        "kid": {"mean": _finite(mean), "sd": _finite(deviation)},
    }


def _with_neighbours(
    figures: dict[str, Any],
    distances: dict[str, np.ndarray],
    match: np.ndarray,
    generated: ImageSet,
    training: ImageSet,
    classes: Sequence[str],
) -> Assessment:
    """Add how many images lie suspiciously close to a training image, and the closest pairs."""
    threshold = float(np.quantile(distances["training to training"], COPY_QUANTILE))
    found = distances["generated to training"]
    below = int((found < threshold).sum())
    pairs = [(int(place), int(match[place])) for place in np.argsort(found, kind="stable")[:NUM_CLOSEST]]
    closest = [
        {
            "image_id": generated.names[own],
            "class": classes[generated.labels[own]],
            "training_id": training.names[real],
            "distance": float(found[own]),
        }
        for own, real in pairs
    ]
    neighbours = {
        "threshold": threshold,
        "num_below": below,
        "share_below": wilson(below, len(generated)).to_json(),
        "n": len(generated),
        "expected_share": COPY_QUANTILE,
        "copies": below > COPY_LIMIT * len(generated),
        "closest": closest,
    }
    return Assessment(figures | {"neighbours": neighbours}, distances, threshold, pairs)


def _distances(
    own: np.ndarray, real: np.ndarray, other: np.ndarray, turned: Sequence[np.ndarray]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the distance from images to the nearest training image in any position, and which that is for ``own``.

    A training image is compared with the other training images.
    """
    match, best = nearest(own, real)
    among, outside = nearest(real, real, exclude_self=True)[1], nearest(other, real)[1]
    for table in turned:
        place, distance = nearest(own, table)
        match, best = np.where(distance < best, place, match), np.minimum(distance, best)
        among = np.minimum(among, nearest(real, table, exclude_self=True)[1])
        outside = np.minimum(outside, nearest(other, table)[1])
    named = {"generated to training": best, "held-out to training": outside, "training to training": among}
    return named, match


def _mean_and_sd(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": _finite(float(np.mean(values))), "sd": _finite(float(np.std(values, ddof=1)))}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
