"""Heads and the angular last layer, by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from breastcli.models import ModelOptions, num_parameters
from breastcli.models.heads import HIDDEN_WIDTH, AngularLayer, make_head, two_layer_head

WIDTH, NUM_CLASSES = 6, 3
OPTIONS = ModelOptions("any", NUM_CLASSES, dropout=0.5, scale=10.0)
LAST_LAYERS = ["linear", "cosine", "angle"]
DIRECTIONS = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
# At 0, 90 and 45; 90, 180 and 135; 53.1301, 36.8699 and 8.1301 degrees to the directions.
EMBEDDINGS = torch.tensor([[1.0, 0.0], [0.0, -5.0], [3.0, 4.0]])


def options(**changes: str) -> ModelOptions:
    return dataclasses.replace(OPTIONS, **changes)


def layer_at(directions: Tensor, scale: float, *, linear: bool) -> AngularLayer:
    layer = AngularLayer(directions.shape[1], len(directions), scale, linear=linear)
    layer.weight = nn.Parameter(directions)
    return layer


def drops(head: nn.Module) -> list[float]:
    return [part.p for part in head.modules() if isinstance(part, nn.Dropout)]


@pytest.mark.parametrize("last_layer", LAST_LAYERS)
@pytest.mark.parametrize("head", ["own", "linear", "mlp"])
def test_shapes_and_counts(head: str, last_layer: str) -> None:
    made = make_head(WIDTH, options(head=head, last_layer=last_layer))
    assert made(torch.randn(5, WIDTH)).shape == (5, NUM_CLASSES)
    hidden = WIDTH * 512 + 512 if head == "mlp" else 0
    last = (512 if head == "mlp" else WIDTH) * NUM_CLASSES + (NUM_CLASSES if last_layer == "linear" else 0)
    assert num_parameters(made) == hidden + last
    assert drops(made) == [0.5]


@pytest.mark.parametrize("last_layer", LAST_LAYERS)
def test_the_last_layer_is_what_was_asked_for(last_layer: str) -> None:
    for head in ("own", "linear", "mlp"):
        last = list(make_head(WIDTH, options(head=head, last_layer=last_layer)).modules())[-1]
        if last_layer == "linear":
            assert type(last) is nn.Linear
        else:
            assert isinstance(last, AngularLayer)
            assert (last.linear, last.scale) == (last_layer == "angle", 10.0)


def test_a_published_head_gives_way_to_another_choice_only() -> None:
    own = two_layer_head(WIDTH, OPTIONS)
    assert make_head(WIDTH, options(head="own"), own) is own
    assert num_parameters(make_head(WIDTH, options(head="linear"), own)) == WIDTH * NUM_CLASSES + NUM_CLASSES
    assert make_head(WIDTH, options(head="mlp"), own) is not own


def test_two_layer_head_by_hand() -> None:
    head = two_layer_head(1, ModelOptions("any", 2, dropout=0.25)).eval()
    first, last = head[0], head[-1]
    with torch.no_grad():
        first.weight.copy_(torch.linspace(-1, 1, HIDDEN_WIDTH)[:, None])
        first.bias.zero_()
        last.weight.copy_(torch.stack([torch.ones(HIDDEN_WIDTH), torch.arange(HIDDEN_WIDTH) % 2]))
        last.bias.copy_(torch.tensor([0.0, 7.0]))
        logits = head(torch.tensor([[2.0]]))
    # ReLU leaves the upper half, 2 (2 k + 1) / 511 for k from 0 to 255; every second of them is an odd unit.
    kept = [2 * (2 * k + 1) / 511 for k in range(256)]
    assert logits[0].tolist() == pytest.approx([sum(kept), sum(kept[1::2]) + 7], rel=1e-5)
    assert drops(head) == [0.25]


def test_cosine_logits_by_hand() -> None:
    logits = layer_at(DIRECTIONS, 10.0, linear=False)(EMBEDDINGS)
    half = 10 * math.sqrt(0.5)
    expected = torch.tensor([[10, 0, half], [0, -10, -half], [6, 8, 1.4 * half]])
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-5)


def test_angle_logits_by_hand() -> None:
    logits = layer_at(DIRECTIONS, 10.0, linear=True)(EMBEDDINGS)
    expected = torch.tensor([[10, 0, 5], [0, -10, -5], [4.096655, 5.903345, 9.096655]])
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.01)  # near 0 and 180 degrees the arccos is held off
    torch.testing.assert_close(logits[:, 2], expected[:, 2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[2], expected[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("linear", [False, True])
def test_only_directions_matter(linear: bool) -> None:
    logits = layer_at(DIRECTIONS, 10.0, linear=linear)(EMBEDDINGS)
    longer = layer_at(DIRECTIONS * torch.tensor([[9.0], [0.2], [30.0]]), 10.0, linear=linear)
    torch.testing.assert_close(longer(EMBEDDINGS * 70), logits)
    torch.testing.assert_close(longer(EMBEDDINGS * 0.01), logits)


@pytest.mark.parametrize("linear", [False, True])
def test_logits_are_proportional_to_the_scale(linear: bool) -> None:
    logits = layer_at(DIRECTIONS, 1.0, linear=linear)(EMBEDDINGS)
    torch.testing.assert_close(layer_at(DIRECTIONS, 24.0, linear=linear)(EMBEDDINGS), 24 * logits)


@pytest.mark.parametrize("linear", [False, True])
def test_no_logit_exceeds_the_scale(linear: bool) -> None:
    directions = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    embeddings = torch.cat([100 * directions, -0.1 * directions, torch.randn(300, 5)])
    logits = layer_at(directions, 16.0, linear=linear)(embeddings)
    assert logits.abs().max() <= 16 * (1 + 1e-6)
    assert logits[:7].diag().min() > 15.98
    assert logits[7:14].diag().max() < -15.98


@pytest.mark.parametrize("linear", [False, True])
def test_an_embedding_without_a_direction_has_equal_logits(linear: bool) -> None:
    layer = layer_at(DIRECTIONS, 10.0, linear=linear)
    torch.testing.assert_close(layer(torch.zeros(1, 2)), torch.zeros(1, 3), rtol=0, atol=1e-5)
    weaker = layer(EMBEDDINGS[:1] * 1e-4)[0].tolist()  # a tenth of the length from which on directions count
    assert abs(weaker[0]) < 2


def test_new_directions_are_not_empty_and_follow_the_seed() -> None:
    torch.manual_seed(5)
    first = AngularLayer(64, 8, 16.0, linear=False)
    torch.manual_seed(5)
    again = AngularLayer(64, 8, 16.0, linear=False)
    assert torch.equal(first.weight, again.weight)
    assert first.weight.norm(dim=1).min() > 0.5
    assert list(first.state_dict()) == ["weight"]


@pytest.mark.parametrize("last_layer", LAST_LAYERS)
@pytest.mark.parametrize("head", ["own", "linear", "mlp"])
def test_dropout_acts_in_training_only(head: str, last_layer: str) -> None:
    torch.manual_seed(0)
    made = make_head(WIDTH, options(head=head, last_layer=last_layer))
    embeddings = torch.randn(4, WIDTH)
    assert not torch.equal(made(embeddings), made(embeddings))
    made.eval()
    assert torch.equal(made(embeddings), made(embeddings))
