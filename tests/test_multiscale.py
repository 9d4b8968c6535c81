from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

from breastcli.errors import UsageError, UserError
from breastcli.models import ARCHITECTURES, ModelOptions, build_model, multiscale, num_parameters
from breastcli.models.freezing import freeze, set_training_mode
from breastcli.models.heads import AngularLayer
from breastcli.models.multiscale import (
    FUSIONS,
    PUBLISHED_FREEZING,
    TRUNKS,
    ChainedParallelPooling,
    FeaturePyramid,
    MultiScale,
    MultiScaleContext,
    Scale,
    build,
    published_head,
    read_trunks,
    share_grid,
)

COUNTS = {"densenet201": 18_092_928, "nasnetmobile": 4_232_978, "resnet101": 42_500_160}
CHANNELS = {"densenet201": 1920, "nasnetmobile": 1056, "resnet101": 2048, "vgg16": 512}


def make_options(**settings: object) -> ModelOptions:
    return ModelOptions(**({"arch": "multiscale", "num_classes": 3, "size_px": 64} | settings))


def on_meta(**settings: object) -> MultiScale:
    with torch.device("meta"):
        return build(make_options(**settings), False)


def make_images(number: int, height_px: int = 64, width_px: int = 64) -> Tensor:
    """Return noise (B, 3, H, W) in float64 about a colour of each image."""
    colours = torch.rand(number, 3, 1, 1) * 2 - 1
    return (colours + 0.3 * torch.randn(number, 3, height_px, width_px)).double()


@pytest.fixture(scope="module")
def model() -> MultiScale:
    """The published network for three classes in float64; tests must leave it as it is.

    Its batch norms have seen images: without, random layers let one trunk's maps grow to thousands and another's fade.
    """
    torch.manual_seed(0)
    model = build_model(make_options())
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.momentum = None  # the statistics of all batches seen, here of one
    with torch.no_grad():
        model.train()(make_images(8).float())
    return model.double().eval()


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Put one convolution in each trunk's place; the list tells which were built and whether pretrained."""
    built: list[tuple[str, bool]] = []

    def make(name: str) -> Scale:
        def build_one(*, pretrained: bool) -> nn.Module:
            built.append((name, pretrained))
            return nn.Conv2d(3, CHANNELS[name], 32, stride=32)

        return Scale(build_one, CHANNELS[name])

    monkeypatch.setattr(multiscale, "TRUNKS", {name: make(name) for name in TRUNKS})
    return built


def test_trunks_have_the_printed_sizes() -> None:
    model = on_meta()
    assert {name: num_parameters(trunk) for name, trunk in model.trunk.items()} == COUNTS
    assert {name: scale.channels for name, scale in TRUNKS.items()} == CHANNELS


def test_count_that_the_docstring_names() -> None:
    by_fusion = {fusion: num_parameters(on_meta(num_classes=2, fusion=fusion)) for fusion in FUSIONS}
    assert by_fusion == {"pyramid": 71_823_700, "concatenation": 65_479_828}
    assert all(f"{count:,}" in MultiScale.__doc__ for count in by_fusion.values())


@torch.no_grad()
def test_trunks_are_torchvisions() -> None:
    images = torch.randn(2, 3, 32, 32)
    for name, last in (("densenet201", "classifier"), ("resnet101", "fc")):
        network = torchvision.models.get_model(name).eval()
        trunk = TRUNKS[name].build(pretrained=False).eval()
        trunk.load_state_dict((network.features if name == "densenet201" else network).state_dict(), strict=False)
        logits = network.get_submodule(last)(trunk(images).mean(dim=(2, 3)))
        torch.testing.assert_close(logits, network(images), msg=name)


def test_shapes(model: MultiScale) -> None:
    maps = model.features(make_images(2))
    assert maps.shape == (2, 3072, 2, 2)
    assert model.embed(maps).shape == (2, 3072)
    assert model.classify(maps).shape == (2, 3)


def test_trunks_that_round_differently_meet_on_the_largest_grid(model: MultiScale) -> None:
    images = make_images(1, 100, 64)
    sizes = {name: tuple(trunk(images).shape[2:]) for name, trunk in model.trunk.items()}
    assert sizes == {"densenet201": (3, 2), "nasnetmobile": (4, 2), "resnet101": (4, 2)}
    assert model.features(images).shape == (1, 3072, 4, 2)


