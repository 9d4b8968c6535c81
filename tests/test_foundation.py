from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from huggingface_hub.utils import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import save_file
from timm.layers import SwiGLUPacked
from torch import Tensor, nn
from torch.nn import functional

from breastcli.errors import UsageError, UserError
from breastcli.models import (
    IMAGENET_SCALING,
    SYMMETRIC_SCALING,
    Classifier,
    ModelOptions,
    build_model,
    find_builder,
    foundation,
    num_parameters,
)
from breastcli.models.foundation import BIOPTIMUS_SCALING, KNOWN, SWIGLU, Encoder, complete, decode
from breastcli.models.transformers import TimmTransformer, timm_names
from breastcli.system.checkpoint import load_checkpoint, load_initial_weights, save_checkpoint

WIDTH = 32
TINY = {"patch_size": 16, "embed_dim": WIDTH, "depth": 2, "num_heads": 2}
VIT = Encoder("nobody", "none", "vit_tiny_patch16_224", TINY)
REGISTERS = {"reg_tokens": 4, "init_values": 1e-5, "mlp_ratio": 5.3375, "dynamic_img_size": True, **SWIGLU}
VIRCHOW = Encoder("nobody", "none", "vit_tiny_patch16_224", {**TINY, **REGISTERS}, "token+mean", BIOPTIMUS_SCALING)


@pytest.fixture(autouse=True)
def tiny_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KNOWN, "Tiny/ViT", VIT)
    monkeypatch.setitem(KNOWN, "Tiny/Virchow", VIRCHOW)
    for door in ("load_model_config_from_hf", "load_state_dict_from_hf"):
        monkeypatch.setattr(foundation, door, refuse)


def refuse(name: str, **_: Any) -> NoReturn:
    raise LocalEntryNotFoundError(f"no network in tests\n(asked for {name})")


def tiny(arch: str, size_px: int = 64, **settings: Any) -> Classifier:
    torch.manual_seed(0)
    return build_model(ModelOptions(arch, 3, size_px, **settings))


def scramble(module: nn.Module) -> None:
    """Give every parameter other values, also layer scales, which start near zero, and biases, which start at it."""
    with torch.no_grad():
        for one in module.parameters():
            one.normal_(std=0.3)


def assert_one_line(error: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_the_table_makes_options_complete() -> None:
    options = complete(ModelOptions("hf-hub:Tiny/Virchow", 2))
    assert options.settings["architecture"] == "vit_tiny_patch16_224"
    assert options.settings["arguments"]["mlp_layer"] == "SwiGLUPacked"
    assert json.loads(json.dumps(asdict(options))) == asdict(options)  # plain values survive a checkpoint
    assert complete(options) is options
    assert complete(ModelOptions("hf-hub:tiny/virchow@main", 2)).settings == options.settings
    other = ModelOptions("timm/test_vit", 2)
    assert complete(other) is other


@pytest.mark.parametrize("name", ["UNI", "", "a/b/c", "https://hf.co/a/b"])
def test_a_name_without_owner_is_refused(name: str) -> None:
    with pytest.raises(UsageError) as error:
        complete(ModelOptions(f"hf-hub:{name}", 2))
    assert_one_line(error, "hf-hub:<owner>/<name>")


def test_the_hub_describes_other_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    described = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "input_size": (3, 224, 224)}
    arguments = {**TINY, "num_classes": 0, "global_pool": "", "dynamic_img_size": False, "qkv_bias": False}
    answer = (described, "vit_tiny_patch16_224", arguments)
    monkeypatch.setattr(foundation, "load_model_config_from_hf", lambda name: answer if name == "some/lab" else None)
    options = complete(ModelOptions("hf-hub:some/lab", 2, 96))
    assert options.settings == {
        "architecture": "vit_tiny_patch16_224",
        "arguments": {**TINY, "qkv_bias": False},
        "pooling": "own",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
    }
    model = build_model(options)
    assert model.native_scaling == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert model.trunk.patch_embed.grid_size == (6, 6)
    assert model.trunk.blocks[0].attn.qkv.bias is None


def absent(_: str) -> NoReturn:
    raise RepositoryNotFoundError("401 Client Error", response=NoResponse())


class NoResponse:
    headers: dict[str, str] = {}  # noqa: RUF012
    request = None


def transformers_config(_: str) -> NoReturn:
    raise KeyError("architecture")


