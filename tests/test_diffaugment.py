from __future__ import annotations

import pytest
import torch

from breastcli.errors import UsageError
from breastcli.gan.diffaugment import color, cutout, diffaugment, parse_diffaugment, translation


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_names_are_parsed_and_wrong_ones_named() -> None:
    assert parse_diffaugment("none") == ()
    assert parse_diffaugment("color, cutout") == ("color", "cutout")
    with pytest.raises(UsageError, match="colour"):
        parse_diffaugment("colour")


def test_translation_moves_whole_images_and_fills_with_zero() -> None:
    images = torch.arange(1, 65.0).reshape(1, 1, 8, 8).expand(200, 3, 8, 8)
    moved = translation(images, source())
    shifts = set()
    for one in moved[:, 0]:
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                expected = torch.zeros(10, 10)
                expected[1 + down : 9 + down, 1 + right : 9 + right] = images[0, 0]
                if torch.equal(one, expected[1:9, 1:9]):
                    shifts.add((down, right))
    assert len(shifts) == 9
    assert all(any(torch.equal(one, other) for other in moved[:, 0]) for one in moved[:, 1])


def test_cutout_sets_half_of_the_side_to_zero() -> None:
    holed = cutout(torch.ones(300, 3, 16, 16), source())
    areas = (holed[:, 0] == 0).sum(dim=(1, 2))
    assert int(areas.max()) == 64
    assert int(areas.min()) == 16  # a centre in a corner leaves a quarter of the hole inside
    assert torch.equal(holed[:, 0], holed[:, 2])


def test_color_keeps_the_pattern_and_changes_each_image_in_its_own_way() -> None:
    images = torch.rand((50, 3, 4, 4), generator=source(1))
    images[1:] = images[0]
    changed = color(images, source())
    assert len({round(float(one.mean()), 6) for one in changed}) == 50
    assert float((changed.mean(dim=(1, 2, 3)) - images.mean(dim=(1, 2, 3))).abs().max()) <= 0.5 + 1e-6
    grey = [one.mean(dim=0) - one.mean() for one in (images[0], changed[0])]
    contrast = float(grey[1].norm() / grey[0].norm())
    assert 0.5 <= contrast <= 1.5
    torch.testing.assert_close(grey[1], contrast * grey[0], atol=1e-5, rtol=1e-4)
    colours = [one - one.mean(dim=0) for one in (images[0], changed[0])]
    saturation = float(colours[1].norm() / colours[0].norm()) / contrast
    assert 0 <= saturation <= 2
    assert abs(saturation - 1) > 0.01
    torch.testing.assert_close(colours[1], saturation * contrast * colours[0], atol=1e-5, rtol=1e-4)


def test_gradients_reach_the_images_and_seeds_repeat() -> None:
    images = (torch.rand(4, 3, 16, 16) * 2 - 1).requires_grad_()
    names = ("color", "translation", "cutout")
    diffaugment(images, names, source(3)).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    again = [diffaugment(images.detach(), names, source(seed)) for seed in (3, 3, 4)]
    assert torch.equal(again[0], again[1])
    assert not torch.equal(again[0], again[2])
