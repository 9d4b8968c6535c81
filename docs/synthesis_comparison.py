"""Do synthetic images help? The same classifier on the same folds without help, with augmentation, with more images.

The comparison behind a table of docs/results.md. Each fold has its own folder of synthetic images, made from that
fold's training images:

    python docs/synthesis_comparison.py PREPARED_FOLDER --weights FILE --synthetic 'images-{fold}' --out RUNS

Runs that are there already are not trained again, so that several of these can share the work (--arms).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from breastcli.config import EvaluateConfig, TrainConfig
from breastcli.data.store import PreparedData
from breastcli.evaluate import evaluate
from breastcli.metrics.figures import ranking_areas
from breastcli.metrics.intervals import percentile_interval, resampled_weights
from breastcli.records import Predictions
from breastcli.train import train

ARMS: dict[str, dict[str, Any]] = {
    "none": {"augment": "none"},
    "oversampling": {"augment": "none", "imbalance": "oversample"},
    "cwgan": {"augment": "none", "extra": True},
    "traditional": {"augment": "deebani"},
    "traditional+oversampling": {"augment": "deebani", "imbalance": "oversample"},
    "traditional+cwgan": {"augment": "deebani", "extra": True},
}
RESAMPLES = 2000


def train_arm(arm: str, fold: int, given: argparse.Namespace) -> None:
    """Train and evaluate one arm on one fold, where that was not done before."""
    out = given.out / f"{arm}-{fold}"
    if not (out / "evaluate/test/predictions.csv").is_file():
        settings = dict(ARMS[arm])
        if settings.pop("extra", False):
            settings["extra"] = given.synthetic.format(fold=fold)
        config = TrainConfig(
            arch="torchvision/mobilenet_v2",
            weights=str(given.weights),
            data=str(given.data),
            fold=fold,
            out=str(out),
            epochs=given.epochs,
            lr=1e-4,
            schedule="cosine",
            batch_norm="frozen",
            monitor="val_loss",
            overwrite=True,
            **settings,
        )
        train(config)
        evaluate(EvaluateConfig(runs=(str(out),), overwrite=True))


def read_arm(arm: str, num_folds: int, folder: Path) -> Predictions:
    """Return the test predictions of all folds, in one order for all arms."""
    parts = [Predictions.from_csv(folder / f"{arm}-{fold}/evaluate/test/predictions.csv") for fold in range(num_folds)]
    pooled = Predictions.concatenate(parts)
    return pooled.select(np.argsort(pooled.image_ids.astype(str)))


def figures(predictions: Predictions, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return (1 + R,) of each figure, on the data themselves and on every resample.

    Args:
        predictions: N images of two classes.
        weights: (N, 1 + R) how often each resample holds each image.
    """
    positive, called = predictions.labels == 1, predictions.predicted == 1
    areas, _ = ranking_areas(predictions.probs[:, 1], positive, weights)
    with np.errstate(invalid="ignore"):
        sensitivity = weights[positive & called].sum(axis=0) / weights[positive].sum(axis=0)
        specificity = weights[~positive & ~called].sum(axis=0) / weights[~positive].sum(axis=0)
    found = {"ROC AUC": areas, "balanced accuracy": (sensitivity + specificity) / 2}
    return found | {"sensitivity": sensitivity, "specificity": specificity}


def print_table(num_folds: int, folder: Path) -> None:
    """Print every arm's figures and their differences from the first one, with 95 % intervals over examinations."""
    arms = {arm: read_arm(arm, num_folds, folder) for arm in ARMS}
    first = arms["none"]
    counts, member = resampled_weights(first.groups(), RESAMPLES, 0)
    values = {arm: figures(predictions, counts[:, member].T) for arm, predictions in arms.items()}
    print(f"| arm | {' | '.join(values['none'])} | ROC AUC minus none | balanced accuracy minus none |")
    print("|---|" + "---|" * (len(values["none"]) + 2))
    for arm, found in values.items():
        assert (arms[arm].image_ids == first.image_ids).all()
        differences = [found[name] - values["none"][name] for name in ("ROC AUC", "balanced accuracy")]
        cells = []
        for one in [*found.values(), *differences]:
            interval = percentile_interval(one[0], one[1:])
            cells.append(f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})")
        print(f"| {arm} | {' | '.join(cells)} |")


def main() -> None:
    """Train what is missing, then print the table where every arm is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--synthetic", required=True, help="folder of synthetic images, with {fold} in its name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--arms", default=",".join(ARMS))
    given = parser.parse_args()
    num_folds = PreparedData.open(given.data).num_folds or 0
    for arm in filter(None, given.arms.split(",")):
        for fold in range(num_folds):
            train_arm(arm, fold, given)
    if all((given.out / f"{arm}-{fold}/evaluate/test").is_dir() for arm in ARMS for fold in range(num_folds)):
        print_table(num_folds, given.out)


if __name__ == "__main__":
    main()
