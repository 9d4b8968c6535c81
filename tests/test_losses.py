"""The losses by hand, the angular margins also against pytorch-metric-learning."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from pytorch_metric_learning import losses as oracle
from torch import Tensor
from torch.nn import functional

from breastcli.errors import UsageError
from breastcli.losses import LOSSES, Loss, angular_margin, class_weights_of, log_prior_of, make_loss, margin_and_scale
from breastcli.models.heads import AngularLayer

LOGITS = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]])  # probabilities (1/4, 3/4) and (4/5, 1/5)
LABELS = torch.tensor([1, 1])
ANGULAR = [name for name in LOSSES.names() if LOSSES.get(name).margin]
# Loss, margin, angle to the true class in degrees, and what takes the place of its cosine (Li-ArcFace: of its angle).
# A-Softmax with lambda at 5, its end: (5 cos(theta) + psi(theta)) / 6.
BY_HAND = [
    ("cosface", 0.3, 60, 0.2),
    ("cosface", 0.3, 45, 0.4071068),
    ("arcface", 0.3, 60, 0.2217402),
    ("arcface", 0.3, 45, 0.4665606),
    ("arcface", math.pi / 12, 60, 0.2588190),  # cos(75)
    ("arcface", 0.3, 170, -1.0734638),  # beyond pi - m: cos(170) - 0.3 sin(0.3)
    ("li_arcface", 0.3, 60, 0.1423474),  # 1/3 - 0.6 / pi
    ("li_arcface", 0.3, 45, 0.3090141),  # 1/2 - 0.6 / pi
    ("a_softmax", 2, 60, 1 / 3),  # psi = cos(120) = -1/2
    ("a_softmax", 2, 45, 0.5892557),  # psi = cos(90) = 0
    ("a_softmax", 2, 120, -2 / 3),  # psi = -cos(240) - 2 = -3/2
    ("a_softmax", 3, 60, 1 / 4),  # psi = cos(180) = -1
    ("a_softmax", 4, 60, 1 / 6),  # psi = -cos(240) - 2 = -3/2
]


def plain(name: str, scale: float, degrees: list[float]) -> list[float]:
    """Return the logits without margin of angles to the classes."""
    if LOSSES.get(name).last_layer == "angle":
        return [scale * (1 - angle / 90) for angle in degrees]
    return [scale * math.cos(math.radians(angle)) for angle in degrees]


def default_loss(name: str, class_weights: Tensor | None = None) -> Loss:
    return make_loss(name, *margin_and_scale(name, None, None), class_weights)


def layer_of(name: str, directions: Tensor, scale: float) -> AngularLayer:
    layer = AngularLayer(directions.shape[1], len(directions), scale, linear=LOSSES.get(name).last_layer == "angle")
    with torch.no_grad():
        layer.weight.copy_(directions)
    return layer


# Cross-entropy and focal loss.


def test_cross_entropy_by_hand() -> None:
    loss = default_loss("cross_entropy")
    expected = (-math.log(3 / 4) - math.log(1 / 5)) / 2
    assert float(loss.training(LOGITS, LABELS, 0.0)) == pytest.approx(expected)
    assert float(loss.validation(LOGITS, LABELS)) == pytest.approx(expected)


def test_weighted_cross_entropy_by_hand() -> None:
    loss = default_loss("cross_entropy", torch.tensor([1.0, 3.0]))
    expected = (-math.log(1 / 4) - 3 * math.log(1 / 5)) / 4
    assert float(loss.training(LOGITS, torch.tensor([0, 1]), 0.0)) == pytest.approx(expected)


def test_focal_by_hand() -> None:
    value = default_loss("focal").training(LOGITS, LABELS, 0.0)
    expected = (-((1 / 4) ** 2) * math.log(3 / 4) - (4 / 5) ** 2 * math.log(1 / 5)) / 2
    assert float(value) == pytest.approx(expected)


def test_weighted_focal_by_hand() -> None:
    value = default_loss("focal", torch.tensor([1.0, 3.0])).training(LOGITS, torch.tensor([0, 1]), 0.0)
    expected = (-((3 / 4) ** 2) * math.log(1 / 4) - 3 * (4 / 5) ** 2 * math.log(1 / 5)) / 4
    assert float(value) == pytest.approx(expected)


# Margins.


@pytest.mark.parametrize("others", [[45.0], [45.0, 100.0]], ids=["two classes", "three classes"])
@pytest.mark.parametrize(("name", "margin", "angle", "expected"), BY_HAND)
def test_margins_by_hand(name: str, margin: float, angle: float, expected: float, others: list[float]) -> None:
    scale, label = 4.0, len(others)  # the true class is the last one
    logits = plain(name, scale, [*others, angle])
    hand = [*logits[:-1], scale * expected]
    value = make_loss(name, margin, scale).training(torch.tensor([logits]), torch.tensor([label]), 0.5)
    assert float(value) == pytest.approx(math.log(sum(map(math.exp, hand))) - hand[-1], abs=2e-6)


def test_a_margin_changes_the_true_class_of_each_image_only() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [1.0, 3.0, -4.0]])
    changed = angular_margin.cosface(0.25, 4.0)(logits, torch.tensor([2, 0]), 0.0)
    assert torch.equal(changed, torch.tensor([[2.0, -1.0, -0.5], [0.0, 3.0, -4.0]]))
    assert torch.equal(logits, torch.tensor([[2.0, -1.0, 0.5], [1.0, 3.0, -4.0]]))


@pytest.mark.parametrize("name", ["cosface", "arcface", "li_arcface"])
def test_no_margin_is_normalised_softmax(name: str) -> None:
    logits = 16 * torch.linspace(-1, 1, 42).view(-1, 2)
    labels = torch.arange(21) % 2
    loss = make_loss(name, LOSSES.get(name).neutral_margin, 16.0)
    assert torch.equal(loss.training(logits, labels, 0.5), functional.cross_entropy(logits, labels))
    assert torch.equal(loss.margin(logits, labels, 0.5), logits)


@pytest.mark.parametrize("progress", [0.0, 0.5])
def test_a_softmax_of_margin_one_is_normalised_softmax(progress: float) -> None:
    cosines = torch.linspace(-1, 1, 42).view(-1, 2)
    labels = torch.arange(21) % 2
    loss = make_loss("a_softmax", 1.0, 1.0)
    assert (loss.margin(cosines, labels, progress) - cosines).abs().max() < 1e-6
    difference = loss.training(cosines, labels, progress) - functional.cross_entropy(cosines, labels)
    assert abs(float(difference)) < 1e-6


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # within the other library
@pytest.mark.parametrize(
    ("name", "margin", "judge"),
    [
        ("arcface", 0.5, lambda **sizes: oracle.ArcFaceLoss(margin=math.degrees(0.5), **sizes)),
        ("cosface", 0.35, lambda **sizes: oracle.CosFaceLoss(margin=0.35, **sizes)),
        ("a_softmax", 2, lambda **sizes: oracle.SphereFaceLoss(margin=2, **sizes)),
        ("a_softmax", 3, lambda **sizes: oracle.SphereFaceLoss(margin=3, **sizes)),
        ("a_softmax", 4, lambda **sizes: oracle.SphereFaceLoss(margin=4, **sizes)),
    ],
)
def test_values_and_gradients_agree_with_pytorch_metric_learning(name, margin, judge, monkeypatch) -> None:
    monkeypatch.setattr(angular_margin, "annealing", lambda progress: 0.0)  # theirs has no annealing
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(3, 6, generator=generator)
    labels = torch.arange(45) % 3
    angles = torch.deg2rad(torch.linspace(2, 178, 45))  # several lie beyond pi - m
    aims = functional.normalize(directions)[labels]
    aside = torch.randn(45, 6, generator=generator)
    aside = functional.normalize(aside - (aside * aims).sum(dim=1, keepdim=True) * aims)
    lengths = 0.5 + 2 * torch.rand(45, 1, generator=generator)
    points = lengths * (angles.cos()[:, None] * aims + angles.sin()[:, None] * aside)

    theirs = judge(num_classes=3, embedding_size=6, scale=8)
    theirs.W = torch.nn.Parameter(directions.T.double())
    others = points.double().requires_grad_()
    expected = theirs(functional.normalize(others), labels)  # SphereFace multiplies by the length
    expected.backward()

    layer = layer_of(name, directions, 8.0)
    embeddings = points.clone().requires_grad_()
    value = make_loss(name, margin, 8.0).training(layer(embeddings), labels, 0.5)
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(embeddings.grad.double(), others.grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(layer.weight.grad.double(), theirs.W.grad.T, rtol=1e-3, atol=1e-5)
    assert others.grad.abs().min() > 0


def margined(margin: angular_margin.Margin, angles: Tensor) -> Tensor:
    """Return what takes the place of the cosines of the angles (N,)."""
    cosines = torch.stack([angles.cos(), torch.zeros_like(angles)], dim=1)
    return margin(cosines, torch.zeros(len(angles), dtype=torch.long), 0.5)[:, 0]


@pytest.mark.parametrize("times", [2, 3, 4])
def test_psi_falls_without_jumps_from_one(times: int, monkeypatch) -> None:
    monkeypatch.setattr(angular_margin, "annealing", lambda progress: 0.0)
    angles = torch.linspace(0, math.pi, 20_001, dtype=torch.float64)
    psi = margined(angular_margin.a_softmax(times, 1.0), angles)
    steps = psi.diff()
    assert (steps <= 0).all()
    assert steps.min() > -1.001 * times * math.pi / 20_000  # no steeper than its greatest slope
    assert float(psi[0]) == pytest.approx(1, abs=1e-4)
    assert float(psi[-1]) == pytest.approx(1 - 2 * times, abs=1e-4)


@pytest.mark.parametrize("margin", [0.1, 0.3, 0.5, 1.0, math.pi / 2])
def test_arcface_falls_over_the_half_turn(margin: float) -> None:
    angles = torch.linspace(0, math.pi, 20_001, dtype=torch.float64)
    values = margined(angular_margin.arcface(margin, 1.0), angles)
    assert (values.diff() <= 0).all()  # level within the limit that keeps the root off 0
    assert (values.diff()[20:-20] < 0).all()
    before = angles < math.pi - margin - 1e-6
    torch.testing.assert_close(values[before][20:], torch.cos(angles + margin)[before][20:])


def test_annealing_by_hand() -> None:
    assert angular_margin.annealing(0.0) == 1000
    assert angular_margin.annealing(25 / 28_000) == pytest.approx(250)  # 1000 / (1 + 0.12 * 25)
    assert angular_margin.annealing(0.0592) > 5  # 1000 / (1 + 3360 p) = 5 at p = 199 / 3360 = 0.05923
    assert angular_margin.annealing(0.0593) == 5
    assert angular_margin.annealing(1.0) == 5


def test_a_softmax_lets_its_margin_in_slowly() -> None:
    logits, labels = torch.tensor([[8.0, 4.0]]), torch.tensor([0])  # cos(60) at scale 16
    loss = make_loss("a_softmax", 2, 16.0)
    values = [float(loss.training(logits, labels, progress)) for progress in (0.0, 0.001, 0.01, 0.5)]
    assert values == sorted(values)
    # psi(60) = -1/2, so the logit starts at 16 (1000 / 2 - 1/2) / 1001 = 7.984016.
    assert values[0] == pytest.approx(math.log1p(math.exp(4 - 7.984016)), abs=1e-6)


# Numbers that arithmetic finds hard.

# Along the first class and against the second; the same a little aside; and without a direction.
POINTS = {"along": [3.0, 0.0, 0.0, 0.0], "nearly along": [3.0, 0.006, 0.0, 0.0], "zero": [0.0, 0.0, 0.0, 0.0]}
DIRECTIONS = torch.tensor([[1.0, 0, 0, 0], [-1, 0, 0, 0], [0, 1, 0, 0]])


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("name", ANGULAR)
def test_gradients_stay_finite(name: str, point: str, dtype: torch.dtype, autocast: bool) -> None:
    embeddings = torch.tensor([POINTS[point]] * 3, dtype=dtype, requires_grad=True)
    labels = torch.arange(3)  # at the angles 0, 180 and 90 degrees
    loss = default_loss(name)
    layer = layer_of(name, DIRECTIONS, LOSSES.get(name).default_scale)
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        logits = layer(embeddings)
        value = loss.training(logits, labels, 0.5)
    value.backward()
    assert logits.dtype == value.dtype == torch.float32
    if point == "along" and LOSSES.get(name).last_layer == "cosine":
        assert logits[0].tolist() == [layer.scale, -layer.scale, 0.0]
    assert torch.isfinite(value)
    assert torch.isfinite(layer.weight.grad).all()
    assert embeddings.grad.abs().max() < 65_504  # the largest number of float16; NaN is refused too


@pytest.mark.parametrize("name", ANGULAR)
def test_half_precision_embeddings_are_computed_in_single_precision(name: str) -> None:
    generator = torch.Generator().manual_seed(2)
    embeddings = torch.randn(8, 4, generator=generator).bfloat16()
    layer = layer_of(name, torch.randn(3, 4, generator=generator), 16.0)
    with torch.autocast("cpu", torch.bfloat16):
        within = layer(embeddings)
        again = layer(embeddings.float())
    assert within.dtype == torch.float32
    assert torch.equal(within, layer(embeddings.float()))
    assert torch.equal(within, again)


# What holds in training only.


@pytest.mark.parametrize("name", ANGULAR)
def test_margins_act_in_training_only(name: str) -> None:
    logits = 12 * torch.rand(9, 3, generator=torch.Generator().manual_seed(1)) - 6
    labels = torch.arange(9) % 3
    loss = default_loss(name)
    assert torch.equal(loss.validation(logits, labels), functional.cross_entropy(logits, labels))
    assert loss.training(logits, labels, 0.5) > loss.validation(logits, labels) + 1e-3


def test_logit_adjustment_by_hand() -> None:
    loss = make_loss("cross_entropy", 0.0, 1.0, log_prior=log_prior_of(torch.tensor([30, 10])))
    # (1/4, 3/4) times (3/4, 1/4) is 1/2 of each; (4/5, 1/5) times it is 12/13 and 1/13.
    assert float(loss.training(LOGITS, LABELS, 0.0)) == pytest.approx((math.log(2) + math.log(13)) / 2)
    assert float(loss.validation(LOGITS, LABELS)) == pytest.approx((-math.log(3 / 4) - math.log(1 / 5)) / 2)


def test_logit_adjustment_comes_after_the_margin() -> None:
    prior = torch.log(torch.tensor([0.75, 0.25]))
    value = make_loss("cosface", 0.25, 4.0, log_prior=prior).training(
        torch.tensor([[1.0, 0.0]]), torch.tensor([0]), 0.0
    )
    # The margin takes the logit of 1 down to 0; the prior is left.
    assert float(value) == pytest.approx(-math.log(0.75))


def test_class_weights_by_hand() -> None:
    weights = class_weights_of(torch.tensor([30, 10]), "weights")
    assert weights.tolist() == pytest.approx([2 / 3, 2])
    assert weights.dtype == torch.float32


def test_class_balanced_weights_by_hand() -> None:
    # b = 3/4: the effective numbers are (1 - 27/64) / (1/4) = 37/16 and 1; weights 16/37 and 1, over their mean 85/148.
    weights = class_weights_of(torch.tensor([3, 1]), "class_balanced")
    assert weights.tolist() == pytest.approx([64 / 85, 148 / 85])
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("rule", ["weights", "class_balanced"])
def test_class_weights_have_mean_one_over_the_images(rule: str) -> None:
    counts = torch.tensor([5000, 12, 340])
    weights = class_weights_of(counts, rule)
    assert float((weights * counts).sum() / counts.sum()) == pytest.approx(1)
    assert weights[1] > weights[2] > weights[0]
    assert class_weights_of(torch.tensor([7, 7]), rule).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("rule", ["none", "oversample", "logit_adjustment"])
def test_other_rules_have_no_class_weights(rule: str) -> None:
    assert class_weights_of(torch.tensor([30, 10]), rule) is None


# The registry and its options.


def test_margin_and_scale_have_defaults() -> None:
    assert margin_and_scale("a_softmax", None, None) == (4, 8)
    assert margin_and_scale("cosface", 0.35, None) == (0.35, 8)
    assert margin_and_scale("li_arcface", None, 30.0) == (0.3, 30)
    assert margin_and_scale("cross_entropy", None, None) == (0, 1)
    assert margin_and_scale("arcface", 0.0, None)[0] == 0
    assert margin_and_scale("a_softmax", 1.0, None)[0] == 1


@pytest.mark.parametrize(
    ("name", "margin", "scale", "words"),
    [
        ("cross_entropy", 0.2, None, "--margin 0.2: cross_entropy has none"),
        ("focal", None, 16.0, "--scale 16: focal has none"),
        ("cosface", -0.1, None, "--margin -0.1: too small for cosface: use 0 or more"),
        ("a_softmax", 0.0, None, "too small for a_softmax: use 1 or more"),
        ("cosface", math.nan, None, "too small"),
        ("arcface", 28.6, None, "--margin 28.6: too large for arcface: give radians, up to 1.57"),
        ("li_arcface", 17.0, None, "give radians"),
        ("cosface", None, 0.0, "--scale 0: not a scale: use a number above 0"),
        ("cosface", None, -4.0, "above 0"),
        ("cosface", None, math.nan, "above 0"),
        ("cosfase", None, None, "did you mean 'cosface'"),
    ],
)
def test_margin_and_scale_refuse_what_cannot_be(name, margin, scale, words) -> None:
    with pytest.raises(UsageError) as caught:
        margin_and_scale(name, margin, scale)
    assert words in str(caught.value)


@pytest.mark.parametrize("margin", [1.5, math.inf])
def test_a_softmax_needs_a_whole_number(margin: float) -> None:
    with pytest.raises(UsageError, match="give a whole number"):
        make_loss("a_softmax", margin, 16.0)


@pytest.mark.parametrize(("wrong", "right"), [("focl", "focal"), ("arc_face", "arcface"), ("asoftmax", "a_softmax")])
def test_unknown_loss_names_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean '{right}'"):
        LOSSES.get(wrong)


@pytest.mark.parametrize("name", LOSSES.names())
def test_every_entry_is_consistent(name: str) -> None:
    kind = LOSSES.get(name)
    assert kind.source
    assert kind.last_layer in ("linear", "cosine", "angle")
    assert (kind.margin is not None) == (kind.last_layer != "linear")
    assert kind.neutral_margin <= kind.default_margin <= kind.largest_margin
    assert margin_and_scale(name, None, None) == (kind.default_margin, kind.default_scale)


@pytest.mark.parametrize("class_weights", [None, torch.tensor([1.0, 2.0, 0.5])], ids=["", "weights"])
@pytest.mark.parametrize("name", LOSSES.names())
def test_every_loss_falls_towards_the_truth(name: str, class_weights: Tensor | None) -> None:
    loss = default_loss(name, class_weights)
    logits = torch.tensor([[0.0, 0.0, 0.0], [0.3, -0.4, 0.5], [-0.9, 0.2, 0.8], [0.9, -0.1, -0.9]], requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0])
    value = loss.training(logits, labels, 0.5)
    value.backward()
    assert value.ndim == 0
    right = functional.one_hot(labels, 3).bool()
    assert (logits.grad[right] < 0).all()
    assert (logits.grad[~right] > 0).all()
    with torch.no_grad():
        moved = logits - 0.1 * logits.grad
        assert loss.training(moved, labels, 0.5) < value
        before, after = loss.validation(logits, labels), loss.validation(moved, labels)
        assert after < before
        shifted = loss.validation(logits + 5.0, labels)  # log-probabilities do as well as logits
    assert shifted.item() == pytest.approx(before.item(), rel=1e-5)


@pytest.mark.parametrize("name", ANGULAR)
def test_every_margin_turns_the_last_layer_towards_the_truth(name: str) -> None:
    generator = torch.Generator().manual_seed(4)
    layer = layer_of(name, torch.randn(3, 8, generator=generator), LOSSES.get(name).default_scale)
    embeddings = torch.randn(12, 8, generator=generator)
    labels = torch.arange(12) % 3
    loss = default_loss(name)
    value = loss.training(layer(embeddings), labels, 0.5)
    value.backward()
    with torch.no_grad():
        layer.weight -= 0.01 * layer.weight.grad
        assert loss.training(layer(embeddings), labels, 0.5) < value
