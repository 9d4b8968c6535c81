"""DALAResNet50: ResNet-50 with a dual-activated lightweight attention module."""

from __future__ import annotations

from torch import Tensor, nn

from breastcli.models import ARCHITECTURES, Architecture, Classifier, ModelOptions
from breastcli.models.backbones import torchvision_trunk
from breastcli.models.heads import make_head

STAGE_CHANNELS = {1: 256, 2: 512, 3: 1024, 4: 2048}


class DualActivatedAttention(nn.Module):
    """Scale every channel by a gate computed from the channels' means.

    Source: DALAResNet50 paper (2024), section III-B, eq. 1-4: adaptive average pooling, a linear layer down, LeakyReLU
    (slope 0.01), a linear layer up, ReLU, element-wise product.

    The gate ends in a ReLU, so a gate that starts at zero for some channel would silence that channel and pass no
    gradient: with PyTorch's default initialisation half of the channels of a pretrained trunk would be dead before the
    first step. The last layer therefore starts with bias 1 and small weights: every gate opens near 1, the pretrained
    network starts as it was, and the module learns departures from it. The paper does not say how it started.

    Args:
        channels: C of the maps.
        reduction: C / reduction is the width between the two linear layers.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.down = nn.Linear(channels, channels // reduction)
        self.up = nn.Linear(channels // reduction, channels)
        self.leaky = nn.LeakyReLU(0.01)
        nn.init.normal_(self.up.weight, std=0.01)
        nn.init.ones_(self.up.bias)

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps (B, C, h, w) of the same shape."""
        means = maps.mean(dim=(2, 3))  # (B, C)
        gate = self.up(self.leaky(self.down(means))).relu()
        return maps * gate[:, :, None, None]


class DalaResNet50(Classifier):
    """ResNet-50 trunk, attention after one stage, global average pooling, dropout and one linear layer.

    Source: DALAResNet50 paper (2024), section III-B and Table 2 (the stage's ablation). With attention after stage 4,
    25,611,842 parameters for two classes (reduction 4) and 24,042,692 for four (reduction 16), as printed in
    Tables 9 and 10.
    """

    def __init__(self, trunk: nn.Module, options: ModelOptions) -> None:
        super().__init__()
        self.trunk = nn.Sequential()
        for name, child in trunk.named_children():
            if name not in ("avgpool", "fc"):
                self.trunk.add_module(name, child)
        self.attended = f"layer{options.attention_stage}"
        self.attention = DualActivatedAttention(STAGE_CHANNELS[options.attention_stage], options.reduction)
        self.head = make_head(STAGE_CHANNELS[4], options)

    def extract(self, images: Tensor) -> Tensor:
        """Return the maps after the last stage (attended, where the attention sits there): (B, 2048, H/32, W/32)."""
        maps = images
        for name, child in self.trunk.named_children():
            maps = child(maps)
            if name == self.attended:
                maps = self.attention(maps)
        return maps

    def embed(self, maps: Tensor) -> Tensor:
        """Return the mean of each channel: (B, 2048)."""
        return maps.mean(dim=(2, 3))


def build(options: ModelOptions, pretrained: bool) -> Classifier:
    """Build the network, optionally on torchvision's ImageNet trunk."""
    return DalaResNet50(torchvision_trunk("resnet50", pretrained=pretrained), options)


ARCHITECTURES.register("dalaresnet50")(
    Architecture(
        build,
        "DALAResNet50 paper, 2024, section III-B",
        {2: 25_611_842, 3: 24_040_643, 4: 24_042_692},
        "for 3 and 4 classes the printed counts are met with --reduction 16",
    )
)
