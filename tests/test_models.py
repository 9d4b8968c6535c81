from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

from breastcli.errors import UsageError, UserError
from breastcli.models import (
    ARCHITECTURES,
    Classifier,
    ModelOptions,
    build_model,
    num_parameters,
)
from breastcli.models.backbones import TorchvisionClassifier, modern_names
from breastcli.models.dalaresnet50 import STAGE_CHANNELS, DalaResNet50, DualActivatedAttention
from breastcli.models.freezing import set_training_mode
from breastcli.models.seresnet50 import SqueezeExcitation
from breastcli.models.vgg16inception import NaiveInception
from breastcli.system.checkpoint import load_checkpoint, save_checkpoint

DOORS = ["torchvision/vit_b_32", "torchvision/swin_t", "timm/swin_tiny_patch4_window7_224"]
TIMM = ["timm/test_resnet", "timm/test_efficientnet", "timm/test_vit", "timm/test_convnext", "timm/test_mambaout"]


def on_meta(name: str, **settings: int) -> Classifier:
    with torch.device("meta"):
        return ARCHITECTURES.get(name).build(ModelOptions(name, **({"num_classes": 2} | settings)), False)


# Rows of the papers' tables that our networks meet exactly, and the trunks that can be recovered from them.
COUNTS = [
    ("dalaresnet50", {"num_classes": 2}, 25_611_842),
    ("dalaresnet50", {"num_classes": 4, "reduction": 16}, 24_042_692),
    ("dalaresnet50", {"num_classes": 3, "reduction": 16}, 24_040_643),
    ("resnet50", {"num_classes": 2}, 23_512_130),
    ("resnet34", {"num_classes": 1000}, 21_797_672),  # printed as ResNet-50
    ("seresnet50", {"num_classes": 2}, 27_073_090),
    ("seresnet50", {"num_classes": 3}, 27_073_603),
    ("seresnet50", {"num_classes": 4}, 27_074_116),
    ("densenet121", {"num_classes": 2}, 9_028_970 - 1_025_000),  # the paper counts an unused layer
    ("densenet121", {"num_classes": 3}, 9_029_483 - 1_025_000),
    ("densenet121", {"num_classes": 4}, 9_029_996 - 1_025_000),
    ("vgg16", {"num_classes": 2}, 134_268_738),
    ("vgg16", {"num_classes": 3}, 134_272_835),
    ("vit", {"num_classes": 2}, 51_375_106),
    ("vit", {"num_classes": 3}, 51_376_131),
    ("swin", {"num_classes": 2}, 86_745_274),
    ("swin", {"num_classes": 3}, 86_746_299),
    ("dinov2_vitb14", {"num_classes": 2}, 86_582_018 - 768),  # the paper counts a mask token
]
TRUNKS = {
    "dalaresnet50": 23_508_032,
    "seresnet50": 26_022_976,
    "densenet201": 18_092_928,
    "nasnetmobile": 4_232_978,
    "resnet101": 42_500_160,
}


@pytest.mark.parametrize(("name", "settings", "count"), COUNTS)
def test_parameter_counts_of_the_papers(name: str, settings: dict[str, int], count: int) -> None:
    assert num_parameters(on_meta(name, **settings)) == count


@pytest.mark.parametrize(("name", "count"), TRUNKS.items())
def test_trunk_counts_of_the_papers(name: str, count: int) -> None:
    assert num_parameters(on_meta(name).trunk) == count


@pytest.mark.parametrize(
    ("name", "library", "known"),
    [
        ("resnet34", torchvision.models, "resnet34"),
        ("resnet101", torchvision.models, "resnet101"),
        ("densenet201", torchvision.models, "densenet201"),
        ("vgg19", torchvision.models, "vgg19"),
        ("mobilenet", timm, "mobilenetv1_100"),
        ("xception", timm, "legacy_xception"),
    ],
)
def test_counts_of_the_libraries(name: str, library: Any, known: str) -> None:
    with torch.device("meta"):
        make = library.create_model if library is timm else library.get_model
        network = make(known, num_classes=2)
    assert num_parameters(on_meta(name)) == num_parameters(network)


