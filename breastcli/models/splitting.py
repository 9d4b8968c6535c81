"""A network cut at an earlier layer, so that class activation maps can explain finer maps."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn
from torchvision.ops import Permute

from breastcli.errors import UserError
from breastcli.models import Classifier
from breastcli.models.backbones import TorchvisionClassifier
from breastcli.models.dalaresnet50 import DalaResNet50
from breastcli.models.transformers import TimmTransformer, Transformer
from breastcli.models.vgg16inception import VGG16Inception

TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]  # how torchvision's Swin moves the channels


@dataclass
class Chain:
    """The modules that make a network's maps, one after the other.

    Attributes:
        steps: the modules in the order in which they run.
        ends: name of a layer to the number of steps that have run when it ends.
    """

    steps: list[nn.Module] = field(default_factory=list)
    ends: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, module: nn.Module) -> None:
        """Append a module; a sequence of modules, as its parts."""
        if type(module).forward is nn.Sequential.forward:
            for child_name, child in module.named_children():
                self.add(f"{name}.{child_name}", child)
        else:
            self.steps.append(module)
        self.ends[name] = len(self.steps)


class SplitChain(Classifier):
    """A network whose maps are those that leave an earlier layer; parameters are shared.

    Args:
        whole: the network.
        chain: what makes its maps.
        end: number of steps before the cut.
    """

    def __init__(self, whole: Classifier, chain: Chain, end: int) -> None:
        super().__init__()
        _share(self, whole)
        self._before, self._after = chain.steps[:end], chain.steps[end:]
        self._channels_last = False
        for step in self._before:
            if isinstance(step, Permute) and step.dims in (TO_LAST, TO_FIRST):
                self._channels_last = step.dims == TO_LAST

    def extract(self, images: Tensor) -> Tensor:
        """See ``Classifier``."""
        maps = images
        for step in self._before:
            maps = step(maps)
        return maps.permute(TO_FIRST) if self._channels_last else maps

    def embed(self, maps: Tensor) -> Tensor:
        """Run the rest of the trunk and pool: (B, D)."""
        maps = maps.permute(TO_LAST) if self._channels_last else maps.clone()  # what follows may work in place
        for step in self._after:
            maps = step(maps)
        return self.whole.embed(maps)


class SplitTransformer(Transformer):
    """A vision transformer whose maps are those that enter an earlier block; parameters are shared.

    Args:
        whole: the network.
        blocks: all its blocks.
        entered: number of the block.
    """

    def __init__(self, whole: Transformer, blocks: nn.Sequential, entered: int) -> None:
        super().__init__()
        _share(self, whole)
        self.num_prefix = whole.num_prefix
        self._between = list(blocks)[entered:-1]
        self._shortened = [_shorten(whole, blocks[: entered + 1])]  # in a list: not another part of this network

    def extract(self, images: Tensor) -> Tensor:
        """See ``Classifier``."""
        return self._shortened[0].extract(images)

    def embed(self, maps: Tensor) -> Tensor:
        """Run the blocks up to the last, which is the whole network's own to run, and pool: (B, D)."""
        tokens = self._take_up(maps)
        for block in self._between:
            tokens = block(tokens)
        prefix, patches = tokens[:, : self.num_prefix], tokens[:, self.num_prefix :]
        return self.whole.embed(self._lay_out(patches.mT.unflatten(2, self.grid(maps).shape[2:]), prefix))


def split_at(model: Classifier, layer: str) -> Classifier:
    """Return a view of a network whose ``features`` stop at an earlier layer and whose ``classify`` runs the rest.

    Args:
        model: the network; the view shares its parameters and its mode.
        layer: of ``layers_of``. The maps are those that leave the layer, or those that enter the block of a vision
            transformer (after the last block the patches no longer matter).

    Raises:
        UserError: the network cannot be cut, or has no such layer; the nearest is named.
    """
    known = layers_of(model)
    if not known:
        raise UserError(
            f"--layer {layer}: this network can be explained at its last maps only", fix="leave --layer out"
        )
    if layer not in known:
        near = get_close_matches(layer, known, n=1)
        outer = [name for name in known if "." not in name] or known
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(outer)}"
        raise UserError(f"--layer {layer}: no such layer", fix=hint)
    if isinstance(model, Transformer):
        return SplitTransformer(model, _blocks_of(model), int(layer.removeprefix("blocks.")))
    chain = _chain_of(model)
    return SplitChain(model, chain, chain.ends[layer])


def layers_of(model: Classifier) -> list[str]:
    """Return the layers that ``split_at`` knows, in the order in which they run; none where it cannot cut."""
    if isinstance(model, Transformer):
        return [f"blocks.{number}" for number in range(1, len(_blocks_of(model)))]
    return list(_chain_of(model).ends)


def _chain_of(model: Classifier) -> Chain:
    chain = Chain()
    if isinstance(model, (TorchvisionClassifier, DalaResNet50, VGG16Inception)):
        for name, child in model.trunk.named_children():
            chain.add(name, child)
            if isinstance(model, DalaResNet50) and name == model.attended:
                chain.add("attention", model.attention)
    if isinstance(model, VGG16Inception):
        chain.add("inception", model.inception)
        chain.add("norm", model.norm)
    return chain


def _blocks_of(model: Transformer) -> nn.Sequential:
    return model.trunk.blocks if isinstance(model, TimmTransformer) else model.trunk.encoder.layers


def _share(view: Classifier, whole: Classifier) -> None:
    """Give a view the parts of a network, in the mode that each of them is in."""
    view.whole = whole
    view.trunk, view.head, view.scaling = whole.trunk, whole.head, whole.scaling
    view.native_scaling = whole.native_scaling
    view.training = whole.training


def _shorten(model: Transformer, blocks: nn.Sequential) -> Transformer:
    """Return a transformer of the first blocks only; as every ``Transformer``, it yields what enters its last one."""
    if isinstance(model, TimmTransformer):
        return _with(model, trunk=_with(model.trunk, blocks=blocks))
    encoder = _with(model.trunk.encoder, layers=blocks)
    return _with(model, trunk=_with(model.trunk, encoder=encoder))


def _with(module: Any, **children: nn.Module) -> Any:
    """Return a shallow copy of a module with other children."""
    twin = copy.copy(module)
    twin._modules = {**module._modules, **children}
    return twin
