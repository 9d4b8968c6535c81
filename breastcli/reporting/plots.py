"""Plots of a run, of predictions and of a data set: colour-blind safe, and the same bytes each time.

``stamp`` is a warning that must travel with a plot, such as "LEAKY: image-level split"; it is printed above it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from breastcli.files import replacing
from breastcli.metrics.calibration import expected_calibration_error, reliability_table
from breastcli.metrics.figures import ranking_areas, ranking_curves
from breastcli.records import Predictions, Scores
from breastcli.reporting.cases import rank_patients
from breastcli.reporting.contact_sheet import BLACK, BLUE, COLOURS, GREY, SKY, VERMILION, short

DASHES = ("-", "--", ":", "-.")
RED = "#B00020"
DPI = 160
MAX_PATIENTS = 82
CURVES = {
    "loss": {"train_loss": "training", "val_loss": "validation"},
    "score": {"val_balanced_accuracy": "balanced accuracy", "val_accuracy": "accuracy", "val_roc_auc": "ROC AUC"},
    "rate": {"lr": "learning rate"},
}
CHANCE = {"color": GREY, "linewidth": 1.1, "linestyle": (0, (2, 2))}

# The defaults come first so that a user's matplotlibrc changes no byte; class names are text, never mathematics.
STYLE = {
    "text.parse_math": False,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E7EA",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
}
History = Sequence[Mapping[str, float]]
_styled = style.context(["default", STYLE])


@_styled
def plot_curves(history: History, path: Path, best_epoch: int | None = None, *, stamp: str = "") -> None:
    """Draw losses, validation figures and learning rate over the epochs.

    Args:
        history: one row per epoch: epoch, lr, train_loss, val_loss, val_accuracy, val_balanced_accuracy, val_roc_auc.
        path: PNG file to write.
        best_epoch: epoch to mark, as numbered in ``history``.
    """
    figure = _figure(9.4, 5.6)
    panels = figure.subplot_mosaic([["loss", "score"], ["rate", "rate"]], height_ratios=(3.2, 1))
    panels["loss"].set(title=f"Loss ({_n(len(history), 'epoch')})", ylabel="Loss")
    panels["score"].set(title="Validation figures", ylabel="Figure (0 to 1)")
    highest = max([row.get("lr", 0) for row in history] + [1e-9])
    panels["rate"].set(title="Learning rate", ylabel="Rate", ylim=(0, 1.1 * highest))
    panels["rate"].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panels["rate"].yaxis.set_major_locator(MaxNLocator(3))
    for name, columns in CURVES.items():
        _draw_series(panels[name], history, columns, best_epoch)
    _write(figure, path, stamp)


@_styled
def plot_confusion(scores: Scores, path: Path, title: str = "", *, stamp: str = "") -> None:
    """Draw the confusion matrix: counts, and percentages of each true class.

    Args:
        scores: figures of one group of predictions.
        path: PNG file to write.
        title: heading; the level and n are added.
    """
    num_classes = len(scores.classes)
    figure = _figure(4.2 + 0.62 * num_classes, 2.9 + 0.55 * num_classes)
    axes = figure.subplots()
    axes.set_title(f"{title or 'Confusion matrix'}\n{scores.level} level ({_n(scores.n, scores.level)})")
    if np.sum(scores.confusion):
        _draw_confusion(figure, axes, np.asarray(scores.confusion), [short(name) for name in scores.classes])
    else:
        _explain(axes, f"No {scores.level} with a known true class: there is nothing to count.")
    _write(figure, path, stamp)


def _draw_confusion(figure: Figure, axes: Axes, counts: np.ndarray, names: list[str]) -> None:
    totals = counts.sum(axis=1)
    shares = 100 * counts / np.maximum(totals, 1)[:, None]
    painted = axes.imshow(shares, cmap="cividis", vmin=0, vmax=100)
    figure.colorbar(painted, ax=axes, label="Share of the true class (%)", shrink=0.85)
    slant = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if len(names) > 2 else {}
    axes.set_xticks(range(len(names)), names, **slant)
    axes.set_yticks(range(len(names)), [f"{name}\n(n = {n:,})" for name, n in zip(names, totals, strict=True)])
    axes.set(xlabel="Predicted class", ylabel="True class")
    axes.grid(False)
    for row, column in np.ndindex(*counts.shape):
        share = f"{shares[row, column]:.1f} %" if totals[row] else "–"
        ink = BLACK if shares[row, column] > 47 else "white"
        size = 12 if len(names) <= 3 else 8.5
        axes.text(column, row, f"{counts[row, column]:,}\n{share}", ha="center", va="center", color=ink, size=size)


@_styled
def plot_roc(predictions: Predictions, path: Path, *, stamp: str = "") -> None:
    """Draw the ROC curve of the last of two classes, or one curve per class against the rest."""
    figure, axes = _unit_square("ROC curve", predictions)
    axes.set(xlabel="1 − specificity (false-positive rate)", ylabel="Sensitivity (true-positive rate)")
    problem = _why_no_curve(predictions)
    if problem:
        _explain(axes, problem)
    else:
        for looks, name, truth, score in _one_against_rest(predictions):
            false_positive, sensitivity, _ = ranking_curves(score, truth)
            label = f"{name}: AUC {_areas(score, truth)[0]:.3f} (n = {truth.sum():,})"
            axes.plot(false_positive, sensitivity, **looks, label=label)
        axes.plot([0, 1], [0, 1], **CHANCE, label="chance: AUC 0.500")
        if len(predictions.classes) == 2:
            right, positive = predictions.predicted == predictions.labels, predictions.labels == 1
            sensitivity, specificity = right[positive].mean(), right[~positive].mean()
            label = f"as decided: sensitivity {sensitivity:.3f}, specificity {specificity:.3f}"
            axes.plot(1 - specificity, sensitivity, "o", color=VERMILION, markersize=8, label=label, clip_on=False)
        figure.legend(loc="outside lower center")
    _write(figure, path, stamp)


def _areas(score: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Return the area under the ROC curve and the average precision."""
    roc_auc, average_precision = ranking_areas(score, truth, np.ones((len(score), 1)))
    return float(roc_auc[0]), float(average_precision[0])


