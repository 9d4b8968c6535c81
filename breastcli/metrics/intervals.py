"""95 % intervals: Wilson for counts, percentile bootstrap over whole groups for everything else."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from breastcli.records import Interval

MIN_DEFINED_SHARE = 0.9


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Return the share ``successes / n`` with its Wilson score interval.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927.

    Args:
        successes: between 0 and ``n``.
        n: number of independent trials; 0 gives NaN throughout.
        level: coverage in (0, 1).
    """
    if n == 0:
        return Interval(float("nan"))
    share = successes / n
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5 / (1 + z**2 / n)
    # At the ends the bound is exactly 0 or 1, which rounding would miss.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(share, low, high)


def group_weights(groups: np.ndarray, resamples: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw whole groups with replacement, as many as there are (the cluster bootstrap).

    Source: Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8, strategy 1.

    Args:
        groups: (N,) group of each row.
        resamples: R.
        rng: source of the draws.

    Returns:
        (R, G) int32, how often each resample holds each group; (N,) the column of ``groups``' rows in it.
    """
    names, member = np.unique(groups, return_inverse=True)
    num_groups = len(names)
    counts = np.empty((resamples, num_groups), dtype=np.int32)
    for row in counts:
        row[:] = np.bincount(rng.integers(num_groups, size=num_groups), minlength=num_groups)
    return counts, member


def resampled_weights(groups: np.ndarray, resamples: int, seed: int | tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return (1 + R, G) group counts, the data themselves first, and each row's column; R is 0 for a single group."""
    varied = len(set(groups)) > 1  # resampling one group would always give the data themselves: a width of zero
    counts, member = group_weights(groups, resamples if varied else 0, np.random.default_rng(seed))
    return np.concatenate([np.ones_like(counts, shape=(1, counts.shape[1])), counts]), member


def sum_by_group(
    member: np.ndarray, num_groups: int, column: np.ndarray, num_columns: int, values: np.ndarray | None = None
) -> np.ndarray:
    """Return (G, columns) sums of (N,) values (counts without them) over each group's rows, by (N,) column index."""
    flat = np.bincount(member * num_columns + column, values, num_groups * num_columns)
    return flat.reshape(num_groups, num_columns).astype(np.float64)


def percentile_interval(value: float, samples: np.ndarray, level: float = 0.95) -> Interval:
    """Return ``value`` with the percentiles of its resampled values.

    Args:
        value: the figure on the data themselves.
        samples: (R,) the figure on each resample, NaN where undefined there. The bounds are NaN when ``value`` is, when
            there are no resamples, when fewer than 90 % of them are defined (the rest would not be a fair sample), and
            when they do not vary: a figure of 1 on every resample is no proof of a figure of 1 elsewhere.
        level: coverage in (0, 1).
    """
    defined = samples[~np.isnan(samples)]
    if np.isnan(value) or len(defined) == 0 or len(defined) < MIN_DEFINED_SHARE * len(samples):
        return Interval(float(value))
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    varies = high - low > 1e-12  # more than rounding
    return Interval(float(value), float(low), float(high)) if varies else Interval(float(value))
