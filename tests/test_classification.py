import json

import numpy as np
import pytest
from imblearn.metrics import geometric_mean_score, make_index_balanced_accuracy, specificity_score
from sklearn import metrics

from breastcli.errors import UsageError, UserError
from breastcli.metrics.calibration import brier, expected_calibration_error
from breastcli.metrics.classification import METRICS, choose_threshold, score_images, score_patients, score_subsets
from breastcli.metrics.intervals import group_weights, wilson
from breastcli.records import Predictions

NAMES = ["accuracy", "balanced_accuracy", "precision", "sensitivity", "specificity", "ppv", "npv", "fpr", "f1"]
NAMES += ["f1_macro", "f1_weighted", "iba", "iba_unsquared", "gmean", "roc_auc", "pr_auc", "cohen_kappa", "mcc"]
NAMES += ["brier", "ece"]

WITHHELD = "no interval where resamples leave a figure undefined (more than 10 %) or do not change it"


def _strings(values):
    return np.array(list(values), dtype=object)


def _predictions(probs, labels, predicted=None, **columns):
    probs = np.array(probs, dtype=np.float64)
    classes = ("benign", "malignant") if probs.shape[1] == 2 else tuple("abcdefgh"[: probs.shape[1]])
    return Predictions(
        image_ids=_strings(f"image{row}" for row in range(len(probs))),
        classes=classes,
        probs=probs,
        predicted=probs.argmax(axis=1) if predicted is None else np.array(predicted),
        labels=np.array(labels),
        columns={name: _strings(values) for name, values in columns.items()},
    )


def _random(num_classes, n, num_groups=40):
    """Twentieths as probabilities, so that many scores are equal; two classes are thresholded at 0.4."""
    rng = np.random.default_rng(num_classes)
    labels = np.arange(n) % num_classes
    truth = (2 + np.eye(num_classes)[labels]) / (2 * num_classes + 1)
    probs = np.array([rng.multinomial(20, row) for row in truth]) / 20
    predicted = (probs[:, 1] >= 0.4).astype(int) if num_classes == 2 else None
    exams = (f"exam{number}" for number in rng.permutation(n) % num_groups)
    return _predictions(probs, labels, predicted, exam=exams)


def _from_counts(tp, fn, tn, fp, **columns):
    labels = np.repeat([1, 1, 0, 0], [tp, fn, tn, fp])
    predicted = np.repeat([1, 0, 0, 1], [tp, fn, tn, fp])
    return _predictions(np.eye(2)[predicted], labels, **columns)


def _oracle(probs, labels, predicted):
    """The same figures from scikit-learn and imbalanced-learn."""
    num_classes = probs.shape[1]
    two = num_classes == 2
    average = "binary" if two else "macro"
    ranked, score = (labels, probs[:, 1]) if two else (np.eye(num_classes)[labels], probs)
    npv = [metrics.precision_score(labels != k, predicted != k) for k in range(num_classes)]
    one_versus_rest = "binary" if two else None
    iba, iba_unsquared = (
        make_index_balanced_accuracy(alpha=0.1, squared=squared)(geometric_mean_score)(
            labels, predicted, average=one_versus_rest
        )
        for squared in (True, False)
    )
    specificity = specificity_score(labels, predicted, average=average)
    precision = metrics.precision_score(labels, predicted, average=average)
    return {
        "accuracy": metrics.accuracy_score(labels, predicted),
        "balanced_accuracy": metrics.balanced_accuracy_score(labels, predicted),
        "precision": precision,
        "sensitivity": metrics.recall_score(labels, predicted, average=average),
        "specificity": specificity,
        "ppv": precision,
        "npv": npv[1] if two else np.mean(npv),
        "fpr": 1 - specificity,
        "f1": metrics.f1_score(labels, predicted, average=average),
        "f1_macro": metrics.f1_score(labels, predicted, average="macro"),
        "f1_weighted": metrics.f1_score(labels, predicted, average="weighted"),
        "iba": np.mean(iba),
        "iba_unsquared": np.mean(iba_unsquared),
        "gmean": geometric_mean_score(labels, predicted),
        "roc_auc": metrics.roc_auc_score(ranked, score),
        "pr_auc": metrics.average_precision_score(ranked, score),
        "cohen_kappa": metrics.cohen_kappa_score(labels, predicted),
        "mcc": metrics.matthews_corrcoef(labels, predicted),
        "brier": brier(probs, labels),
        "ece": expected_calibration_error(probs, labels),
    }


