"""Any classifier of torchvision or timm behind the contract, and the table of those that the papers name."""

from __future__ import annotations

import inspect
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from breastcli.errors import UsageError, UserError, first_line
from breastcli.models import ARCHITECTURES, SYMMETRIC_SCALING, Architecture, Classifier, ModelOptions
from breastcli.models.heads import make_head
from breastcli.models.published import download
from breastcli.models.transformers import TimmTransformer, TorchvisionTransformer

HEAD_NAMES = ("classifier", "fc", "head", "heads")
AUXILIARY_NAMES = ("aux1", "aux2", "AuxLogits")


class TorchvisionClassifier(Classifier):
    """A torchvision network cut into trunk, pooling and head.

    torchvision defines its networks' children in the order in which they run, so the trunk is what comes before the
    pooling, and what stands between pooling and last linear layer belongs to ``embed``.
    """

    def __init__(self, network: nn.Module, options: ModelOptions) -> None:
        super().__init__()
        children = OrderedDict((name, child) for name, child in network.named_children() if name not in AUXILIARY_NAMES)
        names = list(children)
        cut = next(i for i, name in enumerate(names) if name == "avgpool" or name in HEAD_NAMES)
        self.trunk = nn.Sequential(OrderedDict((name, children[name]) for name in names[:cut]))
        if isinstance(network, torchvision.models.DenseNet):
            self.trunk.append(nn.ReLU(inplace=True))  # a function call in torchvision's forward
        if isinstance(network, torchvision.models.MaxVit):
            self.trunk = nn.Sequential(OrderedDict(stem=network.stem, blocks=nn.Sequential(*network.blocks)))
        head_name = next(name for name in names if name in HEAD_NAMES)
        old_head = children[head_name]
        before, width = _without_last_linear(old_head)
        pool = children.get("avgpool", nn.AdaptiveAvgPool2d(1))
        first_flattens = bool(before) and not isinstance(before[0], (nn.Linear, nn.Dropout))
        middle = before if first_flattens else [nn.Flatten(1), *before]
        pooled = isinstance(before[0], nn.AdaptiveAvgPool2d) if before else False
        self.pool = nn.Sequential(*([] if pooled else [pool]), *middle)
        self._head_name, self._moved_by = head_name, len(self.pool) - len(before)
        self.head = make_head(width, options)

    def extract(self, images: Tensor) -> Tensor:
        """See ``Classifier``."""
        return self.trunk(images)

    def embed(self, maps: Tensor) -> Tensor:
        """See ``Classifier``."""
        return self.pool(maps)

    def published_parts(self) -> list[nn.Module]:
        """See ``Classifier``; the layers between pooling and last layer were published too."""
        return [self.trunk, self.pool]

    def from_published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """See ``Classifier``; ``classifier.0`` of a VGG is ``pool.2`` here."""

        def rename(match: re.Match[str]) -> str:
            place = int(match[1]) + self._moved_by
            return f"pool.{place}." if place < len(self.pool) else match[0]

        layer = re.compile(rf"^{self._head_name}\.(\d+)\.")
        return modern_names({layer.sub(rename, name): tensor for name, tensor in tensors.items()})


class TimmClassifier(Classifier):
    """A timm network without its classifier, with a new head.

    Token sequences (B, T, C) are laid out as maps (B, C, 1, T).

    Args:
        network: built by timm with ``num_classes=0``.
        options: what to build.
        tokens: whether its ``forward_features`` gives token sequences.
    """

    def __init__(self, network: Any, options: ModelOptions, *, tokens: bool) -> None:
        super().__init__()
        self.trunk = network
        self.tokens = tokens
        self.channels_last_maps = getattr(network, "output_fmt", "NCHW") == "NHWC"
        self.head = make_head(getattr(network, "head_hidden_size", None) or network.num_features, options)

    def extract(self, images: Tensor) -> Tensor:
        """See ``Classifier``."""
        maps = self.trunk.forward_features(images)
        if self.tokens:
            return maps.transpose(1, 2)[:, :, None]
        return maps.permute(0, 3, 1, 2) if self.channels_last_maps else maps

    def embed(self, maps: Tensor) -> Tensor:
        """See ``Classifier``."""
        if self.tokens:
            maps = maps[:, :, 0].transpose(1, 2)
        elif self.channels_last_maps:
            maps = maps.permute(0, 2, 3, 1)
        return self.trunk.forward_head(maps, pre_logits=True)