@_styled
def plot_precision_recall(predictions: Predictions, path: Path, *, stamp: str = "") -> None:
    """Draw the precision-recall curve of the last of two classes, or one per class, over its prevalence line."""
    figure, axes = _unit_square("Precision and recall", predictions)
    axes.set(xlabel="Recall (sensitivity)", ylabel="Precision (positive predictive value)")
    problem = _why_no_curve(predictions)
    if problem:
        _explain(axes, problem)
    else:
        for looks, name, truth, score in _one_against_rest(predictions):
            _, recall, precision = ranking_curves(score, truth)
            prevalence = truth.mean()
            label = f"{name}: AP {_areas(score, truth)[1]:.3f}, prevalence {prevalence:.3f} (n = {truth.sum():,})"
            axes.plot(recall, precision, **looks, drawstyle="steps-pre", label=label)
            axes.axhline(prevalence, **CHANCE | {"color": looks["color"]})
        axes.plot([], [], **CHANCE, label="prevalence: what chance reaches")
        figure.legend(loc="outside lower center")
    _write(figure, path, stamp)


@_styled
def plot_reliability(
    predictions: Predictions, path: Path, before: Predictions | None = None, *, stamp: str = ""
) -> None:
    """Draw how often the most probable class is right against its probability, over the number of images.

    Args:
        predictions: N images.
        path: PNG file to write.
        before: the same images before calibration; they are drawn on the left.
        stamp: warning to print above.
    """
    both = {"Reliability before calibration": before, "Reliability after calibration": predictions}
    sides = {"Reliability": predictions} if before is None else both
    figure = _figure(5.6 * len(sides), 6.4)
    for part, (name, shown) in zip(figure.subfigures(1, len(sides), squeeze=False)[0], sides.items(), strict=True):
        axes, below = part.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        axes.set_title(f"{name}, image level ({_n(len(shown), 'image')})")
        axes.set(ylabel="Share of right answers", ylim=(0, 1.02))
        below.set(xlabel="Probability of the most probable class", ylabel="Images")
        problem = _why_no_answer(shown)
        if problem:
            below.set_visible(False)
            _explain(axes, problem)
        else:
            _draw_reliability(axes, below, shown)
            part.legend(loc="outside lower center")
    _write(figure, path, stamp)


