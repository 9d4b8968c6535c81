"""Three networks side by side whose maps are fused over scales."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from breastcli.errors import UsageError
from breastcli.models import ARCHITECTURES, Architecture, Classifier, ModelOptions
from breastcli.models.backbones import torchvision_trunk
from breastcli.models.heads import last_layer, make_head
from breastcli.models.nasnetmobile import nasnetmobile_trunk

COMMON_WIDTH = 256
DILATIONS = (1, 2, 3)
POOLING_WINDOWS = (3, 5, 7)
HIDDEN_WIDTH = 128
DROPOUT_BEFORE, DROPOUT_AFTER = 0.2, 0.4  # the hidden layer
HEAD_EPSILON = 1e-3  # of its batch norms: Keras' default; PyTorch's 1e-5 blows up channels that hardly ever vary

# The paper's "first 200 layers of DenseNet-201 and first 50 of ResNet-101", in layers with weights. Keras, where it was
# trained, also counts inputs, paddings, activations, poolings, concatenations and additions:
#   DenseNet-201  7 of the stem + 6 blocks x 7 + 4 of a transition + 12 x 7 + 4 + 8 x 7 + 3 = 200, the last being the
#                 first convolution of the third stage's ninth block; with weights 2 + 24 + 2 + 48 + 2 + 32 + 2 = 112
#   ResNet-101    7 of the stem + 12 + 10 + 10 of the first stage + 11 of the 12 of the second stage's first block, all
#                 but its last activation, = 50; with weights 2 + 8 + 6 + 6 + 8 = 30
PUBLISHED_FREEZING = "densenet201:112,resnet101:30"


class TrunkBuilder(Protocol):
    """Makes a trunk with random or with ImageNet weights."""

    def __call__(self, *, pretrained: bool) -> nn.Module:
        """Return the trunk."""


class Scale(NamedTuple):
    """What gives one scale: how to build its trunk, and C of the trunk's maps."""

    build: TrunkBuilder
    channels: int


def densenet201_trunk(*, pretrained: bool) -> nn.Module:
    """Return DenseNet-201 up to the ReLU before its pooling: maps (B, 1920, H/32, W/32)."""
    trunk = torchvision_trunk("densenet201", pretrained=pretrained).features
    trunk.add_module("relu", nn.ReLU(inplace=True))  # a function call in torchvision's forward
    return trunk


def resnet101_trunk(*, pretrained: bool) -> nn.Module:
    """Return ResNet-101 without its pooling: maps (B, 2048, H/32, W/32)."""
    network = torchvision_trunk("resnet101", pretrained=pretrained)
    trunk = nn.Sequential()
    for name, child in network.named_children():
        if name not in ("avgpool", "fc"):
            trunk.add_module(name, child)
    return trunk


def vgg16_trunk(*, pretrained: bool) -> nn.Module:
    """Return VGG-16's convolutions: maps (B, 512, H/32, W/32)."""
    return torchvision_trunk("vgg16", pretrained=pretrained).features


# From the shallow to the high level, as the paper assigns them. VGG-16 is what its Table 6 counts under the name of
# ResNet-101.
TRUNKS = {
    "nasnetmobile": Scale(nasnetmobile_trunk, 1056),
    "vgg16": Scale(vgg16_trunk, 512),
    "resnet101": Scale(resnet101_trunk, 2048),
    "densenet201": Scale(densenet201_trunk, 1920),
}