def _values(scores):
    return {name: figure.value for name, figure in scores.overall.items()}


def test_metrics_have_titles_in_the_agreed_order():
    assert list(METRICS) == NAMES
    assert METRICS["iba"].title == "IBA (alpha 0.1, squared)"
    assert all(metric.title and metric.description for metric in METRICS.values())


@pytest.mark.parametrize(("num_classes", "n"), [(2, 300), (3, 300), (8, 600)])
def test_every_figure_agrees_with_the_libraries(num_classes, n):
    images = _random(num_classes, n)
    assert len(np.unique(images.probs[:, -1])) < 21  # scores tie
    scores = score_images(images, resamples=100)
    assert list(scores.overall) == NAMES
    assert _values(scores) == pytest.approx(_oracle(images.probs, images.labels, images.predicted), abs=1e-9)
    assert (scores.confusion == metrics.confusion_matrix(images.labels, images.predicted)).all()
    assert (scores.level, scores.n, scores.num_groups) == ("image", n, 40)


@pytest.mark.parametrize("num_classes", [2, 3, 8])
def test_class_figures_agree_with_the_libraries(num_classes):
    images = _random(num_classes, 300)
    expected = {
        "precision": metrics.precision_score(images.labels, images.predicted, average=None),
        "sensitivity": metrics.recall_score(images.labels, images.predicted, average=None),
        "specificity": specificity_score(images.labels, images.predicted, average=None),
        "f1": metrics.f1_score(images.labels, images.predicted, average=None),
    }
    per_class = score_images(images, resamples=100).per_class
    assert list(per_class) == list(images.classes)
    for k, figures in enumerate(per_class.values()):
        assert {name: figure.value for name, figure in figures.items()} == pytest.approx(
            {name: values[k] for name, values in expected.items()}, abs=1e-9
        )


@pytest.mark.parametrize(("num_classes", "n"), [(2, 120), (3, 150), (8, 600)])
def test_intervals_are_those_of_groups_repeated_one_by_one(num_classes, n):
    images = _random(num_classes, n, num_groups=15)
    counts, member = group_weights(images.groups(), 20, np.random.default_rng(5))
    samples = []
    for row in counts:
        rows = np.repeat(np.arange(n), row[member])
        samples.append(_oracle(images.probs[rows], images.labels[rows], images.predicted[rows]))
    for name, figure in score_images(images, resamples=20, seed=5).overall.items():
        expected = np.quantile([sample[name] for sample in samples], [0.025, 0.975])
        if expected[0] == expected[1]:
            assert np.isnan(figure.low)
            continue
        assert (figure.low, figure.high) == pytest.approx(expected, abs=1e-9), name


def test_chunks_do_not_change_the_intervals(monkeypatch):
    images = _random(3, 150)
    whole = score_images(images, resamples=50)
    monkeypatch.setattr("breastcli.metrics.classification.CHUNK_VALUES", 150 * 7)
    parts = score_images(images, resamples=50)
    for name in NAMES:
        assert parts.overall[name].low == pytest.approx(whole.overall[name].low, abs=1e-12)


def test_published_forty_times_figures():
    scores = score_images(_from_counts(tp=405, fn=6, tn=185, fp=3), resamples=100)
    rounded = {name: round(figure.value, 3) for name, figure in scores.overall.items()}
    assert scores.n == 599
    assert [rounded[name] for name in ("sensitivity", "specificity", "ppv", "npv")] == [0.985, 0.984, 0.993, 0.969]
    assert scores.confusion.tolist() == [[185, 3], [6, 405]]


def test_balanced_accuracy_index_by_hand():
    overall = _values(score_images(_from_counts(tp=90, fn=10, tn=40, fp=10), resamples=100))
    assert overall["gmean"] == pytest.approx(0.72**0.5)
    assert overall["iba"] == pytest.approx(1.01 * 0.72)
    assert overall["iba_unsquared"] == pytest.approx(1.01 * 0.72**0.5)


