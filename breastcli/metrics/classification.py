"""Scores of class predictions, image by image and patient by patient, with intervals over groups.

Every figure is computed for a stack of resamples at once; the figure on the data themselves is the resample that holds
each group once, so that there is one implementation of each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from breastcli.errors import UsageError, UserError
from breastcli.metrics.calibration import NUM_BINS, calibration_figures, calibration_sums
from breastcli.metrics.figures import IBA_ALPHA, class_figures, count_figures, mean_over, ranking_areas
from breastcli.metrics.intervals import percentile_interval, resampled_weights, sum_by_group, wilson
from breastcli.records import Interval, Predictions, Scores

FEW_GROUPS = 10
CLASS_METRICS = ("precision", "sensitivity", "specificity", "f1")  # in Scores.per_class
CHUNK_VALUES = 2**19  # images x resamples worked on at once: 4 MiB per array


@dataclass(frozen=True)
class Metric:
    """How a figure is called and what it means.

    Attributes:
        title: for table heads.
        description: the convention; where it says "macro", two classes mean the positive class alone.
    """

    title: str
    description: str


METRICS = {
    "accuracy": Metric("Accuracy", "share predicted right"),
    "balanced_accuracy": Metric("Balanced accuracy", "mean sensitivity over classes"),
    "precision": Metric("Precision", "share of a class's predictions that are right; macro"),
    "sensitivity": Metric("Sensitivity", "share of a class that is predicted as such (recall); macro"),
    "specificity": Metric("Specificity", "share of the other classes that is not predicted as the class; macro"),
    "ppv": Metric("PPV", "positive predictive value, the same as precision; macro"),
    "npv": Metric("NPV", "share of the predictions as another class that are right; macro"),
    "fpr": Metric("False-positive rate", "1 - specificity; macro"),
    "f1": Metric("F1", "harmonic mean of precision and sensitivity; macro"),
    "f1_macro": Metric("F1 (macro)", "mean over classes, for two classes too"),
    "f1_weighted": Metric("F1 (weighted)", "mean over classes weighted by their true counts, for two classes too"),
    "iba": Metric(f"IBA (alpha {IBA_ALPHA}, squared)", "(1 + alpha (sensitivity - specificity)) G-mean²; macro"),
    "iba_unsquared": Metric(
        f"IBA (alpha {IBA_ALPHA}, unsquared)",
        "(1 + alpha (sensitivity - specificity)) G-mean, as the papers print; macro",
    ),
    "gmean": Metric("G-mean", "geometric mean of the classes' sensitivities"),
    "roc_auc": Metric("ROC AUC", "area under the ROC curve, one class versus the rest; macro"),
    "pr_auc": Metric("PR AUC", "average precision, one class versus the rest; macro"),
    "cohen_kappa": Metric("Cohen's kappa", "unweighted"),
    "mcc": Metric("MCC", "Matthews correlation coefficient; 0 where everything is predicted as one class"),
    "brier": Metric("Brier score", "mean squared error of the probabilities: positive class, or sum over classes"),
    "ece": Metric("ECE", f"expected calibration error of the most probable class, {NUM_BINS} equal-width bins"),
}


@dataclass(frozen=True)
class PatientScores:
    """Figures that count patients instead of images.

    Attributes:
        recognition_rate: mean over patients of the share of their images that are right.
        vote: scores of the class that most of a patient's images were predicted as.
        mean: scores of the class with the largest mean probability over a patient's images.
    """

    recognition_rate: Interval
    vote: Scores
    mean: Scores

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-safe dictionary."""
        return {
            "recognition_rate": self.recognition_rate.to_json(),
            "vote": self.vote.to_json(),
            "mean": self.mean.to_json(),
        }


def score_images(predictions: Predictions, *, resamples: int = 2000, seed: int = 0) -> Scores:
    """Score every image, with bootstrap intervals over groups (exams where known, else patients, else images).

    Args:
        predictions: N images with labels. The positive class of two is the last.
        resamples: bootstrap resamples.
        seed: of the resampling: the same seed gives the same intervals.

    Raises:
        UserError: there are no images, or their labels are unknown.
    """
    return _score(predictions, "image", resamples, seed)