def _draw_reliability(axes: Axes, below: Axes, predictions: Predictions) -> None:
    table = reliability_table(predictions.probs, predictions.labels)
    centres, width = (table.edges[:-1] + table.edges[1:]) / 2, 0.94 * table.edges[1]
    axes.bar(centres, table.accuracy, width, color=SKY, alpha=0.55, label="share of right answers")
    axes.plot([0, 1], [0, 1], **CHANCE, label="perfectly calibrated")
    axes.plot(table.confidence, table.accuracy, "o", color=BLUE, label="at the bin's mean probability", clip_on=False)
    confidence, right = predictions.probs.max(axis=1), predictions.probs.argmax(axis=1) == predictions.labels
    error = expected_calibration_error(predictions.probs, predictions.labels)
    label = f"all images: {right.mean():.3f} right, mean {confidence.mean():.3f}, ECE {error:.3f}"
    axes.plot(confidence.mean(), right.mean(), "D", color=VERMILION, label=label, clip_on=False)
    drawn = below.bar(centres, table.count, width, color=GREY)
    below.bar_label(drawn, [f"{count:,}" if count else "" for count in table.count], size=8, padding=1)
    below.margins(y=0.25)
    lowest = 1 / len(predictions.classes)  # no class can be the most probable one below this
    below.set_xlim(table.edges[table.edges <= lowest + 1e-9].max() if lowest < 1 else 0, 1)


@_styled
def plot_patients(predictions: Predictions, path: Path, *, stamp: str = "") -> None:
    """Draw one row of dots per patient, worst first: each image at the probability given to its true class.

    A patient whose images carry two labels has one row per label, as in ``Predictions.by_patient``. At most
    ``MAX_PATIENTS`` rows are drawn; the title says when better ones are left out.
    """
    problem = _why_no_answer(predictions)
    rows = [] if problem else rank_patients(predictions)
    shown = rows[:MAX_PATIENTS]
    figure = _figure(7.2, 2.1 + 0.21 * max(len(shown), 6))
    axes = figure.subplots()
    size = f"{_n(len(rows), 'patient')}, {sum(len(case.members) for case in rows):,} images"
    left_out = f"\nthe {len(shown)} worst of them are shown" if len(shown) < len(rows) else ""
    axes.set_title(f"Patients, worst first ({size}){left_out}")
    if rows:
        for row, case in enumerate(shown):
            _draw_patient(axes, row, predictions.select(case.members))
        names = [
            f"{short(case.patient)} · {short(predictions.classes[case.label])} · {case.num_right}/{len(case.members)}"
            for case in shown
        ]
        axes.set_yticks(range(len(shown)), names, size=8)
        axes.set(xlim=(-0.02, 1.02), ylim=(len(shown) - 0.4, -0.6), xlabel="Probability given to the true class")
        axes.set_ylabel("Patient · true class\nimages right / all")
        axes.scatter([], [], s=24, color=BLUE, label="image right")
        axes.scatter([], [], s=28, color=VERMILION, marker="x", label="image wrong")
        figure.legend(loc="outside lower center", ncols=2)
    else:
        _explain(axes, problem or "No image's patient is known: there is nothing to group by.")
    _write(figure, path, stamp)


