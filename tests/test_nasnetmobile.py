from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import timm
import torch
from timm.layers.padding import pad_same
from timm.layers.pool2d_same import AvgPool2dSame
from timm.models.nasnet import NASNetALarge
from torch import Tensor, nn
from torch.nn import functional

from breastcli.errors import UserError
from breastcli.models import ModelOptions, build_model, num_parameters
from breastcli.models.nasnetmobile import (
    NORMAL_CELL,
    REDUCTION_CELL,
    WEIGHTS_URL,
    NasNetTrunk,
    Pooling,
    SeparableConvolution,
    nasnetmobile_trunk,
)
from breastcli.system.checkpoint import load_initial_weights

LARGE = {"stem_channels": 96, "width": 4032, "cells_per_stack": 6, "skip_reduction": True}
OPTIONS = ModelOptions("nasnetmobile", num_classes=2, size_px=64)
ONLY_IN_LARGE = tuple(f"cell_{number}." for number in (4, 5, 10, 11, 16, 17))


@pytest.fixture(scope="module")
def trunk() -> NasNetTrunk:
    torch.manual_seed(0)
    return NasNetTrunk().eval()


@pytest.fixture
def published() -> dict[str, Tensor]:
    """Tensors named and shaped as in the published file: timm's Large, narrowed and without the cells it has more."""
    torch.manual_seed(1)
    network = NASNetALarge(num_classes=1000, stem_size=32, num_features=1056)
    return {name: value for name, value in network.state_dict().items() if not name.startswith(ONLY_IN_LARGE)}


def serve(monkeypatch: pytest.MonkeyPatch, answer: dict[str, Tensor] | Exception) -> None:
    """Answer the download with tensors or with an error."""

    def download(url: str, **settings: Any) -> dict[str, Tensor]:
        assert url == WEIGHTS_URL
        assert settings["weights_only"]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)


def test_counts() -> None:
    with torch.device("meta"):
        mobile, large = NasNetTrunk(), NasNetTrunk(**LARGE)
    statistics = [value for name, value in mobile.named_buffers() if name.endswith(("running_mean", "running_var"))]
    assert num_parameters(mobile) == 4_232_978
    assert sum(one.numel() for one in statistics) == 36_738
    assert num_parameters(large) == 84_720_150


def test_batch_norms_are_those_of_the_published_weights(trunk: NasNetTrunk) -> None:
    norms = [module for module in trunk.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(0.001, 0.1)}


