from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional

from breastcli.data.augment import POLICIES, Augmentation, Draws, dihedral, draw_elements, place
from breastcli.data.loading import to_network


def images(count: int = 16, size_px: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (count, 3, 6, 6), generator=generator, dtype=torch.uint8)
    return coarse.repeat_interleave(size_px // 6, 2).repeat_interleave(size_px // 6, 3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws_for(given: torch.Tensor, seed: int = 0) -> Draws:
    return Draws(generator(seed), len(given))


def test_to_network_spans_minus_one_to_one() -> None:
    values = to_network(torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1))
    assert torch.allclose(values.flatten(), torch.tensor([-1.0, 1.0, -0.6]))


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_keeps_shape_range_and_seed(name: str) -> None:
    policy, given = POLICIES[name], images()
    before = given.clone()
    once, again, other = (policy(given, draws_for(given, seed)) for seed in (0, 0, 1))
    assert once.shape == given.shape
    assert once.dtype == torch.float32
    assert once.isfinite().all()
    assert once.min() >= -1.001
    assert once.max() <= 1.001
    assert torch.equal(once, again)
    assert torch.equal(given, before)
    assert torch.equal(once, other) == (name in ("none", "wang"))


def test_none_is_the_identity() -> None:
    assert torch.equal(POLICIES["none"](images(), draws_for(images())), to_network(images()))


def test_dihedral_gives_eight_distinct_positions_with_the_same_pixels() -> None:
    image = images(1)
    positions = {tuple(dihedral(image, element).flatten().tolist()) for element in range(8)}
    assert len(positions) == 8
    assert all(sorted(position) == sorted(image.flatten().tolist()) for position in positions)
    assert torch.equal(dihedral(image, 0), image)


# Where the pixels 0..15 of a 4 x 4 image, numbered row by row, go; worked out by hand.
WANG_BY_HAND = {
    "as it is": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
    "90 degrees counterclockwise": [3, 7, 11, 15, 2, 6, 10, 14, 1, 5, 9, 13, 0, 4, 8, 12],
    "180 degrees": [15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0],
    "270 degrees counterclockwise": [12, 8, 4, 0, 13, 9, 5, 1, 14, 10, 6, 2, 15, 11, 7, 3],
    "left-right": [3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12],
    "top-bottom": [12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3],
}


def test_wang_copies_are_the_image_its_three_turns_and_its_two_mirror_images() -> None:
    policy, state = POLICIES["wang"], generator()
    numbered = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4).expand(6, 3, -1, -1)
    expected = torch.tensor(list(WANG_BY_HAND.values()), dtype=torch.uint8).view(6, 1, 4, 4).expand(-1, 3, -1, -1)
    assert torch.equal(policy(numbered, Draws(state, 6), torch.tensor(policy.copies)), to_network(expected))
    assert torch.equal(state.get_state(), generator().get_state())


def test_wang_turns_are_those_of_numpy() -> None:
    image = images(1)
    for quarters, element in enumerate(POLICIES["wang"].copies[:4]):
        expected = np.rot90(image.numpy(), k=quarters, axes=(2, 3)).copy()
        assert torch.equal(dihedral(image, element), torch.from_numpy(expected))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_place_puts_every_image_in_its_own_position(layout: torch.memory_format) -> None:
    given = images(40).contiguous(memory_format=layout)
    before, elements = given.clone(), torch.randint(8, (40,), generator=generator())
    placed = place(given, elements)
    for image, element, result in zip(given, elements.tolist(), placed, strict=True):
        assert torch.equal(dihedral(image[None], element)[0], result)
    assert elements.unique().tolist() == list(range(8))
    assert placed.stride() == given.stride()
    assert torch.equal(given, before)


def test_place_only_mirrors_images_that_are_not_square() -> None:
    given = images(4)[:, :, :12]
    expected = torch.stack([given[0], given[1].flip(2), given[2].flip(1), given[3].flip(1, 2)])
    assert torch.equal(place(given, torch.arange(4)), expected)
    with pytest.raises(RuntimeError):
        place(given, torch.full((4,), 4))