def score_patients(predictions: Predictions, *, resamples: int = 2000, seed: int = 0) -> PatientScores | None:
    """Score every patient, or return None where any image's patient is unknown.

    Patients are those of ``Predictions.by_patient``. Accuracy, sensitivity and specificity are shares of patients and
    get Wilson intervals; everything else gets bootstrap intervals over groups.

    Source of the recognition rate: Spanhol et al., A Dataset for Breast Cancer Histopathological Image Classification,
    IEEE TBME 2016; Wang et al. 2024, eq. 1-2.

    Args:
        predictions: N images with labels.
        resamples: bootstrap resamples.
        seed: of the resampling.

    Raises:
        UserError: there are no images, or their labels are unknown.
    """
    if not all(predictions.column("patient")):
        return None
    known_labels(predictions)
    votes = predictions.by_patient("vote")
    rates = recognition_rates(votes, *resampled_weights(votes.groups(), resamples, seed))
    return PatientScores(
        recognition_rate=percentile_interval(rates[0], rates[1:]),
        vote=_score(votes, "patient", resamples, seed, notes=("probabilities: shares of the patient's images",)),
        mean=_score(predictions.by_patient("mean"), "patient", resamples, seed),
    )


def recognition_rates(votes: Predictions, weights: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Return (R,) mean over patients of the share of their images that are right, for (R, G) group counts."""
    shares = votes.probs[np.arange(len(votes)), votes.labels]  # of the patient's images, predicted as their true class
    with np.errstate(divide="ignore", invalid="ignore"):
        return weights @ np.bincount(member, shares) / (weights @ np.bincount(member))


def score_subsets(predictions: Predictions, column: str, *, resamples: int = 2000, seed: int = 0) -> dict[str, Scores]:
    """Score the images of each value of a column apart; figures that need two true classes are NaN where one occurs.

    Args:
        predictions: N images with labels.
        column: such as "magnification" or "subtype"; images with an empty value are left out.
        resamples: bootstrap resamples.
        seed: of the resampling.

    Returns:
        value to scores, numbers in the values sorted as numbers (40X before 100X).

    Raises:
        UserError: labels are unknown.
    """
    values = predictions.column(column)
    names = sorted({value for value in values if value}, key=_natural)
    return {name: score_images(predictions.select(values == name), resamples=resamples, seed=seed) for name in names}


def describe_spread(runs: Mapping[str, Predictions], *, resamples: int, seed: int) -> dict[str, Any]:
    """Return the figures of the single runs, and their mean and standard deviation; None for both of one run.

    Args:
        runs: run folder to its predictions.
        resamples: bootstrap resamples.
        seed: of the resampling.

    Returns:
        JSON-safe: "folds" and "spread".
    """
    if len(runs) == 1:
        return {"folds": None, "spread": None}
    folds = []
    for name, predictions in runs.items():
        scores = score_images(predictions, resamples=resamples, seed=seed)
        overall = {metric: figure.to_json()["value"] for metric, figure in scores.overall.items()}
        folds.append({"run": name, "n": scores.n, "overall": overall})
    spread = {}
    for metric in folds[0]["overall"]:
        values = [fold["overall"][metric] for fold in folds if fold["overall"][metric] is not None]
        if len(values) > 1:
            spread[metric] = {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1))}
    return {"folds": folds, "spread": spread}


def choose_threshold(labels: np.ndarray, positive_probs: np.ndarray, rule: str) -> float:
    """Return the decision threshold of two classes: an image is positive where its probability >= threshold.

    Args:
        labels: (N,) 1 where the image is positive, else 0; validation images, never test images.
        positive_probs: (N,) probability of the positive class.
        rule: a number in [0, 1]; "val-youden", the observed probability with the largest sensitivity + specificity, the
            smallest such in a tie; or "val-sensitivity=S", the largest threshold whose sensitivity is at least S.

    Raises:
        UsageError: no such rule.
        UserError: the rule needs images of a class that has none.
    """
    name, _, target = rule.partition("=")
    positive = np.sort(positive_probs[labels == 1])
    negative = np.sort(positive_probs[labels == 0])
    if name == "val-youden" and not target:
        _require(positive, negative, rule=rule)
        candidates = np.concatenate([positive, negative])
        candidates.sort()
        hits = len(positive) - np.searchsorted(positive, candidates)
        correct_rejections = np.searchsorted(negative, candidates)
        # In whole numbers, so that ties are ties.
        return float(candidates[np.argmax(hits * len(negative) + correct_rejections * len(positive))])
    if name == "val-sensitivity" and (share := _share(target, rule)) > 0:
        _require(positive, rule=rule)
        sensitivity = np.arange(1, len(positive) + 1) / len(positive)
        return float(positive[::-1][np.argmax(sensitivity >= share)])
    return _share(rule, rule)


def decide(probs: np.ndarray, threshold: float | None) -> np.ndarray:
    """Return the (N,) class that each of (N, K) probabilities is decided as; without a threshold the largest."""
    return probs.argmax(axis=1) if threshold is None else (probs[:, 1] >= threshold).astype(np.int64)


def _share(text: str, rule: str) -> float:
    """Return a number in [0, 1] that ``rule`` holds."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise UsageError(
            f"--threshold {rule}: no such rule", fix="use a number in [0, 1], val-youden or val-sensitivity=0.95"
        )
    return value


