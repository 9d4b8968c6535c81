"""Two sets of predictions beside each other: every figure of the second minus that of the first, with intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from breastcli.errors import UserError
from breastcli.metrics.classification import (
    FEW_GROUPS,
    METRICS,
    group_unit,
    known_labels,
    recognition_rates,
    resampled_figures,
)
from breastcli.metrics.intervals import percentile_interval, resampled_weights
from breastcli.records import Interval, Predictions

LEVELS = {"image": "images", "patient_vote": "patients, majority vote", "patient_mean": "patients, mean probability"}
RECOGNITION_RATE = "recognition_rate"
TITLES = {RECOGNITION_RATE: "Patient recognition rate"} | {name: metric.title for name, metric in METRICS.items()}
LOWER_IS_BETTER = ("fpr", "brier", "ece")
RULE = (
    "paired on the common images where they are more than half of the smaller side's, else unpaired: each side's "
    "groups are then resampled by themselves"
)
Figures = Callable[[Predictions, np.ndarray, np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Difference:
    """One figure of both sides, and B - A with its interval."""

    a: float
    b: float
    difference: Interval

    @property
    def leaves_out_zero(self) -> bool | None:
        """Whether the interval lies on one side of zero; None where there is no interval."""
        low, high = self.difference.low, self.difference.high
        return None if np.isnan(low) else bool(low > 0 or high < 0)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-safe dictionary."""
        sides = {name: Interval(value).to_json()["value"] for name, value in (("a", self.a), ("b", self.b))}
        return {**sides, "difference": self.difference.to_json(), "leaves_out_zero": self.leaves_out_zero}


@dataclass(frozen=True)
class Level:
    """The figures that count images, or patients.

    Attributes:
        n: number of images or patients of A and of B.
        num_groups: number of groups of each that the bootstrap resampled (0 where no bootstrap was made).
        figures: metric name to difference.
    """

    n: tuple[int, int]
    num_groups: tuple[int, int]
    figures: dict[str, Difference]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-safe dictionary."""
        counts = {name: dict(zip("ab", getattr(self, name), strict=True)) for name in ("n", "num_groups")}
        return {**counts, "figures": {name: figure.to_json() for name, figure in self.figures.items()}}


@dataclass(frozen=True)
class Comparison:
    """How two sets of predictions differ.

    Attributes:
        paired: whether both sides' figures are those of the common images, over the same resamples.
        num_common: images that both sides predicted.
        num_images: images that A and that B predicted.
        levels: those of LEVELS that both sides have.
        notes: conventions and warnings to print beside the figures.
    """

    paired: bool
    num_common: int
    num_images: tuple[int, int]
    levels: dict[str, Level]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-safe dictionary."""
        return {
            "paired": self.paired,
            "num_common": self.num_common,
            "num_images": dict(zip("ab", self.num_images, strict=True)),
            "rule": RULE,
            "levels": {name: level.to_json() for name, level in self.levels.items()},
            "notes": list(self.notes),
        }


def compare_predictions(
    a: Predictions, b: Predictions, *, same_data: bool = True, resamples: int = 2000, seed: int = 0
) -> Comparison:
    """Return B - A of every figure, at image level and, where every patient is known, at patient level.

    Paired where the common images are more than half of the smaller side's: both sides' figures are then those of the
    common images, and every resample draws the same groups for both, so that what makes a group easy or hard for
    either cancels. What the smaller side could tell is then mostly kept, and the other images of a larger side (another
    magnification, further folds) say nothing about the difference. With fewer common images pairing would answer for a
    remnant: unpaired, all images count and each side's groups are resampled by themselves. Groups that stand on both
    sides are then drawn twice, which widens the interval rather than narrowing it.

    Source: Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8 (groups).

    Args:
        a: labelled predictions.
        b: labelled predictions of the same classes.
        same_data: whether equal names are the same images; False where the sides are of different data sets.
        resamples: bootstrap resamples of groups (exams where known, else patients, else images).
        seed: of the resampling: the same seed gives the same intervals.

    Raises:
        UserError: the classes differ, there are no images, or labels are unknown.
    """
    if a.classes != b.classes:
        raise UserError(
            f"the classes differ: {', '.join(a.classes)} and {', '.join(b.classes)}", fix="compare runs of one task"
        )
    num_images = len(a), len(b)
    rows_a, rows_b = _common_rows(a, b) if same_data else (np.zeros(0, dtype=int),) * 2
    paired = 2 * len(rows_a) > min(num_images)
    if paired:
        a, b = a.select(rows_a), b.select(rows_b)
    levels = {"image": _compare(a, b, _image_figures, paired, resamples, seed)}
    if all(a.column("patient")) and all(b.column("patient")):
        for rule, figures in (("vote", _vote_figures), ("mean", _image_figures)):
            merged = a.by_patient(rule), b.by_patient(rule)
            levels[f"patient_{rule}"] = _compare(*merged, figures, paired, resamples, seed)
    notes = _notes((a, b), levels, paired, len(rows_a), num_images, resamples)
    shared = len(set(a.groups()) & set(b.groups())) if same_data and not paired else 0
    if shared:
        notes.append(f"{shared} {group_unit(a)}s are on both sides and drawn apart: the intervals are rather too wide")
    return Comparison(paired, len(rows_a), num_images, levels, tuple(notes))


