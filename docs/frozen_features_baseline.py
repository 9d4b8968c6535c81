"""Pooled features of a frozen network and logistic regression, on the folds of a prepared folder.

The baseline beside which docs/results.md puts trained networks:

    python docs/frozen_features_baseline.py PREPARED_FOLDER --arch torchvision/mobilenet_v2 --weights FILE
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from breastcli.data.loading import load_batches, make_batches, to_network
from breastcli.data.store import PreparedData
from breastcli.metrics.classification import score_images
from breastcli.models import ModelOptions, build_model
from breastcli.records import Predictions
from breastcli.system.checkpoint import load_initial_weights


@torch.inference_mode()
def embed(data: PreparedData, arch: str, weights: Path, *, native: bool) -> np.ndarray:
    """Return the pooled features (N, D) of every image, scaled as the weights expect where ``native``."""
    model = build_model(ModelOptions(arch, len(data.classes), data.size_px, native_scaling=native)).eval()
    load_initial_weights(model, weights)
    batches = load_batches(data, make_batches(np.arange(len(data.rows)), 64), torch.device("cpu"))
    return torch.cat([model.embed(model.features(to_network(batch.images))) for batch in batches]).numpy()


def predict_folds(data: PreparedData, features: np.ndarray, *, with_validation: bool) -> Predictions:
    """Predict every fold by a regression fitted on the others, with or without the validation fold."""
    parts = []
    for fold in range(data.num_folds or 0):
        splits = ("train", "val") if with_validation else ("train",)
        fitted = np.concatenate([data.select(split, fold=fold) for split in splits])
        rows = data.select("test", fold=fold)
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=5000))
        probs = model.fit(features[fitted], data.labels[fitted]).predict_proba(features[rows])
        records = [data.rows[row].record for row in rows]
        parts.append(
            Predictions(
                image_ids=np.array([record.image_id for record in records], dtype=object),
                classes=data.classes,
                probs=probs,
                predicted=probs.argmax(axis=1),
                labels=data.labels[rows],
                columns={"exam": np.array([record.exam for record in records], dtype=object)},
            )
        )
    return Predictions.concatenate(parts)


def main() -> None:
    """Print ROC AUC and balanced accuracy with their intervals."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--arch", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--normalisation", choices=("native", "symmetric"), default="native")
    given = parser.parse_args()
    data = PreparedData.open(given.data)
    features = embed(data, given.arch, given.weights, native=given.normalisation == "native")
    for with_validation in (False, True):
        overall = score_images(predict_folds(data, features, with_validation=with_validation)).overall
        figures = (f"{name} {one.value:.3f} ({one.low:.3f}-{one.high:.3f})" for name, one in overall.items())
        chosen = [text for text in figures if text.startswith(("balanced_accuracy", "roc_auc", "sens", "spec"))]
        print("fitted on train + val:" if with_validation else "fitted on train:", ", ".join(chosen))


if __name__ == "__main__":
    main()