def test_elements_come_before_all_else() -> None:
    given, elements = images(), torch.arange(16) % 8
    placed = place(given, elements)
    for name in ("light", "deebani"):
        policy = POLICIES[name]
        assert torch.equal(policy(given, draws_for(given), elements), policy(placed, draws_for(given))), name


def turned_by_coins(given: torch.Tensor, state: torch.Generator) -> torch.Tensor:
    """The rule of ``turn`` in plain words: mirror left-right, then top-bottom, then swap rows and columns."""
    square = given.shape[2] == given.shape[3]
    coins = [(torch.rand(len(given), generator=state) < 0.5).tolist() for _ in range(3 if square else 2)]
    turned = []
    for image, *tosses in zip(given, *coins, strict=True):
        image = image.flip(2) if tosses[0] else image
        image = image.flip(1) if tosses[1] else image
        turned.append(image.transpose(1, 2) if square and tosses[2] else image)
    return torch.stack(turned)


@pytest.mark.parametrize("height", [24, 12])
def test_turn_follows_three_coins_or_two_if_not_square(height: int) -> None:
    given = images(60)[:, :, :height]
    ours, reference = generator(), generator()
    assert torch.equal(
        Augmentation(turn=True)(given, Draws(ours, len(given))), to_network(turned_by_coins(given, reference))
    )
    assert torch.equal(ours.get_state(), reference.get_state())


def test_draw_elements_names_the_positions_of_turn() -> None:
    given, ours, reference = images(60), generator(3), generator(3)
    elements = draw_elements(Draws(ours, 60))
    assert elements.dtype == torch.int64
    assert elements.shape == (60,)
    assert elements.unique().tolist() == list(range(8))
    assert torch.equal(place(given, elements), turned_by_coins(given, reference))
    assert torch.equal(ours.get_state(), reference.get_state())


def test_light_shows_each_of_the_eight_positions_equally_often() -> None:
    image = images(1)
    turned = POLICIES["light"](image.expand(4000, -1, -1, -1), Draws(generator(), 4000))
    counts = [int((turned == to_network(dihedral(image, element))).flatten(1).all(dim=1).sum()) for element in range(8)]
    assert sum(counts) == 4000
    assert min(counts) > 400
    assert max(counts) < 600


def test_every_image_goes_its_own_way() -> None:
    same = images(1).expand(8, -1, -1, -1)
    for name in ("light", "paper", "strong", "deebani"):
        assert len(torch.unique(POLICIES[name](same, draws_for(same)), dim=0)) > 2, name


@pytest.mark.parametrize(("policy", "axis"), [(Augmentation(flip=True), 3), (Augmentation(flip_vertical=True), 2)])
def test_flip_alone_is_exact(policy: Augmentation, axis: int) -> None:
    given = images()
    flipped = policy(given, draws_for(given))
    as_given = (flipped == to_network(given)).flatten(1).all(dim=1)
    mirrored = (flipped == to_network(given.flip(axis))).flatten(1).all(dim=1)
    assert (as_given ^ mirrored).all()
    assert as_given.any()
    assert mirrored.any()


@pytest.mark.parametrize("angle_deg", [0.0, 90.0])
def test_rotation_turns_about_the_centre(angle_deg: float, monkeypatch: pytest.MonkeyPatch) -> None:
    given = images(4)

    monkeypatch.setattr(Draws, "uniform", lambda self, low, high: torch.full((self.total,), high))
    turned = Augmentation(rotation_deg=angle_deg or 1e-6, min_crop=1.0)(given, draws_for(given))
    expected = torch.rot90(to_network(given), 1 if angle_deg else 0, (2, 3))
    opposite = torch.rot90(to_network(given), -1 if angle_deg else 0, (2, 3))
    assert min((turned - expected).abs().max(), (turned - opposite).abs().max()) < 1e-3