def test_figures_without_a_denominator_are_undefined():
    constant = _values(score_images(_from_counts(tp=0, fn=30, tn=70, fp=0), resamples=100))
    assert np.isnan(constant["precision"])
    assert np.isnan(constant["ppv"])
    assert (constant["sensitivity"], constant["specificity"], constant["f1"]) == (0, 1, 0)
    assert (constant["mcc"], constant["cohen_kappa"], constant["gmean"]) == (0, 0, 0)  # as in the libraries
    assert constant["npv"] == pytest.approx(0.7)


def test_ranking_means_leave_out_classes_without_images():
    scores = score_images(_predictions(np.eye(3)[[0, 0, 1, 2]], [0, 0, 1, 1]), resamples=100)
    assert scores.overall["roc_auc"].value == pytest.approx((1 + 0.75) / 2)
    assert "class without images: c" in scores.notes


def _defined(scores):
    return {name: value for name, value in _values(scores).items() if not np.isnan(value)}


def test_one_true_class_leaves_what_needs_no_other():
    malignant = score_images(_from_counts(tp=8, fn=2, tn=0, fp=0), resamples=200)
    assert _defined(malignant) == pytest.approx({"accuracy": 0.8, "sensitivity": 0.8, "brier": 0.2, "ece": 0.2})
    assert malignant.overall["sensitivity"].low < 0.8 < malignant.overall["sensitivity"].high
    benign = score_images(_from_counts(tp=0, fn=0, tn=9, fp=1), resamples=100)
    assert _defined(benign).keys() == {"accuracy", "specificity", "fpr", "brier", "ece"}
    one_of_three = score_images(_predictions(np.eye(3)[[1, 1, 1, 0]], [1, 1, 1, 1]), resamples=100)
    assert _defined(one_of_three).keys() == {"accuracy", "sensitivity", "brier", "ece"}


def test_interval_is_withheld_where_resamples_often_lack_a_class():
    # One of ten exams is benign: it is missing from (9/10)^10 = 35 % of the resamples.
    scores = score_images(_from_counts(tp=15, fn=3, tn=2, fp=0, exam=np.repeat(np.arange(10), 2).astype(str)))
    assert scores.overall["specificity"].value == 1
    assert np.isnan(scores.overall["specificity"].low)
    assert not np.isnan(scores.overall["accuracy"].low)
    assert WITHHELD in scores.notes


def test_interval_is_withheld_where_every_resample_says_the_same():
    scores = score_images(_from_counts(tp=20, fn=0, tn=15, fp=5, exam=np.arange(40).astype(str)))
    assert scores.overall["sensitivity"].value == 1
    assert np.isnan(scores.overall["sensitivity"].low)
    assert not np.isnan(scores.overall["specificity"].low)
    assert WITHHELD in scores.notes


def test_same_seed_same_intervals():
    images = _random(3, 150)
    first, second, other = (score_images(images, resamples=100, seed=seed) for seed in (1, 1, 2))
    assert first.overall == second.overall
    assert first.per_class == second.per_class
    assert first.overall["accuracy"].low != other.overall["accuracy"].low


def test_intervals_over_homogeneous_groups_are_wider_than_over_images():
    right = np.repeat(np.arange(20) % 4 > 0, 10)
    labels = np.arange(200) % 2
    probs = np.eye(2)[np.where(right, labels, 1 - labels)]
    alone = score_images(_predictions(probs, labels)).overall["accuracy"]
    grouped = score_images(_predictions(probs, labels, exam=np.repeat(np.arange(20), 10).astype(str)))
    grouped = grouped.overall["accuracy"]
    # Ten equal images per exam: the variance is ten times that of independent images.
    assert (grouped.high - grouped.low) / (alone.high - alone.low) == pytest.approx(10**0.5, rel=0.1)


def test_one_group_has_no_interval():
    scores = score_images(_random(2, 50, num_groups=1), resamples=100)
    assert scores.num_groups == 0
    assert scores.overall["accuracy"].value > 0.5
    assert np.isnan(scores.overall["accuracy"].low)
    assert "one exam only: no bootstrap intervals" in scores.notes


