from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

from breastcli.gan.networks import SIZES_PX, Critic, EqualConv, GanOptions, Generator, StyledConv

TINY = GanOptions(size_px=64, num_conditions=3, width=4, noise_dim=16)


@pytest.fixture
def generator() -> Generator:
    torch.manual_seed(0)
    return Generator(TINY).eval()


@pytest.fixture
def critic() -> Critic:
    torch.manual_seed(0)
    return Critic(TINY).eval()


@pytest.mark.parametrize("size_px", SIZES_PX)
def test_every_size_comes_out_and_goes_in(size_px: int) -> None:
    with torch.device("meta"):
        options = GanOptions(size_px, 2)
        images = Generator(options)(torch.empty(4, 128), torch.zeros(4, dtype=torch.long))
        assert images.shape == (4, 3, size_px, size_px)
        assert Critic(options)(images, torch.zeros(4, dtype=torch.long)).shape == (4,)


def test_channels_double_at_each_halving_up_to_eight_times() -> None:
    assert GanOptions(128, 2, width=8).channels() == [(4, 64), (8, 64), (16, 64), (32, 32), (64, 16), (128, 8)]


def test_a_size_between_is_refused() -> None:
    with pytest.raises(AssertionError, match="96 px"):
        GanOptions(96, 2).channels()


def test_images_lie_between_minus_one_and_one_and_depend_on_noise_and_condition(generator: Generator) -> None:
    noise = torch.randn(4, 16, generator=torch.Generator().manual_seed(1)) * 100
    images = generator(noise, torch.tensor([0, 0, 1, 1]))
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1
    assert (images[0] - images[1]).abs().max() > 1e-3
    same_noise = generator(noise[:1].expand(2, -1), torch.tensor([0, 1]))
    assert (same_noise[0] - same_noise[1]).abs().max() > 1e-3


def test_an_image_does_not_depend_on_its_batch(generator: Generator) -> None:
    noise, conditions = torch.randn(5, 16), torch.tensor([0, 1, 2, 0, 1])
    together = generator(noise, conditions)
    alone = generator(noise[3:4], conditions[3:4])
    torch.testing.assert_close(together[3:4], alone, atol=1e-5, rtol=1e-5)


def test_a_styled_convolution_is_the_one_with_scaled_and_normalised_weights() -> None:
    torch.manual_seed(0)
    layer = StyledConv(6, 5, 8)
    maps, style = torch.randn(3, 6, 7, 7), torch.randn(3, 8)
    outcomes = []
    for one, own in zip(maps, style, strict=True):  # the published form: new weights for every image
        weight = layer.conv.weight * layer.conv.gain * layer.scale(own[None])[0][None, :, None, None]
        weight = weight / (weight.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).sqrt()
        outcomes.append(functional.conv2d(one[None], weight, padding=1))
    gain = (2 / (1 + 0.2**2)) ** 0.5
    expected = functional.leaky_relu(torch.cat(outcomes) * gain, 0.2)
    torch.testing.assert_close(layer(maps, style), expected, atol=1e-5, rtol=1e-5)


def test_an_equal_convolution_keeps_the_variance() -> None:
    torch.manual_seed(0)
    values = EqualConv(64, 64, 3, gain=1.0)(torch.randn(8, 64, 16, 16))[:, :, 2:-2, 2:-2]
    assert float(values.detach().var()) == pytest.approx(1, abs=0.1)


def test_the_critic_has_no_batch_norm_and_swapping_labels_changes_its_scores(critic: Critic) -> None:
    assert not [one for one in critic.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    images = torch.rand(4, 3, 64, 64) * 2 - 1
    scores = [critic(images, torch.full((4,), number)) for number in range(3)]
    for one, two in itertools.combinations(scores, 2):
        assert (one - two).abs().min() > 1e-4


def test_the_projection_is_the_inner_product_with_the_embedding(critic: Critic) -> None:
    features, conditions = torch.randn(2, critic.score.weight.shape[1]), torch.tensor([2, 0])
    plain = critic.score(features)[:, 0]
    projected = (critic.embedding.weight[conditions] * features).sum(dim=1) / features.shape[1] ** 0.5
    torch.testing.assert_close(critic.judge(features, conditions), plain + projected)


def test_the_critic_sees_that_images_of_a_group_are_all_alike(critic: Critic) -> None:
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    others = torch.rand(3, 3, 64, 64) * 2 - 1
    conditions = torch.zeros(4, dtype=torch.long)
    alike = critic(image.expand(4, -1, -1, -1), conditions)[0]
    among_others = critic(torch.cat([image, others]), conditions)[0]
    assert (alike - among_others).abs() > 1e-4


def test_groups_of_four_do_not_see_each_other(critic: Critic) -> None:
    images, conditions = torch.rand(8, 3, 64, 64) * 2 - 1, torch.zeros(8, dtype=torch.long)
    torch.testing.assert_close(critic(images, conditions)[:4], critic(images[:4], conditions[:4]), atol=1e-5, rtol=1e-4)
