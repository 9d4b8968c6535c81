"""Stain normalisation against Beer-Lambert by hand, torchstain and a plain NumPy l-alpha-beta."""

import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from breastcli.data.stain import PUBLISHED_MACENKO, StainReference, fit_reference, normalise_stain
from breastcli.errors import UserError

STRONG = ((0.65, 0.70, 0.29), (0.27, 0.88, 0.39))  # haematoxylin, eosin; not of unit length
PURPLE = ((0.56, 0.72, 0.41), (0.22, 0.80, 0.56))


def stained(stains: tuple, *, seed: int = 0, strength: float = 1.0, size: int = 128) -> Tensor:
    """Draw (3, size, size) uint8 by Beer-Lambert: a third each of nuclei, stroma and a mixture, a tenth of it blank."""
    generator = np.random.default_rng(seed)
    amounts = generator.uniform(0.2, 2.0, (2, size * size)) * strength
    kind = generator.integers(0, 3, size * size)
    amounts[1, kind == 0] = 0
    amounts[0, kind == 1] = 0
    amounts[:, kind == 2] /= 2
    amounts[:, generator.random(size * size) < 0.1] = 0
    vectors = np.array(stains).T / np.linalg.norm(stains, axis=1)
    levels = 240 * np.exp(-vectors @ amounts) - 1
    return torch.from_numpy(levels.round().clip(0, 255).astype(np.uint8)).reshape(3, size, size)


def angle_deg(first: np.ndarray, second: np.ndarray) -> float:
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    return math.degrees(math.acos(min(1.0, cosine)))


def lab(image: Tensor) -> np.ndarray:
    """Return (3, N) l-alpha-beta, written out from the paper."""
    red, green, blue = (image.flatten(1).double().numpy() + 1) / 256
    long = np.log10(0.3811 * red + 0.5783 * green + 0.0402 * blue)
    medium = np.log10(0.1967 * red + 0.7244 * green + 0.0782 * blue)
    short = np.log10(0.0241 * red + 0.1288 * green + 0.8444 * blue)
    return np.stack([(long + medium + short) / 3**0.5, (long + medium - 2 * short) / 6**0.5, (long - medium) / 2**0.5])


def mean_difference(first: Tensor, second: Tensor) -> float:
    return (first.int() - second.int()).abs().float().mean().item()


def torchstain_normalizer():
    pytest.importorskip("torchstain")
    from torchstain.base.normalizers import MacenkoNormalizer

    return MacenkoNormalizer(backend="torch")


def references() -> list[StainReference]:
    return [PUBLISHED_MACENKO, fit_reference(stained(PURPLE)[None], "reinhard", source="test")]


@pytest.fixture(params=["macenko", "reinhard"])
def reference(request: pytest.FixtureRequest) -> StainReference:
    return next(reference for reference in references() if reference.method == request.param)


@pytest.mark.parametrize("stains", [STRONG, PURPLE])
def test_macenko_recovers_the_stains_that_the_image_was_drawn_with(stains):
    fitted = fit_reference(stained(stains)[None], "macenko", source="test")
    found = np.array(fitted.matrix).T
    assert angle_deg(found[0], np.array(stains[0])) < 3
    assert angle_deg(found[1], np.array(stains[1])) < 3
    assert np.linalg.norm(found, axis=1) == pytest.approx([1, 1], abs=1e-5)
    assert fitted.maxima == pytest.approx((2.0, 2.0), rel=0.05)


def test_macenko_recovers_stains_whose_mixture_varies_more_than_their_amount():
    # The tissue's mean lies along the lesser eigenvector here: with its sign left open, angles may jump at 180 degrees.
    generator = np.random.default_rng(0)
    for stains in (STRONG, PURPLE, STRONG[::-1]):
        share = generator.random(64 * 64)
        amounts = np.stack([share, 1 - share]) * generator.uniform(1.45, 1.55, 64 * 64)
        levels = 240 * np.exp(-np.array(stains).T @ amounts) - 1
        image = torch.from_numpy(levels.round().astype(np.uint8)).reshape(1, 3, 64, 64)
        fitted = fit_reference(image, "macenko", source="test")
        for found, drawn in zip(np.array(fitted.matrix).T, sorted(stains, reverse=True), strict=True):
            assert angle_deg(found, np.array(drawn)) < 3