def test_notes_state_conventions_and_units():
    notes = score_images(_random(2, 200), resamples=150).notes
    assert notes[0] == "positive class: malignant"
    assert notes[1].startswith("IBA alpha 0.1; squared")
    assert notes[2] == "95 % intervals: percentile bootstrap, 150 resamples of 40 exams"
    assert notes[3:] == (WITHHELD,)  # every malignant image is found there
    few = score_images(_random(3, 90, num_groups=9), resamples=100).notes
    assert few[0].startswith("averaging: macro")
    assert few[3] == "fewer than 10 exams: bootstrap intervals are too narrow"
    assert len(score_images(_random(3, 90, num_groups=10), resamples=100).notes) == 3
    units = {"patient": {"patient": "pqrpqr"}, "image": {}, "group": {"patient": "pqrpqr", "exam": ["e", *[""] * 5]}}
    for unit, columns in units.items():
        notes = score_images(_predictions(np.eye(2)[[0, 1] * 3], [0, 1] * 3, **columns), resamples=100).notes
        assert notes[2].endswith(f" {unit}s")


def test_nothing_to_score_is_refused():
    images = _random(2, 20)
    with pytest.raises(UserError, match="nothing to score"):
        score_images(images.select(np.zeros(20, dtype=bool)))
    unlabelled = Predictions(
        images.image_ids, images.classes, images.probs, images.predicted, None, {"patient": images.image_ids}
    )
    with pytest.raises(UserError, match="nothing to score"):
        score_images(unlabelled)
    with pytest.raises(UserError, match="nothing to score"):
        score_patients(unlabelled)


def test_scores_are_json_safe():
    scores = score_images(_from_counts(tp=8, fn=2, tn=0, fp=0), resamples=100)
    text = json.dumps(scores.to_json(), allow_nan=False)
    assert json.loads(text)["overall"]["specificity"] == {"value": None, "low": None, "high": None}


def _three_patients():
    """Patient p (benign): 3 of 4 images right; q (malignant): 1 of 2; r (malignant): 1 of 3. Images right: 5 of 9."""
    malignant = [0.1, 0.2, 0.3, 0.9, 0.6, 0.1, 0.9, 0.4, 0.4]
    probs = np.column_stack([1 - np.array(malignant), malignant])
    return _predictions(probs, [0] * 4 + [1] * 5, patient="ppppqqrrr")


def test_recognition_rate_and_patient_figures_by_hand():
    scores = score_patients(_three_patients())
    assert scores.recognition_rate.value == pytest.approx((3 / 4 + 1 / 2 + 1 / 3) / 3)
    assert scores.vote.confusion.tolist() == [[1, 0], [1, 1]]  # q is a tie, which counts as malignant
    assert scores.mean.confusion.tolist() == [[1, 0], [1, 1]]  # means: p 0.375, q 0.35, r 0.567
    assert (scores.mean.level, scores.mean.n, scores.mean.num_groups) == ("patient", 3, 3)
    assert scores.mean.overall["accuracy"] == wilson(2, 3)
    assert scores.mean.overall["sensitivity"] == wilson(1, 2)
    assert scores.mean.overall["specificity"] == wilson(1, 1)
    assert scores.mean.overall["fpr"] == wilson(0, 1)
    assert scores.mean.per_class["benign"]["sensitivity"] == wilson(1, 1)
    assert scores.mean.per_class["benign"]["specificity"] == wilson(1, 2)
    assert scores.mean.overall["roc_auc"].value == pytest.approx(0.5)
    assert json.dumps(scores.to_json(), allow_nan=False)


def test_recognition_rate_resamples_exams():
    images = _three_patients()
    exams = _predictions(images.probs, images.labels, patient="ppppqqrrr", exam="xxxxxxyyy")
    rate = score_patients(exams, resamples=500).recognition_rate
    # The resamples hold x twice (patients p, q), y twice (r), or both.
    assert (rate.low, rate.high) == pytest.approx((1 / 3, (3 / 4 + 1 / 2) / 2))


def test_patient_figures_of_three_classes_keep_the_bootstrap_for_means():
    images = _random(3, 150)
    patients = _predictions(images.probs, images.labels, patient=(f"p{row // 5}" for row in range(150)))
    vote = score_patients(patients, resamples=200).vote
    right = int(np.trace(vote.confusion))
    assert vote.n == 90  # 30 patients with all three labels each
    assert vote.overall["accuracy"] == wilson(right, 90)
    assert vote.per_class["c"]["sensitivity"] == wilson(int(vote.confusion[2, 2]), 30)
    assert vote.per_class["c"]["specificity"] == wilson(60 - int(vote.confusion[:2, 2].sum()), 60)
    macro = np.mean([vote.confusion[k, k] / 30 for k in range(3)])
    assert vote.overall["sensitivity"].value == pytest.approx(macro)
    assert vote.overall["sensitivity"] != wilson(right, 90)


