"""VGGIN-Net: the lower part of VGG-16 and one naive Inception block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from breastcli.models import ARCHITECTURES, Architecture, Classifier, ModelOptions
from breastcli.models.backbones import torchvision_trunk
from breastcli.models.heads import make_head

BLOCK4_POOL = 24  # the first 24 layers of torchvision's VGG-16 end with the fourth pooling
CHANNELS = 512
BRANCHES = {1: 64, 3: 128, 5: 32}  # kernel size to channels, GoogLeNet's first block (Szegedy et al., Table 1)


class NaiveInception(nn.Module):
    """Convolutions of several sizes and a maximum pooling side by side.

    Source: Szegedy et al., Going Deeper with Convolutions, CVPR 2015, Figure 2a.

    Args:
        channels: C of the maps.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels, width, size, padding=size // 2) for size, width in BRANCHES.items()
        )
        self.pool = nn.MaxPool2d(3, stride=1, padding=1)
        self.out_channels = channels + sum(BRANCHES.values())

    def forward(self, maps: Tensor) -> Tensor:
        """Return (B, C + 224, h, w) of maps (B, C, h, w)."""
        return torch.cat([*(convolution(maps).relu() for convolution in self.convolutions), self.pool(maps)], dim=1)


class VGG16Inception(Classifier):
    """VGG-16 up to its fourth pooling, a naive Inception block, batch norm, flattening, dropout and one layer.

    Source: Saini and Susan, VGGIN-Net, IEEE/ACM TCBB 2022. There the VGG-16 part is frozen (``--freeze trunk``) and
    later fine-tuned block by block (``--unfreeze-at``). The 38,139,938 parameters that the DALAResNet50 paper prints
    (Table 9) were not recovered; from 3 classes to 2 it loses 4,097, so its last layer had 4,096 inputs.

    Its embedding is as wide as the flattened maps, so a network serves one image size only.
    """

    def __init__(self, network: Any, options: ModelOptions) -> None:
        super().__init__()
        self.trunk = nn.Sequential()
        self.trunk.features = network.features[:BLOCK4_POOL]
        self.inception = NaiveInception(CHANNELS)
        self.norm = nn.BatchNorm2d(self.inception.out_channels)
        side = options.size_px // 16
        self.head = make_head(self.inception.out_channels * side * side, options)

    def extract(self, images: Tensor) -> Tensor:
        """Return the maps of the Inception block after batch norm: (B, 736, H/16, W/16)."""
        return self.norm(self.inception(self.trunk(images)))

    def embed(self, maps: Tensor) -> Tensor:
        """Return the flattened maps."""
        return maps.flatten(1)


def build(options: ModelOptions, pretrained: bool) -> Classifier:
    """Build the network, optionally on torchvision's ImageNet weights of VGG-16."""
    return VGG16Inception(torchvision_trunk("vgg16", pretrained=pretrained), options)


ARCHITECTURES.register("vgg16inception")(
    Architecture(
        build,
        "Saini and Susan, IEEE/ACM TCBB 2022 (VGGIN-Net)",
        {2: 38_139_938, 3: 38_144_035, 4: 38_148_134},
        "printed count not recovered; built as its authors describe it",
    )
)
