"""NASNetMobile: the searched network NASNet-A in its small size."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from breastcli.models import ARCHITECTURES, SYMMETRIC_SCALING, Architecture, Classifier, ModelOptions
from breastcli.models.heads import make_head
from breastcli.models.published import download

WEIGHTS_URL = "http://data.lip6.fr/cadene/pretrainedmodels/nasnetamobile-7e03cead.pth"
WIDTH = 1056
NUM_STACKS = 3
CELL_NUMBERS_PER_STACK = 6  # cells are numbered as in NASNet-A Large; the small network leaves numbers out

CURRENT, PREVIOUS = 0, 1
Step = tuple[str, int]
Adjustment = Literal["kept", "projected", "halved"]

batch_norm = partial(nn.BatchNorm2d, eps=0.001)


@dataclass(frozen=True)
class CellTable:
    """What the search found: a cell as a table.

    Attributes:
        combinations: each is the sum of two operations on maps made before. Maps 0 and 1 are the adjusted outputs of
            the cell before (``CURRENT``) and of the one before that (``PREVIOUS``); combination k makes maps k + 2.
        outputs: the maps that are concatenated: those that no combination uses.
        stride: of the operations on maps 0 and 1.
    """

    combinations: tuple[tuple[Step, Step], ...]
    outputs: tuple[int, ...]
    stride: int


NORMAL_CELL = CellTable(
    combinations=(
        (("separable5", CURRENT), ("separable3", PREVIOUS)),
        (("separable5", PREVIOUS), ("separable3", PREVIOUS)),
        (("average3", CURRENT), ("identity", PREVIOUS)),
        (("average3", PREVIOUS), ("average3", PREVIOUS)),
        (("separable3", CURRENT), ("identity", CURRENT)),
    ),
    outputs=(PREVIOUS, 2, 3, 4, 5, 6),
    stride=1,
)
REDUCTION_CELL = CellTable(
    combinations=(
        (("separable5", CURRENT), ("separable7", PREVIOUS)),
        (("max3", CURRENT), ("separable7", PREVIOUS)),
        (("average3", CURRENT), ("separable5", PREVIOUS)),
        (("identity", 3), ("average3", 2)),
        (("separable3", 2), ("max3", CURRENT)),
    ),
    outputs=(3, 4, 5, 6),
    stride=2,
)


class SeparableConvolution(nn.Module):
    """A k × k convolution of each channel, then a 1 × 1 convolution of all; the side becomes ceil(side / stride)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        inner = "same" if stride == 1 else 0
        self.depthwise_conv2d = nn.Conv2d(
            in_channels, in_channels, kernel, stride, padding=inner, groups=in_channels, bias=False
        )
        self.pointwise_conv2d = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.kernel, self.stride = kernel, stride

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps (B, out_channels, h', w')."""
        if self.stride > 1:
            (top, bottom), (left, right) = (self._overhang(side) for side in maps.shape[-2:])
            maps = functional.pad(maps, (left, right, top, bottom))
        return self.pointwise_conv2d(self.depthwise_conv2d(maps))

    def _overhang(self, side: int) -> tuple[int, int]:
        """Return how many pixels TensorFlow's "same" padding, with which the network was trained, adds at both ends."""
        last_start = (-(-side // self.stride) - 1) * self.stride
        total = max(last_start + self.kernel - side, 0)
        return total // 2, total - total // 2


class TwiceSeparable(nn.Module):
    """ReLU, separable convolution and batch norm, twice; only the first has a stride.

    Source: Zoph et al., CVPR 2018, appendix: separable operations are applied twice.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, kernel: int) -> None:
        super().__init__()
        self.separable_1 = SeparableConvolution(in_channels, out_channels, kernel, stride)
        self.bn_sep_1 = batch_norm(out_channels)
        self.separable_2 = SeparableConvolution(out_channels, out_channels, kernel, 1)
        self.bn_sep_2 = batch_norm(out_channels)

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps (B, out_channels, h', w')."""
        maps = self.bn_sep_1(self.separable_1(maps.relu()))
        return self.bn_sep_2(self.separable_2(maps.relu()))


class Pooling(nn.Module):
    """Maximum or mean of 3 × 3 pixels; of those that exist, where the window overhangs the border.

    Differs from timm's NASNet-A Large, whose means of stride 2 count the overhanging pixels as zeros. TensorFlow, where
    the weights were trained, leaves them out, and so does the port that published the weights.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, kind: Literal["max", "average"]) -> None:
        super().__init__()
        assert in_channels == out_channels, "pooling keeps the number of channels"
        self.kind, self.stride = kind, stride

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps (B, C, h', w')."""
        # With stride 2 the windows of an even side overhang behind only (ceil_mode), those of an odd side at both ends.
        padding = [1 if self.stride == 1 else side % 2 for side in maps.shape[-2:]]
        if self.kind == "max":
            return functional.max_pool2d(maps, 3, self.stride, padding, ceil_mode=True)
        return functional.avg_pool2d(maps, 3, self.stride, padding, ceil_mode=True, count_include_pad=False)


OPERATIONS = {
    "identity": lambda in_channels, out_channels, stride: nn.Identity(),
    "average3": partial(Pooling, kind="average"),
    "max3": partial(Pooling, kind="max"),
    "separable3": partial(TwiceSeparable, kernel=3),
    "separable5": partial(TwiceSeparable, kernel=5),
    "separable7": partial(TwiceSeparable, kernel=7),
}


class Projection(nn.Module):
    """ReLU, 1 × 1 convolution and batch norm."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn = batch_norm(out_channels)

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps (B, out_channels, h, w)."""
        return self.bn(self.conv(maps.relu()))


class EveryOtherPixel(nn.Module):
    """Half of a factorised reduction: every other pixel from ``first`` on, then a 1 × 1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, *, first: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.first = first

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps (B, out_channels, ceil(h / 2), ceil(w / 2))."""
        shifted = functional.pad(maps, (-self.first, self.first, -self.first, self.first))
        return self.conv(shifted[..., ::2, ::2])


class Cell(nn.Module):
    """Interpret a table.

    The modules are named as in the published weights, so that these load with ``--weights`` as they are.

    Source: Zoph et al., CVPR 2018, Figure 4 and appendix.

    Args:
        table: what to combine.
        current_channels: C of the cell before.
        previous_channels: C of the one before that.
        filters: width of every combination.
        previous: how the maps before the last are fitted to the last: ``kept``; ``projected`` (1 × 1 convolution) where
            the sizes agree; ``halved`` (factorised reduction) where they are twice as large.
    """

    def __init__(
        self, table: CellTable, current_channels: int, previous_channels: int, filters: int, previous: Adjustment
    ) -> None:
        super().__init__()
        self.table = table
        self.previous = previous
        self.out_channels = len(table.outputs) * filters
        self.conv_1x1 = Projection(current_channels, filters)
        if previous == "projected":
            self.conv_prev_1x1 = Projection(previous_channels, filters)
        elif previous == "halved":
            self.path_1 = EveryOtherPixel(previous_channels, filters // 2, first=0)
            self.path_2 = EveryOtherPixel(previous_channels, filters // 2, first=1)
            self.final_path_bn = batch_norm(filters)
        for number, steps in enumerate(table.combinations):
            for side, (operation, source) in zip(("left", "right"), steps, strict=True):
                width = previous_channels if previous == "kept" and source == PREVIOUS else filters
                stride = table.stride if source in (CURRENT, PREVIOUS) else 1
                self.add_module(f"comb_iter_{number}_{side}", OPERATIONS[operation](width, filters, stride))

    def forward(self, current: Tensor, previous: Tensor) -> Tensor:
        """Return maps (B, out_channels, h', w').

        Args:
            current: (B, current_channels, h, w).
            previous: (B, previous_channels, h, w), or twice as large.
        """
        maps = [self.conv_1x1(current), self.adjust(previous)]
        for number, ((_, left), (_, right)) in enumerate(self.table.combinations):
            on_left = self.get_submodule(f"comb_iter_{number}_left")
            on_right = self.get_submodule(f"comb_iter_{number}_right")
            maps.append(on_left(maps[left]) + on_right(maps[right]))
        return torch.cat([maps[number] for number in self.table.outputs], dim=1)

    def adjust(self, previous: Tensor) -> Tensor:
        """Return the maps before the last in the size of the last: (B, filters, h, w), or as they are if kept."""
        if self.previous == "kept":
            return previous
        if self.previous == "projected":
            return self.conv_prev_1x1(previous)
        previous = previous.relu()
        return self.final_path_bn(torch.cat([self.path_1(previous), self.path_2(previous)], dim=1))


class NasNetTrunk(nn.Module):
    """NASNet-A without its classifier.

    Source: Zoph et al., Learning Transferable Architectures for Scalable Image Recognition, CVPR 2018, Figures 2 and 4.
    The defaults are NASNet-A (4 @ 1056) "Mobile"; NASNet-A (6 @ 4032) "Large" has ``stem_channels=96, width=4032,
    cells_per_stack=6, skip_reduction=True``.

    Args:
        stem_channels: C of the first convolution.
        width: C of the last maps, a multiple of 96: six maps per cell, four times the filters of the first stack, and
            the stem starts with a quarter of those.
        cells_per_stack: normal cells in each of the three stacks, at most 6.
        skip_reduction: whether the first normal cell after a reduction cell takes as previous what the reduction cell
            took as previous, rather than what it reduced.
    """

    def __init__(
        self,
        *,
        stem_channels: int = 32,
        width: int = WIDTH,
        cells_per_stack: int = 4,
        skip_reduction: bool = False,
    ) -> None:
        super().__init__()
        assert width % 96 == 0
        assert cells_per_stack <= CELL_NUMBERS_PER_STACK
        filters = width // 24
        first_convolution = nn.Conv2d(3, stem_channels, 3, stride=2, bias=False)
        self.conv0 = nn.Sequential(OrderedDict(conv=first_convolution, bn=batch_norm(stem_channels)))
        self.steps_back: dict[str, int] = {}  # from a cell to what it takes as previous
        self._channels = [stem_channels, stem_channels]
        self._add_cell("cell_stem_0", REDUCTION_CELL, filters // 4, "kept")
        self._add_cell("cell_stem_1", REDUCTION_CELL, filters // 2, "halved")
        for stack in range(NUM_STACKS):
            if stack > 0:
                self._add_cell(f"reduction_cell_{stack - 1}", REDUCTION_CELL, filters * 2**stack, "projected")
            for cell in range(cells_per_stack):
                name = f"cell_{stack * CELL_NUMBERS_PER_STACK + cell}"
                skips = skip_reduction and stack > 0 and cell == 0
                previous: Adjustment = "halved" if cell == 0 else "projected"
                self._add_cell(name, NORMAL_CELL, filters * 2**stack, previous, steps_back=3 if skips else 2)

    def _add_cell(
        self, name: str, table: CellTable, filters: int, previous: Adjustment, *, steps_back: int = 2
    ) -> None:
        cell = Cell(table, self._channels[-1], self._channels[-steps_back], filters, previous)
        self.add_module(name, cell)
        self.steps_back[name] = steps_back
        self._channels.append(cell.out_channels)

    def forward(self, images: Tensor) -> Tensor:
        """Return the maps after the last ReLU: (B, width, H/32, W/32).

        Args:
            images: (B, 3, H, W) in [-1, 1], H and W at least 32.
        """
        maps = self.conv0(images)
        outputs = [maps, maps]
        for name, steps_back in self.steps_back.items():
            maps = self.get_submodule(name)(outputs[-1], outputs[-steps_back])
            outputs = [*outputs[-2:], maps]
        return maps.relu()


class NasNetMobile(Classifier):
    """NASNet-A (4 @ 1056), global average pooling and a new head."""

    native_scaling = SYMMETRIC_SCALING

    def __init__(self, trunk: NasNetTrunk, options: ModelOptions) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = make_head(WIDTH, options)

    def extract(self, images: Tensor) -> Tensor:
        """Return the maps after the last ReLU: (B, 1056, H/32, W/32)."""
        return self.trunk(images)

    def embed(self, maps: Tensor) -> Tensor:
        """Return the mean of each channel: (B, 1056)."""
        return maps.mean(dim=(2, 3))


def nasnetmobile_trunk(*, pretrained: bool) -> NasNetTrunk:
    """Return the trunk of NASNetMobile, with published ImageNet weights if asked for.

    Raises:
        UserError: the weights cannot be downloaded.
    """
    trunk = NasNetTrunk()
    if pretrained:
        published = download(WEIGHTS_URL)
        trunk.load_state_dict({name: value for name, value in published.items() if not name.startswith("last_linear.")})
    return trunk


def build(options: ModelOptions, pretrained: bool) -> Classifier:
    """Build the network, optionally on published ImageNet weights."""
    return NasNetMobile(nasnetmobile_trunk(pretrained=pretrained), options)


ARCHITECTURES.register("nasnetmobile")(Architecture(build, "Zoph et al., CVPR 2018"))