def test_macenko_turns_an_image_into_its_differently_stained_copy():
    image, copy = stained(STRONG), stained(PURPLE, strength=0.8)
    fitted = fit_reference(copy[None], "macenko", source="test")
    (result,), fell_back = normalise_stain(image[None], fitted)
    assert not fell_back.any()
    assert mean_difference(image, copy) > 10
    assert mean_difference(result, copy) < 1.5


def test_macenko_with_an_image_s_own_reference_changes_nothing():
    image = stained(PURPLE)
    (result,), _ = normalise_stain(
        image[None], dataclasses.replace(fit_reference(image[None], "macenko", source="test"), max_pixels=None)
    )
    # Only what lies off the plane of the two stains and the cut to whole grey levels may differ.
    assert mean_difference(result, image) < 1


@pytest.mark.parametrize(("max_pixels", "tolerance"), [(None, 0.05), (5_000, 1.0)])
def test_macenko_agrees_with_torchstain_on_drawn_images(max_pixels, tolerance):
    normalizer = torchstain_normalizer()
    for stains in (STRONG, PURPLE):
        image = stained(stains, seed=3)
        expected = normalizer.normalize(image, stains=False)[0].permute(2, 0, 1)
        (result,), fell_back = normalise_stain(
            image[None], dataclasses.replace(PUBLISHED_MACENKO, max_pixels=max_pixels)
        )
        assert not fell_back.any()
        assert mean_difference(image, expected) > 3
        assert mean_difference(result, expected) < tolerance


def test_macenko_fit_agrees_with_torchstain():
    normalizer = torchstain_normalizer()
    image = stained(STRONG, seed=5)
    normalizer.fit(image)
    fitted = fit_reference(image[None], "macenko", source="test")
    assert np.array(fitted.matrix) == pytest.approx(normalizer.HERef.numpy(), abs=1e-3)
    assert fitted.maxima == pytest.approx(normalizer.maxCRef.tolist(), abs=2e-3)


def test_published_reference_is_torchstain_s_own():
    normalizer = torchstain_normalizer()
    assert np.array(PUBLISHED_MACENKO.matrix) == pytest.approx(normalizer.HERef.numpy())
    assert PUBLISHED_MACENKO.maxima == pytest.approx(normalizer.maxCRef.tolist())


@pytest.mark.real
def test_macenko_agrees_with_torchstain_on_real_images():
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("BREASTCLI_REAL_DATA", beside)) / "breakhis_original"
    paths = sorted(folder.rglob("*.png"))[::20][:6]
    if not paths:
        pytest.skip(f"no images in {folder}")
    normalizer = torchstain_normalizer()
    exact, sampled = [], []
    for path in paths:
        image = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
        expected = normalizer.normalize(image, stains=False)[0].permute(2, 0, 1)
        exact.append(
            mean_difference(
                normalise_stain(image[None], dataclasses.replace(PUBLISHED_MACENKO, max_pixels=None))[0][0], expected
            )
        )
        sampled.append(mean_difference(normalise_stain(image[None], PUBLISHED_MACENKO)[0][0], expected))
    assert np.mean(exact) < 0.05
    # All but one: where both vectors have nearly the same red, a sample may put the other one first.
    assert sorted(sampled)[-2] < 1.0


def unusable_fields() -> dict[str, Tensor]:
    size = 64
    white = torch.full((3, size, size), 255, dtype=torch.uint8)
    pink = torch.tensor([200, 120, 160], dtype=torch.uint8)[:, None, None].expand(3, size, size).contiguous()
    generator = torch.Generator().manual_seed(0)
    speckle = torch.randint(-1, 2, pink.shape, generator=generator)
    grey = torch.randint(30, 200, (1, size, size), generator=generator).expand(3, size, size)
    nearly_white = white.clone()
    nearly_white[:, :6, :6] = stained(PURPLE, size=6)  # 36 of 4096 pixels
    return {
        "white": white,
        "black": torch.zeros_like(white),
        "pale": torch.randint(215, 250, white.shape, generator=generator).to(torch.uint8),
        "pink": pink,
        "pink with sensor noise": (pink.int() + speckle).to(torch.uint8),
        "grey": grey.to(torch.uint8).contiguous(),
        "nearly white": nearly_white,
    }


@pytest.mark.parametrize("name", unusable_fields())
def test_fields_without_measurable_stain_fall_back_to_themselves(name, reference):
    field = unusable_fields()[name]
    (result,), fell_back = normalise_stain(field[None], reference)
    assert fell_back.tolist() == [True]
    assert torch.equal(result, field)