@torch.no_grad()
def test_images_do_not_see_each_other(model: MultiScale) -> None:
    torch.manual_seed(1)
    images = make_images(2)
    alone = torch.cat([model(one[None]) for one in images])
    torch.testing.assert_close(model(images), alone, rtol=1e-8, atol=1e-8)
    assert (alone[0] - alone[1]).abs().max() > 0.1


def test_every_parameter_learns() -> None:
    torch.manual_seed(1)
    model = build_model(make_options())
    set_training_mode(model, batch_norm="train")
    nn.functional.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.tensor([0, 1, 2, 0])).backward()
    assert [name for name, one in model.named_parameters() if one.grad is None or not one.grad.isfinite().all()] == []
    assert [name for name, one in model.named_parameters() if not one.grad.any()] == []


def impulse() -> Tensor:
    maps = torch.zeros(1, 1, 7, 7)
    maps[0, 0, 3, 3] = 1
    return maps


@torch.no_grad()
def hand_made_context() -> MultiScaleContext:
    """One channel, projection and norms that change nothing, and kernels filled with their rate."""
    context = MultiScaleContext(1, width=1).eval()
    for norm in (context.projection_norm, context.dilated_norm):
        norm.eps = 0
    context.projection.weight.fill_(1)
    for rate, convolution in enumerate(context.dilated, start=1):
        convolution.weight.fill_(rate)
    return context


@torch.no_grad()
def test_context_by_hand() -> None:
    context = hand_made_context()
    expected = torch.tensor(
        [
            [3, 0, 0, 3, 0, 0, 3],
            [0, 2, 0, 2, 0, 2, 0],
            [0, 0, 1, 1, 1, 0, 0],
            [3, 2, 1, 7, 1, 2, 3],
            [0, 0, 1, 1, 1, 0, 0],
            [0, 2, 0, 2, 0, 2, 0],
            [3, 0, 0, 3, 0, 0, 3],
        ]
    )
    assert torch.equal(context(impulse())[0, 0], expected.float())
    assert torch.equal(context(impulse(), 2 * impulse())[0, 0], 3.0 * expected)
    assert not context(impulse(), -impulse()).any()
    assert not context(-impulse()).any()  # the first ReLU
    for convolution in context.dilated:
        convolution.weight.neg_()
    assert torch.equal(context(impulse()), torch.zeros(1, 1, 7, 7))  # the last ReLU: 1 - 6 < 0
    for convolution in context.dilated:
        convolution.weight.zero_()
    assert torch.equal(context(impulse()), impulse())  # the residual


@torch.no_grad()
def test_context_normalises_projection_and_context_apart() -> None:
    context = hand_made_context()
    context.projection_norm.running_mean.fill_(-1)  # adds 1
    context.dilated_norm.running_var.fill_(4)  # halves
    seen = context(torch.zeros(1, 1, 7, 7))[0, 0]
    assert seen[3, 3] == 1 + (9 * 1 + 9 * 2 + 9 * 3) / 2
    assert seen[0, 0] == 1 + (4 * 1 + 4 * 2 + 4 * 3) / 2


@torch.no_grad()
def test_each_scale_is_merged_into_the_next_from_shallow_to_high() -> None:
    torch.manual_seed(2)
    published = {name: CHANNELS[name] for name in COUNTS}
    pyramid = FeaturePyramid(published).eval()
    assert list(pyramid.contexts) == ["nasnetmobile", "resnet101", "densenet201"]
    maps = {name: torch.randn(2, width, 3, 4) for name, width in published.items()}
    shallow = pyramid.contexts["nasnetmobile"](maps["nasnetmobile"])
    middle = pyramid.contexts["resnet101"](maps["resnet101"], shallow)
    high = pyramid.contexts["densenet201"](maps["densenet201"], middle)
    fused = pyramid(maps)
    assert fused.shape == (2, 4 * 3 * 256, 3, 4)
    assert torch.equal(fused[:, : 3 * 256], torch.cat([shallow, middle, high], dim=1))
    assert torch.equal(fused, ChainedParallelPooling()(fused[:, : 3 * 256]))


