from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision

from breastcli.cams import CamOptions, maps_and_gradient, saliency_maps
from breastcli.errors import UserError
from breastcli.models import Classifier, ModelOptions, build_model, find_builder
from breastcli.models.backbones import TorchvisionClassifier
from breastcli.models.splitting import layers_of, split_at
from breastcli.models.transformers import TorchvisionTransformer

VIT = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
# Network, further options, size; layers, and C and the side of their maps.
CASES: dict[str, tuple[dict[str, Any], int, dict[str, tuple[int, int]]]] = {
    "resnet34": ({}, 64, {"conv1": (64, 32), "bn1": (64, 32), "layer1": (64, 16), "layer3.2": (256, 4)}),
    "dalaresnet50": ({}, 64, {"layer2": (512, 8), "layer3.5": (1024, 4), "layer4": (2048, 2), "attention": (2048, 2)}),
    "seresnet50": ({}, 64, {"layer1.0": (256, 16), "layer3": (1024, 4)}),
    "densenet121": (
        {},
        64,
        {
            "features.denseblock3": (1024, 4),
            "features.transition2": (256, 4),
            "features.transition2.norm": (512, 8),
            "features.norm5": (1024, 2),
        },
    ),
    "densenet121_se": ({}, 64, {"features.denseblock2": (512, 8), "features.transition3": (512, 2)}),
    "vgg16inception": ({}, 32, {"features.9": (128, 8), "features": (512, 2), "inception": (736, 2)}),
    "torchvision/squeezenet1_1": ({}, 64, {"features.1": (64, 31), "features.7": (256, 7), "features": (512, 3)}),
    "torchvision/efficientnet_b0": ({}, 64, {"features.4": (80, 4), "features.8.0": (1280, 2)}),
    "small swin": (
        {},
        64,
        {"features.0.0": (24, 16), "features.1": (24, 16), "features.3.1": (48, 8), "permute": (48, 8)},
    ),
    "small vit": ({}, 64, {"blocks.1": (32, 4), "blocks.2": (32, 4), "blocks.3": (32, 4)}),
    "timm/vit_tiny_patch16_224": ({"settings": VIT}, 64, {"blocks.1": (32, 8), "blocks.3": (32, 8)}),
}
REGISTERS = {"settings": {**VIT, "reg_tokens": 4, "dynamic_img_size": True}}
WITHOUT_TOKENS = {"settings": {**VIT, "class_token": False, "global_pool": "avg"}}


def build(arch: str, size_px: int = 64, **options: Any) -> Classifier:
    torch.manual_seed(0)
    chosen = ModelOptions(arch, 3, size_px, **options)
    if arch == "small swin":  # torchvision's own classes in sizes that it has no name for
        swin = torchvision.models.SwinTransformer([4, 4], 24, [1, 2], [2, 2], [4, 4])
        return TorchvisionClassifier(swin, chosen).eval()
    if arch == "small vit":
        return TorchvisionTransformer(torchvision.models.VisionTransformer(64, 16, 4, 2, 32, 64), chosen).eval()
    return build_model(chosen).eval()


