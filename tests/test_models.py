from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

from breastcli.config import UsageError, UserError
from breastcli.models import (
    ARCHITECTURES,
    Classifier,
    ModelOptions,
    build_model,
    freeze,
    num_parameters,
    set_training_mode,
)
from breastcli.models.backbones import TorchvisionClassifier
from breastcli.models.dalaresnet50 import STAGE_CHANNELS, DalaResNet50, DualActivatedAttention

TIMM = ["timm/test_resnet", "timm/test_efficientnet", "timm/test_vit", "timm/test_convnext", "timm/test_mambaout"]


def on_meta(name: str, **settings: int) -> Classifier:
    with torch.device("meta"):
        return ARCHITECTURES.get(name).build(ModelOptions(name, **({"num_classes": 2} | settings)), False)


@pytest.mark.parametrize(
    ("name", "settings", "count"),
    [
        ("dalaresnet50", {"num_classes": 2}, 25_611_842),
        ("dalaresnet50", {"num_classes": 4, "reduction": 16}, 24_042_692),
        ("dalaresnet50", {"num_classes": 3, "reduction": 16}, 24_040_643),
        ("resnet50", {"num_classes": 2}, 23_512_130),
    ],
)
def test_parameter_counts_of_the_papers(name: str, settings: dict[str, int], count: int) -> None:
    assert num_parameters(on_meta(name, **settings)) == count


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


@pytest.mark.parametrize("name", [*ARCHITECTURES.names(), *TIMM])
def test_contract(name: str) -> None:
    torch.manual_seed(0)
    size_px = 160 if "vit" in name else 64
    model = build_model(ModelOptions(name, 3, size_px)).eval()
    images = torch.randn(4, 3, size_px, size_px)
    maps = model.features(images)
    assert maps.ndim == 4
    logits = model(images)
    assert logits.shape == (4, 3)
    assert torch.equal(model.classify(maps), logits)
    assert model.embed(maps).ndim == 2
    torch.testing.assert_close(model(images[:1]), logits[:1], rtol=1e-4, atol=1e-4)
    set_training_mode(model, batch_norm="train")
    model(images).logsumexp(dim=1).sum().backward()
    without = [key for key, one in model.named_parameters() if one.grad is None or not one.grad.isfinite().all()]
    assert not without


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


def test_freeze() -> None:
    model = build_model(ModelOptions("timm/test_resnet", 2, 64))
    assert freeze(model, "none") == 0
    assert freeze(model, "trunk") == num_parameters(model.trunk)
    assert num_parameters(model, trainable=True) == num_parameters(model.head)
    model = build_model(ModelOptions("timm/test_resnet", 2, 64))
    layers = [module for module in model.modules() if list(module.parameters(recurse=False))]
    freeze(model, "3")
    frozen = [all(not one.requires_grad for one in layer.parameters(recurse=False)) for layer in layers]
    assert frozen == [True] * 3 + [False] * (len(layers) - 3)
    for bad in ("1000", "-1", "head"):
        with pytest.raises(UserError, match=f"--freeze {bad}"):
            freeze(model, bad)


def test_frozen_batch_norms_keep_their_statistics() -> None:
    model = build_model(ModelOptions("timm/test_resnet", 2, 64))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    set_training_mode(model, batch_norm="train")
    assert all(norm.training for norm in norms)
    set_training_mode(model, batch_norm="frozen")
    assert not any(norm.training for norm in norms)
    assert model.head.training
    freeze(model, "trunk")
    set_training_mode(model, batch_norm="train")
    before = [norm.running_mean.clone() for norm in norms]
    model(torch.randn(4, 3, 64, 64))
    assert all(torch.equal(norm.running_mean, old) for norm, old in zip(norms, before, strict=True))