def test_a_field_that_falls_back_leaves_its_neighbours_alone(reference):
    good = stained(STRONG, size=64)
    batch = torch.stack([good, *unusable_fields().values(), good])
    results, fell_back = normalise_stain(batch, reference)
    assert fell_back.tolist() == [False] + [True] * (len(batch) - 2) + [False]
    assert torch.equal(results[0], results[-1])
    assert torch.equal(results[0], normalise_stain(good[None], reference)[0][0])
    assert not torch.equal(results[0], good)


def test_macenko_falls_back_where_one_stain_is_too_rare_to_have_a_maximum():
    eosin = np.linspace(0.8, 2.0, 64 * 64)
    eosin[::2] = 0
    amounts = np.stack([np.zeros_like(eosin), eosin])
    amounts[:, 1::128] = amounts[::-1, 1::128]  # 0.8 % of the field, 1.6 % of its tissue
    levels = 240 * np.exp(-np.array(PURPLE).T @ amounts) - 1
    image = torch.from_numpy(levels.round().astype(np.uint8)).reshape(1, 3, 64, 64)
    results, fell_back = normalise_stain(image, PUBLISHED_MACENKO)
    assert fell_back.tolist() == [True]
    assert torch.equal(results, image)


def test_half_white_field_is_normalised_and_its_background_stays_bright():
    image = stained(STRONG)
    image[:, :, 64:] = 245
    (result,), fell_back = normalise_stain(image[None], PUBLISHED_MACENKO)
    assert not fell_back.any()
    assert result[:, :, 64:].min() >= 235
    whole, _ = normalise_stain(stained(STRONG)[None], PUBLISHED_MACENKO)
    assert mean_difference(result[:, :, :64], whole[0, :, :, :64]) < 5


def test_pure_noise_gives_grey_levels_or_itself(reference):
    noise = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    results, fell_back = normalise_stain(noise, reference)
    assert results.dtype == torch.uint8
    for image, result, same in zip(noise, results, fell_back, strict=True):
        assert torch.equal(image, result) == bool(same)
        assert result.float().std() > 1


def test_a_reference_beyond_all_measure_falls_back():
    absurd = StainReference("macenko", "test", matrix=((math.inf, 0.2), (0.7, 0.8), (0.4, 0.5)), maxima=(1.0, 1.0))
    image = stained(PURPLE)
    (result,), fell_back = normalise_stain(image[None], absurd)
    assert fell_back.tolist() == [True]
    assert torch.equal(result, image)


@pytest.mark.parametrize("max_pixels", [None, 1_000])
@pytest.mark.parametrize("size", [33, 128, 400])  # of 400 no two share a chunk
def test_an_image_s_result_does_not_depend_on_its_batch(reference, size, max_pixels):
    images = torch.stack([stained(stains, seed=seed, size=size) for seed in range(2) for stains in (STRONG, PURPLE)])
    together, _ = normalise_stain(images, dataclasses.replace(reference, max_pixels=max_pixels))
    for batch_size in (1, 3):
        parts = [
            normalise_stain(part, dataclasses.replace(reference, max_pixels=max_pixels))[0]
            for part in images.split(batch_size)
        ]
        assert torch.equal(torch.cat(parts), together)
    backwards, _ = normalise_stain(images.flip(0), dataclasses.replace(reference, max_pixels=max_pixels))
    assert torch.equal(backwards.flip(0), together)


def test_memory_layout_does_not_matter(reference):
    images = torch.stack([stained(STRONG)[:, :100], stained(PURPLE)[:, :100]])
    expected, _ = normalise_stain(images, reference)
    channels_last = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert expected.shape == (2, 3, 100, 128)
    assert torch.equal(normalise_stain(channels_last, reference)[0], expected)
    refit = [fit_reference(layout, reference.method, source="test") for layout in (images, channels_last)]
    assert refit[0] == refit[1]


def test_images_passed_in_are_not_changed(reference):
    image = stained(STRONG)
    normalise_stain(image[None], reference)
    assert torch.equal(image, stained(STRONG))