def check(model: Classifier, size_px: int, layers: dict[str, tuple[int, int]]) -> None:
    """Each cut gives maps of the right size, and the same logits and embedding as the whole network."""
    images = torch.randn(2, 3, size_px, size_px)
    known = layers_of(model)
    with torch.no_grad():
        expected = model(images)
        for layer, (channels, side) in layers.items():
            assert layer in known
            view = split_at(model, layer)
            maps = view.features(images)
            assert view.grid(maps).shape == (2, channels, side, side)
            for _ in range(2):  # twice, because what follows may work in place
                torch.testing.assert_close(view.classify(maps), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(view(images), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(view.embed(maps), model.embed(model.features(images)), rtol=1e-4, atol=1e-4)
            assert {id(one) for one in view.parameters()} == {id(one) for one in model.parameters()}


@pytest.mark.parametrize("arch", CASES)
def test_a_cut_changes_nothing(arch: str) -> None:
    options, size_px, layers = CASES[arch]
    check(build(arch, size_px, **options), size_px, layers)


@pytest.mark.parametrize("options", [REGISTERS, WITHOUT_TOKENS], ids=["registers", "no tokens"])
def test_a_cut_keeps_all_tokens(options: dict[str, Any]) -> None:
    check(build("timm/vit_tiny_patch16_224", **options), 64, {"blocks.1": (32, 8), "blocks.2": (32, 8)})


@pytest.mark.parametrize("stage", [1, 3])
def test_attention_lies_where_it_runs(stage: int) -> None:
    model = build("dalaresnet50", attention_stage=stage)
    names = layers_of(model)
    assert names.index("attention") == names.index(f"layer{stage}") + 1
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = split_at(model, f"layer{stage}").features(images)
        after = split_at(model, "attention").features(images)
        torch.testing.assert_close(after, model.attention(before))
        check(model, 64, {"attention": tuple(after.shape[1:3]), "layer4": (2048, 2)})


def test_maps_are_those_that_leave_the_layer() -> None:
    """Compared with a hook, for networks with channels in the second and in the last place."""
    for arch, layer, module, last in (
        ("torchvision/resnet18", "layer2.0", lambda trunk: trunk.layer2[0], False),
        ("small swin", "features.3", lambda trunk: trunk.features[3], True),
    ):
        model = build(arch)
        seen = []
        handle = module(model.trunk).register_forward_hook(lambda *args, seen=seen: seen.append(args[2].clone()))
        images = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            model(images)
            handle.remove()
            found = split_at(model, layer).features(images)
        assert torch.equal(found, seen[0].permute(0, 3, 1, 2) if last else seen[0])


def test_maps_are_those_that_enter_the_block() -> None:
    for arch, options in (("timm/vit_tiny_patch16_224", REGISTERS), ("small vit", {})):
        model = build(arch, **options)
        blocks = model.trunk.blocks if arch.startswith("timm") else model.trunk.encoder.layers
        seen = []
        handle = blocks[2].register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        images = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            model(images)
            handle.remove()
            view = split_at(model, "blocks.2")
            maps = view.grid(view.features(images))
        num_prefix = 5 if arch.startswith("timm") else 1
        torch.testing.assert_close(maps.flatten(2).mT, seen[0][:, num_prefix:])


def test_gradients_reach_the_cut_and_not_the_parameters() -> None:
    for arch, layer, side in (("torchvision/resnet18", "bn1", 32), ("timm/vit_tiny_patch16_224", "blocks.1", 8)):
        model = build(arch, **({"settings": VIT} if "vit" in arch else {}))
        images = torch.randn(2, 3, 64, 64)
        maps, gradient = maps_and_gradient(split_at(model, layer), images, torch.tensor([0, 2]))
        assert maps.shape == gradient.shape
        assert maps.shape[2:] == (side, side)
        assert (gradient.abs().sum(dim=(1, 2, 3)) > 0).all()
        assert all(one.grad is None for one in model.parameters())


def test_finer_maps() -> None:
    model = build("torchvision/resnet18")
    images = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    maps = saliency_maps(split_at(model, "layer1"), images, torch.tensor([0]), "layercam", CamOptions())
    assert maps.shape == (1, 64, 64)
    assert maps.unique().numel() > 1000  # 256 positions, interpolated


def test_a_view_has_the_mode_of_the_network() -> None:
    for arch, layer in (("torchvision/resnet18", "layer2"), ("timm/vit_tiny_patch16_224", "blocks.1")):
        model = build(arch, **({"settings": VIT} if "vit" in arch else {}), native_scaling=True)
        view = split_at(model, layer)
        assert not any(module.training for module in view.modules())
        assert view.scaling is model.scaling
        assert view.native_scaling == model.native_scaling
        model.train()
        assert split_at(model, layer).training
        view.eval()
        assert not any(module.training for module in model.modules() if module is not model)


def test_layers_are_listed_in_order() -> None:
    names = layers_of(build("torchvision/resnet18"))
    assert names == [
        *("conv1", "bn1", "relu", "maxpool"),
        *(name for i in range(1, 5) for name in (f"layer{i}.0", f"layer{i}.1", f"layer{i}")),
    ]
    assert layers_of(build("timm/vit_tiny_patch16_224", settings=VIT)) == ["blocks.1", "blocks.2", "blocks.3"]
    with torch.device("meta"):
        vgg = find_builder("vgg16")(ModelOptions("vgg16", 2), False)
    assert layers_of(vgg) == [*(f"features.{i}" for i in range(31)), "features"]


@pytest.mark.parametrize(
    ("arch", "layer", "message"),
    [
        ("torchvision/resnet18", "layer5", "--layer layer5: no such layer: did you mean layer4?"),
        ("torchvision/resnet18", "?", "use one of conv1, bn1, relu, maxpool, layer1, layer2, layer3, layer4$"),
        ("torchvision/squeezenet1_1", "feature.2", "did you mean features.2"),
        ("small vit", "blocks.4", "did you mean blocks.3"),
        ("small vit", "?", "use one of blocks.1, blocks.2, blocks.3$"),
        ("timm/test_resnet", "layer1", "--layer layer1: this network can be explained at its last maps only"),
        ("nasnetmobile", "conv0", "leave --layer out"),
    ],
)
def test_layers_that_are_not_there(arch: str, layer: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        split_at(build(arch), layer)
    assert error.value.exit_code == 1