def randomise_batch_norms(network: nn.Module, images: Tensor) -> None:
    """Draw weights and biases and take the statistics of images; drawn statistics would let the signal fade away."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.momentum = None  # the statistics of all batches seen, here of one
    network.train()
    network(images)


def mean_of_existing_pixels(pool: AvgPool2dSame, maps: Tensor) -> Tensor:
    """TensorFlow's average pooling; timm's own counts the padding as zeros, which its pool2d_same.py admits."""
    filled = [pad_same(values, pool.kernel_size, pool.stride) for values in (maps, torch.ones_like(maps))]
    sums, counts = (functional.avg_pool2d(values, pool.kernel_size, pool.stride) for values in filled)
    return sums / counts


@torch.no_grad()
def test_large_agrees_with_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    oracle = timm.create_model("nasnetalarge", num_classes=0).double()  # so many random layers magnify rounding
    randomise_batch_norms(oracle, torch.rand(2, 3, 64, 64).double() * 2 - 1)
    oracle.eval()
    with torch.device("meta"):
        ours = NasNetTrunk(**LARGE).eval()
    ours.load_state_dict(oracle.state_dict(), assign=True)
    images = torch.rand(2, 3, 64, 96).double() * 2 - 1
    monkeypatch.setattr(AvgPool2dSame, "forward", mean_of_existing_pixels)
    expected = oracle.forward_features(images)
    assert (expected[0] - expected[1]).std() > 0.1  # what the images differ in comes through
    torch.testing.assert_close(ours(images), expected, rtol=1e-8, atol=1e-8)


def test_mobile_feeds_the_cell_after_a_reduction_with_what_was_reduced(trunk: NasNetTrunk) -> None:
    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    hooks = [
        trunk.get_submodule(name).register_forward_hook(
            lambda _, given, made, name=name: seen.update({name: (*given, made)})
        )
        for name in trunk.steps_back
    ]
    trunk(torch.rand(1, 3, 64, 64))
    for hook in hooks:
        hook.remove()
    for name, current, previous in (
        ("cell_stem_1", "cell_stem_0", None),
        ("cell_0", "cell_stem_1", "cell_stem_0"),
        ("cell_1", "cell_0", "cell_stem_1"),
        ("reduction_cell_0", "cell_3", "cell_2"),
        ("cell_6", "reduction_cell_0", "cell_3"),
        ("cell_7", "cell_6", "reduction_cell_0"),
        ("cell_12", "reduction_cell_1", "cell_9"),
        ("cell_15", "cell_14", "cell_13"),
    ):
        assert seen[name][0] is seen[current][2], name
        assert previous is None or seen[name][1] is seen[previous][2], name


@pytest.mark.parametrize("table", [NORMAL_CELL, REDUCTION_CELL])
def test_a_cell_concatenates_what_no_combination_uses(table: Any) -> None:
    used = {source for steps in table.combinations for _, source in steps}
    made = range(2, 2 + len(table.combinations))
    assert set(made) - used <= set(table.outputs) <= {1, *made}
    assert all(source < number for number, steps in zip(made, table.combinations, strict=True) for _, source in steps)


@pytest.mark.parametrize("side", range(1, 9))
@pytest.mark.parametrize("stride", [1, 2])
def test_same_padding(side: int, stride: int) -> None:
    ones = torch.ones(1, 1, side, side + 1)
    shape = (-(-side // stride), -(-(side + 1) // stride))
    for kind in ("average", "max"):
        pooled = Pooling(1, 1, stride, kind=kind)(-ones)  # padding with zeros would show as a larger value
        assert pooled.shape[-2:] == shape
        assert (pooled == -1).all()
    for kernel in (3, 5, 7):
        convolution = SeparableConvolution(1, 1, kernel, stride)
        for weight in convolution.parameters():
            nn.init.ones_(weight)
        padded = pad_same(ones, [kernel, kernel], [stride, stride])
        expected = functional.avg_pool2d(padded, kernel, stride) * kernel**2
        torch.testing.assert_close(convolution(ones), expected)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (32, 32, (1, 1)),
        (33, 33, (1, 1)),
        (64, 64, (2, 2)),
        (75, 75, (3, 3)),
        (96, 64, (3, 2)),
        (160, 160, (5, 5)),
        (224, 224, (7, 7)),
    ],
)
@torch.no_grad()
def test_shapes(trunk: NasNetTrunk, height: int, width: int, expected: tuple[int, int]) -> None:
    maps = trunk(torch.rand(1, 3, height, width))
    assert maps.shape == (1, 1056, *expected)
    assert maps.min() == 0
    assert maps.max() > 0


def test_backward_reaches_every_parameter() -> None:
    torch.manual_seed(3)
    model = build_model(OPTIONS).train()
    logits = model(torch.rand(2, 3, 64, 64) * 2 - 1)
    nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    for name, one in model.named_parameters():
        assert one.grad is not None, name
        assert one.grad.isfinite().all(), name
        assert one.grad.any(), name


def test_names_and_shapes_are_the_published_ones(trunk: NasNetTrunk, published: dict[str, Tensor]) -> None:
    ours = {name: value.shape for name, value in trunk.state_dict().items()}
    theirs = {name: value.shape for name, value in published.items()}
    assert theirs.pop("last_linear.weight") == (1000, 1056)
    assert theirs.pop("last_linear.bias") == (1000,)
    assert ours == theirs


def test_pretrained_takes_every_published_tensor(published: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    without_counters = {name: value for name, value in published.items() if "num_batches" not in name}
    serve(monkeypatch, without_counters)  # the published file is older than these counters
    loaded = nasnetmobile_trunk(pretrained=True).state_dict()
    for name, value in without_counters.items():
        assert name.startswith("last_linear.") or torch.equal(loaded[name], value), name


@pytest.mark.parametrize("change", ["missing", "surplus"])
def test_pretrained_is_strict(published: dict[str, Tensor], change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = published.pop("cell_3.conv_1x1.conv.weight")
    if change == "surplus":
        published |= {"cell_3.conv_1x1.conv.weight": tensor, "cell_4.conv_1x1.conv.weight": tensor}
    serve(monkeypatch, published)
    with pytest.raises(RuntimeError, match=r"cell_[34]\.conv_1x1"):
        nasnetmobile_trunk(pretrained=True)


@pytest.mark.parametrize("error", [URLError("no route to host"), ConnectionResetError("reset"), RuntimeError("hash")])
def test_without_network_one_line_says_what_to_do(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, error)
    with pytest.raises(UserError) as caught:
        build_model(OPTIONS, pretrained=True)
    message = str(caught.value)
    assert WEIGHTS_URL in message
    assert "--weights nasnetamobile-7e03cead.pth" in message
    assert "\n" not in message


def test_the_published_file_fits_weights_as_it_is(published: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "nasnetamobile-7e03cead.pth"
    torch.save(published, path)
    report = load_initial_weights(build_model(OPTIONS), path)
    assert all(name.startswith("head.") for name in report.missing), report
    assert report.unused == ["last_linear.bias", "last_linear.weight"]