def _require(*images: np.ndarray, rule: str) -> None:
    if not all(map(len, images)):
        raise UserError(f"--threshold {rule}: a class has no validation image", fix="give the threshold as a number")


def _natural(text: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text)]


def known_labels(predictions: Predictions) -> np.ndarray:
    """Return the (N,) true classes.

    Raises:
        UserError: there are no images, or their labels are unknown.
    """
    if predictions.labels is None or len(predictions) == 0:
        raise UserError("there is nothing to score", fix="pass predictions of labelled images")
    return predictions.labels


def _score(
    predictions: Predictions, level: Literal["image", "patient"], resamples: int, seed: int, notes: tuple[str, ...] = ()
) -> Scores:
    labels = known_labels(predictions)
    num_classes = len(predictions.classes)
    weights, member = resampled_weights(predictions.groups(), resamples, seed)
    overall, per_class = resampled_figures(predictions, weights, member)
    confusion = np.bincount(labels * num_classes + predictions.predicted, minlength=num_classes**2)
    confusion = confusion.reshape(num_classes, num_classes)
    intervals = {name: percentile_interval(values[0], values[1:]) for name, values in overall.items()}
    class_intervals = {
        name: {metric: percentile_interval(values[0, k], values[1:, k]) for metric, values in per_class.items()}
        for k, name in enumerate(predictions.classes)
    }
    if level == "patient":
        _put_wilson(intervals, class_intervals, confusion)
    num_groups = weights.shape[1] if len(weights) > 1 else 0
    return Scores(
        level=level,
        n=len(predictions),
        num_groups=num_groups,
        overall=intervals,
        per_class=class_intervals,
        confusion=confusion,
        classes=predictions.classes,
        notes=(*_notes(predictions, level, num_groups, resamples, intervals), *notes),
    )


