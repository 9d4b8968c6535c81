"""The conditional generator and the projection critic, for 64 to 512 pixels."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from breastcli.system.runtime import full_precision

START_PX = 4
SIZES_PX = (64, 128, 256, 512)
MAX_WIDENING = 8  # channels at the smallest maps, as a multiple of those at full size
SLOPE = 0.2
GAIN = math.sqrt(2 / (1 + SLOPE**2))  # what keeps the variance through a leaky rectifier
MAPPING_PACE = 0.01  # or the style soon forgets the noise (Karras et al. 2019, appendix C)
GROUP_SIZE = 4  # images that the critic sees the spread of


@dataclass(frozen=True)
class GanOptions:
    """What generator and critic are built from.

    Attributes:
        size_px: side of the images, 4 times a power of two.
        num_conditions: number of classes (or other labels) that an image can be asked for by.
        width: channels at full size.
        noise_dim: length of the noise vector and of the style.
    """

    size_px: int
    num_conditions: int
    width: int = 32
    noise_dim: int = 128

    def channels(self) -> list[tuple[int, int]]:
        """Return (side in pixels, channels) of the maps from the smallest to full size."""
        steps = int(math.log2(self.size_px // START_PX))
        assert START_PX * 2**steps == self.size_px, f"{self.size_px} px is not 4 times a power of two"
        return [(START_PX * 2**k, self.width * min(MAX_WIDENING, 2 ** (steps - k))) for k in range(steps + 1)]


class EqualLinear(nn.Module):
    """A linear layer whose weights are scaled at run time, so that one learning rate suits every layer.

    It learns at ``pace`` times that rate.

    Source: Karras et al., Progressive Growing of GANs, ICLR 2018, section 4.1.
    """

    def __init__(self, num_in: int, num_out: int, *, gain: float = 1.0, bias: float = 0.0, pace: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_out, num_in) / pace)
        self.bias = nn.Parameter(torch.full((num_out,), bias / pace))
        self.gain, self.pace = gain * pace / math.sqrt(num_in), pace

    def forward(self, values: Tensor) -> Tensor:
        """Return (B, num_out) of (B, num_in)."""
        return functional.linear(values, self.weight * self.gain, self.bias * self.pace)


class EqualConv(nn.Module):
    """A convolution that keeps the size, its weights scaled at run time like those of ``EqualLinear``."""

    def __init__(self, num_in: int, num_out: int, kernel: int, *, gain: float = GAIN, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_out, num_in, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(num_out)) if bias else None
        self.gain = gain / math.sqrt(num_in * kernel**2)

    def forward(self, maps: Tensor) -> Tensor:
        """Return (B, num_out, h, w) of (B, num_in, h, w)."""
        return functional.conv2d(maps, self.weight * self.gain, self.bias, padding=self.weight.shape[-1] // 2)


class StyledConv(nn.Module):
    """A convolution whose input channels are scaled by the style and whose output channels keep unit variance.

    Source: Karras et al., Analyzing and Improving the Image Quality of StyleGAN, CVPR 2020, section 2.2 (weight
    modulation and demodulation), in its form on activations: one convolution serves the whole batch.
    """

    def __init__(self, num_in: int, num_out: int, style_dim: int) -> None:
        super().__init__()
        self.conv = EqualConv(num_in, num_out, 3, gain=1.0, bias=False)
        self.scale = EqualLinear(style_dim, num_in, bias=1.0)
        self.bias = nn.Parameter(torch.zeros(num_out))

    def forward(self, maps: Tensor, style: Tensor) -> Tensor:
        """Return (B, num_out, h, w) of maps (B, num_in, h, w) and a style (B, style_dim)."""
        with full_precision(maps.device):  # sums of squares need more than bfloat16's eight bits
            scale = self.scale(style.float())  # (B, num_in)
            power = (self.conv.weight * self.conv.gain).square().sum(dim=(2, 3))  # (num_out, num_in)
            restore = (scale.square() @ power.t() + 1e-8).rsqrt()  # (B, num_out)
        maps = self.conv(maps * scale[:, :, None, None].to(maps.dtype))
        maps = maps * (restore * GAIN)[:, :, None, None].to(maps.dtype)
        return functional.leaky_relu(maps + self.bias[:, None, None].to(maps.dtype), SLOPE)


class Generator(nn.Module):
    """Turns noise and a condition into an image.

    The condition's embedding and the noise give the layout, maps of 4 × 4 pixels, and the style, which modulates every
    upsampling block; each size adds its own red, green and blue to those of the sizes below, and tanh ends it.

    Source: Deebani et al. 2025, "Generator (G)": a deep convolutional network on noise z and label y with LeakyReLU,
    upsampling, a final convolution and tanh. Differs from the paper: "similar to U-Net" can mean its decoder only, as
    there is no image to encode; the links from every size to the result are what is left of U-Net's.
    """

    def __init__(self, options: GanOptions) -> None:
        super().__init__()
        self.options = options
        dim, sizes = options.noise_dim, options.channels()
        self.embedding = nn.Embedding(options.num_conditions, dim)
        self.mapping = nn.ModuleList(EqualLinear(size, dim, gain=GAIN, pace=MAPPING_PACE) for size in (2 * dim, dim))
        self.start = EqualLinear(2 * dim, sizes[0][1] * START_PX**2)
        self.first = StyledConv(sizes[0][1], sizes[0][1], dim)
        self.blocks = nn.ModuleList(
            nn.ModuleList([StyledConv(before, after, dim), StyledConv(after, after, dim)])
            for (_, before), (_, after) in itertools.pairwise(sizes)
        )
        # Together the sizes begin within the bend of tanh, where it still has a slope.
        self.to_rgb = nn.ModuleList(EqualConv(channels, 3, 1, gain=1 / len(sizes)) for _, channels in sizes)

    def style(self, noise: Tensor, conditions: Tensor) -> Tensor:
        """Return the style (B, noise_dim) of noise (B, noise_dim) and conditions (B,)."""
        values = self._joined(noise, conditions)
        for layer in self.mapping:
            values = functional.leaky_relu(layer(values), SLOPE)
        return values

    def layout(self, noise: Tensor, conditions: Tensor) -> Tensor:
        """Return the smallest maps (B, C, 4, 4) of noise (B, noise_dim) and conditions (B,)."""
        return self.start(self._joined(noise, conditions)).unflatten(1, (-1, START_PX, START_PX))

    def _joined(self, noise: Tensor, conditions: Tensor) -> Tensor:
        """Return noise and embedded condition side by side, (B, 2 noise_dim)."""
        return torch.cat([_unit(noise), _unit(self.embedding(conditions))], dim=1)

    def draw(self, layout: Tensor, style: Tensor) -> Tensor:
        """Return images (B, 3, size_px, size_px) in [-1, 1] of layouts (B, C, 4, 4) and styles (B, noise_dim)."""
        maps = self.first(layout.contiguous(memory_format=torch.channels_last), style)
        image = self.to_rgb[0](maps)
        for block, to_rgb in zip(self.blocks, self.to_rgb[1:], strict=True):
            maps = functional.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=False)
            for layer in block:
                maps = layer(maps, style)
            image = functional.interpolate(image, scale_factor=2, mode="bilinear", align_corners=False) + to_rgb(maps)
        return image.float().tanh()

    def forward(self, noise: Tensor, conditions: Tensor) -> Tensor:
        """Return images (B, 3, size_px, size_px) float32 in [-1, 1].

        Args:
            noise: (B, noise_dim), standard normal.
            conditions: (B,) int64.
        """
        return self.draw(self.layout(noise, conditions), self.style(noise, conditions))


class CriticBlock(nn.Module):
    """Two convolutions and a shortcut, then half the size."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.first = EqualConv(num_in, num_in, 3)
        self.second = EqualConv(num_in, num_out, 3)
        self.shortcut = EqualConv(num_in, num_out, 1, gain=1.0, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Return (B, num_out, h / 2, w / 2) of (B, num_in, h, w)."""
        inner = functional.leaky_relu(self.first(maps), SLOPE)
        inner = functional.leaky_relu(functional.avg_pool2d(self.second(inner), 2), SLOPE)
        return (inner + self.shortcut(functional.avg_pool2d(maps, 2))) * math.sqrt(0.5)


class Critic(nn.Module):
    """Scores how real an image of a condition is; no batch norm, which would tie the gradients of a batch together.

    The score is unbounded. Source: Arjovsky et al., Wasserstein GAN, ICML 2017; projection of the condition: Miyato and
    Koyama, cGANs with Projection Discriminator, ICLR 2018, eq. 3. Differs from Deebani et al. 2025, where "a single
    value between 0 and 1" comes out: that belongs to a classic GAN, not to a Wasserstein critic.
    """

    def __init__(self, options: GanOptions) -> None:
        super().__init__()
        sizes = options.channels()[::-1]
        self.from_rgb = EqualConv(3, sizes[0][1], 1)
        self.blocks = nn.ModuleList(CriticBlock(before, after) for (_, before), (_, after) in itertools.pairwise(sizes))
        channels = sizes[-1][1]
        self.last = EqualConv(channels + 1, channels, 3)
        self.flatten = EqualLinear(channels * START_PX**2, channels, gain=GAIN)
        self.score = EqualLinear(channels, 1)
        self.embedding = nn.Embedding(options.num_conditions, channels)

    def features(self, images: Tensor) -> Tensor:
        """Return (B, D) features of images (B, 3, H, W) in [-1, 1]."""
        maps = functional.leaky_relu(self.from_rgb(images), SLOPE)
        for block in self.blocks:
            maps = block(maps)
        maps = functional.leaky_relu(self.last(torch.cat([maps, _spread(maps)], dim=1)), SLOPE)
        return functional.leaky_relu(self.flatten(maps.flatten(1)), SLOPE)

    def judge(self, features: Tensor, conditions: Tensor) -> Tensor:
        """Return scores (B,) float32 of features (B, D) under conditions (B,)."""
        with full_precision(features.device):  # scores are unbounded, and their differences count
            features = features.float()
            projected = (self.embedding(conditions) * features).sum(dim=1) / math.sqrt(features.shape[1])
            return self.score(features)[:, 0] + projected

    def forward(self, images: Tensor, conditions: Tensor) -> Tensor:
        """Return scores (B,), unbounded; higher is more real."""
        return self.judge(self.features(images), conditions)


def _unit(values: Tensor) -> Tensor:
    """Scale vectors (B, D) to a root mean square of one."""
    return values * (values.float().square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


def _spread(maps: Tensor) -> Tensor:
    """Return a map (B, 1, h, w) of how far images of a group lie apart, so that sameness is seen.

    Groups are of up to four images; where the batch does not divide, all of it is one group.

    Source: Karras et al., Progressive Growing of GANs, ICLR 2018, section 3 (minibatch standard deviation).
    """
    size = GROUP_SIZE if len(maps) % GROUP_SIZE == 0 else len(maps)
    grouped = maps.float().unflatten(0, (-1, size))  # (groups, size, C, h, w)
    deviation = (grouped - grouped.mean(dim=1, keepdim=True)).square().mean(dim=1).add(1e-8).sqrt()
    spread = deviation.mean(dim=(1, 2, 3)).repeat_interleave(size)  # (B,)
    return spread[:, None, None, None].expand(-1, 1, *maps.shape[2:]).to(maps.dtype)