def test_sampling_meets_every_column():
    # Two stains in alternating columns: a stride of 2 or 4 would only ever see one of them.
    image = stained(STRONG, size=128)
    image[:, :, ::2] = 245
    whole, _ = normalise_stain(image[None], dataclasses.replace(PUBLISHED_MACENKO, max_pixels=None))
    sampled, fell_back = normalise_stain(image[None], dataclasses.replace(PUBLISHED_MACENKO, max_pixels=128 * 128 // 4))
    assert not fell_back.any()
    assert mean_difference(whole, sampled) < 2


def test_reinhard_gives_the_reference_s_mean_and_spread():
    target, image = stained(PURPLE, strength=0.4, size=32), stained(STRONG, seed=1, strength=0.7)
    fitted = fit_reference(target[None], "reinhard", source="test")
    assert fitted.mean == pytest.approx(lab(target).mean(axis=1).tolist(), abs=1e-5)
    assert fitted.std == pytest.approx(lab(target).std(axis=1, ddof=1).tolist(), abs=1e-5)
    (result,), fell_back = normalise_stain(image[None], dataclasses.replace(fitted, max_pixels=None))
    assert not fell_back.any()
    assert result.min() > 0
    assert result.max() < 255  # nothing was cut off
    assert lab(result).mean(axis=1) == pytest.approx(fitted.mean, abs=1e-3)
    assert lab(result).std(axis=1, ddof=1) == pytest.approx(fitted.std, rel=0.02)
    assert np.abs(lab(image).mean(axis=1) - fitted.mean).max() > 0.01


def test_reinhard_with_an_image_s_own_reference_changes_nothing():
    image = stained(PURPLE)
    fitted = fit_reference(image[None], "reinhard", source="test")
    (result,), _ = normalise_stain(image[None], dataclasses.replace(fitted, max_pixels=None))
    assert (result.int() - image.int()).abs().max() <= 1


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_fit_over_several_images_is_their_median_and_passes_over_pale_ones(method):
    blue = ((0.70, 0.60, 0.39), (0.30, 0.90, 0.30))
    images = [stained(PURPLE, strength=0.6), stained(STRONG, strength=0.8), stained(blue, strength=1.0)]
    white = torch.full_like(images[0], 255)
    fitted = fit_reference(torch.stack([white, *images, white]), method, source="training images")
    single = [fit_reference(image[None], method, source="training images") for image in images]
    assert fitted.source == "training images"
    if method == "macenko":
        assert fitted.maxima == pytest.approx(np.median([one.maxima for one in single], axis=0).tolist())
        middle = np.median([one.matrix for one in single], axis=0)
        assert np.abs(np.linalg.norm(middle, axis=0) - 1).max() > 1e-3
        assert np.array(fitted.matrix) == pytest.approx(middle / np.linalg.norm(middle, axis=0), abs=1e-5)
    else:
        assert fitted.mean == pytest.approx(np.median([one.mean for one in single], axis=0).tolist())
        assert fitted.std == pytest.approx(np.median([one.std for one in single], axis=0).tolist())


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_fit_refuses_when_every_image_is_pale(method):
    with pytest.raises(UserError, match=r"stained tissue.*slide\.png"):
        fit_reference(torch.full((2, 3, 32, 32), 240, dtype=torch.uint8), method, source="slide.png")


def test_reference_survives_a_trip_through_json():
    for reference in references():
        assert StainReference.from_json(json.loads(json.dumps(reference.to_json()))) == reference


@pytest.mark.parametrize(
    "change", [{"method": "vahadane"}, {"maxima": [1.0]}, {"mean": [0.1, 0.2, 0.3]}, {"matrix": None}, {"std": "abc"}]
)
def test_reference_that_was_tampered_with_is_refused(change):
    with pytest.raises(UserError, match="stain reference"):
        StainReference.from_json(PUBLISHED_MACENKO.to_json() | change)


def test_reference_with_a_missing_key_is_refused():
    values = PUBLISHED_MACENKO.to_json()
    del values["source"]
    with pytest.raises(UserError, match="source"):
        StainReference.from_json(values)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees_with_cpu(reference):
    images = torch.stack([stained(STRONG), stained(PURPLE), torch.full((3, 128, 128), 255, dtype=torch.uint8)])
    expected, expected_flags = normalise_stain(images, reference)
    results, flags = normalise_stain(images.cuda(), reference)
    assert results.is_cuda
    assert torch.equal(flags.cpu(), expected_flags)
    assert mean_difference(results.cpu(), expected) < 0.05
