"""SE-ResNet-50 with two-layer head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from breastcli.models import ARCHITECTURES, Architecture, Classifier, ModelOptions
from breastcli.models.backbones import TorchvisionClassifier
from breastcli.models.heads import make_head, two_layer_head
from breastcli.models.published import download

CHANNELS = 2048
REDUCTION = 16
# The bias-free SE-ResNet-50 that the printed count belongs to; its tensors are named as ours. Nobody documents whether
# the end of its name is a hash.
WEIGHTS = "https://github.com/moskomule/senet.pytorch/releases/download/archive/seresnet50-60a8950a85b2b.pkl"


class SqueezeExcitation(nn.Module):
    """Scale every channel by a gate computed from the channels' means.

    Source: Hu et al., Squeeze-and-Excitation Networks, CVPR 2018, eq. 2-4.

    Args:
        channels: C of the maps.
        reduction: C / reduction is the width between the two layers.
        bias: whether the layers have biases; the paper's equations have none.
    """

    def __init__(self, channels: int, reduction: int = REDUCTION, *, bias: bool = False) -> None:
        super().__init__()
        width = channels // reduction
        self.fc = nn.Sequential(
            nn.Linear(channels, width, bias=bias),
            nn.ReLU(inplace=True),
            nn.Linear(width, channels, bias=bias),
            nn.Sigmoid(),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps (B, C, h, w) of the same shape."""
        return maps * self.fc(maps.mean(dim=(2, 3)))[:, :, None, None]


class SEBottleneck(Bottleneck):
    """ResNet's bottleneck with squeeze and excitation before the shortcut is added."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.se = SqueezeExcitation(self.conv3.out_channels)

    def forward(self, maps: Tensor) -> Tensor:
        """Return (B, C', h', w') of maps (B, C, h, w)."""
        shortcut = maps if self.downsample is None else self.downsample(maps)
        inner = self.relu(self.bn1(self.conv1(maps)))
        inner = self.relu(self.bn2(self.conv2(inner)))
        return self.relu(self.se(self.bn3(self.conv3(inner))) + shortcut)


class SEResNet50(TorchvisionClassifier):
    """SE-ResNet-50 trunk (26,022,976 parameters), average pooling and a hidden layer of 512.

    Source: Hu et al., CVPR 2018; head: DALAResNet50 paper (2024), Tables 9 and 10, whose counts (27,073,090 for two
    classes) are met by layers without biases in the gates and a hidden layer of 512.
    """

    def __init__(self, network: nn.Module, options: ModelOptions) -> None:
        super().__init__(network, options)
        self.head = make_head(CHANNELS, options, own=two_layer_head(CHANNELS, options))


def build(options: ModelOptions, pretrained: bool) -> Classifier:
    """Build the network, optionally on published ImageNet weights."""
    network = ResNet(SEBottleneck, [3, 4, 6, 3])
    if pretrained:
        network.load_state_dict(download(WEIGHTS, check_hash=False))
    return SEResNet50(network, options)


ARCHITECTURES.register("seresnet50")(
    Architecture(
        build,
        "Hu et al., CVPR 2018; head: DALAResNet50 paper, Table 9",
        {2: 27_073_090, 3: 27_073_603, 4: 27_074_116},
    )
)