def test_rotation_reflects_instead_of_blackening() -> None:
    white = torch.full((8, 3, 24, 24), 255, dtype=torch.uint8)
    assert POLICIES["paper"](white, draws_for(white)).min() > 0.999


@pytest.mark.parametrize("name", ["paper", "strong"])
def test_a_seed_gives_what_it_gave_before_shift_shear_and_zoom(name: str) -> None:
    """The warp as it was first written; runs of that time must be repeatable but for the rounding of the grid."""
    policy, given = replace(POLICIES[name], stain=0.0), images(17)
    ours, state = generator(5), generator(5)
    values = to_network(turned_by_coins(given, state) if policy.turn else given)
    angle, scale, *rest = (torch.rand(17, generator=state) for _ in range(5 if policy.flip else 4))
    angle = (2 * policy.rotation_deg * angle - policy.rotation_deg) * (torch.pi / 180)
    scale = policy.min_crop + (1 - policy.min_crop) * scale
    mirror = torch.where(rest.pop(0) < 0.5, -1.0, 1.0) if policy.flip else torch.ones(17)
    shift_x, shift_y = ((2 * draw - 1) * (1 - scale) for draw in rest)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    matrix = torch.stack([cosine * mirror, -sine, shift_x, sine * mirror, cosine, shift_y], dim=1).view(17, 2, 3)
    grid = functional.affine_grid(matrix, [17, 3, 24, 24], align_corners=False)
    expected = functional.grid_sample(values, grid, padding_mode="reflection", align_corners=False)
    torch.testing.assert_close(policy(given, Draws(ours, len(given))), expected, rtol=0, atol=1e-5)
    assert torch.equal(ours.get_state(), state.get_state())


def source_of_each_pixel(draws: dict[str, float], side: int) -> np.ndarray:
    """Keras' order of matrices, in pixels, x before y, then reflection at the border: (2, side, side)."""
    turn, shear = np.deg2rad([draws["angle_deg"], draws["shear_deg"]])
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    shift = np.array([[1, 0, side * draws["shift_x"]], [0, 1, side * draws["shift_y"]], [0, 0, 1]])
    shearing = np.array([[np.cos(shear), 0, 0], [-np.sin(shear), 1, 0], [0, 0, 1]])
    zoom = np.diag([draws["mirror_x"] / draws["zoom"], draws["mirror_y"] / draws["zoom"], 1])
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    places = np.einsum("ij,jhw->ihw", rotation @ shift @ shearing @ zoom, np.stack([x, y, np.ones_like(x)]))[:2]
    from_border = np.mod(places + side / 2, 2 * side)
    return np.clip(np.minimum(from_border, 2 * side - from_border) - 0.5, 0, side - 1)


def draws_of(policy: Augmentation, count: int, state: torch.Generator) -> list[dict[str, float]]:
    """Draw as the policy does: what is off takes no draw, but for angle, crop and place of the crop."""

    def draw(limit: float) -> list[float]:
        return (limit * (2 * torch.rand(count, generator=state) - 1)).tolist()

    angle, _crop = draw(policy.rotation_deg), draw(1)
    mirror_x = [-1 if toss < 0 else 1 for toss in draw(1)] if policy.flip else [1] * count
    _left, _top = draw(1), draw(1)
    shift_x, shift_y = (draw(policy.shift), draw(policy.shift)) if policy.shift else ([0] * count, [0] * count)
    shear = draw(policy.shear_deg) if policy.shear_deg else [0] * count
    zoom = [policy.max_zoom**power for power in draw(1)] if policy.max_zoom > 1 else [1] * count
    mirror_y = [-1 if toss < 0 else 1 for toss in draw(1)] if policy.flip_vertical else [1] * count
    names = ("angle_deg", "mirror_x", "shift_x", "shift_y", "shear_deg", "zoom", "mirror_y")
    rows = zip(angle, mirror_x, shift_x, shift_y, shear, zoom, mirror_y, strict=True)
    return [dict(zip(names, row, strict=True)) for row in rows]