def test_every_printed_count_is_met_or_explained() -> None:
    for name in ARCHITECTURES.names():
        architecture = ARCHITECTURES.get(name)
        for num_classes, printed in architecture.published.items():
            met = num_parameters(on_meta(name, num_classes=num_classes)) == printed
            assert met or architecture.remark, name


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_attention_sits_after_its_stage(stage: int) -> None:
    model = on_meta("dalaresnet50", attention_stage=stage)
    assert isinstance(model, DalaResNet50)
    width = STAGE_CHANNELS[stage]
    assert (model.attention.down.in_features, model.attention.down.out_features) == (width, width // 4)
    seen = []
    for child in ("layer1", "layer2", "layer3", "layer4"):
        getattr(model.trunk, child).register_forward_hook(lambda *_, name=child: seen.append(name))
    model.attention.register_forward_hook(lambda *_: seen.append("attention"))
    model.eval()(torch.zeros(1, 3, 32, 32, device="meta"))
    assert seen.index("attention") == seen.index(f"layer{stage}") + 1


SIZES = {"dinov2_vitb14": 28, "vit": 32, "timm/test_vit": 160}


@pytest.mark.parametrize("name", [*ARCHITECTURES.names(), *TIMM, *DOORS])
def test_contract(name: str, tmp_path: Path) -> None:
    """Forward, backward, independence of the batch, and the way through a checkpoint."""
    torch.manual_seed(0)
    size_px = SIZES.get(name, 64)
    options = ModelOptions(name, 3, size_px)
    model = build_model(options).eval()
    images = torch.randn(2, 3, size_px, size_px)
    with torch.no_grad():
        maps = model.features(images)
        logits = model(images)
        assert model.grid(maps).shape[2] == model.grid(maps).shape[3]
        assert logits.shape == (2, 3)
        assert torch.equal(model.classify(maps), logits)
        assert model.embed(maps).ndim == 2
        torch.testing.assert_close(model(images[:1]), logits[:1], rtol=1e-4, atol=1e-4)
    known = {"classes": ["a", "b", "c"], "epoch": 1, "stain": None, "dataset": {"name": "x", "split_fingerprint": "0"}}
    save_checkpoint(tmp_path / "one.safetensors", model, options, known)
    loaded, facts = load_checkpoint(tmp_path / "one.safetensors", torch.device("cpu"))
    assert facts["classes"] == ["a", "b", "c"]
    restored = loaded.state_dict()
    assert all(torch.equal(restored[key], one) for key, one in model.state_dict().items())
    (tmp_path / "one.safetensors").unlink()  # up to half a gigabyte
    del loaded, restored
    set_training_mode(model, batch_norm="train")
    model(images).logsumexp(dim=1).sum().backward()
    without = [key for key, one in model.named_parameters() if one.grad is None or not one.grad.isfinite().all()]
    assert not without


@pytest.mark.parametrize("name", ["vit", "dinov2_vitb14", "timm/test_vit", "torchvision/vit_b_32"])
def test_patches_of_a_transformer_lie_where_they_were(name: str) -> None:
    """A change in one corner of the image reaches the maps of that corner first, and every patch has a gradient."""
    torch.manual_seed(0)
    size_px = {"dinov2_vitb14": 56, "timm/test_vit": 160, "torchvision/vit_b_32": 128}.get(name, 64)
    model = build_model(ModelOptions(name, 2, size_px)).eval()
    images = torch.randn(1, 3, size_px, size_px)
    changed = images.clone()
    changed[:, :, : size_px // 4, -size_px // 4 :] += 2  # the corner at the top right
    maps = model.features(images)
    difference = model.grid((model.features(changed) - maps).abs().sum(dim=1, keepdim=True))[0, 0]
    assert difference.argmax() == difference.shape[1] - 1
    maps = maps.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.classify(maps)[0, 0], maps)
    assert (model.grid(gradient).abs().sum(dim=1) > 0).all()


def test_native_scaling_is_that_of_the_published_weights() -> None:
    model = build_model(ModelOptions("torchvision/resnet18", 2, 64, native_scaling=True))
    images = torch.rand(1, 3, 4, 4)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(model.scaling(images * 2 - 1), expected)
    plain = build_model(ModelOptions("torchvision/resnet18", 2, 64))
    assert isinstance(plain.scaling, nn.Identity)
    assert set(plain.state_dict()) == set(model.state_dict())
    assert isinstance(build_model(ModelOptions("nasnetmobile", 2, 64, native_scaling=True)).scaling, nn.Identity)


def test_published_densenet_files_have_older_names() -> None:
    old = {"features.denseblock1.denselayer1.norm.1.weight": torch.ones(1), "features.norm5.bias": torch.ones(1)}
    assert set(modern_names(old)) == {"features.denseblock1.denselayer1.norm1.weight", "features.norm5.bias"}


def test_vit_has_no_published_weights() -> None:
    with pytest.raises(UserError, match="--pretrained: vit has none, nobody published weights of this size"):
        build_model(ModelOptions("vit", 2, 32), pretrained=True)


def test_sizes_that_a_patch_does_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="dinov2_vitb14 cannot take 64-pixel.*--size 56 or 70"):
        build_model(ModelOptions("dinov2_vitb14", 2, 64))


