"""How close generated images come to real ones, measured on their features; exact, in float64, numpy only.

Every set of features is an array (n, D) of finite numbers, one row per image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BLOCK_BYTES = 64 * 2**20  # of the largest array that a pairwise figure makes at a time
FRECHET_TOLERANCE = 1e-6  # relative
PAIR_ROUNDING = 1e-12  # of the largest squared norm: below it, |x|² + |y|² - 2 x·y is rounding and nothing else


@dataclass(frozen=True)
class Coverage:
    """How the supports of the real and the generated features overlap.

    Attributes:
        precision: share of the generated within the real support, in [0, 1].
        recall: share of the real within the generated support, in [0, 1].
        density: mean number of real balls that hold a generated feature, over k; 1 expected of equal distributions.
        coverage: share of the real balls that hold a generated feature, in [0, 1].
    """

    precision: float
    recall: float
    density: float
    coverage: float


def _features(values: np.ndarray, minimum: int) -> np.ndarray:
    """Return ``values`` in float64, having made sure that there are ``minimum`` rows of finite numbers."""
    values = np.asarray(values, dtype=np.float64)
    assert values.ndim == 2, "features are (n, D)"
    assert len(values) >= minimum, f"at least {minimum} feature vectors are needed"
    assert np.isfinite(values).all(), "features must be finite"
    return values


def _blocks(num_rows: int, width: int) -> Iterator[slice]:
    """Divide ``num_rows`` so that each part by ``width`` numbers in float64 stays within ``BLOCK_BYTES``."""
    step = max(1, BLOCK_BYTES // (8 * width))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def _covariance_factor(values: np.ndarray) -> np.ndarray:
    """Return R (min(n, D), D) such that RᵀR is the covariance of ``values`` (n, D), with n - 1 below the line."""
    centred = (values - values.mean(axis=0)) / np.sqrt(len(values) - 1)
    return centred if centred.shape[0] <= centred.shape[1] else np.linalg.qr(centred, mode="r")


def _quick_nuclear_norm(matrix: np.ndarray) -> tuple[float, float]:
    """Return the sum of the singular values by the eigenvalues of the Gram matrix, and a bound on its rounding error.

    Squaring makes this twice as fast as the singular values, and leaves half the digits to the smallest of them. A
    computed eigenvalue λ is off by about δ = ε λ_max at most, its root by δ / (2 √λ), and never by more than √δ.
    """
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    eigenvalues = np.linalg.eigvalsh(gram).clip(min=0)
    singular = np.sqrt(eigenvalues)
    doubt = np.finfo(np.float64).eps * eigenvalues[-1]
    bound = np.minimum(doubt / np.maximum(2 * singular, np.finfo(np.float64).tiny), np.sqrt(doubt))
    return float(singular.sum()), float(bound.sum())


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Return the squared Fréchet distance of the Gaussians fitted to two sets of features (FID, with Inception's).

    |m₁ - m₂|² + Tr(S₁ + S₂ - 2 (S₁S₂)^½). With S = RᵀR the last trace is the sum of the singular values of R₁R₂ᵀ, so
    that no root of a matrix is taken, and covariances of fewer images than features need no correction.

    Source: Heusel et al., Two time-scale update rule, NeurIPS 2017, eq. 6. Differs from Deebani et al., 2025, FID,
    who print √S₁ √S₂ for the root of the product, which is the same only where the two commute.

    Args:
        first: (n, D), n ≥ 2.
        second: (m, D), m ≥ 2.

    Returns:
        At least 0, and off by less than 1e-6 of itself or 1e-12 of the traces.
    """
    first, second = _features(first, 2), _features(second, 2)
    gap = first.mean(axis=0) - second.mean(axis=0)
    left, right = _covariance_factor(first), _covariance_factor(second)
    apart = gap @ gap + (left**2).sum() + (right**2).sum()
    product = left @ right.T
    common, error = _quick_nuclear_norm(product)
    if 2 * error > FRECHET_TOLERANCE * (apart - 2 * common):  # nearly equal sets, or a spectrum that ends in nothing
        common = np.linalg.svd(product, compute_uv=False).sum()
    return max(float(apart - 2 * common), 0.0)