def torchvision_trunk(name: str, *, pretrained: bool, **settings: Any) -> nn.Module:
    """Return a torchvision network, with its ImageNet weights if asked for.

    The weights are those that ``pretrained=True`` meant when the papers were written (IMAGENET1K_V1).

    Raises:
        UsageError: torchvision has no such classifier; the nearest is named.
        UserError: the weights do not exist or cannot be downloaded.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise UsageError(f"torchvision has no classifier {name!r}", fix=_nearest(name, known))
    if name.startswith(("googlenet", "inception")):
        settings |= {"init_weights": False, "aux_logits": pretrained}
    network = torchvision.models.get_model(name, weights=None, **settings)
    if pretrained:
        url = next(iter(torchvision.models.get_model_weights(name))).url
        network.load_state_dict(modern_names(download(url)))
    return network


def modern_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename what torchvision's DenseNet files still call ``denselayer1.norm.1`` to ``denselayer1.norm1``."""
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", name): one for name, one in tensors.items()}


def from_torchvision(name: str, options: ModelOptions, pretrained: bool) -> Classifier:
    """Build ``torchvision/<name>``."""
    settings: dict[str, Any] = {}
    if name.startswith("vit_"):
        settings["image_size"] = options.size_px
        return TorchvisionTransformer(torchvision_trunk(name, pretrained=pretrained, **settings), options)
    if name == "maxvit_t":
        settings["input_size"] = (options.size_px, options.size_px)
    model = TorchvisionClassifier(torchvision_trunk(name, pretrained=pretrained, **settings), options)
    if name in ("googlenet", "inception_v3"):  # their weights come from TensorFlow
        model.native_scaling = SYMMETRIC_SCALING
    return model


