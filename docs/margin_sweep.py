"""Margins and scales of the angular losses, on the validation folds of a prepared folder.

The sweep behind the defaults, and behind a table of docs/results.md. The test folds are not looked at:

    python docs/margin_sweep.py PREPARED_FOLDER --arch torchvision/mobilenet_v2 --weights FILE
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from breastcli.config import TrainConfig
from breastcli.data.store import PreparedData
from breastcli.train import train

SCALES = (4.0, 8.0, 16.0, 32.0)
MARGINS = {
    "cosface": (0.0, 0.1, 0.3),
    "arcface": (0.1, 0.3, 0.5),
    "a_softmax": (2.0, 4.0),
    "li_arcface": (0.0, 0.1, 0.3),
}
FIGURES = ("val_roc_auc", "val_balanced_accuracy")


def grid() -> Iterator[tuple[str, float | None, float | None]]:
    """Yield loss, margin and scale; plain cross-entropy first."""
    yield "cross_entropy", None, None
    for scale in SCALES:
        for loss, margins in MARGINS.items():
            for margin in margins:
                yield loss, margin, scale


def main() -> None:
    """Print the figures of each loss: of its best epoch and of its last one, means over the folds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--arch", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    given = parser.parse_args()
    num_folds = PreparedData.open(given.data).num_folds or 0
    print("loss, margin, scale, ROC AUC and balanced accuracy of the best epoch, of the last epoch")
    for loss, margin, scale in grid():
        rows = []
        for fold in range(num_folds):
            with tempfile.TemporaryDirectory() as folder:
                config = TrainConfig(
                    arch=given.arch,
                    weights=str(given.weights),
                    freeze="trunk",
                    augment="light",
                    imbalance="weights",
                    monitor="val_roc_auc",
                    data=str(given.data),
                    fold=fold,
                    epochs=40,
                    lr=1e-3,
                    loss=loss,
                    margin=margin,
                    scale=scale,
                    out=folder,
                )
                result = train(config)
                rows.append([row[name] for row in (result.best, result.history[-1]) for name in FIGURES])
        print(loss, margin, scale, *(f"{value:.3f}" for value in np.nanmean(rows, axis=0)), flush=True)


if __name__ == "__main__":
    main()
