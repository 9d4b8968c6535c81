"""Vision transformers behind the contract: tokens laid out as maps over the image."""

from __future__ import annotations

import logging
import math
import re
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional

from breastcli.models import Classifier, ModelOptions
from breastcli.models.heads import make_head

logger = logging.getLogger(__name__)

# Hugging Face's transformers library: its names of a ViT's or a DINOv2's tensors, and timm's.
OUTSIDE_BLOCKS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
INSIDE_BLOCKS = {
    "attention.output.dense": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "mlp.weights_in": "mlp.fc1",
    "mlp.weights_out": "mlp.fc2",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}


class Transformer(Classifier):
    """A vision transformer cut before its last block.

    After the last block the class token alone decides, and the patches' gradient is zero. The maps are therefore what
    enters that block, and ``embed`` runs it: every patch then has its true influence on the logits. Class and register
    tokens lie in rows below the patches, filled up with zeros; ``grid`` cuts them off.

    Attributes:
        num_prefix: class and register tokens.
    """

    num_prefix: int

    def grid(self, maps: Tensor) -> Tensor:
        """See ``Classifier``."""
        return maps[:, :, : maps.shape[2] - math.ceil(self.num_prefix / maps.shape[3])]

    def _lay_out(self, patches: Tensor, prefix: Tensor) -> Tensor:
        """Return maps (B, C, h + r, w) of patches (B, C, h, w) and prefix tokens (B, P, C)."""
        if not self.num_prefix:
            return patches
        width = patches.shape[3]
        padding = -self.num_prefix % width
        rows = functional.pad(prefix.transpose(1, 2), (0, padding))  # (B, C, r * w)
        return torch.cat([patches, rows.unflatten(2, (-1, width))], dim=2)

    def _take_up(self, maps: Tensor) -> Tensor:
        """Return the tokens (B, P + h * w, C) that ``_lay_out`` laid out."""
        tokens = maps.flatten(2).transpose(1, 2)
        num_patches = self.grid(maps).shape[2] * maps.shape[3]
        return torch.cat([tokens[:, num_patches : num_patches + self.num_prefix], tokens[:, :num_patches]], dim=1)


class TimmTransformer(Transformer):
    """A timm ``VisionTransformer`` with the pooling that it was published with.

    Args:
        network: built by timm with ``num_classes=0``.
        options: what to build.
        with_mean: append the mean of the patches to what timm pools; the embedding is twice as wide.
    """

    def __init__(self, network: Any, options: ModelOptions, *, with_mean: bool = False) -> None:
        super().__init__()
        self.trunk = network
        self.num_prefix = network.num_prefix_tokens
        self.with_mean = with_mean
        self.head = make_head(network.head_hidden_size * (1 + with_mean), options)

    def extract(self, images: Tensor) -> Tensor:
        """See ``Classifier``."""
        (found,) = self.trunk.forward_intermediates(
            images,
            indices=[len(self.trunk.blocks) - 2],
            return_prefix_tokens=True,
            stop_early=True,
            intermediates_only=True,
        )
        patches, prefix = found if self.num_prefix else (found, None)
        return self._lay_out(patches, prefix)

    def embed(self, maps: Tensor) -> Tensor:
        """Run the last block and pool: (B, D)."""
        tokens = self.trunk.norm(self.trunk.blocks[-1](self._take_up(maps)))
        pooled = self.trunk.forward_head(tokens, pre_logits=True)
        return torch.cat([pooled, tokens[:, self.num_prefix :].mean(dim=1)], dim=1) if self.with_mean else pooled

    def from_published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """See ``Classifier``; positions that were published for another grid are resampled for ours."""
        tensors = timm_names(tensors)
        own = self.trunk.pos_embed
        num_prefix = 0 if self.trunk.no_embed_class else self.num_prefix
        for name in ("pos_embed", "trunk.pos_embed"):
            given = tensors.get(name)
            if own is None or given is None or given.shape == own.shape or given.shape[2:] != own.shape[2:]:
                continue
            side = math.isqrt(max(given.shape[1] - num_prefix, 0))
            if side and side**2 == given.shape[1] - num_prefix:
                grid = list(self.trunk.patch_embed.grid_size)
                logger.info("positions resampled from %d x %d patches to %d x %d", side, side, *grid)
                tensors = {**tensors, name: resample_abs_pos_embed(given, grid, num_prefix_tokens=num_prefix)}
        return tensors


class TorchvisionTransformer(Transformer):
    """A torchvision ``VisionTransformer``: class token, fixed image size."""

    num_prefix = 1

    def __init__(self, network: Any, options: ModelOptions) -> None:
        super().__init__()
        self.trunk = network
        self.trunk.heads = nn.Identity()
        self.head = make_head(network.hidden_dim, options)

    def extract(self, images: Tensor) -> Tensor:
        """See ``Classifier``."""
        patches = self.trunk._process_input(images)  # (B, h * w, C)
        encoder = self.trunk.encoder
        tokens = torch.cat([self.trunk.class_token.expand(len(patches), -1, -1), patches], dim=1)
        tokens = encoder.layers[:-1](encoder.dropout(tokens + encoder.pos_embedding))
        height = images.shape[2] // self.trunk.patch_size
        return self._lay_out(tokens[:, 1:].transpose(1, 2).unflatten(2, (height, -1)), tokens[:, :1])

    def embed(self, maps: Tensor) -> Tensor:
        """Run the last block and return the class token: (B, C)."""
        encoder = self.trunk.encoder
        return encoder.ln(encoder.layers[-1](self._take_up(maps)))[:, 0]


def timm_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a transformers library's ViT or DINOv2 as timm calls them; other files pass unchanged."""
    plain = {re.sub(r"^((vit|dinov2)\.)?(encoder\.)?", "", name): tensor for name, tensor in tensors.items()}
    if not plain.keys() >= OUTSIDE_BLOCKS.keys():
        return tensors
    renamed = {}
    for name, tensor in plain.items():
        block = re.fullmatch(r"layer\.(\d+)\.(.+?)(\.weight|\.bias)?", name)
        if block is None:
            renamed[OUTSIDE_BLOCKS.get(name, name)] = tensor
            continue
        number, part, kind = block[1], block[2], block[3] or ""
        if part == "attention.attention.query":
            three = [name.replace("query", one) for one in ("query", "key", "value")]
            renamed[f"blocks.{number}.attn.qkv{kind}"] = torch.cat([plain[one] for one in three if one in plain])
        elif part not in ("attention.attention.key", "attention.attention.value"):
            renamed[f"blocks.{number}.{INSIDE_BLOCKS.get(part, part)}{kind}"] = tensor
    return renamed
