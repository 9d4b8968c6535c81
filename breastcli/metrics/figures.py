"""Figures from confusion matrices and from rankings, for a whole stack of resamples at once."""

from __future__ import annotations

import numpy as np

IBA_ALPHA = 0.1


def class_figures(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Return each class's figures against the rest; NaN where a ratio has no denominator.

    Precision, NPV and F1 are also NaN for a class that does not occur or that is the only one: they would be 0 or 1
    whatever the classifier does.

    Args:
        confusion: (..., K, K) counts, rows true class.

    Returns:
        (..., K) in [0, 1] each.
    """
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    true, predicted = confusion.sum(axis=-1), confusion.sum(axis=-2)
    total = true.sum(axis=-1, keepdims=True)
    right_rest = total - true - predicted + right
    telling = (true > 0) & (true < total)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "precision": np.where(telling, right / predicted, np.nan),
            "sensitivity": right / true,
            "specificity": right_rest / (total - true),
            "f1": np.where(telling, 2 * right / (true + predicted), np.nan),
            "npv": np.where(telling, right_rest / (total - predicted), np.nan),
        }


def count_figures(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Return the figures that follow from a confusion matrix; the conventions are those of METRICS.

    A macro mean is taken over the classes that occur, and counts the precision of a class that was never predicted as 0
    (scikit-learn's default). Where one class occurs, what would need another is NaN.

    Source of IBA: García et al., Index of Balanced Accuracy, IbPRIA 2009; G-mean: Kubat and Matwin, ICML 1997; MCC for
    K classes: Gorodkin, Computational Biology and Chemistry 2004.

    Args:
        confusion: (..., K, K) counts, rows true class; with K = 2 the positive class is the last.

    Returns:
        (...) each.
    """
    by_class = class_figures(confusion)
    sensitivity, specificity, f1 = by_class["sensitivity"], by_class["specificity"], by_class["f1"]
    true = confusion.sum(axis=-1)
    occurs = true > 0
    telling = occurs & (true < true.sum(axis=-1, keepdims=True))

    def overall(values: np.ndarray, counted: np.ndarray = telling) -> np.ndarray:
        if confusion.shape[-1] == 2:
            return values[..., 1]
        return mean_over(np.where(telling, np.nan_to_num(values), values), counted)

    product = sensitivity * specificity
    emphasis = 1 + IBA_ALPHA * (sensitivity - specificity)
    precision = overall(by_class["precision"])
    return {
        "accuracy": np.trace(confusion, axis1=-2, axis2=-1) / true.sum(axis=-1),
        "balanced_accuracy": mean_over(sensitivity, telling),
        "precision": precision,
        "sensitivity": overall(sensitivity, occurs),
        "specificity": overall(specificity),
        "ppv": precision,
        "npv": overall(by_class["npv"]),
        "fpr": 1 - overall(specificity),
        "f1": overall(f1),
        "f1_macro": mean_over(f1, telling),
        "f1_weighted": mean_over(f1, true),
        "iba": overall(emphasis * product),
        "iba_unsquared": overall(emphasis * np.sqrt(product)),
        **_joint_figures(confusion),
    }


def _joint_figures(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Return the figures that do not come class by class, (...) each."""
    true, predicted = confusion.sum(axis=-1), confusion.sum(axis=-2)
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    right, total = hits.sum(axis=-1), true.sum(axis=-1)
    by_chance = (true * predicted).sum(axis=-1)  # the right ones to expect, times the total
    spread = (total**2 - (true**2).sum(axis=-1)) * (total**2 - (predicted**2).sum(axis=-1))
    num_occurring = (true > 0).sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        recalls = np.where(true > 0, hits / true, 1)
        figures = {
            "gmean": recalls.prod(axis=-1) ** (1 / num_occurring),
            "cohen_kappa": (right * total - by_chance) / (total**2 - by_chance),
            "mcc": np.where(spread > 0, (right * total - by_chance) / np.sqrt(spread), 0),
        }
    return {name: np.where(num_occurring > 1, values, np.nan) for name, values in figures.items()}


def mean_over(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the weighted mean over the last axis, ignoring whatever has no weight; NaN where nothing has."""
    with np.errstate(invalid="ignore"):
        return np.where(weights > 0, values * weights, 0).sum(axis=-1) / weights.sum(axis=-1)


def ranking_areas(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the area under the ROC curve and the average precision for many weightings of the same images.

    Images with equal scores are one step of either curve. Source: Fawcett, An introduction to ROC analysis, Pattern
    Recognition Letters 2006, algorithm 2; average precision as in scikit-learn, without interpolation.

    Args:
        scores: (N,) larger is more positive.
        positive: (N,) bool.
        weights: (N, R) whole numbers: how often each resample holds each image.

    Returns:
        (R,) and (R,) in [0, 1], NaN where a resample lacks either class.
    """
    order = np.argsort(-scores, kind="stable")
    step_ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    weights = weights[order]
    seen = np.cumsum(weights, axis=0)[step_ends]
    found = np.cumsum(weights * positive[order, None], axis=0)[step_ends]
    num_positive, num_negative = found[-1], seen[-1] - found[-1]
    hits = np.diff(found, axis=0, prepend=0)
    false_alarms = np.diff(seen, axis=0, prepend=0) - hits
    with np.errstate(divide="ignore", invalid="ignore"):
        # Half a step's own positives: a tie is worth half.
        roc_auc = np.einsum("sr,sr->r", false_alarms, found - hits / 2) / (num_positive * num_negative)
        # Nothing seen yet means nothing hit either, so the 1 only avoids 0 / 0.
        precision = found / np.maximum(seen, 1)
        average_precision = np.einsum("sr,sr->r", hits, precision) / num_positive
    return roc_auc, np.where(num_negative > 0, average_precision, np.nan)


def ranking_curves(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the points of the ROC curve and of the precision-recall curve, one per distinct score, best first.

    Images with equal scores are one step; before the first one nothing is found and precision counts as 1.

    Args:
        scores: (N,) larger is more positive.
        positive: (N,) bool, both values occurring.

    Returns:
        (S + 1,) false-positive rate, sensitivity (which is recall) and precision, all in [0, 1].
    """
    order = np.argsort(-scores, kind="stable")
    step_ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    hits = np.append(0, np.cumsum(positive[order])[step_ends])
    seen = np.append(0, step_ends + 1)
    precision = np.append(1.0, hits[1:] / seen[1:])
    return (seen - hits) / (seen[-1] - hits[-1]), hits / hits[-1], precision
