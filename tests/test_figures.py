import numpy as np
import pytest
from sklearn import metrics

from breastcli.metrics.figures import class_figures, count_figures, ranking_areas, ranking_curves


def test_ranking_areas_agree_with_weighted_scikit_learn():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(8, size=80) / 8, rng.random(80) < 0.4
    weights = rng.integers(0, 4, size=(80, 6)).astype(float)
    weights[scores == 1, 0] = 0  # the best-scored images are missing from a resample
    roc_auc, average_precision = ranking_areas(scores, positive, weights)
    for column, weight in enumerate(weights.T):
        assert roc_auc[column] == pytest.approx(
            metrics.roc_auc_score(positive, scores, sample_weight=weight), abs=1e-12
        )
        assert average_precision[column] == pytest.approx(
            metrics.average_precision_score(positive, scores, sample_weight=weight), abs=1e-12
        )


def test_ranking_curves_agree_with_scikit_learn():
    rng = np.random.default_rng(1)
    scores, positive = rng.integers(8, size=80) / 8, rng.random(80) < 0.4
    false_alarms, recall, precision = ranking_curves(scores, positive)
    expected = metrics.roc_curve(positive, scores, drop_intermediate=False)[:2]
    np.testing.assert_allclose((false_alarms, recall), expected, rtol=0, atol=1e-12)
    expected = metrics.precision_recall_curve(positive, scores)[:2]
    np.testing.assert_allclose((precision[::-1], recall[::-1]), expected, rtol=0, atol=1e-12)


def test_ranking_areas_by_hand():
    # Positives at 0.9 and 0.5, negatives at 0.5 and 0.1: 1 + 1 + 0.5 + 1 of 4 pairs; precisions 1 and 2/3.
    areas = ranking_areas(np.array([0.5, 0.9, 0.1, 0.5]), np.array([True, True, False, False]), np.ones((4, 1)))
    assert np.ravel(areas) == pytest.approx([3.5 / 4, (1 + 2 / 3) / 2])


def test_ranking_areas_need_both_classes():
    weights = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    for area in ranking_areas(np.array([0.2, 0.7]), np.array([False, True]), weights):
        assert np.isnan(area).tolist() == [True, True, False]


def test_a_class_never_predicted_has_no_precision_and_counts_as_zero_in_the_mean():
    confusion = np.array([[4, 0, 0], [1, 3, 0], [2, 0, 0]])
    labels, predicted = np.nonzero(confusion)
    repeats = confusion[labels, predicted]
    labels, predicted = np.repeat(labels, repeats), np.repeat(predicted, repeats)
    assert np.isnan(class_figures(confusion)["precision"]).tolist() == [False, False, True]
    assert count_figures(confusion)["precision"] == pytest.approx(
        metrics.precision_score(labels, predicted, average="macro", zero_division=0)
    )
    assert count_figures(confusion)["f1_macro"] == pytest.approx(metrics.f1_score(labels, predicted, average="macro"))


def test_macro_means_leave_out_classes_without_images():
    figures = count_figures(np.array([[6, 2, 0], [1, 3, 0], [0, 0, 0]]))
    assert figures["balanced_accuracy"] == pytest.approx((0.75 + 0.75) / 2)
    assert figures["precision"] == pytest.approx((6 / 7 + 3 / 5) / 2)
    assert figures["specificity"] == pytest.approx((0.75 + 0.75) / 2)
    assert figures["gmean"] == pytest.approx(0.75)


def test_stacked_confusion_matrices_give_the_figures_of_each():
    stack = np.random.default_rng(0).integers(0, 9, size=(5, 4, 3, 3))
    figures = count_figures(stack)
    assert figures["iba"].shape == (5, 4)
    for name, values in figures.items():
        assert values[2, 3] == pytest.approx(count_figures(stack[2, 3])[name]), name
    assert class_figures(stack)["f1"].shape == (5, 4, 3)
