"""Heads: from an embedding to logits, plain or by angles."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from breastcli.models import ModelOptions

HIDDEN_WIDTH = 512  # of the two-layer heads, as in the DALAResNet50 paper's SE-ResNet-50 and DenseNet-121
COSINE_LIMIT = 1 - 1e-6  # arccos has no finite derivative at 1; in float32 the next number below is 6e-8 away
# Shorter embeddings are not brought to unit length: at zero, PyTorch's own limit of 1e-12 would pass gradients of 1e12.
SHORTEST = 1e-3


class AngularLayer(nn.Module):
    """Logits from the angles between an embedding and one direction per class.

    With theta_j the angle to class j, the logits are s cos(theta_j), or s (pi - 2 theta_j) / pi where ``linear``: both
    run from s to -s. No margin is applied here, so that predictions carry none (see ``losses.angular_margin``).

    Source: Wang et al., CosFace, CVPR 2018, eq. 3; linear: Li et al., AirFace, ICCV workshops 2019, eq. 5.

    Args:
        width: D of the embedding.
        num_classes: K.
        scale: s.
        linear: take the angle itself instead of its cosine.
    """

    def __init__(self, width: int, num_classes: int, scale: float, *, linear: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(num_classes, width)))
        self.scale = scale
        self.linear = linear

    def forward(self, embedding: Tensor) -> Tensor:
        """Return (B, K) float32 logits of embeddings (B, D), in float32 also inside autocast."""
        with torch.autocast(embedding.device.type, enabled=False):
            directions = functional.normalize(embedding.float(), eps=SHORTEST)
            cosines = functional.linear(directions, functional.normalize(self.weight.float()))
            if not self.linear:
                return self.scale * cosines
            angles = cosines.clamp(-COSINE_LIMIT, COSINE_LIMIT).acos()
            return self.scale * (1 - 2 * angles / math.pi)


def make_head(width: int, options: ModelOptions, own: nn.Module | None = None) -> nn.Module:
    """Return the head that the options ask for.

    Args:
        width: D of the embedding.
        options: ``head`` "own" gives ``own``, or dropout and one layer where the network has no head of its own.
        own: the head that was published with the network.
    """
    if options.head == "mlp":
        return two_layer_head(width, options)
    if options.head == "own" and own is not None:
        return own
    return nn.Sequential(nn.Dropout(options.dropout), last_layer(width, options))


def two_layer_head(width: int, options: ModelOptions) -> nn.Module:
    """Return a hidden layer of 512 with ReLU and dropout, then the last layer."""
    hidden = [nn.Linear(width, HIDDEN_WIDTH), nn.ReLU(), nn.Dropout(options.dropout)]
    return nn.Sequential(*hidden, last_layer(HIDDEN_WIDTH, options))


def last_layer(width: int, options: ModelOptions) -> nn.Module:
    """Return the layer that gives logits: linear, or angular."""
    if options.last_layer == "linear":
        return nn.Linear(width, options.num_classes)
    return AngularLayer(width, options.num_classes, options.scale, linear=options.last_layer == "angle")