def largest_around(maps: Tensor, window: int) -> Tensor:
    """Maximum pooling of maps (C, h, w) with stride 1, pixel by pixel."""
    reach = window // 2
    pooled = torch.empty_like(maps)
    for channel in range(maps.shape[0]):
        for row in range(maps.shape[1]):
            for column in range(maps.shape[2]):
                rows = slice(max(row - reach, 0), row + reach + 1)
                columns = slice(max(column - reach, 0), column + reach + 1)
                pooled[channel, row, column] = maps[channel, rows, columns].max()
    return pooled


def test_chained_pooling_by_hand() -> None:
    maps = torch.randn(2, 9, 17) - 5  # negative, so that a border of zeros would show
    by_3 = largest_around(maps, 3)
    by_5 = largest_around(by_3, 5)
    by_7 = largest_around(by_5, 7)
    pooled = ChainedParallelPooling()(maps[None])[0]
    assert torch.equal(pooled, torch.cat([maps, by_3, by_5, by_7]))
    assert torch.equal(by_7, largest_around(maps, 13))  # chained, so the last sees 6 pixels each way


def test_share_grid() -> None:
    ramp = torch.tensor([0.0, 1.0]).expand(1, 2, 3, 2)
    wide = torch.randn(1, 5, 1, 4)
    shared = share_grid({"ramp": ramp, "wide": wide})
    assert torch.equal(shared["ramp"], torch.tensor([0, 0.25, 0.75, 1]).expand(1, 2, 3, 4))
    assert torch.equal(shared["wide"], wide.expand(1, 5, 3, 4))
    same = share_grid({"a": wide, "b": wide + 1})
    assert same["a"] is wide


def test_head_is_table_6() -> None:
    head = published_head(3488, make_options(num_classes=2, dropout=0.9))
    assert [type(layer) for layer in head] == [
        nn.Dropout, nn.BatchNorm1d, nn.Linear, nn.ReLU, nn.Dropout, nn.BatchNorm1d, nn.Linear
    ]  # fmt: skip
    assert (head[0].p, head[4].p) == (0.2, 0.4)
    assert head[1].eps == head[5].eps == 0.001
    assert (num_parameters(head[2]), num_parameters(head[6])) == (446_592, 258)


def test_he_initialisation(light: list) -> None:
    torch.manual_seed(3)
    model = build(make_options(num_classes=64), False)
    new = [*model.fusion.modules(), *model.head.modules()]
    layers = [module for module in new if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 3 * 4 + 2
    for layer in layers:
        fan_in = layer.weight[0].numel()
        assert float(layer.weight.detach().std()) == pytest.approx((2 / fan_in) ** 0.5, rel=0.03)
        assert layer.bias is None or not layer.bias.any()


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("names", ["densenet201", "nasnetmobile", "resnet101,nasnetmobile"])
def test_subsets(light: list, names: str, fusion: str) -> None:
    chosen = names.split(",")
    model = build(make_options(trunks=names, fusion=fusion), False).eval()
    assert list(model.trunk) == chosen == [name for name, _ in light]
    width = len(chosen) * 1024 if fusion == "pyramid" else sum(CHANNELS[name] for name in chosen)
    assert model.embed(model.features(torch.zeros(1, 3, 64, 64))).shape == (1, width)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize("names", ["densenet201,nasnetmobile,resnet101", " resnet101, densenet201,nasnetmobile"])
@torch.no_grad()
def test_concatenation_keeps_the_order_given(light: list, names: str) -> None:
    model = build(make_options(trunks=names, fusion="concatenation"), False).eval()
    images = torch.randn(2, 3, 64, 64)
    embedding = model.embed(model.features(images))
    assert embedding.shape == (2, 1920 + 1056 + 2048)
    expected = [model.trunk[name.strip()](images).mean(dim=(2, 3)) for name in names.split(",")]
    torch.testing.assert_close(embedding, torch.cat(expected, dim=1))


@pytest.mark.parametrize("head", ["own", "linear", "mlp"])
@pytest.mark.parametrize("last", ["linear", "cosine", "angle"])
def test_heads(light: list, head: str, last: str) -> None:
    model = build(make_options(head=head, last_layer=last, scale=8.0, dropout=0.9), False).eval()
    assert isinstance(model.head[-1], nn.Linear if last == "linear" else AngularLayer)
    dropouts = [layer.p for layer in model.head if isinstance(layer, nn.Dropout)]
    assert dropouts == ([0.2, 0.4] if head == "own" else [0.9])
    logits = model(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 3)
    assert last == "linear" or logits.abs().max() <= 8


@torch.no_grad()
def test_bfloat16(light: list) -> None:
    torch.manual_seed(4)
    model = build(make_options(), False).eval()
    images = torch.randn(8, 3, 64, 64)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    assert (logits - expected).std() < 0.05 * expected.std()


def test_pretrained_reaches_each_trunk(light: list[tuple[str, bool]]) -> None:
    build(make_options(), True)
    assert light == [("densenet201", True), ("nasnetmobile", True), ("resnet101", True)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("densenet201,resnet10", "unknown trunk 'resnet10'.*did you mean 'resnet101'"),
        ("mystery", "unknown trunk 'mystery'.*known: densenet201, nasnetmobile, resnet101, vgg16"),
        ("", "unknown trunk ''.*known: "),
        ("resnet101,nasnetmobile,resnet101", "resnet101 is listed twice.*once"),
    ],
)
def test_refused_trunks(names: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"(?s)--trunks: {message}"):
        build_model(make_options(trunks=names))