def test_unknown_patients_have_no_patient_figures():
    assert score_patients(_random(2, 20)) is None
    assert score_patients(_predictions(np.eye(2), [0, 1], patient=["p", ""])) is None


def test_subsets_are_scored_apart_in_natural_order():
    images = _predictions(
        np.eye(2)[[0, 1, 1, 1, 0, 0]], [0, 1, 0, 1, 0, 1], magnification=["100X", "100X", "40X", "40X", "40X", ""]
    )
    scores = score_subsets(images, "magnification", resamples=100)
    assert list(scores) == ["40X", "100X"]
    assert [subset.n for subset in scores.values()] == [3, 2]
    assert [subset.overall["accuracy"].value for subset in scores.values()] == pytest.approx([2 / 3, 1])
    assert score_subsets(images, "subtype") == {}


def test_subset_of_one_class_gives_its_recall():
    images = _predictions(np.eye(2)[[0, 1, 1, 0]], [0, 0, 1, 1], subtype=["A", "A", "DC", "DC"])
    scores = score_subsets(images, "subtype", resamples=100)
    assert scores["DC"].overall["sensitivity"].value == 0.5
    assert scores["A"].overall["specificity"].value == 0.5
    assert np.isnan(scores["A"].overall["roc_auc"].value)
    assert "one true class only: figures that need two are undefined" in scores["A"].notes


LABELS = np.array([0, 0, 1, 0, 1, 1])
PROBS = np.array([0.1, 0.3, 0.35, 0.4, 0.6, 0.8])


@pytest.mark.parametrize(
    ("rule", "threshold"),
    [
        ("0.5", 0.5),
        ("0", 0.0),
        ("1", 1.0),
        ("val-youden", 0.35),  # 1 + 2/3 there, and 2/3 + 1 at 0.6: the smaller wins
        ("val-sensitivity=0.95", 0.35),
        ("val-sensitivity=0.6", 0.6),
        ("val-sensitivity=0.3", 0.8),
    ],
)
def test_threshold_rules_by_hand(rule, threshold):
    assert choose_threshold(LABELS, PROBS, rule) == threshold


def test_sensitivity_rule_reaches_its_target_and_no_larger_threshold_does():
    rng = np.random.default_rng(1)
    labels, probs = rng.integers(2, size=200), rng.integers(50, size=200) / 50
    for target in (0.07, 0.5, 0.9, 0.95, 1.0):
        threshold = choose_threshold(labels, probs, f"val-sensitivity={target}")
        assert (probs[labels == 1] >= threshold).mean() >= target
        assert (probs[labels == 1] > threshold).mean() < target


def test_sensitivity_target_is_not_missed_by_rounding():
    labels, probs = np.ones(100, dtype=int), np.arange(100) / 100
    assert (
        choose_threshold(labels, probs, "val-sensitivity=0.07") == 0.93
    )  # 0.07 * 100 is more than 7 in floating point


def test_youden_rule_finds_the_best_of_all_thresholds():
    rng = np.random.default_rng(2)
    labels = rng.integers(2, size=300)
    probs = np.round(np.clip(rng.normal(0.4 + 0.2 * labels, 0.2), 0, 1), 2)
    fpr, tpr, _ = metrics.roc_curve(labels, probs, drop_intermediate=False)
    predicted = probs >= choose_threshold(labels, probs, "val-youden")
    assert predicted[labels == 1].mean() - predicted[labels == 0].mean() == pytest.approx((tpr - fpr).max())


@pytest.mark.parametrize(
    "rule",
    ["half", "1.5", "-0.1", "nan", "val-sensitivity", "val-sensitivity=0", "val-sensitivity=2", "val-youden=1", ""],
)
def test_bad_threshold_rules_are_refused(rule):
    with pytest.raises(UsageError, match="no such rule"):
        choose_threshold(LABELS, PROBS, rule)


@pytest.mark.parametrize("rule", ["val-youden", "val-sensitivity=0.9"])
def test_fitted_rules_need_positive_images(rule):
    with pytest.raises(UserError, match="no validation image"):
        choose_threshold(np.zeros(3, dtype=int), PROBS[:3], rule)
