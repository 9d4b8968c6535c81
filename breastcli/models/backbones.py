"""Any classifier of torchvision or timm behind the contract, and the table of those that the papers name."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any
from urllib.error import URLError

import timm
import torch
import torchvision
from torch import Tensor, nn

from breastcli.config import UsageError, UserError, first_line
from breastcli.models import ARCHITECTURES, Architecture, Classifier, ModelOptions, linear_head

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
        old_head = children[next(name for name in names if name in HEAD_NAMES)]
        before, width = _without_last_linear(old_head)
        pool = children.get("avgpool", nn.AdaptiveAvgPool2d(1))
        first_flattens = bool(before) and not isinstance(before[0], (nn.Linear, nn.Dropout))
        middle = before if first_flattens else [nn.Flatten(1), *before]
        pooled = isinstance(before[0], nn.AdaptiveAvgPool2d) if before else False
        self.pool = nn.Sequential(*([] if pooled else [pool]), *middle)
        self.head = linear_head(width, options)

    def features(self, images: Tensor) -> Tensor:
        """See ``Classifier``."""
        return self.trunk(images)

    def embed(self, maps: Tensor) -> Tensor:
        """See ``Classifier``."""
        return self.pool(maps)


class TorchvisionTransformer(Classifier):
    """A torchvision vision transformer; its token sequence (B, T, C) is laid out as maps (B, C, 1, T)."""

    def __init__(self, network: Any, options: ModelOptions) -> None:
        super().__init__()
        self.trunk = network
        self.trunk.heads = nn.Identity()
        self.head = linear_head(network.hidden_dim, options)

    def features(self, images: Tensor) -> Tensor:
        """See ``Classifier``."""
        patches = self.trunk._process_input(images)  # (B, T - 1, C)
        tokens = torch.cat([self.trunk.class_token.expand(len(patches), -1, -1), patches], dim=1)
        return self.trunk.encoder(tokens).transpose(1, 2)[:, :, None]

    def embed(self, maps: Tensor) -> Tensor:
        """Return the class token: (B, C)."""
        return maps[:, :, 0, 0]


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
        self.head = linear_head(getattr(network, "head_hidden_size", None) or network.num_features, options)

    def features(self, images: Tensor) -> Tensor:
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
        weights = next(iter(torchvision.models.get_model_weights(name)))
        try:
            network.load_state_dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
        except (URLError, OSError) as error:
            file = weights.url.rsplit("/", 1)[-1]
            raise UserError(
                f"--pretrained: cannot download {weights.url} ({first_line(error, 120)})",
                fix=f"download it elsewhere and pass --weights {file} instead",
            ) from error
    return network


def from_torchvision(name: str, options: ModelOptions, pretrained: bool) -> Classifier:
    """Build ``torchvision/<name>``."""
    settings: dict[str, Any] = {}
    if name.startswith("vit_"):
        settings["image_size"] = options.size_px
        return TorchvisionTransformer(torchvision_trunk(name, pretrained=pretrained, **settings), options)
    if name == "maxvit_t":
        settings["input_size"] = (options.size_px, options.size_px)
    return TorchvisionClassifier(torchvision_trunk(name, pretrained=pretrained, **settings), options)


def from_timm(name: str, options: ModelOptions, pretrained: bool) -> Classifier:
    """Build ``timm/<name>``.

    Raises:
        UsageError: timm has no such network; the nearest is named.
        UserError: the weights cannot be downloaded.
    """
    if not timm.is_model(name):
        raise UsageError(f"timm has no network {name!r}", fix=_nearest(name.split(".")[0], timm.list_models()))
    settings: dict[str, Any] = {"num_classes": 0}
    described = timm.get_pretrained_cfg(name)
    if described is not None and described.fixed_input_size:
        settings["img_size"] = options.size_px
    for noisy in ("timm", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        network = timm.create_model(name, pretrained=pretrained, **settings)
    except Exception as error:
        if not pretrained:
            raise
        hub = f"hf.co/{described.hf_hub_id}" if described and described.hf_hub_id else "timm"
        raise UserError(
            f"--pretrained: cannot download the weights of {name} from {hub} ({first_line(error, 120)})",
            fix="download its model.safetensors elsewhere and pass --weights model.safetensors instead",
        ) from error
    with torch.no_grad():
        tokens = network.eval().forward_features(torch.zeros(1, 3, options.size_px, options.size_px)).ndim == 3
    return TimmClassifier(network, options, tokens=tokens)


LIBRARIES: dict[str, Callable[[str, ModelOptions, bool], Classifier]] = {
    "torchvision": from_torchvision,
    "timm": from_timm,
}

PAPER_BACKBONES = {
    "resnet50": ("torchvision/resnet50", "He et al., CVPR 2016"),
}


def _register(name: str, door: str, source: str) -> None:
    library, _, network = door.partition("/")
    ARCHITECTURES.register(name)(
        Architecture(lambda options, pretrained: LIBRARIES[library](network, options, pretrained), source)
    )


for _name, (_door, _source) in PAPER_BACKBONES.items():
    _register(_name, _door, _source)


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
