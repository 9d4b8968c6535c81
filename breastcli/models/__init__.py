"""Networks behind one contract: features, embed, head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from breastcli.config import UserError, first_line
from breastcli.registry import Registry


class Classifier(nn.Module):
    """An image classifier in three steps, so that no caller needs a hook.

    Attributes:
        trunk: the part that a library's pretrained weights fit; ``--freeze trunk`` freezes it.
        head: (B, D) embedding to (B, K) logits.
    """

    trunk: nn.Module
    head: nn.Module

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Return feature maps (B, C, h, w) of images (B, 3, H, W) in [-1, 1]."""

    @abstractmethod
    def embed(self, maps: Tensor) -> Tensor:
        """Pool feature maps (B, C, h, w) into an embedding (B, D)."""

    def classify(self, maps: Tensor) -> Tensor:
        """Return logits (B, K) of feature maps (B, C, h, w)."""
        return self.head(self.embed(maps))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K) of images (B, 3, H, W) in [-1, 1]."""
        return self.classify(self.features(images))


@dataclass(frozen=True)
class ModelOptions:
    """What a network is built from; saved with every checkpoint so that it can be built again.

    Attributes:
        arch: name in the registry, ``timm/<name>`` or ``torchvision/<name>``.
        num_classes: K.
        size_px: side of the images that it will see.
        dropout: probability before the last layer.
        attention_stage: stage after which DALAResNet50's attention sits, 1 to 4.
        reduction: reduction of DALAResNet50's attention.
    """

    arch: str
    num_classes: int
    size_px: int = 224
    dropout: float = 0.25
    attention_stage: int = 4
    reduction: int = 4


@dataclass(frozen=True)
class Architecture:
    """A network of the registry.

    Attributes:
        build: makes the network with random weights, or with the library's ImageNet weights in the trunk.
        source: who described it.
    """

    build: Callable[[ModelOptions, bool], Classifier]
    source: str


ARCHITECTURES: Registry[Architecture] = Registry("architecture", "breastcli.models")


def linear_head(width: int, options: ModelOptions) -> nn.Module:
    """Return dropout and one linear layer of (B, width) to (B, K)."""
    return nn.Sequential(nn.Dropout(options.dropout), nn.Linear(width, options.num_classes))


def build_model(options: ModelOptions, *, pretrained: bool = False) -> Classifier:
    """Build a network and try it once on an empty image.

    Raises:
        UsageError: no such architecture; the nearest one is named.
        UserError: the weights cannot be downloaded, or the network cannot take images of this size.
    """
    from breastcli.models import backbones

    library, _, name = options.arch.partition("/")
    try:
        if name and library in backbones.LIBRARIES:
            model = backbones.LIBRARIES[library](name, options, pretrained)
        else:
            model = ARCHITECTURES.get(options.arch).build(options, pretrained)
        logits = _try_out(model, options)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = first_line(error)
        raise UserError(
            f"{options.arch} cannot take {options.size_px}-pixel images ({reason})", fix="prepare with another --size"
        ) from error
    assert logits.shape == (1, options.num_classes), f"{options.arch} gives {tuple(logits.shape)}"
    return model


@torch.no_grad()
def _try_out(model: Classifier, options: ModelOptions) -> Tensor:
    model.eval()
    return model(torch.zeros(1, 3, options.size_px, options.size_px))


def num_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """Return the number of parameters, or of those that are trained."""
    return sum(one.numel() for one in model.parameters() if one.requires_grad or not trainable)


def freeze(model: Classifier, what: str) -> int:
    """Freeze the trunk, or the first N layers that have weights; return the number of frozen parameters.

    Args:
        model: the network.
        what: "none", "trunk" or a whole number; layers are counted in the order of the network's definition, as in
            Deebani et al. ("first 200 layers").

    Raises:
        UserError: not one of those, or more layers than there are.
    """
    if what == "none":
        return 0
    layers: list[nn.Module] = [module for module in model.modules() if list(module.parameters(recurse=False))]
    if what == "trunk":
        frozen = [model.trunk]
    elif what.isdigit() and int(what) < len(layers):
        frozen = layers[: int(what)]
    else:
        raise UserError(f"--freeze {what}: not accepted", fix=f"use none, trunk or a number below {len(layers)}")
    for module in frozen:
        module.requires_grad_(False)
    return num_parameters(model) - num_parameters(model, trainable=True)


def set_training_mode(model: nn.Module, *, batch_norm: str) -> None:
    """Switch to training mode, keeping frozen batch norms (all of them with ``batch_norm="frozen"``) as loaded.

    A frozen layer whose statistics still moved would not be frozen.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            parameters = list(module.parameters(recurse=False))
            frozen = bool(parameters) and not any(one.requires_grad for one in parameters)
            if frozen or batch_norm == "frozen":
                module.eval()
