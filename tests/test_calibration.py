import numpy as np
import pytest
from sklearn.metrics import brier_score_loss

from breastcli.metrics.calibration import brier, expected_calibration_error, reliability_table


def _random(num_classes, n=400):
    rng = np.random.default_rng(num_classes)
    return rng.dirichlet(np.ones(num_classes), size=n), rng.integers(num_classes, size=n)


def test_brier_of_two_classes_by_hand():
    probs = np.array([[0.9, 0.1], [0.4, 0.6], [0.8, 0.2]])
    assert brier(probs, np.array([0, 1, 1])) == pytest.approx((0.01 + 0.16 + 0.64) / 3)


def test_brier_of_three_classes_by_hand():
    probs = np.array([[0.5, 0.3, 0.2]])
    assert brier(probs, np.array([1])) == pytest.approx(0.25 + 0.49 + 0.04)


def test_brier_agrees_with_scikit_learn():
    probs, labels = _random(2)
    assert brier(probs, labels) == pytest.approx(brier_score_loss(labels, probs[:, 1]), abs=1e-12)
    probs, labels = _random(5)
    assert brier(probs, labels) == pytest.approx(brier_score_loss(labels, probs, scale_by_half=False), abs=1e-12)


def test_calibration_error_by_hand():
    # Bin (0.6, 0.667]: confidences 0.62, 0.66, one of two right: gap 0.64 - 0.5. Bin (0.867, 0.933]: 0.9, right.
    probs = np.array([[0.62, 0.38], [0.34, 0.66], [0.1, 0.9]])
    labels = np.array([0, 0, 1])
    assert expected_calibration_error(probs, labels) == pytest.approx((2 * 0.14 + 0.1) / 3)


def test_gaps_of_one_bin_cancel_and_those_of_two_do_not():
    probs = np.array([[0.25, 0.75], [0.25, 0.75], [0.25, 0.75], [0.25, 0.75]])
    assert expected_calibration_error(probs, np.array([1, 1, 1, 0])) == pytest.approx(0)
    split = np.array([[0.25, 0.75], [0.25, 0.75], [0.2, 0.8], [0.2, 0.8]])
    assert expected_calibration_error(split, np.array([1, 1, 1, 0]), num_bins=4) == pytest.approx((0.5 + 0.6) / 4)


@pytest.mark.parametrize("num_classes", [2, 3, 8])
def test_calibration_error_agrees_with_a_plain_loop(num_classes):
    probs, labels = _random(num_classes)
    confidence, right = probs.max(axis=1), probs.argmax(axis=1) == labels
    expected = 0.0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert expected_calibration_error(probs, labels) == pytest.approx(expected, abs=1e-12)


def test_reliability_table_by_hand():
    probs = np.array([[0.5, 0.5], [0.2, 0.8], [0.1, 0.9], [1.0, 0.0]])
    table = reliability_table(probs, np.array([0, 0, 1, 0]), num_bins=4)
    assert table.edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert table.count.tolist() == [0, 1, 0, 3]  # 0.5 belongs to the bin that it closes
    assert table.confidence[[1, 3]] == pytest.approx([0.5, 0.9])
    assert table.accuracy[[1, 3]] == pytest.approx([1, 2 / 3])
    assert np.isnan(table.confidence[[0, 2]]).all()
    assert np.isnan(table.accuracy[[0, 2]]).all()
