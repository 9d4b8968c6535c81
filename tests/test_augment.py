from __future__ import annotations

import pytest
import torch

from breastcli.data.augment import POLICIES, Augmentation, dihedral
from breastcli.data.loading import to_network


def images(count: int = 16, size_px: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (count, 3, 6, 6), generator=generator, dtype=torch.uint8)
    return coarse.repeat_interleave(size_px // 6, 2).repeat_interleave(size_px // 6, 3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_to_network_spans_minus_one_to_one() -> None:
    values = to_network(torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1))
    assert torch.allclose(values.flatten(), torch.tensor([-1.0, 1.0, -0.6]))


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_keeps_shape_range_and_seed(name: str) -> None:
    policy, given = POLICIES[name], images()
    before = given.clone()
    once, again, other = policy(given, generator()), policy(given, generator()), policy(given, generator(1))
    assert once.shape == given.shape
    assert once.dtype == torch.float32
    assert once.isfinite().all()
    assert once.min() >= -1.001
    assert once.max() <= 1.001
    assert torch.equal(once, again)
    assert torch.equal(given, before)
    assert torch.equal(once, other) == (name == "none")


def test_none_is_the_identity() -> None:
    assert torch.equal(POLICIES["none"](images(), generator()), to_network(images()))


def test_dihedral_gives_eight_distinct_positions_with_the_same_pixels() -> None:
    image = images(1)
    positions = {tuple(dihedral(image, element).flatten().tolist()) for element in range(8)}
    assert len(positions) == 8
    assert all(sorted(position) == sorted(image.flatten().tolist()) for position in positions)
    assert torch.equal(dihedral(image, 0), image)


def test_light_shows_each_of_the_eight_positions_equally_often() -> None:
    image = images(1)
    turned = POLICIES["light"](image.expand(4000, -1, -1, -1), generator())
    counts = [int((turned == to_network(dihedral(image, element))).flatten(1).all(dim=1).sum()) for element in range(8)]
    assert sum(counts) == 4000
    assert min(counts) > 400
    assert max(counts) < 600


def test_every_image_goes_its_own_way() -> None:
    same = images(1).expand(8, -1, -1, -1)
    for name in ("light", "paper", "strong"):
        assert len(torch.unique(POLICIES[name](same, generator()), dim=0)) > 2, name


def test_flip_alone_is_exact() -> None:
    given = images()
    flipped = Augmentation(flip=True)(given, generator())
    as_given = (flipped == to_network(given)).flatten(1).all(dim=1)
    mirrored = (flipped == to_network(given.flip(3))).flatten(1).all(dim=1)
    assert (as_given ^ mirrored).all()
    assert as_given.any()
    assert mirrored.any()


@pytest.mark.parametrize("angle_deg", [0.0, 90.0])
def test_rotation_turns_about_the_centre(angle_deg: float, monkeypatch: pytest.MonkeyPatch) -> None:
    given = images(4)

    def at_the_upper_end(size: int, low: float, high: float, *_: object) -> torch.Tensor:
        return torch.full((size,), high)

    monkeypatch.setattr("breastcli.data.augment._uniform", at_the_upper_end)
    turned = Augmentation(rotation_deg=angle_deg or 1e-6, min_crop=1.0)(given, generator())
    expected = torch.rot90(to_network(given), 1 if angle_deg else 0, (2, 3))
    opposite = torch.rot90(to_network(given), -1 if angle_deg else 0, (2, 3))
    assert min((turned - expected).abs().max(), (turned - opposite).abs().max()) < 1e-3


def test_rotation_reflects_instead_of_blackening() -> None:
    white = torch.full((8, 3, 24, 24), 255, dtype=torch.uint8)
    assert POLICIES["paper"](white, generator()).min() > 0.999


def test_crop_magnifies() -> None:
    edge = torch.zeros(200, 3, 24, 24, dtype=torch.uint8)
    edge[:, :, 8:16, 8:16] = 255
    shares = (Augmentation(min_crop=0.5)(edge, generator()) > 0).float().mean(dim=(1, 2, 3))
    assert shares.max() > 1.8 * (8 / 24) ** 2


def test_stain_jitter_moves_colour_but_not_place() -> None:
    given = images(32)
    jittered = Augmentation(stain=0.2)(given, generator())
    change = (jittered - to_network(given)).abs().flatten(1).mean(dim=1)
    assert change.min() > 0.003
    assert Augmentation(stain=1e-6)(given, generator()).sub(to_network(given)).abs().max() < 1e-3
