import numpy as np
import pytest

from breastcli.metrics.intervals import group_weights, percentile_interval, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (8, 10, 0.4901625, 0.9433178),  # (0.8 + z²/20 ± z sqrt(0.016 + z²/400)) / (1 + z²/10), z = 1.959964
        (0, 10, 0.0, 0.2775328),  # z² / (n + z²)
        (10, 10, 0.7224672, 1.0),
        (1, 1, 0.2065493, 1.0),  # 1 / (1 + z²)
    ],
)
def test_wilson_matches_hand_computed_bounds(successes, n, low, high):
    interval = wilson(successes, n)
    assert interval.value == successes / n
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-7)


@pytest.mark.parametrize("n", [5, 9, 13, 17])  # where the formula misses by a rounding error
def test_wilson_bounds_are_exact_at_the_ends(n):
    assert wilson(0, n).low == 0
    assert wilson(n, n).high == 1


def test_wilson_is_narrower_at_a_lower_level():
    assert wilson(8, 10, level=0.5).high < wilson(8, 10).high


def test_wilson_of_nothing_is_undefined():
    assert np.isnan([wilson(0, 0).value, wilson(0, 0).low, wilson(0, 0).high]).all()


def test_group_weights_draw_as_many_groups_as_there_are():
    groups = np.array(["b", "a", "b", "c"], dtype=object)
    counts, member = group_weights(groups, 500, np.random.default_rng(3))
    assert counts.shape == (500, 3)
    assert (counts.sum(axis=1) == 3).all()
    assert member.tolist() == [1, 0, 1, 2]
    assert len(np.unique(counts, axis=0)) == 10  # every multiset of three out of three was drawn
    assert counts.mean(axis=0) == pytest.approx(1, abs=0.12)


def test_group_weights_follow_the_generator():
    groups = np.arange(20)
    first, second, other = (group_weights(groups, 5, np.random.default_rng(seed))[0] for seed in (1, 1, 2))
    assert (first == second).all()
    assert (first != other).any()


def test_percentile_interval_takes_the_middle_95_percent():
    interval = percentile_interval(0.3, np.random.default_rng(0).permutation(np.linspace(0, 1, 1001)))
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.3, 0.025, 0.975))


def test_percentile_interval_ignores_undefined_resamples_up_to_a_tenth():
    samples = np.concatenate([np.linspace(0, 1, 90), np.full(10, np.nan)])
    interval = percentile_interval(0.5, samples)
    assert (interval.low, interval.high) == pytest.approx((0.025, 0.975))
    with_one_more = percentile_interval(0.5, np.append(samples, np.nan))
    assert with_one_more.value == 0.5
    assert np.isnan([with_one_more.low, with_one_more.high]).all()


def test_percentile_interval_needs_a_value_and_resamples():
    assert np.isnan(percentile_interval(float("nan"), np.linspace(0, 1, 10)).low)
    assert np.isnan(percentile_interval(0.5, np.array([])).high)
