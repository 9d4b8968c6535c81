"""All figures with bootstrap intervals beside a loop over two of scikit-learn's."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from breastcli.benchmarks import COMPARISONS, Comparison, Setting
from breastcli.benchmarks.timing import Pair, compare
from breastcli.metrics.classification import METRICS, score_images
from breastcli.records import Predictions, strings

NUM_IMAGES, NUM_EXAMS, RESAMPLES = 600, 70, 200


def compare_intervals(setting: Setting) -> list[Pair]:
    """Time the same number of resamples over exams of random predictions; both sides compute on the CPU."""
    generator = np.random.default_rng(setting.seed)
    labels = generator.integers(0, 2, NUM_IMAGES)
    positive = np.clip(0.3 * labels + generator.random(NUM_IMAGES) * 0.7, 0, 1)
    exams = strings(f"e{number}" for number in generator.integers(0, NUM_EXAMS, NUM_IMAGES))
    predictions = Predictions(
        image_ids=strings(map(str, range(NUM_IMAGES))),
        classes=("benign", "malignant"),
        probs=np.stack([1 - positive, positive], axis=1),
        predicted=(positive >= 0.5).astype(np.int64),
        labels=labels,
        columns={"exam": exams, "patient": exams},
    )
    members = [np.flatnonzero(exams == exam) for exam in np.unique(exams)]

    def theirs() -> None:
        draws = np.random.default_rng(setting.seed)
        for _ in range(RESAMPLES):
            rows = np.concatenate([members[k] for k in draws.integers(0, len(members), len(members))])
            balanced_accuracy_score(labels[rows], predictions.predicted[rows])
            roc_auc_score(labels[rows], positive[rows])

    def ours() -> None:
        score_images(predictions, resamples=RESAMPLES, seed=setting.seed)

    title = f"bootstrap over exams, {NUM_IMAGES} images: {len(METRICS)} figures / 2 of scikit-learn"
    return [compare(title, "resamples/s", RESAMPLES, ours, theirs, setting.rounds)]


COMPARISONS.register("intervals")(Comparison(compare_intervals))