def unknown_network(_: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    return {}, "vit_of_the_future", {}


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        (refuse, "the hub cannot be reached"),
        (absent, "hf auth login"),
        (transformers_config, "names no architecture"),
        (unknown_network, "vit_of_the_future"),
    ],
)
def test_a_repository_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, answer: Any, part: str) -> None:
    monkeypatch.setattr(foundation, "load_model_config_from_hf", answer)
    with pytest.raises(UserError) as error:
        complete(ModelOptions("hf-hub:some/lab", 2))
    assert_one_line(error, "hf.co/some/lab", part)


def test_an_argument_that_timm_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KNOWN, "tiny/odd", Encoder("", "", "vit_tiny_patch16_224", {**TINY, "colour": "red"}))
    with pytest.raises(UserError) as error:
        tiny("hf-hub:tiny/odd")
    assert_one_line(error, "tiny/odd", "colour")


def test_a_checkpoint_is_rebuilt_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    described = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    answer = (described, "vit_tiny_patch16_224", dict(TINY))
    monkeypatch.setattr(foundation, "load_model_config_from_hf", lambda _: answer)
    options = complete(ModelOptions("hf-hub:some/lab", 3, 64, native_scaling=True))
    model = build_model(options)
    known = {"classes": ["a", "b", "c"], "epoch": 1, "stain": None, "dataset": {"name": "x", "split_fingerprint": "0"}}
    save_checkpoint(tmp_path / "best.safetensors", model, options, known)
    monkeypatch.setattr(foundation, "load_model_config_from_hf", refuse)
    again, _ = load_checkpoint(tmp_path / "best.safetensors", torch.device("cpu"))
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(again(images), model(images))


def test_layers_are_decoded() -> None:
    decoded = decode({**SWIGLU, "depth": 3})
    assert decoded == {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "depth": 3}
    for key in SWIGLU:
        with pytest.raises(UserError, match=f"{key} 'os.system'"):
            decode({key: "os.system"})


@pytest.mark.parametrize("changes", [{}, {"no_embed_class": True}, {"reg_tokens": 0}])
def test_the_mean_of_the_patches_follows_the_class_token(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setitem(
        KNOWN, "Tiny/Virchow", Encoder("", "", VIRCHOW.architecture, {**VIRCHOW.arguments, **changes}, "token+mean")
    )
    model = tiny("hf-hub:Tiny/Virchow", size_px=48)
    scramble(model.trunk)
    images = torch.randn(2, 3, 48, 48)
    tokens = model.trunk.forward_features(images)
    assert tokens.shape == (2, 1 + changes.get("reg_tokens", 4) + 9, WIDTH)
    expected = torch.cat([tokens[:, 0], tokens[:, -9:].mean(dim=1)], dim=1)
    torch.testing.assert_close(model.embed(model.extract(images)), expected)
    assert model(images).shape == (2, 3)


def test_the_class_token_alone() -> None:
    model = tiny("hf-hub:Tiny/ViT")
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.embed(model.extract(images)), model.trunk.forward_features(images)[:, 0])


@pytest.mark.parametrize("name", [name for name in KNOWN if not name.startswith("Tiny/")])
def test_published_encoders(name: str) -> None:
    row = KNOWN[name]
    options = complete(ModelOptions(f"hf-hub:{name}", 2))
    with torch.device("meta"):
        model = find_builder(options.arch)(options, False)
    digits = 1 if row.millions < 1000 else -1  # printed as 303.4 million or 1.13 billion
    assert round(num_parameters(model.trunk) / 1e6, digits) == row.millions
    assert model.trunk.global_pool == "token"
    assert model.native_scaling == (BIOPTIMUS_SCALING if name.startswith("bioptimus/") else IMAGENET_SCALING)
    images = torch.zeros(1, 3, 224, 224, device="meta")
    assert model(images).shape == (1, 2)


def test_the_table_decides_the_scaling() -> None:
    assert tiny("timm/vit_tiny_patch16_224").native_scaling == SYMMETRIC_SCALING
    assert tiny("hf-hub:Tiny/ViT").native_scaling == IMAGENET_SCALING
    model = tiny("hf-hub:Tiny/Virchow", native_scaling=True)
    mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in BIOPTIMUS_SCALING)
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(model.scaling(2 * images - 1), (images - mean) / std)


def test_sizes() -> None:
    assert tiny("hf-hub:Tiny/ViT", size_px=48).trunk.patch_embed.grid_size == (3, 3)
    assert tiny("hf-hub:Tiny/Virchow", size_px=48).trunk.patch_embed.grid_size == (14, 14)  # dynamic
    for name in ("ViT", "Virchow"):
        with pytest.raises(UserError) as error:
            tiny(f"hf-hub:Tiny/{name}", size_px=100)
        assert_one_line(error, f"hf-hub:Tiny/{name}", "100", "--size 96 or 112")
    with pytest.raises(UserError, match="--size 96 or 112"):
        tiny("timm/vit_tiny_patch16_224", size_px=100)