class MultiScaleContext(nn.Module):
    """Bring one trunk's maps to a common width, add the previous scale, and look around at several distances (MSCF).

    x = ReLU(BN(1 × 1 convolution of the maps) + previous scale); result = ReLU(x + BN(sum of dilated 3 × 3 of x)).

    Source: Deebani et al. (2025), Figure 4b: dilated convolutions and residual connections. It gives neither width nor
    rates nor the order within the block.

    Args:
        channels: C of the trunk's maps.
        width: C of the result.
    """

    def __init__(self, channels: int, width: int = COMMON_WIDTH) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, width, 1, bias=False)
        self.projection_norm = nn.BatchNorm2d(width)
        self.dilated = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=rate, dilation=rate, bias=False) for rate in DILATIONS
        )
        self.dilated_norm = nn.BatchNorm2d(width)

    def forward(self, maps: Tensor, previous: Tensor | None = None) -> Tensor:
        """Return maps (B, width, h, w).

        Args:
            maps: (B, C, h, w) of one trunk.
            previous: (B, width, h, w) of the scale before; None for the first.
        """
        projected = self.projection_norm(self.projection(maps))
        entered = (projected if previous is None else projected + previous).relu()
        context = self.dilated_norm(sum(convolution(entered) for convolution in self.dilated))
        return (entered + context).relu()


class ChainedParallelPooling(nn.Module):
    """Maximum poolings of growing windows, each fed by the one before, beside their input (CPP).

    Source: Deebani et al. (2025), Figure 4d, which gives no windows.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """Return the maps (B, C, h, w) and three poolings of them side by side: (B, 4 C, h, w)."""
        chain = [maps]
        for window in POOLING_WINDOWS:
            chain.append(functional.max_pool2d(chain[-1], window, stride=1, padding=window // 2))
        return torch.cat(chain, dim=1)


class FeaturePyramid(nn.Module):
    """A context module per scale, their results side by side (MLFF), then chained parallel pooling.

    Source: Deebani et al. (2025), Figure 4a-d; He initialisation: Table 10.

    Args:
        channels: C of each trunk's maps, by the trunk's name.
    """

    def __init__(self, channels: Mapping[str, int]) -> None:
        super().__init__()
        self.contexts = nn.ModuleDict({name: MultiScaleContext(channels[name]) for name in TRUNKS if name in channels})
        self.pooling = ChainedParallelPooling()
        self.out_channels = len(channels) * COMMON_WIDTH * (1 + len(POOLING_WINDOWS))
        self.apply(_initialise)

    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        """Return (B, out_channels, h, w) of maps (B, C, h, w) by the trunk's name."""
        pyramid: list[Tensor] = []
        for name, context in self.contexts.items():
            pyramid.append(context(maps[name], pyramid[-1] if pyramid else None))
        return self.pooling(torch.cat(pyramid, dim=1))


class Concatenation(nn.Module):
    """The trunks' maps side by side, in the order in which the trunks were named.

    Args:
        channels: C of each trunk's maps, by the trunk's name.
    """

    def __init__(self, channels: Mapping[str, int]) -> None:
        super().__init__()
        self.out_channels = sum(channels.values())

    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        """Return (B, out_channels, h, w) of maps (B, C, h, w) by the trunk's name."""
        return torch.cat(list(maps.values()), dim=1)


FUSIONS = {"pyramid": FeaturePyramid, "concatenation": Concatenation}


