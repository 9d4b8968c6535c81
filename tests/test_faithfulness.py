"""Networks here are functions of the pixels known by heart, so that every figure can be worked out by hand."""

import json
from collections import OrderedDict
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch import nn

from breastcli.metrics import faithfulness as faith
from breastcli.metrics.faithfulness import blur, confidence_change, find_stages, insertion_deletion, randomisation_check
from breastcli.models import Classifier, ModelOptions, build_model
from breastcli.models.splitting import split_at

FP32 = torch.float32


class Corner(Classifier):
    """Class 1 has the probability 0.1 + 0.8 times the mean of ``measure`` over the top left quadrant."""

    def __init__(self, measure=lambda images: (images + 1) / 2):
        super().__init__()
        self.trunk, self.head = nn.Identity(), nn.Identity()
        self.measure = measure

    def extract(self, images):
        return self.measure(images)

    def embed(self, maps):
        corner = maps[:, :, : maps.shape[2] // 2, : maps.shape[3] // 2]
        probability = 0.1 + 0.8 * corner.mean(dim=(1, 2, 3))
        return torch.stack([1 - probability, probability], dim=1).log()


class Small(Classifier):
    """Two convolutions with batch norm, a position grid of its own, and a linear head that is defined first."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 2)
        conv1, conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        bn1, bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.trunk = nn.Sequential(OrderedDict(conv1=conv1, bn1=bn1, relu=nn.ReLU(), conv2=conv2, bn2=bn2))
        self.positions = nn.Parameter(torch.randn(3, 16, 16))

    def extract(self, images):
        return self.trunk(images + self.positions)

    def embed(self, maps):
        return maps.relu().square().mean(dim=(2, 3))


@pytest.fixture
def white(monkeypatch):
    """Two 4 x 4 images whose top left quadrant is white and whose rest is black, as is the baseline."""
    monkeypatch.setattr(faith, "blur", torch.zeros_like)
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    images[:, :, :2, :2] = 255
    return images


@pytest.fixture
def texture():
    """Random black and white pixels, which a blur turns grey."""
    return torch.randint(0, 2, (5, 3, 32, 32), generator=torch.Generator().manual_seed(3)).mul(255).to(torch.uint8)


def follow(model, images, saliency, targets=None, **settings):
    targets = torch.ones(len(images), dtype=torch.int64) if targets is None else targets
    return insertion_deletion(model, images, saliency, targets, dtype=FP32, **settings)


def corner_map(num, side):
    saliency = torch.zeros(num, side, side)
    saliency[:, : side // 2, : side // 2] = 1
    return saliency


@pytest.fixture
def small():
    torch.manual_seed(11)
    network = Small()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        network.trunk.bn1.running_mean.fill_(0.3)
        network.trunk.bn2.running_var.fill_(4.0)
    return network


def test_curves_of_two_steps_by_hand(white):
    oracle = corner_map(2, 4)
    found = follow(Corner(), white, torch.stack([oracle[0], 1 - oracle[1]]), steps=2)
    assert found.shares.tolist() == [0, 0.5, 1]
    # Half of the pixels hold the whole quadrant (oracle first) or nothing of it (inverse map).
    assert found.deletion_curves == pytest.approx(np.array([[0.9, 0.1, 0.1], [0.9, 0.9, 0.1]]), abs=1e-6)
    assert found.insertion_curves == pytest.approx(np.array([[0.1, 0.9, 0.9], [0.1, 0.1, 0.9]]), abs=1e-6)
    assert found.deletion_auc == pytest.approx([0.3, 0.7], abs=1e-6)
    assert found.insertion_auc == pytest.approx([0.7, 0.3], abs=1e-6)


def test_area_uses_the_true_shares_where_steps_do_not_divide_the_pixels(white):
    found = follow(Corner(), white[:1], corner_map(1, 4), steps=3)
    assert found.shares.tolist() == [0, 5 / 16, 10 / 16, 1]
    assert found.deletion_auc == pytest.approx([5 / 16 * (0.9 + 0.1) / 2 + 11 / 16 * 0.1], abs=1e-6)


def test_pixels_leave_in_the_order_of_their_saliency(white):
    saliency = torch.linspace(1, 0, 16).view(1, 4, 4)  # row after row: the quadrant goes in pairs of pixels
    found = follow(Corner(), white[:1], saliency, steps=8)
    assert found.deletion_curves[0] == pytest.approx([0.9, 0.5, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], abs=1e-6)


def test_the_target_is_the_class_that_is_followed(white):
    found = follow(Corner(), white, corner_map(2, 4), torch.tensor([1, 0]), steps=2)
    assert found.deletion_curves[1] == pytest.approx(1 - found.deletion_curves[0], abs=1e-6)


def test_curves_run_from_the_image_to_its_blur(texture):
    found = follow(Corner(torch.square), texture, torch.rand(5, 32, 32), steps=4)
    quadrant = (blur(texture).float() / 127.5 - 1)[:, :, :16, :16]
    ends = 0.1 + 0.8 * quadrant.square().mean(dim=(1, 2, 3)).numpy()
    assert (ends < 0.2).all()
    assert found.deletion_curves[:, 0] == pytest.approx(np.full(5, 0.9), abs=1e-6)
    assert found.insertion_curves[:, -1] == pytest.approx(np.full(5, 0.9), abs=1e-6)
    assert found.deletion_curves[:, -1] == pytest.approx(ends, abs=1e-6)
    assert found.insertion_curves[:, 0] == pytest.approx(ends, abs=1e-6)


def test_the_oracle_beats_a_random_map_and_that_beats_the_inverse(texture):
    oracle, noise = corner_map(5, 32), torch.rand(5, 32, 32, generator=torch.Generator().manual_seed(0))
    best, middle, worst = (follow(Corner(torch.square), texture, each) for each in (oracle, noise, 1 - oracle))
    assert (best.deletion_auc + 0.1 < middle.deletion_auc).all()
    assert (middle.deletion_auc + 0.1 < worst.deletion_auc).all()
    assert (best.insertion_auc > middle.insertion_auc + 0.1).all()
    assert (middle.insertion_auc > worst.insertion_auc + 0.1).all()


def test_batches_mix_images_and_steps_without_changing_the_curves(texture):
    model, saliency, targets = Corner(torch.square), torch.rand(5, 32, 32), torch.tensor([1, 0, 1, 1, 0])
    counted = []
    small = follow(model, texture, saliency, targets, steps=6, batch_size=3, on_batch=counted.append)
    large = follow(model, texture, saliency, targets, steps=6, batch_size=64)
    alone = follow(model, texture[2:3], saliency[2:3], targets[2:3], steps=6)
    assert max(counted) == 3
    assert sum(counted) == 2 * 5 * 7
    assert small.deletion_curves == pytest.approx(large.deletion_curves, abs=1e-6)
    assert small.insertion_curves == pytest.approx(large.insertion_curves, abs=1e-6)
    assert alone.deletion_curves[0] == pytest.approx(large.deletion_curves[2], abs=1e-6)


def test_results_of_several_calls_join_and_go_into_json(texture):
    model, saliency = Corner(torch.square), torch.rand(5, 32, 32)
    whole = follow(model, texture, saliency, steps=4)
    parts = [follow(model, texture[rows], saliency[rows], steps=4) for rows in (slice(0, 2), slice(2, 5))]
    joined = faith.Faithfulness.concatenate(parts)
    assert joined.deletion_auc == pytest.approx(whole.deletion_auc, abs=1e-6)
    assert joined.insertion_curves == pytest.approx(whole.insertion_curves, abs=1e-6)
    values = json.loads(json.dumps(joined.to_json(), allow_nan=False))
    assert values["n"] == 5
    assert values["deletion_auc"] == pytest.approx(joined.deletion_auc.mean())
    assert values["insertion_curve"] == pytest.approx(joined.insertion_curves.mean(axis=0).tolist())
    assert values["shares"] == [0, 0.25, 0.5, 0.75, 1]


def test_a_map_of_another_size_or_range_is_refused(texture):
    for wrong in (torch.rand(5, 16, 16), torch.rand(5, 32, 32) - 0.5, torch.full((5, 32, 32), torch.nan)):
        with pytest.raises(AssertionError):
            follow(Corner(), texture, wrong)


def test_blur_agrees_with_scipy():
    images = torch.randint(0, 256, (2, 3, 32, 48), generator=torch.Generator().manual_seed(5)).to(torch.uint8)
    expected = ndimage.gaussian_filter(images.numpy().astype(float), sigma=(0, 0, 2, 2), mode="mirror", truncate=3)
    assert np.abs(blur(images).numpy() - expected).max() < 0.51  # rounded to whole grey levels


def test_ranks_follow_saliency():
    assert faith.rank_pixels(torch.tensor([[[0.1, 0.9], [0.5, 0.0]]])).tolist() == [[[2, 0], [1, 3]]]
    assert (faith.rank_pixels(corner_map(1, 8))[:, :4, :4] < 16).all()  # ties on both sides of a difference


def test_ties_are_broken_all_over_the_image_and_always_alike():
    ranks = faith.rank_pixels(torch.zeros(2, 16, 16))
    assert sorted(ranks[0].flatten().tolist()) == list(range(256))
    assert torch.equal(ranks[0], ranks[1])
    assert torch.equal(ranks[:1], faith.rank_pixels(torch.full((1, 16, 16), 0.7)))
    early = (ranks[0] < 128).float()
    for quadrant in (early[:8, :8], early[:8, 8:], early[8:, :8], early[8:, 8:]):
        assert 0.3 < quadrant.mean() < 0.7
    position = torch.arange(256.0)
    assert abs(np.corrcoef(position, ranks[0].flatten())[0, 1]) < 0.2


def test_drop_and_increase_by_hand():
    images, targets = torch.full((4, 3, 4, 4), 255, dtype=torch.uint8), torch.tensor([1, 0, 1, 1])
    saliency = torch.stack(
        [torch.full((4, 4), 0.2), torch.full((4, 4), 0.2), torch.ones(4, 4), 1 - corner_map(1, 4)[0]]
    )
    counted = []
    found = confidence_change(Corner(), images, saliency, targets, dtype=FP32, batch_size=3, on_batch=counted.append)
    assert counted == [3, 1, 3, 1]
    # White times 0.2 has the probability 0.1 + 0.8 * 0.2 = 0.26 of class 1; what the map leaves out turns black.
    assert found.whole == pytest.approx([0.9, 0.1, 0.9, 0.9], abs=1e-6)
    assert found.explained == pytest.approx([0.26, 0.74, 0.9, 0.1], abs=1e-6)
    assert found.drop == pytest.approx([0.64 / 0.9, 0, 0, 0.8 / 0.9], abs=1e-5)
    assert found.increase.tolist() == [0, 1, 0, 0]
    values = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert values == {"n": 4, "average_drop": pytest.approx(0.4, abs=1e-5), "increase": 0.25}


def test_joined_changes_and_an_impossible_class():
    first, second = np.array([[0.5], [0.25]]), np.zeros((2, 1))
    joined = faith.ConfidenceChange.concatenate([faith.ConfidenceChange(*first), faith.ConfidenceChange(*second)])
    assert joined.drop.tolist() == [0.5, 0]
    assert joined.increase.tolist() == [0, 0]


def test_rank_correlation_agrees_with_scipy():
    rng = np.random.default_rng(2)
    tied = rng.integers(0, 4, (6, 60)).astype(float)
    other = tied + rng.integers(0, 5, (6, 60))
    other[1] = -tied[1]
    other[2] = rng.random(60)
    found = faith.rank_correlation(torch.tensor(tied), torch.tensor(other))
    expected = [stats.spearmanr(one, two).statistic for one, two in zip(tied, other, strict=True)]
    assert found.numpy() == pytest.approx(np.array(expected), abs=1e-12)
    assert found[1] == pytest.approx(-1)


def test_rank_correlation_of_constant_or_broken_rows_is_undefined():
    rows = torch.rand(4, 30, dtype=torch.float64)
    others = torch.rand(4, 30, dtype=torch.float64)
    rows[0] = 0.1
    others[1] = 0.3
    others[2, 5] = torch.nan
    assert faith.rank_correlation(rows, others).isnan().tolist() == [True, True, True, False]


def test_stages_run_from_the_head_to_the_input(small):
    names = [name for name, _ in find_stages(small)]
    assert names == ["head", "trunk.bn2", "trunk.conv2", "trunk.bn1", "trunk.conv1", "network (own)"]


def test_a_head_of_several_layers_is_one_stage(small):
    small.head = nn.Sequential(nn.Linear(8, 500), nn.ReLU(), nn.Linear(500, 2))
    assert [name for name, _ in find_stages(small)][:2] == ["head", "trunk.bn2"]


@pytest.mark.parametrize(
    ("arch", "cut", "last"),
    [
        ("timm/test_resnet", "", "trunk.conv1"),
        ("timm/test_vit", "", "trunk.patch_embed to trunk (own)"),
        ("timm/test_vit", "blocks.2", "trunk.patch_embed to trunk (own)"),  # a view that shares its modules
    ],
)
def test_every_parameter_becomes_random_once(arch, cut, last):
    model = build_model(ModelOptions(arch, 2, size_px=160))
    model = split_at(model, cut) if cut else model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 + 0.05 * torch.rand_like(parameter))
    seen = []

    def explain(network):
        seen.append({name: one.detach().clone() for name, one in network.named_parameters()})
        return torch.zeros(1, 4, 4)

    levels = randomisation_check(model, explain, seed=0)
    assert levels[0].name == "head"
    assert levels[-1].name == last
    assert 6 <= len(levels) <= 8
    for name in seen[0]:
        changes = [not torch.equal(before[name], after[name]) for before, after in pairwise(seen)]
        assert sum(changes) == 1, name
        assert changes[0] == name.removeprefix("whole.").startswith("head."), name


def test_the_network_itself_stays_as_it_is(small):
    small.train()
    before = {name: one.clone() for name, one in small.state_dict().items()}
    random_state = torch.get_rng_state()
    modes, last = [], {}

    def explain(network):
        modes.append(network.training)
        last.update(network.state_dict())
        return network.positions.detach()[:1]

    randomisation_check(small, explain, seed=0)
    assert modes == [False] * 7
    assert small.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert before.keys() == small.state_dict().keys()
    for name, one in small.state_dict().items():
        assert torch.equal(one, before[name]), name
    assert torch.equal(last["trunk.bn1.running_mean"], torch.zeros(8))
    assert torch.equal(last["trunk.bn2.running_var"], torch.ones(8))
    assert torch.equal(last["trunk.bn1.weight"], torch.ones(8))


def test_parameters_without_a_reset_keep_their_mean_and_spread(small):
    with torch.no_grad():
        small.positions.mul_(0.2).add_(3)
    seen = []
    randomisation_check(
        small, lambda network: seen.append(network.positions.detach().clone()) or torch.rand(1, 4, 4), seed=0
    )
    assert abs(np.corrcoef(seen[0].flatten(), seen[-1].flatten())[0, 1]) < 0.2
    assert seen[-1].mean() == pytest.approx(float(seen[0].mean()), abs=0.05)
    assert seen[-1].std() == pytest.approx(float(seen[0].std()), rel=0.15)


def gradient_map(images, targets):
    def explain(network):
        pixels = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(network(pixels).gather(1, targets[:, None]).sum(), pixels)
        return gradient.abs().sum(dim=1)

    return explain


def test_a_map_that_ignores_the_network_survives(small):
    images = torch.rand(4, 3, 16, 16)
    edges = images.mean(dim=1).diff(dim=1).abs()
    levels = randomisation_check(small, lambda network: edges, seed=1)
    assert [level.mean for level in levels] == pytest.approx([1] * 6)
    assert faith.survives(levels)


def test_a_map_that_follows_the_network_does_not(small):
    generator = torch.Generator().manual_seed(4)
    images = torch.rand(6, 3, 16, 16, generator=generator) * 2 - 1
    explain = gradient_map(images, torch.tensor([0, 1, 0, 1, 0, 1]))
    levels = randomisation_check(small, explain, seed=1)
    assert not faith.survives(levels)
    assert abs(levels[-1].mean) < 0.3
    again = randomisation_check(small, explain, seed=1)
    assert [level.mean for level in again] == [level.mean for level in levels]
    assert randomisation_check(small, explain, seed=2)[-1].mean != levels[-1].mean


def test_correlations_belong_to_the_level_at_which_the_network_changed(small):
    first = small.trunk.conv1.weight.detach().clone()
    original = torch.rand(2, 8, 8)

    def explain(network):
        same = torch.equal(network.trunk.conv1.weight, first)
        return original if same else 1 - original

    levels = randomisation_check(small, explain, seed=0)
    assert [level.mean for level in levels] == pytest.approx([1, 1, 1, 1, -1, -1])


def test_maps_are_ranked_at_no_more_than_64_pixels_a_side(small):
    coarse = torch.rand(1, 64, 64)
    steps = torch.tensor([[0.3, -0.3], [-0.1, 0.1]]).repeat(64, 64)
    blocks = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)
    calls = iter([blocks + steps, *[blocks - steps] * 6])
    levels = randomisation_check(small, lambda network: next(calls), seed=0)
    assert levels[0].mean == pytest.approx(1, abs=1e-6)


def test_constant_maps_are_counted_and_left_out(small):
    maps = torch.rand(3, 100, 90)
    flat = maps.clone()
    flat[0] = 0.1
    calls = iter([maps, *[flat] * 6])
    level = randomisation_check(small, lambda network: next(calls).numpy(), seed=0)[-1]
    assert np.isnan(level.correlations).tolist() == [True, False, False]
    assert level.num_undefined == 1
    assert level.mean == pytest.approx(1)
    values = json.loads(json.dumps(level.to_json(), allow_nan=False))
    assert values == {"name": "network (own)", "n": 3, "num_undefined": 1, "correlation": pytest.approx(1)}


@pytest.mark.gpu
def test_the_same_on_a_gpu(small, texture):
    targets, saliency = torch.tensor([1, 0, 1, 0, 1]), torch.rand(5, 32, 32)
    expected = follow(Corner(torch.square), texture, saliency, targets, steps=4)
    found = follow(Corner(torch.square), texture.cuda(), saliency.cuda(), targets.cuda(), steps=4)
    assert found.deletion_curves == pytest.approx(expected.deletion_curves, abs=2e-3)

    def random_weights(device):
        seen = []
        explain = gradient_map(torch.ones(1, 3, 16, 16, device=device), torch.tensor([1], device=device))
        levels = randomisation_check(
            small.to(device),
            lambda network: seen.append(network.trunk.conv1.weight.clone()) or explain(network),
            seed=0,
        )
        assert {weight.device.type for weight in seen} == {device}
        assert len(levels) == 6
        return seen[-1].cpu()

    assert torch.equal(random_weights("cpu"), random_weights("cuda"))


def test_survival_needs_a_correlation_above_the_limit_at_the_last_level():
    def level(*values):
        return faith.RandomisationLevel("", np.array(values))

    assert faith.survives([level(0.0), level(0.6)])
    assert not faith.survives([level(0.9), level(0.4)])
    assert faith.survives([level(0.4)], limit=0.3)
    assert not faith.survives([level(0.6)], limit=0.6)
    assert not faith.survives([level(np.nan, np.nan)])
    assert level(np.nan).to_json()["correlation"] is None
