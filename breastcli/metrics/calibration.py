"""How far probabilities can be taken at their word, and temperature scaling, which makes them more credible.

All figures look at the probabilities alone, never at the decision threshold. The confidence of an image is its largest
class probability (top label), for two classes as for more, so with K classes it lies in [1/K, 1].
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from breastcli.metrics.intervals import percentile_interval, resampled_weights, sum_by_group
from breastcli.records import Predictions

NUM_BINS = 15
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
NUM_HALVINGS = 50  # of the searched interval: to the last digits of a float64
TITLES = {"nll": "Negative log-likelihood", "brier": "Brier score", "ece": "ECE"}  # of ``calibration_figures``


@dataclass(frozen=True)
class ReliabilityTable:
    """What a reliability diagram shows, per equal-width bin of confidence.

    Attributes:
        edges: (B + 1,) bin edges from 0 to 1; a bin holds its upper edge, the first one also 0.
        confidence: (B,) mean confidence, NaN in an empty bin.
        accuracy: (B,) share of images whose most probable class is the true one, NaN in an empty bin.
        count: (B,) number of images.
    """

    edges: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


def brier(probs: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean Brier loss: in [0, 1] for two classes, in [0, 2] for more.

    Args:
        probs: (N, K) class probabilities.
        labels: (N,) true class index.
    """
    return float(brier_losses(probs, labels).mean())