def _common_rows(a: Predictions, b: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the images that both sides have under the same name and label, in one order."""
    names = (
        [f"{name}\x00{label}" for name, label in zip(side.image_ids, known_labels(side), strict=True)]
        for side in (a, b)
    )
    _, rows_a, rows_b = np.intersect1d(*map(np.array, names), return_indices=True)
    return rows_a, rows_b


def _image_figures(predictions: Predictions, weights: np.ndarray, member: np.ndarray) -> dict[str, np.ndarray]:
    return resampled_figures(predictions, weights, member)[0]


def _vote_figures(votes: Predictions, weights: np.ndarray, member: np.ndarray) -> dict[str, np.ndarray]:
    rates = recognition_rates(votes, weights, member)
    return {RECOGNITION_RATE: rates} | _image_figures(votes, weights, member)


def _compare(a: Predictions, b: Predictions, figures: Figures, paired: bool, resamples: int, seed: int) -> Level:
    """Compare rows that are images or patients; paired ones stand in the same order on both sides."""
    drawn_a = resampled_weights(a.groups(), resamples, seed)
    drawn_b = drawn_a if paired else resampled_weights(b.groups(), resamples, (seed, 1))
    values_a, values_b = figures(a, *drawn_a), figures(b, *drawn_b)
    num_draws = min(len(drawn_a[0]), len(drawn_b[0]))  # 1 where a side is a single group: no interval
    differences = {name: values_b[name][:num_draws] - values_a[name][:num_draws] for name in values_a}
    num_groups = tuple(weights.shape[1] if num_draws > 1 else 0 for weights, _ in (drawn_a, drawn_b))
    found = {
        name: Difference(float(values_a[name][0]), float(values_b[name][0]), percentile_interval(one[0], one[1:]))
        for name, one in differences.items()
    }
    return Level((len(a), len(b)), num_groups, found)


def _notes(
    sides: tuple[Predictions, Predictions],
    levels: dict[str, Level],
    paired: bool,
    num_common: int,
    num_images: tuple[int, int],
    resamples: int,
) -> list[str]:
    """Return how the sides were compared, and the warnings to print beside the figures."""
    groups, unit = levels["image"].num_groups, group_unit(sides[0])
    if not paired:
        how = f"unpaired: {num_common:,} of {num_images[0]:,} (A) and {num_images[1]:,} (B) images are common"
        drawn = f"{groups[0]} {unit}s of A and {groups[1]} {group_unit(sides[1])}s of B, each by themselves"
    else:
        others = "" if set(num_images) == {num_common} else f" (of {num_images[0]:,} of A and {num_images[1]:,} of B)"
        how = f"paired on the {num_common:,} common images{others}"
        drawn = f"{groups[0]} {unit}s, the same for both sides"
    notes = [f"{how}; the rule: {RULE}"]
    intervals = [one for level in levels.values() for one in level.figures.values()]
    if not any(groups):
        notes.append(f"one {unit} only: no bootstrap intervals")
    else:
        notes.append(f"95 % intervals of B - A: percentile bootstrap, {resamples} resamples of {drawn}")
        known = sum(one.leaves_out_zero is not None for one in intervals)
        notes.append(f"of {known} intervals some leave out zero by chance alone: look at the figure chosen beforehand")
        if min(groups) < FEW_GROUPS:
            notes.append(f"fewer than {FEW_GROUPS} {unit}s: bootstrap intervals are too narrow")
    if any(groups) and any(one.leaves_out_zero is None and not np.isnan(one.difference.value) for one in intervals):
        notes.append("no interval where resamples leave a difference undefined (more than 10 %) or do not change it")
    if len(sides[0].classes) == 2:
        notes.append(f"positive class: {sides[0].classes[1]}")
    notes.append(f"lower is better: {', '.join(TITLES[name] for name in LOWER_IS_BETTER)}")
    return notes
