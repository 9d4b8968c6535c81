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

from breastcli.config import EvaluateConfig, TrainConfig
from breastcli.data.store import PreparedData
from breastcli.evaluate import evaluate
from breastcli.metrics.classification import score_images
from breastcli.metrics.comparison import compare_predictions
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
FIGURES = {
    "roc_auc": "ROC AUC",
    "balanced_accuracy": "balanced accuracy",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
}


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
    """Return the test predictions of all folds."""
    parts = [Predictions.from_csv(folder / f"{arm}-{fold}/evaluate/test/predictions.csv") for fold in range(num_folds)]
    return Predictions.concatenate(parts)


def print_table(num_folds: int, folder: Path) -> None:
    """Print every arm's figures and their differences from the first one, with 95 % intervals over examinations."""
    arms = {arm: read_arm(arm, num_folds, folder) for arm in ARMS}
    print(f"| arm | {' | '.join(FIGURES.values())} | ROC AUC minus none | balanced accuracy minus none |")
    print("|---|" + "---|" * (len(FIGURES) + 2))
    for arm, predictions in arms.items():
        found = score_images(predictions).overall
        compared = compare_predictions(arms["none"], predictions)
        assert compared.num_common == len(arms["none"]) == len(predictions)
        differences = [compared.levels["image"].figures[name].difference for name in ("roc_auc", "balanced_accuracy")]
        intervals = [*(found[name] for name in FIGURES), *differences]
        cells = (f"{one.value:.3f} ({one.low:.3f} to {one.high:.3f})" for one in intervals)
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