def test_spaces_between_trunks() -> None:
    assert read_trunks("resnet101, densenet201") == ["resnet101", "densenet201"]


def keras_densenet201() -> list[str]:
    layers = ["input", "pad", "conv", "norm", "relu", "pad", "pool"]
    for num_blocks in (6, 12, 48, 32):
        layers += ["norm", "relu", "conv", "norm", "relu", "conv", "concatenate"] * num_blocks
        layers += ["norm", "relu", "conv", "pool"]
    return layers


def keras_resnet101() -> list[str]:
    layers = ["input", "pad", "conv", "norm", "relu", "pad", "pool"]
    inner = ["conv", "norm", "relu", "conv", "norm", "relu"]
    for num_blocks in (3, 4, 23, 3):
        layers += [*inner, "conv", "conv", "norm", "norm", "add", "relu"]  # shortcut and third convolution alternate
        layers += [*inner, "conv", "norm", "add", "relu"] * (num_blocks - 1)
    return layers


def test_published_freezing_is_what_keras_counts() -> None:
    # Compared with keras.applications of Keras 3.15.1: layer 200 is conv4_block9_1_conv, layer 50 conv3_block1_add.
    counts = {
        name: sum(layer in ("conv", "norm") for layer in layers[:first])
        for name, layers, first in (("densenet201", keras_densenet201(), 200), ("resnet101", keras_resnet101(), 50))
    }
    assert ",".join(f"{name}:{count}" for name, count in counts.items()) == PUBLISHED_FREEZING


def test_published_freezing() -> None:
    model = on_meta()
    num_frozen = freeze(model, PUBLISHED_FREEZING)
    first_learning = {"densenet201": "denseblock3.denselayer9.norm2", "resnet101": "layer2.1.conv1"}
    for name, first in first_learning.items():
        layers = {key: one for key, one in model.trunk[name].named_modules() if list(one.parameters(recurse=False))}
        position = list(layers).index(first)
        states = [{one.requires_grad for one in layer.parameters()} for layer in layers.values()]
        assert states == [{False}] * position + [{True}] * (len(layers) - position)
    whole = (model.trunk["nasnetmobile"], model.fusion, model.head)
    assert all(one.requires_grad for part in whole for one in part.parameters())
    assert num_frozen == num_parameters(model) - num_parameters(model, trainable=True) == 2_780_608


def test_freezing_a_trunk_that_was_left_out_is_refused() -> None:
    with pytest.raises(UserError, match="--freeze densenet201:112: no such stage"):
        freeze(on_meta(trunks="resnet101"), PUBLISHED_FREEZING)


def test_the_papers_trainable_count_is_that_of_a_concatenation_with_vgg16() -> None:
    """Deebani et al., Table 6, prints 37,494,676 trainable parameters, and VGG-16's trunk under ResNet-101's name."""
    options = ModelOptions("multiscale", 2, trunks="densenet201,nasnetmobile,vgg16", fusion="concatenation")
    with torch.device("meta"):
        model = ARCHITECTURES.get("multiscale").build(options, False)
    assert num_parameters(model) == 37_494_676
