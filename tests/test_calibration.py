import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from sklearn.metrics import brier_score_loss, log_loss

from breastcli.metrics.calibration import (
    brier,
    describe_calibration,
    expected_calibration_error,
    fit_temperature,
    log_losses,
    reliability_table,
    show_temperatures,
    temper,
)
from breastcli.records import Predictions, strings


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


def _softmax(logits):
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def _drawn_from(probs, rng):
    """Labels that come out as often as their probabilities say."""
    return (probs.cumsum(axis=1) < rng.random((len(probs), 1))).sum(axis=1)


@pytest.mark.parametrize("num_classes", [2, 5])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_that_spoilt_calibrated_probabilities_is_found(temperature, num_classes):
    rng = np.random.default_rng(num_classes)
    logits = rng.normal(scale=1.5, size=(20_000, num_classes))
    labels = _drawn_from(_softmax(logits), rng)
    probs = _softmax(logits * temperature)
    found = fit_temperature(probs, labels)
    assert found == pytest.approx(temperature, rel=0.04)
    best = minimize_scalar(
        lambda t: log_losses(_softmax(np.log(probs) / t), labels).mean(), bounds=(0.1, 10), method="bounded"
    )
    assert found == pytest.approx(best.x, rel=1e-4)
    calibrated = temper(probs, found)
    assert (calibrated.argmax(axis=1) == probs.argmax(axis=1)).all()
    assert calibrated.sum(axis=1) == pytest.approx(np.ones(len(labels)))
    assert expected_calibration_error(calibrated, labels) < 0.02


def test_no_temperature_fits_where_every_image_is_right_or_wrong_and_none_changes_nothing():
    probs = np.array([[0.9, 0.1], [0.2, 0.8]])
    assert fit_temperature(probs, np.array([0, 1])) is None
    assert fit_temperature(probs, np.array([1, 0])) is None
    assert np.array_equal(temper(probs, None), probs)
    assert show_temperatures([None, 1.5]) == "none fits, 1.500"


def test_log_losses_agree_with_scikit_learn_and_a_zero_is_not_infinite():
    probs, labels = _random(4)
    assert log_losses(probs, labels).mean() == pytest.approx(log_loss(labels, probs, labels=range(4)), abs=1e-9)
    impossible = np.array([[0.0, 1.0]])
    assert np.isfinite(log_losses(impossible, np.array([0]))).all()
    assert temper(impossible, 2.0) == pytest.approx(impossible)
    assert fit_temperature(np.repeat(impossible, 2, axis=0), np.array([0, 1])) is None


def _predictions(probs, labels):
    names = strings(map(str, range(len(labels))))
    exams = strings(f"e{row % 25}" for row in range(len(labels)))
    return Predictions(names, ("a", "b"), probs, probs.argmax(axis=1), labels, {"exam": exams})


def test_what_calibration_did_is_told_with_paired_intervals():
    rng = np.random.default_rng(7)
    calibrated = _softmax(rng.normal(scale=1.5, size=(800, 2)))
    labels = _drawn_from(calibrated, rng)
    before, after = _predictions(temper(calibrated, 1 / 3), labels), _predictions(calibrated, labels)
    told = describe_calibration(before, after, [3.0], resamples=300, seed=0)
    for side, probs in (("before", before.probs), ("after", after.probs)):
        figures = {name: one["value"] for name, one in told[side].items()}
        assert figures == pytest.approx(
            {
                "nll": log_loss(labels, probs),
                "brier": brier_score_loss(labels, probs[:, 1]),
                "ece": expected_calibration_error(probs, labels),
            },
            abs=1e-9,
        )
        assert all(one["low"] < one["value"] < one["high"] for one in (told[side]["nll"], told[side]["brier"]))
    for name, one in told["difference"].items():
        assert one["value"] == pytest.approx(told["after"][name]["value"] - told["before"][name]["value"])
        assert one["high"] < 0, name  # three times too certain: every figure gets better
    same = describe_calibration(before, before, [1.0], resamples=300, seed=0)["difference"]["nll"]
    assert same == {"value": 0.0, "low": None, "high": None}