def named_by_transformers(model: Classifier, *, head: bool) -> dict[str, Tensor]:
    """Return the names and shapes of a file of the transformers library for a ViT, with random values."""
    grid = model.trunk.pos_embed.shape[1]
    square, inner = (WIDTH, WIDTH), 4 * WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.position_embeddings": (1, grid, WIDTH),
        "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, 16, 16),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,),
    }
    norms = ["layernorm"]
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        norms += [f"{layer}.layernorm_before", f"{layer}.layernorm_after"]
        linear = {f"attention.attention.{one}": square for one in ("query", "key", "value")}
        linear |= {
            "attention.output.dense": square,
            "intermediate.dense": (inner, WIDTH),
            "output.dense": (WIDTH, inner),
        }
        for name, shape in linear.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
    for norm in norms:
        shapes |= {f"{norm}.weight": (WIDTH,), f"{norm}.bias": (WIDTH,)}
    generator = torch.Generator().manual_seed(1)
    tensors = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if not head:
        return tensors
    return {f"vit.{name}": one for name, one in tensors.items()} | {"classifier.weight": torch.zeros(5, WIDTH)}


def run_as_transformers(tensors: dict[str, Tensor], images: Tensor, num_heads: int) -> Tensor:
    """Compute a ViT's class token (B, C) from the transformers library's tensors, written anew from its paper."""

    def linear(name: str, values: Tensor) -> Tensor:
        return values @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(name: str, values: Tensor) -> Tensor:
        centred = values - values.mean(dim=-1, keepdim=True)
        spread = (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return centred / spread * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    projection = "embeddings.patch_embeddings.projection"
    patches = functional.conv2d(images, tensors[f"{projection}.weight"], tensors[f"{projection}.bias"], stride=16)
    classes = tensors["embeddings.cls_token"].expand(len(images), -1, -1)
    tokens = torch.cat([classes, patches.flatten(2).mT], dim=1) + tensors["embeddings.position_embeddings"]
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        normed = norm(f"{layer}.layernorm_before", tokens)
        query, key, value = (
            linear(f"{layer}.attention.attention.{one}", normed).unflatten(2, (num_heads, -1)).transpose(1, 2)
            for one in ("query", "key", "value")
        )
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)
        tokens = tokens + linear(f"{layer}.attention.output.dense", (weights @ value).transpose(1, 2).flatten(2))
        hidden = functional.gelu(linear(f"{layer}.intermediate.dense", norm(f"{layer}.layernorm_after", tokens)))
        tokens = tokens + linear(f"{layer}.output.dense", hidden)
    return norm("layernorm", tokens)[:, 0]


@pytest.mark.parametrize("head", [False, True])
def test_weights_of_the_transformers_library(tmp_path: Path, head: bool) -> None:
    model = tiny("hf-hub:Tiny/ViT")
    tensors = named_by_transformers(model, head=head)
    save_file(tensors, tmp_path / "model.safetensors")
    report = load_initial_weights(model, tmp_path / "model.safetensors")
    assert all(name.startswith("head.") for name in report.missing)  # every tensor of the trunk is filled
    assert report.unused == (["classifier.weight"] if head else [])  # and every tensor of the file is used
    images = torch.randn(2, 3, 64, 64)
    plain = {name.removeprefix("vit."): one for name, one in tensors.items()}
    expected = run_as_transformers(plain, images, TINY["num_heads"])
    torch.testing.assert_close(model.embed(model.extract(images)), expected, rtol=1e-4, atol=1e-4)


def test_names_of_a_dinov2() -> None:
    def block(part: str) -> str:
        return f"encoder.layer.3.{part}"

    names = {
        block("norm1.weight"): "blocks.3.norm1.weight",
        block("layer_scale1.lambda1"): "blocks.3.ls1.gamma",
        block("layer_scale2.lambda1"): "blocks.3.ls2.gamma",
        block("mlp.fc1.bias"): "blocks.3.mlp.fc1.bias",
        block("mlp.weights_in.weight"): "blocks.3.mlp.fc1.weight",
        block("mlp.weights_out.weight"): "blocks.3.mlp.fc2.weight",
        "embeddings.mask_token": "embeddings.mask_token",  # no classifier has a place for it
        "embeddings.position_embeddings": "pos_embed",
    }
    others = named_by_transformers(tiny("hf-hub:Tiny/ViT"), head=False)
    outside = {name: one for name, one in others.items() if not name.startswith("encoder.")}
    given = outside | {name: torch.full((1,), float(i)) for i, name in enumerate(names)}
    renamed = timm_names(given)
    for old, new in names.items():
        assert renamed[new] is given[old]


