from __future__ import annotations

import itertools
import json
import time

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.filters import threshold_otsu
from sklearn.metrics import average_precision_score, f1_score, jaccard_score, precision_score, recall_score

from breastcli.errors import UsageError, UserError
from breastcli.metrics.localisation import (
    METRICS,
    POOLED,
    Rule,
    average_precision,
    baseline_maps,
    binarise,
    fit_threshold,
    overlap,
    paired_difference,
    parse_rule,
    score_localisation,
    select_everything,
)

HALF = Rule("fixed", 0.5)
# The region is the upper half; three of its pixels and one below are at 0.5 or more.
MAP = np.array([[1.0, 0.8, 0.5, 0.4], [0.3, 0.2, 0.1, 0.0], [0.0, 0.9, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
REGION = np.repeat([True, False], 8).reshape(4, 4)


def blobs(num_images: int, side: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Maps that say something about their masks, and the masks; every other map is largest outside."""
    rng = np.random.default_rng(seed)
    masks = rng.random((num_images, side, side)) < rng.uniform(0.1, 0.6, (num_images, 1, 1))
    masks[:, 0, 0] = False
    maps = (0.3 * masks + 0.69 * rng.random(masks.shape)).astype(np.float32)
    maps[::2, 0, 0] = 1
    return maps, masks


def names(*groups: str) -> np.ndarray:
    return np.array(groups, dtype=object)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("otsu", Rule("otsu")),
        ("val", Rule("val")),
        ("fixed=0.5", Rule("fixed", 0.5)),
        ("fixed=0", Rule("fixed", 0.0)),
        ("quantile=0.8", Rule("quantile", 0.8)),
    ],
)
def test_rules_are_read_and_written(text, rule):
    assert parse_rule(text) == rule
    assert str(parse_rule(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "Otsu", "0.5", "otsu=0.5", "otsu=", "val=0.3"),
        *("fixed", "fixed=", "fixed=half", "fixed=1.1", "fixed=nan"),
        *("quantile", "quantile=1", "quantile=0", "quantile=-0.2"),
    ],
)
def test_other_rules_are_refused(text):
    with pytest.raises(UsageError) as caught:
        parse_rule(text)
    assert repr(text) in caught.value.problem
    assert all(form in caught.value.fix for form in ("otsu", "fixed=0.5", "val", "quantile=0.8"))


def test_otsu_is_taken_image_by_image():
    rng = np.random.default_rng(0)
    maps = rng.beta(1, 4, (4, 20, 20)).astype(np.float32) * np.array([1, 0.2, 0.7, 0.01], np.float32)[:, None, None]
    selected = binarise(maps, Rule("otsu"))
    for one, chosen in zip(maps.astype(float), selected, strict=True):
        assert np.array_equal(chosen, one > threshold_otsu(one))
        assert 0.1 < chosen.mean() < 0.6


@pytest.mark.parametrize("value", [0, 0.4, 1])
def test_a_constant_map_selects_nothing_by_otsu(value):
    assert not binarise(np.full((1, 4, 4), value, np.float32), Rule("otsu")).any()


def test_otsu_bears_maps_that_hardly_vary():
    almost = np.full((1, 4, 4), 0.7, np.float32)
    almost[0, 0, 0] = np.nextafter(np.float32(0.7), np.float32(1))
    assert np.argwhere(binarise(almost, Rule("otsu"))).tolist() == [[0, 0, 0]]


def test_fixed_levels_select_what_reaches_them():
    assert binarise(MAP[None], HALF).sum() == 4
    assert np.array_equal(binarise(MAP[None], Rule("fixed", 0.5000001))[0], np.float32(0.5) < MAP)
    assert binarise(MAP[None], Rule("fixed", 0.7)).sum() == 3
    assert binarise(np.full((1, 4, 4), 0.7, np.float32), Rule("fixed", 0.7)).all()  # 0.7 is smaller in float32
    assert binarise(MAP[None], Rule("fixed", 0.0)).all()


def test_val_uses_the_given_level():
    assert np.array_equal(binarise(MAP[None], Rule("val"), 0.25), MAP[None] >= 0.25)
    with pytest.raises(UserError, match="needs validation images with masks"):
        binarise(MAP[None], Rule("val"))


@pytest.mark.parametrize(("q", "expected"), [(0.8, 20), (0.75, 25), (0.5, 50), (0.999, 0), (0.005, 99), (1e-12, 99)])
def test_quantiles_select_the_rest(q, expected):
    values = np.random.default_rng(1).permutation(100).reshape(10, 10).astype(np.float32) / 100
    selected = binarise(np.stack([values, values / 5]), Rule("quantile", q))
    assert selected.sum(axis=(1, 2)).tolist() == [expected, expected]
    assert values[selected[0]].min(initial=1) > values[~selected[0]].max()


def test_quantiles_leave_out_ties():
    assert binarise(MAP[None], Rule("quantile", 0.25)).sum() == 8  # 12 wanted, but the zeros are all alike
    assert binarise(MAP[None], Rule("quantile", 0.75)).sum() == 4
    assert not binarise(np.ones((1, 4, 4), np.float32), Rule("quantile", 0.5)).any()


def test_fitted_level_has_the_largest_pooled_dice():
    maps, masks = blobs(3)
    maps = np.round(maps * 100).astype(np.float32) / 100  # on the grid, where float32 and float64 differ
    dice = [f1_score(masks.ravel(), binarise(maps, Rule("fixed", k / 100)).ravel()) for k in range(101)]
    level = fit_threshold(maps, masks)
    assert level == np.argmax(dice) / 100
    assert 0.2 < level < 0.6
    assert max(dice) == pytest.approx(
        score_localisation(maps, masks, names("a", "b", "c"), Rule("val"), threshold=level).pooled["dice"].value
    )


def test_fitted_level_of_a_tie_is_the_lowest():
    # By hand: 0.2 or less selects all four (4/6), up to 0.6 the two right ones (1), above that one of them (2/3).
    maps = np.array([[[0.6, 0.9], [0.2, 0.2]]], np.float32)
    assert fit_threshold(maps, maps > 0.5) == 0.21


def test_fitted_level_pools_images():
    # The large region decides over the small one, which a level of 0.5 would suit better.
    maps = np.stack([np.full((4, 4), 0.3), np.where(np.eye(4) > 0, 0.5, 0.31)]).astype(np.float32)
    masks = np.stack([np.ones((4, 4), bool), np.eye(4, dtype=bool)])
    assert fit_threshold(maps[1:], masks[1:]) == 0.32
    assert fit_threshold(maps, masks) == 0.0


def test_fitting_needs_a_region():
    with pytest.raises(UserError, match="no validation mask holds a region"):
        fit_threshold(MAP[None], np.zeros((1, 4, 4), bool))


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_average_precision_agrees_with_scikit_learn(levels):
    rng = np.random.default_rng(levels)
    for share in (0.03, 0.5, 0.97):
        mask = rng.random((30, 40)) < share
        saliency = (rng.integers(levels, size=mask.shape) / levels).astype(np.float32)
        expected = average_precision_score(mask.ravel(), saliency.ravel())
        assert average_precision(saliency, mask) == pytest.approx(expected, abs=1e-12)


def test_average_precision_by_hand():
    # From the top: in, out, in, in, in, in, in, in; the eighth (0.0) is tied with seven outside.
    expected = (1 + 2 / 3 + 3 / 4 + 4 / 5 + 5 / 6 + 6 / 7 + 7 / 8 + 8 / 16) / 8
    assert average_precision(MAP, REGION) == pytest.approx(expected)


def test_average_precision_of_special_cases():
    assert average_precision(np.full((4, 4), 0.3, np.float32), REGION) == 0.5
    assert average_precision(MAP, np.ones((4, 4), bool)) == 1
    assert np.isnan(average_precision(MAP, np.zeros((4, 4), bool)))
    assert average_precision(REGION.astype(np.float32), REGION) == 1


def test_average_precision_of_a_large_image_is_fast():
    rng = np.random.default_rng(0)
    saliency, mask = rng.random((512, 512), dtype=np.float32), rng.random((512, 512)) < 0.3
    started = time.process_time()
    for _ in range(3):
        average_precision(saliency, mask)
    assert (time.process_time() - started) / 3 < 0.3  # 0.02 s on a free core


def test_figures_of_one_image_by_hand():
    scores = score_localisation(MAP[None], REGION[None], names("p"), HALF)
    expected = {
        "iou": 3 / 9,
        "dice": 6 / 12,
        "f1": 6 / 12,
        "precision": 3 / 4,
        "recall": 3 / 8,
        "pointing": 1,
        "energy_inside": 3.3 / 4.2,
        "region_share": 0.5,
        "selected_share": 0.25,
    }
    for name, value in expected.items():
        assert scores.per_image[name] == pytest.approx([value]), name
    assert scores.per_image["average_precision"] == [average_precision(MAP, REGION)]
    assert set(scores.per_image) == set(scores.mean) == set(METRICS)
    assert set(scores.pooled) == set(POOLED)
    assert (scores.n, scores.num_groups, scores.num_empty, scores.num_unselected) == (1, 0, 0, 0)


def test_overlap_agrees_with_scikit_learn_image_by_image_and_pooled():
    maps, masks = blobs(5)
    scores = score_localisation(maps, masks, names(*"aabbc"), Rule("otsu"))
    selected = binarise(maps, Rule("otsu"))
    oracles = {"iou": jaccard_score, "dice": f1_score, "precision": precision_score, "recall": recall_score}
    for name, oracle in oracles.items():
        each = [oracle(mask.ravel(), chosen.ravel()) for mask, chosen in zip(masks, selected, strict=True)]
        assert scores.per_image[name] == pytest.approx(each), name
        assert scores.mean[name].value == pytest.approx(np.mean(each)), name
        assert scores.pooled[name].value == pytest.approx(oracle(masks.ravel(), selected.ravel())), name
        assert scores.pooled[name].value != pytest.approx(scores.mean[name].value, abs=1e-4), name


def test_pooled_and_mean_by_hand():
    masks = np.zeros((2, 4, 4), bool)
    masks[0], masks[1, 0, 0] = True, True
    maps = np.zeros((2, 4, 4), np.float32)
    maps[0, :2], maps[1, 0, :2] = 1, 1  # 8 of 16 pixels found; 1 of 1 with a false one beside it
    scores = score_localisation(maps, masks, names("a", "b"), HALF)
    assert scores.mean["recall"].value == pytest.approx((0.5 + 1) / 2)
    assert scores.pooled["recall"].value == pytest.approx(9 / 17)
    assert scores.mean["iou"].value == pytest.approx((8 / 16 + 1 / 2) / 2)
    assert scores.pooled["iou"].value == pytest.approx(9 / 18)
    assert scores.pooled["precision"].value == pytest.approx(9 / 10)


def test_pointing_shares_ties():
    maps = np.zeros((4, 4, 4), np.float32)
    maps[0, 3, 3] = 1  # outside
    maps[1, :3, 0] = 1  # two of three inside
    maps[2] = 0.2  # everywhere: as by chance
    maps[3, 1, 1] = 0.001  # small but the largest
    scores = score_localisation(maps, np.stack([REGION] * 4), names(*"abcd"), HALF)
    assert scores.per_image["pointing"] == pytest.approx([0, 2 / 3, 0.5, 1])


def test_a_map_without_mass_counts_as_uniform():
    maps = np.stack([np.zeros((4, 4), np.float32), np.full((4, 4), 0.1, np.float32)])
    mask = np.zeros((4, 4), bool)
    mask[0] = True
    scores = score_localisation(maps, np.stack([mask, mask]), names("a", "b"), Rule("otsu"))
    for name in ("energy_inside", "pointing", "average_precision"):
        assert scores.per_image[name] == pytest.approx([0.25, 0.25]), name
    for name in POOLED:
        assert scores.per_image[name].tolist() == [0, 0], name
        assert scores.pooled[name].value == 0, name
    assert scores.num_unselected == 2


def test_a_full_mask_is_all_found_or_all_missed():
    maps = np.stack([np.ones((4, 4)), np.zeros((4, 4))]).astype(np.float32)
    scores = score_localisation(maps, np.ones((2, 4, 4), bool), names("a", "b"), HALF)
    assert scores.per_image["iou"].tolist() == [1, 0]
    assert scores.per_image["average_precision"].tolist() == [1, 1]
    assert scores.per_image["energy_inside"].tolist() == [1, 1]


def test_empty_masks_have_no_figures_and_count_nowhere():
    maps, masks = blobs(4)
    maps[1] = 1  # would be wrong everywhere
    masks[1] = False
    kept = [0, 2, 3]
    groups = names("a", "z", "a", "b")
    scores = score_localisation(maps, masks, groups, HALF, seed=3)
    without = score_localisation(maps[kept], masks[kept], groups[kept], HALF, seed=3)
    assert (scores.n, scores.num_empty, scores.num_groups) == (3, 1, 2)
    for name in METRICS:
        assert np.isnan(scores.per_image[name]).tolist() == [False, True, False, False], name
    assert scores.to_json() == without.to_json() | {"num_empty": 1}


def test_only_empty_masks_give_nothing():
    scores = score_localisation(MAP[None], np.zeros((1, 4, 4), bool), names("a"), HALF)
    assert (scores.n, scores.num_empty) == (0, 1)
    assert np.isnan([figure.value for figure in (*scores.mean.values(), *scores.pooled.values())]).all()


def test_refinement_is_applied_to_each_selection():
    seen = []

    def first_row(selected: np.ndarray) -> np.ndarray:
        seen.append(selected.copy())
        return selected & (np.arange(4) == 0)[:, None]

    plain = score_localisation(np.stack([MAP, MAP / 2]), np.stack([REGION] * 2), names("a", "b"), HALF)
    refined = score_localisation(
        np.stack([MAP, MAP / 2]), np.stack([REGION] * 2), names("a", "b"), HALF, refine=first_row
    )
    assert np.array_equal(seen, binarise(np.stack([MAP, MAP / 2]), HALF))
    assert plain.per_image["precision"].tolist() == [0.75, 1]
    assert refined.per_image["precision"].tolist() == [1, 1]
    assert refined.pooled["precision"].value == 1
    for name in ("average_precision", "pointing", "energy_inside"):
        assert np.array_equal(refined.per_image[name], plain.per_image[name])


def test_the_fitted_level_is_reported_for_its_rule_only():
    arguments = (MAP[None], REGION[None], names("a"))
    assert score_localisation(*arguments, Rule("val"), threshold=0.25).threshold == 0.25
    assert score_localisation(*arguments, HALF, threshold=0.25).threshold is None
    facts = json.loads(json.dumps(score_localisation(*arguments, HALF).to_json()))
    assert facts["rule"] == "fixed=0.5"
    assert facts["mean"]["iou"] == {"value": pytest.approx(1 / 3), "low": None, "high": None}


def test_the_same_seed_gives_the_same_intervals():
    maps, masks = blobs(12)
    groups = names(*"aabbccddeeff")
    first, again, other = (
        score_localisation(maps, masks, groups, HALF, resamples=50, seed=seed).to_json() for seed in (1, 1, 2)
    )
    assert first == again
    assert first["mean"]["iou"] != other["mean"]["iou"]
    assert first["pooled"]["iou"] != other["pooled"]["iou"]


def test_intervals_come_from_whole_groups():
    """With two groups a resample is one of three: a twice, b twice, or both."""
    maps, masks = blobs(9)
    groups = names(*"abbbbbbbb")
    scores = score_localisation(maps, masks, groups, Rule("otsu"), resamples=400)
    assert scores.num_groups == 2
    for name in METRICS:
        values = scores.per_image[name]
        ends = sorted([values[0], values[1:].mean()])
        interval = scores.mean[name]
        assert interval.value == pytest.approx(values.mean()), name
        assert (interval.low, interval.high) == pytest.approx(ends), name
    selected = binarise(maps, Rule("otsu"))
    ends = sorted(jaccard_score(masks[part].ravel(), selected[part].ravel()) for part in (slice(1), slice(1, None)))
    assert (scores.pooled["iou"].low, scores.pooled["iou"].high) == pytest.approx(ends)


def test_order_and_names_of_groups_do_not_matter_to_the_figures():
    maps, masks = blobs(6)
    one = score_localisation(maps, masks, names(*"aaabbc"), HALF)
    order = [5, 0, 3, 1, 4, 2]
    other = score_localisation(maps[order], masks[order], names(*"aaabbc")[order], HALF)
    for name in METRICS:
        assert other.per_image[name].tolist() == one.per_image[name][order].tolist()
        found, expected = other.mean[name], one.mean[name]
        assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high))


def test_intervals_are_withheld_where_nothing_varies():
    maps, masks = blobs(4)
    lone = score_localisation(maps, masks, names(*"aaaa"), HALF)
    assert lone.num_groups == 0
    assert np.isfinite(lone.mean["iou"].value)
    assert np.isnan([figure.low for figure in (*lone.mean.values(), *lone.pooled.values())]).all()
    perfect = score_localisation(masks.astype(np.float32), masks, names(*"abcd"), HALF)
    assert (perfect.mean["iou"].value, perfect.pooled["iou"].value) == (1, 1)
    assert np.isnan([perfect.mean["iou"].high, perfect.pooled["iou"].low]).all()
    assert np.isfinite(perfect.mean["region_share"].low)


def test_paired_difference_resamples_pairs_by_group():
    a = np.array([0.9, 0.5, 0.4, np.nan, 0.3])
    b = np.array([0.1, 0.4, 0.4, 0.7, np.nan])
    groups = names("x", "y", "y", "z", "z")  # z has no pair
    interval = paired_difference(a, b, groups, resamples=300)
    assert interval.value == pytest.approx((0.8 + 0.1 + 0.0) / 3)
    assert (interval.low, interval.high) == pytest.approx((0.05, 0.8))
    opposite = paired_difference(b, a, groups, resamples=300)
    assert (opposite.value, opposite.low, opposite.high) == pytest.approx(
        (-interval.value, -interval.high, -interval.low)
    )


def test_paired_difference_is_narrower_than_its_parts():
    rng = np.random.default_rng(0)
    b = rng.random(40)
    a = b + 0.05 + 0.01 * rng.random(40)
    groups = np.repeat(np.arange(20).astype(str), 2)
    interval = paired_difference(a, b, groups, seed=4)
    assert interval.low > 0.05
    assert interval == paired_difference(a, b, groups, seed=4)
    assert interval != paired_difference(a, b, groups, seed=5)


def test_paired_difference_is_withheld_where_nothing_varies():
    a = np.array([0.2, 0.4, 0.6])
    same = paired_difference(a, a, names(*"abc"))
    assert same.value == 0
    assert np.isnan([same.low, same.high]).all()
    assert np.isnan(paired_difference(a, a / 2, names(*"aaa")).low)
    assert np.isnan(paired_difference(a, np.full(3, np.nan), names(*"abc")).value)


def test_overlap_takes_any_shape():
    figures = overlap(np.array([[1, 0], [0, 2]]), np.array([[2, 0], [3, 2]]), np.array([[2, 4], [0, 2]]))
    assert figures["iou"] == pytest.approx(np.array([[1 / 3, 0], [np.nan, 1]]), nan_ok=True)
    assert figures["precision"] == pytest.approx(np.array([[0.5, 0], [np.nan, 1]]), nan_ok=True)
    assert figures["recall"] == pytest.approx(np.array([[0.5, 0], [np.nan, 1]]), nan_ok=True)


def random_images(num_images: int = 3, height: int = 21, width: int = 30) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_images, height, width, 3), np.uint8)


def test_baselines_are_maps_in_the_unit_interval():
    images = random_images()
    maps = baseline_maps(images)
    assert set(maps) == {"uniform", "centre", "luminance", "brightness", "random"}
    for name, stack in maps.items():
        assert stack.shape == (3, 21, 30), name
        assert stack.dtype == np.float32, name
        assert stack.min() >= 0, name
        assert stack.max() <= 1, name
    assert (maps["uniform"] == 1).all()


def test_uniform_baseline_selects_everything_and_ranks_nothing():
    masks = blobs(3)[1]
    maps = baseline_maps(random_images(3, 12, 12))["uniform"]
    for rule in (Rule("otsu"), HALF, Rule("quantile", 0.8)):
        scores = score_localisation(maps, masks, names(*"abc"), rule, refine=select_everything)
        shares = masks.mean(axis=(1, 2))
        assert (scores.per_image["recall"] == 1).all()
        for name in ("precision", "iou", "average_precision", "pointing", "energy_inside"):
            assert scores.per_image[name] == pytest.approx(shares), name


def test_centre_baseline_falls_off_alike_on_all_sides():
    for height, width in ((21, 30), (20, 31)):
        centre = baseline_maps(random_images(1, height, width))["centre"][0]
        assert centre == pytest.approx(centre[::-1])
        assert centre == pytest.approx(centre[:, ::-1])
        assert (np.diff(centre[: (height + 1) // 2], axis=0) > 0).mean() > 0.99
    wide = baseline_maps(random_images(1, 401, 401))["centre"][0]
    assert wide[200, 200] == 1
    # A quarter of the side from the middle: one standard deviation.
    assert wide[100, 200] == wide[200, 300] == pytest.approx(np.exp(-0.5), abs=0.01)


def test_luminance_baseline_is_darkness():
    images = random_images()
    images[2] = 128
    found = baseline_maps(images)["luminance"]
    assert found[0].max() == found[1].max() == 1
    assert found[0].min() == found[1].min() == 0
    assert not found[2].any()
    grey = np.asarray(Image.fromarray(images[0]).convert("L")).astype(float)
    assert np.corrcoef(grey.ravel(), found[0].ravel())[0, 1] < -0.999
    assert found[0] == pytest.approx((grey.max() - grey) / np.ptp(grey), abs=0.01)


def test_random_baseline_is_seeded_and_smooth():
    images = random_images(4, 56, 56)
    first, again, other = (baseline_maps(images, seed)["random"] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)
    for one, two in itertools.combinations(first, 2):
        assert np.abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) < 0.7
    assert np.abs(np.diff(first, axis=2)).max() < 0.2  # eight steps from cell to cell
    assert np.array_equal(baseline_maps(images[:2], 1)["random"], first[:2])
    cells = torch.from_numpy(np.random.default_rng(1).random((4, 1, 7, 7), dtype=np.float32))
    enlarged = torch.nn.functional.interpolate(cells, (56, 56), mode="bilinear", align_corners=False)[:, 0].numpy()
    low, high = enlarged.min(axis=(1, 2), keepdims=True), enlarged.max(axis=(1, 2), keepdims=True)
    assert first == pytest.approx((enlarged - low) / (high - low), abs=1e-5)