@pytest.mark.parametrize(
    "policy",
    [
        Augmentation(max_zoom=2.0),
        Augmentation(shift=0.4),
        Augmentation(shear_deg=30.0),
        Augmentation(rotation_deg=95.0, shift=0.4),
        Augmentation(flip=True, flip_vertical=True, rotation_deg=95.0, max_zoom=2.0, shear_deg=30.0, shift=0.4),
        POLICIES["deebani"],
    ],
    ids=["zoom", "shift", "shear", "rotation and shift", "all", "deebani"],
)
def test_every_pixel_comes_from_where_kerass_matrices_say(policy: Augmentation) -> None:
    side, count = 64, 12
    ramp = (4 * torch.arange(side, dtype=torch.uint8)).expand(side, side)  # a pixel's red and green are its x and y
    given = torch.stack([ramp, ramp.T, torch.zeros_like(ramp)]).expand(count, -1, -1, -1)
    ours, reference = generator(2), generator(2)
    found = (policy(given, Draws(ours, len(given)))[:, :2] + 1) * 127.5 / 4
    expected = np.stack([source_of_each_pixel(draws, side) for draws in draws_of(policy, count, reference)])
    assert np.abs(found.numpy() - expected).max() < 2e-3
    assert torch.equal(ours.get_state(), reference.get_state())


def test_deebani_has_the_values_of_table_5() -> None:
    geometry = {"rotation_deg": 95, "max_zoom": 2, "shear_deg": 0.5, "shift": 0.4}
    assert POLICIES["deebani"] == Augmentation(flip=True, flip_vertical=True, **geometry)


def test_zooming_out_and_shifting_far_reflects_instead_of_blackening() -> None:
    white = torch.full((64, 3, 24, 24), 255, dtype=torch.uint8)
    assert POLICIES["deebani"](white, draws_for(white)).min() > 0.999


def test_crop_magnifies() -> None:
    edge = torch.zeros(200, 3, 24, 24, dtype=torch.uint8)
    edge[:, :, 8:16, 8:16] = 255
    shares = (Augmentation(min_crop=0.5)(edge, draws_for(edge)) > 0).float().mean(dim=(1, 2, 3))
    assert shares.max() > 1.8 * (8 / 24) ** 2


def test_stain_jitter_moves_colour_but_not_place() -> None:
    given = images(32)
    jittered = Augmentation(stain=0.2)(given, draws_for(given))
    change = (jittered - to_network(given)).abs().flatten(1).mean(dim=1)
    assert change.min() > 0.003
    assert Augmentation(stain=1e-6)(given, draws_for(given)).sub(to_network(given)).abs().max() < 1e-3


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("cuts", [(0, 8, 17), (0, 6, 12, 17)], ids=["two parts", "three parts"])
def test_a_part_of_a_batch_is_augmented_as_in_the_whole(name: str, cuts: tuple[int, ...]) -> None:
    policy, given = POLICIES[name], images(17)
    parts = [slice(start, stop) for start, stop in pairwise(cuts)]
    apart = [policy(given[part], Draws(generator(4), 17, part)) for part in parts]
    torch.testing.assert_close(torch.cat(apart), policy(given, draws_for(given, 4)), rtol=0, atol=1e-6)


def test_draws_of_a_part_are_those_of_the_whole() -> None:
    whole, part = Draws(generator(), 9), Draws(generator(), 9, slice(4, 7))
    for draw in (lambda one: one.uniform(-2.0, 3.0), Draws.coin, lambda one: one.normal(3)):
        assert torch.equal(draw(whole)[4:7], draw(part))
    reference = generator()
    expected = [torch.rand(9, generator=reference), torch.rand(9, generator=reference)]
    expected.append(torch.randn((9, 3), generator=reference))
    again = Draws(generator(), 9)
    assert torch.equal(again.uniform(-2.0, 3.0), 5 * expected[0] - 2)
    assert torch.equal(again.coin(), expected[1] < 0.5)
    assert torch.equal(again.normal(3), expected[2])