class MultiScale(Classifier):
    """DenseNet-201, NASNetMobile and ResNet-101 on the same image; a feature pyramid; a hidden layer of 128.

    ``features`` are the fused maps, so that class activation maps explain all trunks at once. Each trunk is a stage for
    ``--freeze``: ``PUBLISHED_FREEZING`` is what the paper froze for its final models, ``trunk`` what it froze before.

    ``--pretrained`` starts each trunk from its own ImageNet weights; there is no single published file, so that
    ``--weights`` takes weights of this network only. With ``--normalisation native`` all trunks see ImageNet's mean and
    deviation, although NASNetMobile was trained on [-1, 1].

    Source: Deebani et al. (2025), section "Multi-scale transfer learning technique", Figure 4, Tables 6 and 10.

    Differs from the paper: Table 6 averages each trunk's maps to a vector before the context modules, where
    convolutions and poolings have nothing to look around in; here, as in Figure 4 and in the text, they see maps, and
    the average comes last. Its "ResNet 101" of 14,714,688 parameters and 512 channels is VGG-16's trunk; here it is
    ResNet-101, as the text says everywhere. Its MSFF (15,986 parameters) and CPP (11,952) are not described. Hence
    71,823,700 parameters for two classes (65,479,828 by concatenation), not 37,793,640. Of these it prints 37,494,676
    as trainable: exactly what a concatenation with VGG-16 in ResNet-101's place has here, without any MSFF and CPP.

    A training step on 32 images of 224 pixels in bfloat16 needs 5.3 GiB with ``PUBLISHED_FREEZING``, 7.6 GiB without,
    beside what kernels need for themselves (computed by ``docs/multiscale_memory.py``).

    Args:
        trunks: by name, a key of ``TRUNKS``.
        options: what to build.
    """

    def __init__(self, trunks: Mapping[str, nn.Module], options: ModelOptions) -> None:
        super().__init__()
        self.trunk = nn.ModuleDict(trunks)
        self.fusion = FUSIONS[options.fusion]({name: TRUNKS[name].channels for name in trunks})
        width = self.fusion.out_channels
        self.head = make_head(width, options, own=published_head(width, options))

    def extract(self, images: Tensor) -> Tensor:
        """Return the fused maps: (B, 3072, H/32, W/32) with three trunks in a pyramid."""
        return self.fusion(share_grid({name: trunk(images) for name, trunk in self.trunk.items()}))

    def embed(self, maps: Tensor) -> Tensor:
        """Return the mean of each channel."""
        return maps.mean(dim=(2, 3))


def share_grid(maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Resize maps (B, C, h, w) to the largest height and width among them, where the trunks round differently."""
    height, width = (max(one.shape[axis] for one in maps.values()) for axis in (2, 3))
    return {
        name: one
        if one.shape[2:] == (height, width)
        else functional.interpolate(one, (height, width), mode="bilinear", align_corners=False)
        for name, one in maps.items()
    }


def published_head(width: int, options: ModelOptions) -> nn.Module:
    """Return the head of Table 6, with He initialisation (Table 10).

    Its dropouts are the published ones, 0.2 and 0.4: ``options.dropout`` does not apply. The activation of the hidden
    layer is not stated; ReLU is assumed.

    Args:
        width: D of the embedding.
        options: number of classes and kind of the last layer.
    """
    head = nn.Sequential(
        nn.Dropout(DROPOUT_BEFORE),
        nn.BatchNorm1d(width, eps=HEAD_EPSILON),
        nn.Linear(width, HIDDEN_WIDTH),
        nn.ReLU(),
        nn.Dropout(DROPOUT_AFTER),
        nn.BatchNorm1d(HIDDEN_WIDTH, eps=HEAD_EPSILON),
        last_layer(HIDDEN_WIDTH, options),
    )
    return head.apply(_initialise)


def read_trunks(names: str) -> list[str]:
    """Return the names that ``--trunks`` lists.

    Raises:
        UsageError: a name is unknown (the nearest is named) or listed twice.
    """
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in TRUNKS:
            near = get_close_matches(name, TRUNKS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(TRUNKS))}"
            raise UsageError(f"--trunks: unknown trunk {name!r}", fix=hint)
        if chosen.count(name) > 1:
            raise UsageError(f"--trunks: {name} is listed twice", fix="list each trunk once")
    return chosen


def _initialise(module: nn.Module) -> None:
    """He initialisation of a convolution or linear layer."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def build(options: ModelOptions, pretrained: bool) -> Classifier:
    """Build the network, optionally on the ImageNet weights of each trunk."""
    return MultiScale(
        {name: TRUNKS[name].build(pretrained=pretrained) for name in read_trunks(options.trunks)}, options
    )


ARCHITECTURES.register("multiscale")(
    Architecture(
        build,
        "Deebani et al., 2025, Figure 4 and Table 6",
        {2: 37_793_640},
        "the printed count has VGG-16's trunk in ResNet-101's place and two layers that are not described; its "
        "37,494,676 trainable ones are those of --trunks densenet201,nasnetmobile,vgg16 --fusion concatenation",
    )
)
