"""How far probabilities can be taken at their word: Brier score, expected calibration error, reliability table.

All three look at the probabilities alone, never at the decision threshold. The confidence of an image is its largest
class probability (top label), for two classes as for more, so with K classes it lies in [1/K, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NUM_BINS = 15


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


def _edges(num_bins: int) -> np.ndarray:
    return np.linspace(0, 1, num_bins + 1)
