"""Networks behind one contract: features, embed, head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from breastcli.errors import UserError, first_line
from breastcli.registry import Registry

IMAGENET_SCALING = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SYMMETRIC_SCALING = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Classifier(nn.Module):
    """An image classifier in three steps, so that no caller needs a hook.

    Attributes:
        trunk: what makes the maps (nearly all of it, where a network of ours adds to a library's).
        head: (B, D) embedding to (B, K) logits.
        native_scaling: per-channel mean and standard deviation, of images in [0, 1], that the published weights expect.
        scaling: takes images from [-1, 1] to what the network was trained on; nothing unless ``use_native_scaling``.
    """

    trunk: nn.Module
    head: nn.Module
    native_scaling: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET_SCALING

    def __init__(self) -> None:
        super().__init__()
        self.scaling: nn.Module = nn.Identity()

    @abstractmethod
    def extract(self, images: Tensor) -> Tensor:
        """Return feature maps (B, C, h, w) of images (B, 3, H, W) that are already scaled."""

    @abstractmethod
    def embed(self, maps: Tensor) -> Tensor:
        """Pool feature maps (B, C, h, w) into an embedding (B, D)."""

    def features(self, images: Tensor) -> Tensor:
        """Return feature maps (B, C, h, w) of images (B, 3, H, W) in [-1, 1]."""
        return self.extract(self.scaling(images))

    def classify(self, maps: Tensor) -> Tensor:
        """Return logits (B, K) of feature maps (B, C, h, w)."""
        return self.head(self.embed(maps))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K) of images (B, 3, H, W) in [-1, 1]."""
        return self.classify(self.features(images))

    def grid(self, maps: Tensor) -> Tensor:
        """Return the part of maps (B, C, h', w), or of their gradient, that lies over the image: (B, C, h, w).

        A transformer with class or register tokens keeps them in rows below the image, because ``classify`` needs them.
        """
        return maps

    def published_parts(self) -> list[nn.Module]:
        """Return what published weights fit; ``--freeze trunk`` freezes it and ``--trunk-lr`` is its learning rate."""
        return [self.trunk]

    def from_published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename the tensors of a published weights file where our names differ from its."""
        return tensors

    def use_native_scaling(self) -> None:
        """Scale images as the published weights expect, instead of leaving them in [-1, 1]."""
        if self.native_scaling != SYMMETRIC_SCALING:
            self.scaling = InputScaling(*self.native_scaling)


class InputScaling(nn.Module):
    """Take images from [-1, 1] to zero mean and unit variance under a data set's statistics.

    Args:
        mean: of each channel of images in [0, 1].
        std: standard deviation of each channel.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        spread = torch.tensor(std).view(1, 3, 1, 1)
        self.register_buffer("factor", 0.5 / spread, persistent=False)
        self.register_buffer("offset", (0.5 - torch.tensor(mean).view(1, 3, 1, 1)) / spread, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, 3, H, W)."""
        return images * self.factor + self.offset


@dataclass(frozen=True)
class ModelOptions:
    """What a network is built from; saved with every checkpoint so that it can be built again.

    Attributes:
        arch: name in the registry, ``timm/<name>``, ``torchvision/<name>`` or ``hf-hub:<owner>/<name>``.
        num_classes: K.
        size_px: side of the images that it will see.
        dropout: probability before the last layer.
        attention_stage: stage after which DALAResNet50's attention sits, 1 to 4.
        reduction: reduction of DALAResNet50's attention.
        head: "own" (as published), "linear" or "mlp".
        last_layer: "linear", "cosine" or "angle" (see ``heads.AngularLayer``).
        scale: factor of the last layer's cosines or angles.
        native_scaling: whether images are scaled as the published weights expect.
        trunks: networks of the multi-scale framework, separated by commas.
        fusion: "pyramid" or "concatenation" of the multi-scale framework.
        settings: further arguments of a timm network.
    """

    arch: str
    num_classes: int
    size_px: int = 224
    dropout: float = 0.25
    attention_stage: int = 4
    reduction: int = 4
    head: str = "own"
    last_layer: str = "linear"
    scale: float = 1.0
    native_scaling: bool = False
    trunks: str = "densenet201,nasnetmobile,resnet101"
    fusion: str = "pyramid"
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Architecture:
    """A network of the registry.

    Attributes:
        build: makes the network with random weights, or with published ImageNet weights in the trunk.
        source: who described it.
        published: number of classes to number of parameters, as a paper prints it.
        remark: why our count differs, or what else a reader should know.
        size_px: side of the images that its publication used.
        multiple_px: sizes must be multiples of this.
        without_weights: why no published weights fit it, or "".
    """

    build: Callable[[ModelOptions, bool], Classifier]
    source: str
    published: Mapping[int, int] = field(default_factory=dict)
    remark: str = ""
    size_px: int = 224
    multiple_px: int = 1
    without_weights: str = ""


ARCHITECTURES: Registry[Architecture] = Registry("architecture", "breastcli.models")


def build_model(options: ModelOptions, *, pretrained: bool = False) -> Classifier:
    """Build a network and try it once on an empty image.

    Raises:
        UsageError: no such architecture; the nearest one is named.
        UserError: the weights cannot be downloaded, or the network cannot take images of this size.
    """
    if pretrained:
        require_published(options.arch)
    try:
        model = find_builder(options.arch)(options, pretrained)
        if options.native_scaling:
            model.use_native_scaling()
        logits = _try_out(model, options)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = first_line(error)
        raise UserError(
            f"{options.arch} cannot take {options.size_px}-pixel images ({reason})", fix="prepare with another --size"
        ) from error
    assert logits.shape == (1, options.num_classes), f"{options.arch} gives {tuple(logits.shape)}"
    return model


def require_published(arch: str) -> None:
    """Refuse ``--pretrained`` for a network of the registry that nobody published weights of.

    Raises:
        UserError: it is one.
    """
    reason = ARCHITECTURES.get(arch).without_weights if arch in ARCHITECTURES.names() else ""
    if reason:
        raise UserError(f"--pretrained: {arch} has none, {reason}", fix="leave --pretrained out")


def find_builder(arch: str) -> Callable[[ModelOptions, bool], Classifier]:
    """Return what builds ``arch``: an entry of the registry, or a library's door.

    Raises:
        UsageError: no such architecture; the nearest one is named.
    """
    from breastcli.models import backbones, foundation

    doors = {**backbones.LIBRARIES, foundation.PREFIX: foundation.from_hub}
    for prefix, door in doors.items():
        if arch.startswith(prefix):
            return lambda options, pretrained: door(arch.removeprefix(prefix), options, pretrained)
    return ARCHITECTURES.get(arch).build


@torch.no_grad()
def _try_out(model: Classifier, options: ModelOptions) -> Tensor:
    model.eval()
    return model(torch.zeros(1, 3, options.size_px, options.size_px))


def num_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """Return the number of parameters, or of those that are trained."""
    return sum(one.numel() for one in model.parameters() if one.requires_grad or not trainable)