def brier_losses(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return each image's Brier loss.

    Source: Brier, Verification of forecasts expressed in terms of probability, Monthly Weather Review 1950: the sum of
    squares over classes. Two classes: the customary half of it, (p - y)² of the positive class.

    Returns:
        (N,) losses.
    """
    errors = np.square(probs - np.eye(probs.shape[1])[labels])
    return errors[:, -1] if probs.shape[1] == 2 else errors.sum(axis=1)


def log_losses(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return (N,) negative logarithms of the probabilities given to the true classes, in nats."""
    return -_log(probs)[np.arange(len(labels)), labels]


def expected_calibration_error(probs: np.ndarray, labels: np.ndarray, num_bins: int = NUM_BINS) -> float:
    """Return the mean gap between confidence and accuracy over bins, weighted by their size; in [0, 1].

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, eq. 3.

    Args:
        probs: (N, K) class probabilities.
        labels: (N,) true class index.
        num_bins: number of equal-width bins of confidence.
    """
    bins, confidence, right = top_label(probs, labels, num_bins)
    return float(np.abs(np.bincount(bins, right - confidence)).sum() / len(labels))


def reliability_table(probs: np.ndarray, labels: np.ndarray, num_bins: int = NUM_BINS) -> ReliabilityTable:
    """Return mean confidence, accuracy and count per bin of confidence.

    Args:
        probs: (N, K) class probabilities.
        labels: (N,) true class index.
        num_bins: number of equal-width bins of confidence.
    """
    bins, confidence, right = top_label(probs, labels, num_bins)
    count = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(bins, confidence, num_bins) / count
        accuracy = np.bincount(bins, right, num_bins) / count
    return ReliabilityTable(_edges(num_bins), mean_confidence, accuracy, count)


def top_label(
    probs: np.ndarray, labels: np.ndarray, num_bins: int = NUM_BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each image's bin of confidence, its confidence, and whether its most probable class is the true one.

    Returns:
        (N,) int in [0, ``num_bins``); (N,) in [1/K, 1]; (N,) bool.
    """
    confidence = probs.max(axis=1)
    return np.searchsorted(_edges(num_bins)[1:-1], confidence), confidence, probs.argmax(axis=1) == labels


def calibration_sums(probs: np.ndarray, labels: np.ndarray, member: np.ndarray, num_groups: int) -> np.ndarray:
    """Return what ``calibration_figures`` needs of each group: its sums can be added up for any set of groups.

    Args:
        probs: (N, K) class probabilities.
        labels: (N,) true class index.
        member: (N,) group of each image, in [0, ``num_groups``).
        num_groups: G.

    Returns:
        (G, 3 + NUM_BINS): number of images, sums of log and Brier losses, and per bin right answers minus confidence.
    """
    bins, confidence, right = top_label(probs, labels)
    rows = (np.ones(len(labels)), log_losses(probs, labels), brier_losses(probs, labels))
    totals = np.stack([np.bincount(member, values, num_groups) for values in rows], axis=1)
    return np.concatenate([totals, sum_by_group(member, num_groups, bins, NUM_BINS, right - confidence)], axis=1)


def calibration_figures(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Return negative log-likelihood, Brier score and expected calibration error from (..., 3 + NUM_BINS) sums."""
    count, gaps = sums[..., 0], sums[..., 3:]
    return {"nll": sums[..., 1] / count, "brier": sums[..., 2] / count, "ece": np.abs(gaps).sum(axis=-1) / count}


def fit_temperature(probs: np.ndarray, labels: np.ndarray) -> float | None:
    """Return the temperature that makes the true classes most probable; None if none between the bounds does.

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, section 4.2. The negative log-likelihood is
    convex in 1 / T, so its slope changes sign at most once and halving finds the place. Differs from the paper, which
    does not bound T by MIN_TEMPERATURE and MAX_TEMPERATURE: where every image is right, T would go to 0 and call every
    later answer certain; where wrong ones outweigh the right, to infinity.

    Args:
        probs: (N, K) class probabilities of validation images, never of those to be scored.
        labels: (N,) true class index.
    """
    logits = _log(probs)
    given = logits[np.arange(len(labels)), labels].mean()
    low, high = np.log(1 / MAX_TEMPERATURE), np.log(1 / MIN_TEMPERATURE)
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        expected = (_softmax(logits * np.exp(middle)) * logits).sum(axis=1).mean()
        low, high = (low, middle) if expected > given else (middle, high)
    temperature = float(np.exp(-(low + high) / 2))
    return temperature if MIN_TEMPERATURE * 1.001 < temperature < MAX_TEMPERATURE / 1.001 else None


def show_temperatures(temperatures: Iterable[float | None]) -> str:
    """Return fitted temperatures as text."""
    return ", ".join("none fits" if value is None else f"{value:.3f}" for value in temperatures)


def temper(probs: np.ndarray, temperature: float | None) -> np.ndarray:
    """Return (N, K) probabilities at a temperature: above 1 less certain, below 1 more, None as they are."""
    return probs if temperature is None else _softmax(_log(probs) / temperature)


def describe_calibration(
    before: Predictions, after: Predictions, temperatures: Sequence[float | None], *, resamples: int, seed: int
) -> dict[str, Any]:
    """Return what calibration did to the probabilities, with bootstrap intervals over the same resamples of groups.

    Args:
        before: labelled predictions of N images.
        after: the same images after calibration.
        temperatures: what each run's probabilities were scaled by; None where no temperature fits.
        resamples: bootstrap resamples.
        seed: of the resampling.

    Returns:
        JSON-safe; "before", "after" and "difference" (after - before) each hold the figures of TITLES.
    """
    weights, member = resampled_weights(after.groups(), resamples, seed)
    values = {
        name: calibration_figures(weights @ calibration_sums(side.probs, side.labels, member, weights.shape[1]))
        for name, side in (("before", before), ("after", after))
    }
    values["difference"] = {name: values["after"][name] - values["before"][name] for name in TITLES}
    return {
        "method": "temperature scaling, fitted on each run's own validation images",
        "temperatures": list(temperatures),
        "bounds": [MIN_TEMPERATURE, MAX_TEMPERATURE],
        **{
            side: {name: percentile_interval(one[0], one[1:]).to_json() for name, one in figures.items()}
            for side, figures in values.items()
        },
    }


def _log(probs: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probs, np.finfo(np.float64).tiny))  # a probability that was rounded to 0 is not impossible


def _softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def _edges(num_bins: int) -> np.ndarray:
    return np.linspace(0, 1, num_bins + 1)
