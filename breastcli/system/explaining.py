"""Maps of many images, and what is measured of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from breastcli.cams import CAMS, CamOptions, saliency_maps
from breastcli.data.masks import MaskSet
from breastcli.errors import UserError
from breastcli.metrics import faithfulness as faith
from breastcli.metrics import localisation as local
from breastcli.models import Classifier
from breastcli.progress import Progress
from breastcli.system.inference import predict_log_probs
from breastcli.system.subjects import Subjects

logger = logging.getLogger(__name__)

CHUNK = 16  # images whose maps are computed before progress is told
COMPARED = ("iou", "dice", "average_precision")
FAITHFUL = ("deletion_auc", "insertion_auc", "average_drop", "increase")
MASK_PROBLEMS = ("missing", "mismatched", "empty", "unreadable")

Table = list[list[Any]]


@dataclass(frozen=True)
class Explainer:
    """Computes maps of a network.

    Attributes:
        model: the network, or one that is split at an earlier stage.
        device: where it is.
        dtype: its arithmetic.
        options: of the methods.
        resamples: of the bootstrap.
        progress: told after every chunk of images.
    """

    model: Classifier
    device: torch.device
    dtype: torch.dtype
    options: CamOptions
    resamples: int
    progress: Progress

    def batches(self, images: np.ndarray) -> Iterator[Tensor]:
        """Yield uint8 batches (B, 3, H, W) on the device of images (n, H, W, 3)."""
        for chunk in np.array_split(images, -(-len(images) // min(CHUNK, self.options.batch_size))):
            yield torch.from_numpy(chunk).permute(0, 3, 1, 2).to(self.device)

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Return class probabilities (n, K)."""
        probs = predict_log_probs(self.model, self.batches(images), self.device, self.dtype).exp().numpy()
        if not np.isfinite(probs).all():
            raise UserError("the network's probabilities are not finite numbers", fix="use --precision fp32")
        return probs

    def maps(
        self, images: np.ndarray, targets: np.ndarray, method: str, *, model: Classifier | None = None
    ) -> np.ndarray:
        """Return maps (n, H, W) float32 in [0, 1] of one class per image; of ``model`` instead where it is given."""
        if model is None:
            self.progress.begin(method, len(images), "images")
        parts: list[Tensor] = []
        for batch, chosen in self._with(images, targets):
            parts.append(saliency_maps(model or self.model, batch, chosen, method, self.options, self.dtype))
            if model is None:
                self.progress.advance(method, len(batch))
        return torch.cat(parts).numpy()

    def faithfulness(
        self, images: np.ndarray, targets: np.ndarray, maps: np.ndarray, name: str
    ) -> dict[str, np.ndarray]:
        """Return (n,) values of each figure of ``FAITHFUL``."""
        task = f"{name}: faithfulness"
        self.progress.begin(task, len(maps), "images")
        curves, changes = [], []
        settings = {"dtype": self.dtype, "batch_size": self.options.batch_size}
        done = 0
        for batch, chosen in self._with(images, targets):
            part = np.array(maps[done : done + len(batch)])
            saliency = torch.from_numpy(part).to(self.device)
            curves.append(faith.insertion_deletion(self.model, batch, saliency, chosen, **settings))
            changes.append(faith.confidence_change(self.model, batch, saliency, chosen, **settings))
            done += len(batch)
            self.progress.advance(task, len(batch))
        curve, change = faith.Faithfulness.concatenate(curves), faith.ConfidenceChange.concatenate(changes)
        values = (curve.deletion_auc, curve.insertion_auc, change.drop, change.increase)
        return dict(zip(FAITHFUL, values, strict=True))

    def randomisation(self, images: np.ndarray, targets: np.ndarray, method: str) -> dict[str, Any]:
        """Return the rank correlations of the maps with those of a network made random, level by level."""
        task = f"{method}: randomisation"
        self.progress.begin(task, 1, "checks")
        levels = faith.randomisation_check(
            self.model, lambda model: self.maps(images, targets, method, model=model), seed=self.options.seed
        )
        self.progress.advance(task)
        survives = faith.survives(levels)
        if survives:
            logger.warning(
                "%s: a random network gives nearly the same maps; they show the image, not the network", method
            )
        entries = [
            {"layer": one.name, "correlation": one.to_json()["correlation"], "n": len(images) - one.num_undefined}
            for one in levels
        ]
        return {"levels": entries, "survives": survives}

    def _with(self, images: np.ndarray, targets: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        done = 0
        for batch in self.batches(images):
            yield batch, torch.from_numpy(targets[done : done + len(batch)]).to(self.device)
            done += len(batch)


def refinement_of(name: str) -> Callable[[np.ndarray], np.ndarray] | None:
    """Return how a method, or a baseline, cleans up the mask that its map became; None where it does not."""
    if name == "uniform":
        return local.select_everything
    return CAMS.get(name).refine if name in CAMS.names() else None


def measure_localisation(
    explainer: Explainer,
    subjects: Subjects,
    maps: dict[str, np.ndarray],
    masks: MaskSet,
    rule: local.Rule,
    thresholds: dict[str, float],
) -> tuple[dict[str, Any], Table]:
    """Score every method and every baseline under one rule; return the document's part and the rows of the table."""
    baselines = local.baseline_maps(subjects.images, explainer.options.seed)
    groups = subjects.groups[masks.index]
    settings = {"resamples": explainer.resamples, "seed": explainer.options.seed}
    scores = {
        name: local.score_localisation(
            one[masks.index],
            masks.masks,
            groups,
            rule,
            threshold=thresholds.get(name),
            refine=refinement_of(name),
            **settings,
        )
        for name, one in {**maps, **baselines}.items()
    }
    rows = [
        [
            subjects.image_ids[image],
            subjects.patients[image],
            name,
            *(one.per_image[key][place] for key in local.METRICS),
        ]
        for name, one in scores.items()
        for place, image in enumerate(masks.index)
    ]
    document = {
        "rule": str(rule),
        "n": len(masks.index),
        "num_groups": len(set(groups)),
        **{kind: len(getattr(masks, kind)) for kind in MASK_PROBLEMS},
        "thresholds": thresholds or None,
        "methods": {name: {"baseline": name in baselines, **one.to_json()} for name, one in scores.items()},
        "differences": {name: _differences(name, scores, groups, settings) for name in maps},
    }
    return document, rows


def _differences(
    name: str, scores: dict[str, local.LocalisationScores], groups: np.ndarray, settings: dict[str, int]
) -> dict[str, dict[str, Any]]:
    """Return one method's figures minus every other's, paired by image, with intervals."""
    own = scores[name].per_image
    return {
        other: {
            metric: local.paired_difference(own[metric], one.per_image[metric], groups, **settings).to_json()
            for metric in COMPARED
        }
        for other, one in scores.items()
        if other != name
    }


def measure_faithfulness(
    explainer: Explainer, subjects: Subjects, maps: dict[str, np.ndarray], targets: np.ndarray
) -> tuple[dict[str, Any], Table]:
    """Measure whether maps tell what the network uses; return the document's part and the rows of the table."""
    settings = {"resamples": explainer.resamples, "seed": explainer.options.seed}
    random = {"random": local.baseline_maps(subjects.images, explainer.options.seed)["random"]}
    figures: dict[str, dict[str, Any]] = {}
    rows: Table = []
    for name, one in {**maps, **random}.items():
        values = explainer.faithfulness(subjects.images, targets, one, name)
        figures[name] = {
            figure: local.paired_difference(each, np.zeros_like(each), subjects.groups, **settings).to_json()
            for figure, each in values.items()
        }
        rows += [
            [image_id, name, *(values[figure][place] for figure in FAITHFUL)]
            for place, image_id in enumerate(subjects.image_ids)
        ]
    num_groups = len(set(subjects.groups))
    checks = {name: explainer.randomisation(subjects.images, targets, name) for name in maps}
    return {"num_groups": num_groups, "methods": figures, "randomisation": checks}, rows