def from_timm(name: str, options: ModelOptions, pretrained: bool, *, with_mean: bool = False) -> Classifier:
    """Build ``timm/<name>``.

    Args:
        name: what timm calls it.
        options: what to build.
        pretrained: whether to load the weights that timm knows for it.
        with_mean: see ``TimmTransformer``.

    Raises:
        UsageError: timm has no such network; the nearest is named.
        UserError: the size is no multiple of its patch, or the weights cannot be downloaded.
    """
    if not timm.is_model(name):
        raise UsageError(f"timm has no network {name!r}", fix=_nearest(name.split(".")[0], timm.list_models()))
    _refuse_foreign(options.settings)
    settings: dict[str, Any] = {"num_classes": 0, **options.settings}
    patch = re.search(r"patch(\d+)", name)
    check_multiple(options, settings.get("patch_size") or int(patch[1] if patch else 1))
    described = timm.get_pretrained_cfg(name)
    if described is not None and described.fixed_input_size and "dynamic_img_size" not in settings:
        settings["img_size"] = options.size_px
    for noisy in ("timm", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        network = timm.create_model(name, pretrained=pretrained, **settings)
    except Exception as error:
        if "pretrained tag" in str(error):
            raise UsageError(f"timm/{name}: {first_line(error, 120)}", fix="leave out what follows the dot") from error
        if not pretrained:
            raise
        hub = f"hf.co/{described.hf_hub_id}" if described and described.hf_hub_id else "timm"
        raise UserError(
            f"--pretrained: cannot download the weights of {name} from {hub} ({first_line(error, 120)})",
            fix="download its model.safetensors elsewhere and pass --weights model.safetensors instead",
        ) from error
    return wrap_timm(network, options, with_mean=with_mean)


def _refuse_foreign(settings: Mapping[str, Any]) -> None:
    """Refuse arguments that would make timm open a file or the network: they may come from anybody's checkpoint.

    Raises:
        UserError: there is one.
    """
    own = set(inspect.signature(timm.create_model).parameters)
    for name in settings:
        if name in own or name.startswith("pretrained"):
            raise UserError(f"a checkpoint must not set {name} of a network", fix="use another one")


def wrap_timm(network: Any, options: ModelOptions, *, with_mean: bool = False) -> Classifier:
    """Put a timm network, built without its classifier, behind the contract."""
    model: Classifier
    if isinstance(network, VisionTransformer):
        model = TimmTransformer(network, options, with_mean=with_mean)
    else:
        with torch.no_grad():
            images = torch.zeros(1, 3, options.size_px, options.size_px, device=next(network.parameters()).device)
            tokens = network.eval().forward_features(images).ndim == 3
        model = TimmClassifier(network, options, tokens=tokens)
    described = network.pretrained_cfg
    if described.get("mean") and described.get("std"):
        model.native_scaling = (tuple(described["mean"]), tuple(described["std"]))
    return model


LIBRARIES: dict[str, Callable[[str, ModelOptions, bool], Classifier]] = {
    "torchvision/": from_torchvision,
    "timm/": from_timm,
}


@dataclass(frozen=True)
class Row:
    """A network of the papers that a library has: its door, further arguments, and what the papers print."""

    door: str
    source: str
    published: dict[int, int] = field(default_factory=dict)
    remark: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    multiple_px: int = 1
    size_px: int = 224
    without_weights: str = ""


PAPER_BACKBONES = {
    "resnet34": Row("torchvision/resnet34", "He et al., CVPR 2016"),
    "resnet50": Row(
        "torchvision/resnet50",
        "He et al., CVPR 2016",
        {2: 21_797_672, 3: 21_797_672, 4: 21_805_868},
        "the printed counts are ResNet-34's with 1000 classes, for 4 classes with Linear(2048, 4) beside it",
    ),
    "resnet101": Row("torchvision/resnet101", "He et al., CVPR 2016"),
    "vgg16": Row(
        "torchvision/vgg16",
        "Simonyan and Zisserman, ICLR 2015",
        {2: 134_268_738, 3: 134_272_835, 4: 134_276_934},
        "for 4 classes 134,276,932: the paper's network kept its 2-class layer and added Linear(2048, 4)",
    ),
    "vgg19": Row("torchvision/vgg19", "Simonyan and Zisserman, ICLR 2015"),
    "densenet201": Row(
        "torchvision/densenet201",
        "Huang et al., CVPR 2017",
        remark="trunk 18,092,928, as printed with running statistics",
    ),
    "mobilenet": Row("timm/mobilenetv1_100", "Howard et al., 2017"),
    "xception": Row("timm/legacy_xception", "Chollet, CVPR 2017"),
    "vit": Row(
        "timm/vit_base_patch16_224",
        "Dosovitskiy et al., ICLR 2021",
        {2: 51_375_106, 3: 51_376_131, 4: 51_385_352},
        "patch 16, width 1024, depth 6, 16 heads, MLP 2048, no qkv bias: not a ViT-B; for 4 classes the printed count "
        "includes an unused Linear(2048, 4)",
        {"embed_dim": 1024, "depth": 6, "num_heads": 16, "mlp_ratio": 2.0, "qkv_bias": False},
        multiple_px=16,
        without_weights="nobody published weights of this size (width 1024, depth 6)",
    ),
    "swin": Row(
        "timm/swin_base_patch4_window7_224",
        "Liu et al., ICCV 2021",
        {2: 86_745_274, 3: 86_746_299, 4: 86_753_470},
        "for 4 classes the printed count is the 2-class network's and Linear(2048, 4)",
        multiple_px=32,
    ),
    "dinov2_vitb14": Row(
        "timm/vit_base_patch14_dinov2",
        "Oquab et al., TMLR 2024",
        {2: 86_582_018, 3: 86_582_787, 4: 86_583_556},
        "the paper counts a mask token (768) that no classifier uses",
        {"img_size": 518, "dynamic_img_size": True},
        multiple_px=14,
    ),
}


def _register(name: str, row: Row) -> None:
    library, _, network = row.door.partition("/")

    def build(options: ModelOptions, pretrained: bool) -> Classifier:
        check_multiple(options, row.multiple_px)
        return LIBRARIES[f"{library}/"](network, replace(options, settings=row.settings), pretrained)

    facts = (row.source, row.published, row.remark, row.size_px, row.multiple_px, row.without_weights)
    entry = Architecture(build, *facts)
    ARCHITECTURES.register(name)(entry)


for _name, _row in PAPER_BACKBONES.items():
    _register(_name, _row)


def check_multiple(options: ModelOptions, multiple_px: int) -> None:
    """Refuse images whose border no patch would cover.

    Raises:
        UserError: the size is no multiple; the nearest ones are named.
    """
    if options.size_px % multiple_px:
        smaller = options.size_px // multiple_px * multiple_px
        nearest = f"{smaller} or {smaller + multiple_px}" if smaller else str(multiple_px)
        raise UserError(
            f"{options.arch} cannot take {options.size_px}-pixel images (a multiple of {multiple_px} is needed)",
            fix=f"prepare with --size {nearest}",
        )


def _without_last_linear(head: nn.Module) -> tuple[list[nn.Module], int]:
    """Return the layers of a head before its last linear layer (its own dropout left out) and the embedding's width."""
    layers = [head] if isinstance(head, nn.Linear) else list(head.children())
    last = max((i for i, layer in enumerate(layers) if isinstance(layer, nn.Linear)), default=None)
    if last is None:  # SqueezeNet classifies with a convolution before its pooling
        convolution = next(layer for layer in layers if isinstance(layer, nn.Conv2d))
        return [nn.AdaptiveAvgPool2d(1), nn.Flatten(1)], convolution.in_channels
    before = layers[:last]
    while before and isinstance(before[-1], nn.Dropout):
        before.pop()
    return before, layers[last].in_features


def _nearest(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}?" if near else "see the library's list of models"