def _draw_patient(axes: Axes, row: int, images: Predictions) -> None:
    right = images.predicted == images.labels
    given = images.probs[np.arange(len(images)), images.labels]
    # Multiples of the golden ratio spread overlapping dots evenly without a random number.
    height = row + 0.5 * ((np.arange(len(images)) * 0.618034) % 1 - 0.5)
    axes.scatter(given[right], height[right], s=16, color=BLUE, alpha=0.6, linewidths=0)
    axes.scatter(given[~right], height[~right], s=22, color=VERMILION, marker="x", linewidths=1.2)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    FigureCanvasAgg(figure)
    return figure


def _unit_square(heading: str, predictions: Predictions) -> tuple[Figure, Axes]:
    """Return a figure of one panel with both axes from 0 to 1 and room for the legend below."""
    figure = _figure(5.6, 5.4 + 0.19 * len(predictions.classes))
    axes = figure.subplots()
    axes.set_title(f"{heading}, image level ({_n(len(predictions), 'image')})")
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    return figure, axes


def _draw_series(axes: Axes, history: History, columns: Mapping[str, str], best_epoch: int | None) -> None:
    """Draw the columns that have a number; one that has none is left out of the legend."""
    epochs = [row["epoch"] for row in history]
    marker = "o" if len(history) <= 30 else ""
    for index, (column, label) in enumerate(columns.items()):
        values = np.array([row.get(column, np.nan) for row in history], dtype=float)
        if np.isfinite(values).any():
            looks = {"color": COLOURS[index], "linestyle": DASHES[index]}
            axes.plot(epochs, values, **looks, marker=marker, markersize=3.5, label=label)
    if not axes.lines:
        _explain(axes, "No epoch with such a figure is finished.")
        return
    if best_epoch is not None:
        axes.axvline(best_epoch, **CHANCE, label=f"best epoch: {best_epoch}")
    axes.set(xlabel="Epoch", xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=True, framealpha=0.85, edgecolor="none")


def _one_against_rest(predictions: Predictions) -> Iterator[tuple[dict[str, str], str, np.ndarray, np.ndarray]]:
    """Yield looks, class name, (N,) truth and (N,) score of each class that has images inside and outside it."""
    num_classes = len(predictions.classes)
    for number, index in enumerate(range(num_classes) if num_classes > 2 else [num_classes - 1]):
        truth = predictions.labels == index
        if truth.any() and not truth.all():
            dashes = DASHES[number // len(COLOURS) % len(DASHES)]
            looks = {"color": COLOURS[number % len(COLOURS)], "linestyle": dashes}
            yield looks, short(predictions.classes[index]), truth, predictions.probs[:, index]


def _why_no_answer(predictions: Predictions) -> str:
    """Return why right and wrong cannot be told apart, or ""."""
    if not len(predictions):
        return "There are no predictions."
    return "The true classes are unknown: there is nothing to compare with." if predictions.labels is None else ""


def _why_no_curve(predictions: Predictions) -> str:
    """Return why no class can be told from the rest, or ""."""
    problem = _why_no_answer(predictions)
    if problem or len(np.unique(predictions.labels)) > 1:
        return problem
    only = short(predictions.classes[predictions.labels[0]])
    return f"Every image is of one class ({only}): a curve needs images of at least two."


def _explain(axes: Axes, text: str) -> None:
    """Put a sentence where the plot would have been."""
    axes.set(xticks=[], yticks=[], xlabel="", ylabel="", facecolor="#F3F5F6")
    axes.spines[:].set_visible(False)
    wrapped = textwrap.fill(text, 38)
    axes.text(0.5, 0.5, wrapped, transform=axes.transAxes, ha="center", va="center", color=GREY, size=11)


def _n(count: int, noun: str) -> str:
    return f"n = {count:,} {noun}{'' if count == 1 else 's'}"


def _write(figure: Figure, path: Path, stamp: str) -> None:
    if stamp:
        figure.suptitle(textwrap.fill(stamp, 62), color=RED, weight="bold", size=11)
    with replacing(path) as temporary:  # without metadata: matplotlib would sign the file with its version
        figure.savefig(temporary, format="png", metadata={"Software": None})
