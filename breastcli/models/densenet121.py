"""DenseNet-121 with pooled two-layer head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from breastcli.models import ARCHITECTURES, Architecture, Classifier, ModelOptions
from breastcli.models.backbones import TorchvisionClassifier, torchvision_trunk
from breastcli.models.heads import make_head, two_layer_head

CHANNELS = 1024


class DenseNet121(TorchvisionClassifier):
    """torchvision's DenseNet-121, average and maximum pooling side by side, and a hidden layer of 512.

    Source: DALAResNet50 paper (2024), Table 9. Its count, 9,028,970 for two classes, gives away the head; it includes
    DenseNet's own 1000-class layer (1,025,000), which nothing uses and which is left out here: 8,003,970.
    """

    def __init__(self, network: Any, options: ModelOptions) -> None:
        super().__init__(network, options)
        self.head = make_head(2 * CHANNELS, options, own=two_layer_head(2 * CHANNELS, options))

    def embed(self, maps: Tensor) -> Tensor:
        """Return each channel's mean and maximum: (B, 2048)."""
        return torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)


def build(options: ModelOptions, pretrained: bool) -> Classifier:
    """Build the network, optionally on torchvision's ImageNet trunk."""
    return DenseNet121(torchvision_trunk("densenet121", pretrained=pretrained), options)


ARCHITECTURES.register("densenet121")(
    Architecture(
        build,
        "Huang et al., CVPR 2017; head: DALAResNet50 paper, Table 9",
        {2: 9_028_970, 3: 9_029_483, 4: 9_029_996},
        "the printed counts include the unused 1000-class layer (1,025,000)",
    )
)
