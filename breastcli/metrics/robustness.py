"""What perturbed images cost: every figure beside that of the clean images, with paired differences."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from breastcli.data.stress import PERTURBATIONS, STRENGTHS, suitable_perturbations
from breastcli.metrics.classification import METRICS, group_unit, resampled_figures
from breastcli.metrics.intervals import percentile_interval, resampled_weights
from breastcli.records import Interval, Predictions

FIGURES = ("roc_auc", "balanced_accuracy", "accuracy", "sensitivity", "specificity", "brier", "ece")
FLIPPED = "flipped"
TITLES = {name: METRICS[name].title for name in FIGURES} | {FLIPPED: "Decisions changed"}


@dataclass(frozen=True)
class Stressed:
    """What was predicted of images under one perturbation.

    Attributes:
        perturbation: its name in PERTURBATIONS.
        level: how strong it was.
        predictions: N images, in the order of the clean predictions and decided by the same threshold.
        num_unchanged: images that it left as they were, such as those without a stain to scale.
    """

    perturbation: str
    level: float
    predictions: Predictions
    num_unchanged: int


def describe_stress(
    clean: Predictions, runs: Sequence[Sequence[Stressed]], card: Mapping[str, Any], *, resamples: int, seed: int
) -> dict[str, Any]:
    """Return the figures of clean and of perturbed images, image level, and their paired differences.

    Every resample draws the same groups for the clean and for the perturbed images.

    Args:
        clean: labelled predictions of N images.
        runs: the same images, perturbed, as each of the pooled runs predicted its own.
        card: the data set's.
        resamples: bootstrap resamples of groups (exams where known, else patients, else images).
        seed: of the resampling.

    Returns:
        JSON-safe. "clean" holds the figures of FIGURES, and so do "figures" and "differences" (perturbed - clean) of
        each of "conditions", with their intervals; "flipped" is the share of images that are decided otherwise.
    """
    stressed = [_pool(several) for several in zip(*runs, strict=True)]
    _, left_out = suitable_perturbations(card["name"])
    weights, member = resampled_weights(clean.groups(), resamples, seed)
    before = _figures(clean, weights, member)
    num_groups = weights.shape[1] if len(weights) > 1 else 0
    conditions = []
    for one in stressed:
        after = _figures(one.predictions, weights, member)
        flipped = weights @ np.bincount(member, one.predictions.predicted != clean.predicted)
        conditions.append(
            {
                **_describe(one),
                "n": len(one.predictions),
                "num_unchanged": one.num_unchanged,
                FLIPPED: _interval(flipped / (weights @ np.bincount(member))).to_json(),
                "figures": {name: _interval(after[name]).to_json() for name in FIGURES},
                "differences": {name: _interval(after[name] - before[name]).to_json() for name in FIGURES},
            }
        )
    return {
        "level": "image",
        "n": len(clean),
        "num_groups": num_groups,
        "size_px": card["size_px"],
        "clean": {name: _interval(before[name]).to_json() for name in FIGURES},
        "conditions": conditions,
        "left_out": left_out,
        "notes": _notes(clean, stressed, left_out, card["size_px"], num_groups),
    }


def _pool(several: Sequence[Stressed]) -> Stressed:
    """Join what several runs predicted under the same perturbation."""
    predictions = Predictions.concatenate([one.predictions for one in several])
    num_unchanged = sum(one.num_unchanged for one in several)
    return dataclasses.replace(several[0], predictions=predictions, num_unchanged=num_unchanged)


def _figures(predictions: Predictions, weights: np.ndarray, member: np.ndarray) -> dict[str, np.ndarray]:
    return resampled_figures(predictions, weights, member)[0]


def _interval(values: np.ndarray) -> Interval:
    return percentile_interval(values[0], values[1:])


def _describe(one: Stressed) -> dict[str, Any]:
    """Return which perturbation it was and how strong."""
    known = PERTURBATIONS[one.perturbation]
    return {
        "perturbation": one.perturbation,
        "title": known.title,
        "kind": known.kind,
        "strength": STRENGTHS[known.levels.index(one.level)],
        "level": one.level,
        "label": known.label.format(one.level),
    }


def _notes(
    clean: Predictions, stressed: Sequence[Stressed], left_out: Mapping[str, str], size_px: int, num_groups: int
) -> list[str]:
    """Return how the images were perturbed and scored, to print beside the figures."""
    notes = [f"perturbed are the prepared images ({size_px} x {size_px} px, after any stain normalisation)"]
    unchanged = [one.num_unchanged for one in stressed if PERTURBATIONS[one.perturbation].kind == "stain"]
    if unchanged:
        stay = f"; {max(unchanged)} images whose stains cannot be told apart stay as they are" if any(unchanged) else ""
        notes.append(f"stains: each image's own haematoxylin and eosin, found as by Macenko normalisation{stay}")
    notes.append("threshold and calibration are those of the clean images' evaluation")
    if num_groups:
        drawn = f"the same resamples of {num_groups} {group_unit(clean)}s"
        notes.append(f"differences: perturbed - clean, over {drawn}; no interval where no resample changes a figure")
    return notes + [f"left out: {PERTURBATIONS[name].title} ({reason})" for name, reason in left_out.items()]
