from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from breastcli.data.measures import Measures
from breastcli.data.outliers import Outlier, colour_drift, find_outliers

SHARP = np.geomspace(50, 200, 25)


def like(**values: float) -> Measures:
    usual = Measures("", 180, 40, 0.3, 100, 0.1, 0.3, 0.2)
    return dataclasses.replace(usual, **values)


def findings(measures: list[Measures], kinds: list[str] | None = None, sizes: list[str] | None = None) -> list[Outlier]:
    names = [f"i{number}" for number in range(len(measures))]
    return find_outliers(names, kinds or [""] * len(names), sizes or ["70x46"] * len(names), measures)


def test_blank_is_uniform_or_nearly_so() -> None:
    found = findings([like(), like(contrast=1.9), like(plain=0.96), like(plain=0.94)])
    assert [(one.image, one.finding) for one in found] == [("i1", "blank"), ("i2", "blank")]
    assert found[1].detail == "96% at one grey level, standard deviation 40.0"


def test_blurred_is_far_below_the_median_of_its_magnification() -> None:
    """Of 50 … 200 the median is 100; half lie within a factor of 1.41, so four spreads (4 x 1.4826) are one of 7.8."""
    usual = [like(sharpness=value) for value in SHARP]
    assert findings(usual) == []
    found = findings([*usual, like(sharpness=6), like(sharpness=12)])
    assert [(one.image, one.finding) for one in found] == [("i25", "blurred")]
    mixed = [*usual, *(like(sharpness=value / 15) for value in SHARP)]
    assert findings(mixed, ["40X"] * 25 + ["400X"] * 25) == []


def test_few_images_do_not_say_what_is_sharp() -> None:
    assert findings([like(sharpness=value) for value in SHARP[:18]] + [like(sharpness=0.1)]) == []


def test_a_blank_image_is_not_blurred_too() -> None:
    usual = [like(sharpness=value) for value in SHARP]
    assert [one.finding for one in findings([*usual, like(sharpness=0.1, contrast=0)])] == ["blank"]


def test_odd_sizes_are_those_that_differ_from_what_most_files_have() -> None:
    found = findings([like()] * 5, sizes=["70x46", "70x46", "70x45", "70x46", "46x70"])
    assert [(one.image, one.detail) for one in found] == [
        ("i2", "70x45, usually 70x46"),
        ("i4", "46x70, usually 70x46"),
    ]
    assert findings([like()] * 4, sizes=["1x1", "1x1", "2x2", "3x3"]) == []
    assert find_outliers([], [], [], []) == []


def test_drift_is_in_standard_deviations_between_groups() -> None:
    """Green is 0 and 2 in train, 4 and 6 in test: means 1 and 5; the standard deviation of 0, 2, 4, 6 is 2.582."""
    green = {"a": 0, "b": 2, "c": 4, "d": 6}
    groups, sides = [*"aaabcdd"], ["train"] * 4 + ["test"] * 3
    densities = np.array([[0.01 * number, green[name], 0.02 * number] for number, name in enumerate(groups)])
    (found,) = colour_drift(sides, groups, densities)
    assert (found.side, found.channel, found.num_groups) == ("test", "green", 2)
    assert found.shift == pytest.approx(4 / 2.582, abs=1e-3)
    assert found.by_chance == pytest.approx(1.0)
    assert not found.notable  # 1.5 is within two standard errors of so few groups


def test_drift_of_many_groups_is_notable() -> None:
    rng = np.random.default_rng(0)
    groups = [str(number) for number in range(60)]
    sides = ["train"] * 30 + ["val"] * 10 + ["test"] * 20
    densities = rng.normal(size=(60, 3))
    assert not any(one.notable for one in colour_drift(sides, groups, densities))
    densities[40:] += [0, 0, 3]
    val, test = colour_drift(sides, groups, densities)
    assert (val.side, val.notable) == ("val", False)
    assert (test.side, test.channel, test.notable) == ("test", "blue", True)


def test_folds_are_compared_with_the_other_folds() -> None:
    densities = np.array([[0.0] * 3, [1.0] * 3, [5.0] * 3])
    found = colour_drift(["0", "1", "2"], ["a", "b", "c"], densities)
    assert [one.side for one in found] == ["0", "1", "2"]
    assert found[2].shift == pytest.approx(4.5 / densities[:, 0].std(ddof=1))


def test_groups_of_one_colour_do_not_drift() -> None:
    assert colour_drift(["train", "test", "test"], ["a", "b", "c"], np.ones((3, 3))) == []