def test_dinov2_interpolates_its_grid() -> None:
    """At 518 pixels the 37 x 37 grid is used as it is; the same weights serve any multiple of 14."""
    torch.manual_seed(0)
    model = build_model(ModelOptions("dinov2_vitb14", 2, 28)).eval()
    assert model.trunk.pos_embed.shape == (1, 1 + 37 * 37, 768)
    assert model.grid(model.features(torch.zeros(1, 3, 42, 42))).shape[2:] == (3, 3)


@pytest.mark.parametrize("name", ["seresnet50", "densenet121_se"])
def test_gates_by_hand(name: str) -> None:
    gate = SqueezeExcitation(16, reduction=8, bias=name.startswith("densenet"))
    maps = torch.rand(2, 16, 3, 3)
    hidden = (maps.mean(dim=(2, 3)) @ gate.fc[0].weight.T + (0 if gate.fc[0].bias is None else gate.fc[0].bias)).relu()
    expected = torch.sigmoid(hidden @ gate.fc[2].weight.T + (0 if gate.fc[2].bias is None else gate.fc[2].bias))
    torch.testing.assert_close(gate(maps), maps * expected[:, :, None, None])


def test_densenet_with_open_gates_is_nearly_densenet() -> None:
    """ImageNet weights keep their meaning: forced fully open, the gates leave DenseNet-121 as it is."""
    torch.manual_seed(0)
    gated = build_model(ModelOptions("densenet121_se", 2, 32)).eval()
    assert len([one for one in gated.modules() if isinstance(one, SqueezeExcitation)]) == 58 + 3
    plain = build_model(ModelOptions("torchvision/densenet121", 2, 32)).eval()
    shared = {name: one for name, one in gated.state_dict().items() if ".se." not in name}
    plain.load_state_dict(shared)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for gate in (one for one in gated.modules() if isinstance(one, SqueezeExcitation)):
            assert gate(torch.ones(1, gate.fc[2].out_features, 1, 1)).min() > 0.9
            gate.fc[2].bias.fill_(100.0)
        torch.testing.assert_close(gated(images), plain(images))


def test_pooled_densenet_by_hand() -> None:
    model = build_model(ModelOptions("densenet121", 2, 32)).eval()
    maps = torch.randn(2, 1024, 2, 3)
    expected = torch.cat([maps.flatten(2).mean(dim=2), maps.flatten(2).max(dim=2).values], dim=1)
    torch.testing.assert_close(model.embed(maps), expected)


def test_naive_inception_by_hand() -> None:
    block = NaiveInception(4)
    maps = torch.randn(1, 4, 5, 5)
    joined = block(maps).detach()
    assert joined.shape == (1, 64 + 128 + 32 + 4, 5, 5)
    parts = joined.split([64, 128, 32, 4], dim=1)
    torch.testing.assert_close(parts[0], block.convolutions[0](maps).relu().detach())
    assert float(parts[3][0, 2, 2, 2]) == float(maps[0, 2, 1:4, 1:4].max())


