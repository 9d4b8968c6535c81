"""One run's predictions of perturbed images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from breastcli.data.stress import suitable_perturbations
from breastcli.metrics.calibration import temper
from breastcli.metrics.classification import decide
from breastcli.metrics.robustness import Stressed
from breastcli.records import Predictions
from breastcli.system.inference import Predictor


def predict_stressed(
    predictor: Predictor,
    rows: np.ndarray,
    task: str,
    clean: Predictions,
    temperature: float | None,
    threshold: float | None,
) -> list[Stressed]:
    """Predict images under every perturbation that suits their data set.

    Args:
        predictor: asked once for each perturbation and level.
        rows: (n,) row numbers.
        task: what progress calls it.
        clean: predictions of the images as they are, in the order of ``rows``.
        temperature: by which the clean probabilities were scaled, or None.
        threshold: by which the clean images were decided, or None.
    """
    found = []
    for name, perturbation in suitable_perturbations(predictor.data.card["name"])[0].items():
        for level in perturbation.levels:
            change = _Change(perturbation.apply, level)
            probs = predictor(rows, f"{task}, {perturbation.title} {perturbation.label.format(level)}", change)
            probs = temper(probs, temperature)
            predictions = dataclasses.replace(clean, probs=probs, predicted=decide(probs, threshold))
            found.append(Stressed(name, level, predictions, change.num_unchanged))
    return found


class _Change:
    """Perturbs batches, and counts the images in which nothing changed."""

    def __init__(self, apply: Callable[[Tensor, float], Tensor], level: float) -> None:
        self.apply = apply
        self.level = level
        self.num_unchanged = 0

    def __call__(self, images: Tensor) -> Tensor:
        changed = self.apply(images, self.level)
        self.num_unchanged += int((changed == images).flatten(1).all(dim=1).sum())
        # In the memory layout of clean batches, lest kernels round otherwise.
        return changed.contiguous(memory_format=torch.channels_last)