def test_files_of_timm_pass_unchanged() -> None:
    tensors = dict(tiny("hf-hub:Tiny/Virchow").trunk.state_dict())
    assert timm_names(tensors) is tensors


@pytest.mark.parametrize("changes", [{}, {"reg_tokens": 4}, {"reg_tokens": 4, "no_embed_class": True}])
@pytest.mark.parametrize("prefix", ["", "trunk."])
def test_positions_are_resampled_to_another_grid(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, Any], prefix: str
) -> None:
    row = {**TINY, "img_size": 96, **changes}
    monkeypatch.setitem(KNOWN, "tiny/dynamic", Encoder("", "", VIT.architecture, {**row, "dynamic_img_size": True}))
    monkeypatch.setitem(KNOWN, "tiny/fixed", Encoder("", "", VIT.architecture, row))
    published, model = tiny("hf-hub:tiny/dynamic"), tiny("hf-hub:tiny/fixed")
    scramble(published.trunk)
    tensors = {f"{prefix}{name}": one.contiguous() for name, one in published.trunk.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    report = load_initial_weights(model, tmp_path / "model.safetensors")
    assert all(name.startswith("head.") for name in report.missing)
    assert model.trunk.pos_embed.shape != published.trunk.pos_embed.shape
    num_prefix = 0 if changes.get("no_embed_class") else 1 + changes.get("reg_tokens", 0)
    assert torch.equal(model.trunk.pos_embed[:, :num_prefix], published.trunk.pos_embed[:, :num_prefix])
    # timm interpolates the published positions itself where sizes are free.
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.embed(model.extract(images)), published.embed(published.extract(images)))


def test_a_constant_table_of_positions_stays_constant() -> None:
    model = tiny("hf-hub:Tiny/ViT", size_px=48)
    given = {"pos_embed": torch.cat([torch.full((1, 1, WIDTH), 5.0), torch.full((1, 196, WIDTH), 2.0)], dim=1)}
    (resampled,) = model.from_published(given).values()
    assert resampled.shape == (1, 10, WIDTH)
    torch.testing.assert_close(resampled[:, 1:], torch.full((1, 9, WIDTH), 2.0))
    assert (resampled[:, 0] == 5).all()
    assert given["pos_embed"].shape[1] == 197  # the caller's tensors are left alone


@pytest.mark.parametrize("shape", [(1, 10, WIDTH), (1, 198, WIDTH), (1, 197, WIDTH + 1), (1, 1, WIDTH), (197,)])
def test_positions_that_fit_or_never_will_pass_unchanged(shape: tuple[int, ...]) -> None:
    model = tiny("hf-hub:Tiny/ViT", size_px=48)
    assert isinstance(model, TimmTransformer)
    given = {"pos_embed": torch.zeros(shape)}
    assert model.from_published(given)["pos_embed"] is given["pos_embed"]


def test_downloaded_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = named_by_transformers(tiny("hf-hub:Tiny/ViT", size_px=96), head=False)
    asked = {}

    def download(name: str, *, weights_only: bool) -> dict[str, Tensor]:
        asked[name] = weights_only
        return tensors

    monkeypatch.setattr(foundation, "load_state_dict_from_hf", download)
    model = build_model(ModelOptions("hf-hub:Tiny/ViT", 3, 64), pretrained=True)
    assert asked == {"Tiny/ViT": True}
    key = tensors["encoder.layer.1.attention.attention.key.weight"]
    assert torch.equal(model.trunk.blocks[1].attn.qkv.weight[WIDTH : 2 * WIDTH], key)
    del tensors["encoder.layer.1.output.dense.bias"]
    with pytest.raises(UserError) as error:
        build_model(ModelOptions("hf-hub:Tiny/ViT", 3, 64), pretrained=True)
    assert_one_line(error, "hf.co/Tiny/ViT", "lack 1 of 30", "blocks.1.mlp.fc2.bias")


def test_weights_that_cannot_be_downloaded() -> None:
    with pytest.raises(UserError) as error:
        build_model(ModelOptions("hf-hub:Tiny/ViT", 3, 64), pretrained=True)
    assert_one_line(error, "hf.co/Tiny/ViT", "--weights FILE", "hf auth login")


def test_every_parameter_learns() -> None:
    model = tiny("hf-hub:Tiny/Virchow")
    model(torch.randn(2, 3, 64, 64)).logsumexp(dim=1).sum().backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in model.parameters())