def test_attention_by_hand() -> None:
    attention = DualActivatedAttention(4, 2)
    with torch.no_grad():
        attention.down.weight.zero_()
        attention.down.weight[0, 0] = 1
        attention.down.bias.copy_(torch.tensor([0.0, -1.0]))
        attention.up.weight.zero_()
        attention.up.weight[0, 0] = 2
        attention.up.weight[1, 1] = 100
        attention.up.bias.copy_(torch.tensor([0.5, 2.0, -3.0, 1.0]))
    maps = torch.ones(1, 4, 2, 2) * torch.tensor([3.0, 1, 1, 1])[None, :, None, None]
    # down gives (3, -1), LeakyReLU (3, -0.01); up gives (6.5, 1, -3, 1), ReLU (6.5, 1, 0, 1)
    expected = torch.tensor([3 * 6.5, 1.0, 0.0, 1.0])
    assert torch.allclose(attention(maps)[0, :, 0, 0], expected)


def test_gate_starts_open_and_learns() -> None:
    """A gate that ends in a ReLU must not silence channels before the first step."""
    torch.manual_seed(0)
    attention = DualActivatedAttention(512, 4)
    maps = torch.rand(8, 512, 7, 7)
    gate = attention(maps) / maps
    assert gate.min() > 0.5
    assert gate.max() < 1.5
    attention(maps).square().sum().backward()
    assert (attention.up.weight.grad.abs().sum(dim=1) > 0).all()
    assert (attention.down.weight.grad.abs().sum(dim=1) > 0).all()


FAMILIES = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "swin_t",
    "vgg11",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_torchvision_networks_are_cut_without_changing_them(name: str) -> None:
    size_px = 128
    settings = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None, num_classes=3, **settings).eval()
    images = torch.randn(1, 3, size_px, size_px)
    with torch.no_grad():
        expected = network(images)
        last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
        model = TorchvisionClassifier(network, ModelOptions(name, 3, size_px)).eval()
        model.head[1].load_state_dict(last.state_dict())
        assert torch.equal(model(images), expected)
        assert model.features(images).shape[2] == model.features(images).shape[3]


def test_the_other_torchvision_families() -> None:
    for name, size_px in (("squeezenet1_1", 64), ("maxvit_t", 224), ("vit_b_32", 64)):
        model = build_model(ModelOptions(f"torchvision/{name}", 3, size_px))
        assert model.features(torch.zeros(1, 3, size_px, size_px)).ndim == 4


def test_torchvision_transformer_equals_the_library() -> None:
    network = torchvision.models.vit_b_32(image_size=64, num_classes=3).eval()
    model = build_model(ModelOptions("torchvision/vit_b_32", 3, 64)).eval()
    model.trunk.load_state_dict(network.state_dict(), strict=False)
    model.head[1].load_state_dict(network.heads.head.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), network(images))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "swin_tiny_patch4_window7_224"])
def test_timm_networks_keep_their_forward(name: str) -> None:
    size_px = 224 if "swin" in name else 160
    torch.manual_seed(0)
    model = build_model(ModelOptions(f"timm/{name}", 3, size_px)).eval()
    network = timm.create_model(name, num_classes=3).eval()
    network.load_state_dict(model.trunk.state_dict(), strict=False)
    network.get_classifier().load_state_dict(model.head[1].state_dict())
    images = torch.randn(1, 3, size_px, size_px)
    with torch.no_grad():
        torch.testing.assert_close(model(images), network(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("dalaresnet", "did you mean 'dalaresnet50'"),
        ("timm/resnt18", "did you mean 'resnet18'"),
        ("torchvision/mobilnet_v2", "did you mean 'mobilenet_v2'"),
        ("torchvision/fcn_resnet50", "torchvision has no classifier"),
        ("keras/resnet50", "unknown architecture"),
    ],
)
def test_unknown_names_suggest_the_nearest(arch: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_model(ModelOptions(arch, 2))


def test_images_of_an_impossible_size_are_refused() -> None:
    with pytest.raises(UserError, match="cannot take 32-pixel images.*--size"):
        build_model(ModelOptions("torchvision/inception_v3", 2, 32))


def test_pretrained_offline_says_what_to_download(monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.error import URLError

    def offline(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"cannot download https://.*resnet50-\w+\.pth.*--weights resnet50") as caught:
        build_model(ModelOptions("dalaresnet50", 2, 64), pretrained=True)
    assert "\n" not in str(caught.value)