def _kernel(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return (x·y / D + 1)³ for every pair of rows, (n, m)."""
    base = first @ second.T
    base /= first.shape[1]
    base += 1
    return base * base * base


def _kernel_sums(first: np.ndarray, second: np.ndarray, chosen: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return (S,) the kernel summed over the pairs of each subset; ``chosen`` (S, n), ``others`` (S, m) are 0 or 1."""
    totals = np.zeros(len(chosen))
    for rows in _blocks(len(first), len(second)):
        totals += ((chosen[:, rows] @ _kernel(first[rows], second)) * others).sum(axis=1)
    return totals


def _subset_mmds(first: np.ndarray, second: np.ndarray, chosen: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return (S,) the unbiased squared discrepancy of each pair of subsets; arguments as of ``_kernel_sums``."""

    def within(values: np.ndarray, members: np.ndarray) -> np.ndarray:
        size = members.sum(axis=1)
        diagonal = ((values**2).sum(axis=1) / values.shape[1] + 1) ** 3  # (n,) each with itself: what biases the mean
        return (_kernel_sums(values, values, members, members) - members @ diagonal) / (size * (size - 1))

    between = _kernel_sums(first, second, chosen, others) / (chosen.sum(axis=1) * others.sum(axis=1))
    return within(first, chosen) + within(second, others) - 2 * between


def unbiased_mmd(first: np.ndarray, second: np.ndarray) -> float:
    """Return the unbiased estimate of the squared maximum mean discrepancy with the kernel (x·y / D + 1)³.

    Source: Bińkowski et al., Demystifying MMD GANs, ICLR 2018, section 4; Gretton et al., JMLR 2012, eq. 3.

    Args:
        first: (n, D), n ≥ 2.
        second: (m, D), m ≥ 2.

    Returns:
        About 0 for sets of one distribution, and then as often below as above.
    """
    first, second = _features(first, 2), _features(second, 2)
    return float(_subset_mmds(first, second, np.ones((1, len(first))), np.ones((1, len(second))))[0])


def kernel_distance(
    first: np.ndarray,
    second: np.ndarray,
    *,
    subset_size: int | None = None,
    num_subsets: int = 100,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """Return mean and standard deviation of ``unbiased_mmd`` over random subsets (KID, with Inception's features).

    Subsets are drawn without replacement from each set, independently of one another. They overlap: the deviation tells
    how much one subset varies and is not the mean's standard error. It divides by the number of subsets.

    Source: Bińkowski et al., Demystifying MMD GANs, ICLR 2018, section 4.

    Args:
        first: (n, D), n ≥ 2.
        second: (m, D), m ≥ 2.
        subset_size: between 2 and min(n, m); None takes the smaller of that and 1000.
        num_subsets: S, at least 1.
        rng: source of the draws.

    Returns:
        The mean, and the deviation: NaN where only one subset is to be had, because S is 1 or both sets have just
        ``subset_size`` members (as two sets of equal size up to 1000 do unless a smaller one is given).
    """
    first, second = _features(first, 2), _features(second, 2)
    n, m = len(first), len(second)
    size = min(1000, n, m) if subset_size is None else subset_size
    assert 2 <= size <= min(n, m), "subset_size lies between 2 and the smaller set's size"
    assert num_subsets >= 1
    if n == m == size:
        return unbiased_mmd(first, second), float("nan")
    draws = [(rng.choice(n, size, replace=False), rng.choice(m, size, replace=False)) for _ in range(num_subsets)]
    if n * n + n * m + m * m <= 3 * num_subsets * size * size:  # each pair of features once, however often drawn
        chosen, others = np.zeros((num_subsets, n)), np.zeros((num_subsets, m))
        for number, (rows, columns) in enumerate(draws):
            chosen[number, rows] = 1
            others[number, columns] = 1
        values = _subset_mmds(first, second, chosen, others)
    else:
        values = np.array([unbiased_mmd(first[rows], second[columns]) for rows, columns in draws])
    return float(values.mean()), float(values.std()) if num_subsets > 1 else float("nan")


def _centred(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Move both sets to their common mean, where differences keep most digits; also return what is then rounding."""
    middle = (first.sum(axis=0) + second.sum(axis=0)) / (len(first) + len(second))
    first, second = first - middle, second - middle
    largest = max((first**2).sum(axis=1).max(), (second**2).sum(axis=1).max())
    return first, second, float(PAIR_ROUNDING * largest)


def _squared_distances(
    first: np.ndarray, second: np.ndarray, rounding: float, *, exclude_self: bool = False
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield rows of ``first`` and their squared distances to all of ``second``, 0 where within ``rounding``.

    With ``exclude_self`` the two sets are one, and the distance of a member to itself is infinite.
    """
    squares = (second**2).sum(axis=1)
    for rows in _blocks(len(first), max(second.shape)):
        block = first[rows] @ second.T
        block *= -2
        block += (first[rows] ** 2).sum(axis=1)[:, None]
        block += squares
        block[block <= rounding] = 0
        if exclude_self:
            block[np.arange(len(block)), np.arange(rows.start, rows.stop)] = np.inf
        yield rows, block


def _ball_radii(points: np.ndarray, k: int, rounding: float) -> np.ndarray:
    """Return (n,) the squared distance of each point to its ``k``-th nearest other, enlarged by ``rounding``."""
    radii = np.empty(len(points))
    for rows, block in _squared_distances(points, points, rounding, exclude_self=True):
        radii[rows] = np.partition(block, k - 1, axis=1)[:, k - 1]
    return radii + rounding


def coverage_figures(real: np.ndarray, generated: np.ndarray, k: int = 5) -> Coverage:
    """Return precision, recall, density and coverage by balls that reach to the k-th nearest neighbour.

    Balls are closed and a point is not its own neighbour. Only with ties does that matter: of two identical sets the
    density is then (k + 1) / k.

    Source: Kynkäänniemi et al., Improved precision and recall metric, NeurIPS 2019, eq. 1-2; Naeem et al., Reliable
    fidelity and diversity metrics, ICML 2020, section 3.

    Args:
        real: (n, D), n > k.
        generated: (m, D), m > k.
        k: at least 1.
    """
    assert k >= 1
    real, generated, rounding = _centred(_features(real, k + 1), _features(generated, k + 1))
    real_radii, generated_radii = (_ball_radii(points, k, rounding) for points in (real, generated))
    precise = np.zeros(len(generated), dtype=bool)
    num_recalled, num_held, num_covered = 0, 0, 0
    for rows, block in _squared_distances(real, generated, rounding):
        held = block <= real_radii[rows, None]  # (rows, m) the generated features that lie in each real ball
        precise |= held.any(axis=0)
        num_held += int(held.sum())
        num_covered += int(held.any(axis=1).sum())
        num_recalled += int((block <= generated_radii).any(axis=1).sum())
    return Coverage(
        precision=float(precise.mean()),
        recall=num_recalled / len(real),
        density=num_held / (k * len(generated)),
        coverage=num_covered / len(real),
    )


def nearest(
    queries: np.ndarray, references: np.ndarray, *, exclude_self: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest reference of every query and its Euclidean distance.

    Candidates that rounding cannot tell apart are measured again, difference by difference: an identical vector is at
    distance 0, and of several equally near references the first is taken.

    Args:
        queries: (n, D).
        references: (m, D), m ≥ 1.
        exclude_self: the two are the same set, and no row is its own neighbour; m ≥ 2.

    Returns:
        (n,) int64 row of ``references``; (n,) float64 distance.
    """
    queries, references = _features(queries, 1), _features(references, 2 if exclude_self else 1)
    assert not exclude_self or len(queries) == len(references), "exclude_self compares a set with itself"
    first, second, rounding = _centred(queries, references)
    indices, distances = np.empty(len(queries), dtype=np.int64), np.empty(len(queries))
    for rows, block in _squared_distances(first, second, rounding, exclude_self=exclude_self):
        winners = block.argmin(axis=1)
        limits = block.min(axis=1) + 2 * rounding
        for row in np.flatnonzero((block <= limits[:, None]).sum(axis=1) > 1):
            candidates = np.flatnonzero(block[row] <= limits[row])
            squared = ((references[candidates] - queries[rows.start + row]) ** 2).sum(axis=1)
            winners[row] = candidates[squared.argmin()]
        indices[rows] = winners
        distances[rows] = np.linalg.norm(queries[rows] - references[winners], axis=1)
    return indices, distances


def diversity(features: np.ndarray) -> float:
    """Return the mean Euclidean distance over all pairs of different rows of ``features`` (n, D), n ≥ 2."""
    points, _, rounding = _centred(_features(features, 2), _features(features, 2))
    total = sum(float(np.sqrt(block).sum()) for _, block in _squared_distances(points, points, rounding))
    return total / (len(points) * (len(points) - 1))