def resampled_figures(
    predictions: Predictions, weights: np.ndarray, member: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return every figure on every resample.

    Args:
        predictions: N images or patients with labels.
        weights: (R, G) how often each resample holds each group.
        member: (N,) column of each row's group in it.

    Returns:
        (R,) each, named as in METRICS; (R, K) each, named as in CLASS_METRICS.
    """
    probs, num_classes, num_groups = predictions.probs, len(predictions.classes), weights.shape[1]
    labels = known_labels(predictions)
    cells = sum_by_group(member, num_groups, labels * num_classes + predictions.predicted, num_classes**2)
    calibration = calibration_sums(probs, labels, member, num_groups)
    ranked = [1] if num_classes == 2 else range(num_classes)
    step = max(1, CHUNK_VALUES // len(labels))
    chunks = []
    for start in range(0, len(weights), step):
        counts = weights[start : start + step].astype(np.float64)
        confusion = (counts @ cells).reshape(-1, num_classes, num_classes)
        overall, per_class = count_figures(confusion), class_figures(confusion)
        by_image = counts.T[member]
        areas = np.array([ranking_areas(probs[:, k], labels == k, by_image) for k in ranked])  # (classes, 2, chunk)
        overall["roc_auc"], overall["pr_auc"] = mean_over(areas.T, ~np.isnan(areas.T)).T
        overall |= calibration_figures(counts @ calibration)
        chunks.append(({name: overall[name] for name in METRICS}, {name: per_class[name] for name in CLASS_METRICS}))
    overall, per_class = (
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*chunks, strict=True)
    )
    return overall, per_class


def _put_wilson(
    intervals: dict[str, Interval], class_intervals: dict[str, dict[str, Interval]], confusion: np.ndarray
) -> None:
    """Replace the intervals of figures that are shares of patients; macro means are none and keep their bootstrap."""
    right, true, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    total = int(true.sum())
    intervals["accuracy"] = wilson(int(right.sum()), total)
    for k, figures in enumerate(class_intervals.values()):
        false_alarms, rest = int(predicted[k] - right[k]), int(total - true[k])
        figures["sensitivity"] = wilson(int(right[k]), int(true[k]))
        figures["specificity"] = wilson(rest - false_alarms, rest)
        if len(true) == 2 and k == 1:
            intervals["sensitivity"], intervals["specificity"] = figures["sensitivity"], figures["specificity"]
            intervals["fpr"] = wilson(false_alarms, rest)


def _notes(
    predictions: Predictions, level: str, num_groups: int, resamples: int, intervals: dict[str, Interval]
) -> tuple[str, ...]:
    """Return the conventions and warnings to print beside the figures."""
    classes, present = predictions.classes, set(predictions.labels.tolist())
    macro = "averaging: macro over classes, each versus the rest"
    notes = [f"positive class: {classes[1]}" if len(classes) == 2 else macro]
    notes.append(f"IBA alpha {IBA_ALPHA}; squared = imbalanced-learn's default, unsquared = the papers' column")
    unit = group_unit(predictions)
    if num_groups:
        notes.append(f"95 % intervals: percentile bootstrap, {resamples} resamples of {num_groups} {unit}s")
    else:
        notes.append(f"one {unit} only: no bootstrap intervals")
    if num_groups and unit == "image":
        notes.append("patients are unknown: intervals over images are too narrow where several show one patient")
    if level == "patient":
        notes.append("shares of patients (accuracy; each class's sensitivity, specificity): Wilson intervals")
    if 0 < num_groups < FEW_GROUPS:
        notes.append(f"fewer than {FEW_GROUPS} {unit}s: bootstrap intervals are too narrow")
    if num_groups and any(np.isnan(figure.low) and not np.isnan(figure.value) for figure in intervals.values()):
        notes.append("no interval where resamples leave a figure undefined (more than 10 %) or do not change it")
    if absent := [name for k, name in enumerate(classes) if k not in present]:
        notes.append(f"class without images: {', '.join(absent)}")
    if len(present) == 1:
        notes.append("one true class only: figures that need two are undefined")
    return tuple(notes)


def group_unit(predictions: Predictions) -> str:
    """Return what ``Predictions.groups`` groups by: exam, patient or image, or "group" where images differ in it."""
    exam, patient = predictions.column("exam"), predictions.column("patient")
    if all(exam):
        return "exam"
    if any(exam) or (any(patient) and not all(patient)):
        return "group"
    return "patient" if all(patient) else "image"
