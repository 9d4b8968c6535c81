"""Which part of a network learns."""

from __future__ import annotations

from difflib import get_close_matches

from torch import nn

from breastcli.errors import UserError
from breastcli.models import Classifier, num_parameters


def freeze(model: Classifier, what: str) -> int:
    """Freeze parts of a network; return the number of frozen parameters.

    Args:
        model: the network.
        what: "none", or parts separated by commas: "trunk"; a stage (the name of a module in the trunk, such as
            ``layer1``); a number N, for the first N layers that have weights, in the order of the network's definition;
            or ``STAGE:N``, for the first N of a stage.

    Raises:
        UserError: a part is none of those, or has fewer layers.
    """
    if what != "none":
        for part in what.split(","):
            for parameter in _find_part(model, part.strip()):
                parameter.requires_grad_(False)
    return num_parameters(model) - num_parameters(model, trainable=True)


def unfreeze(model: nn.Module) -> None:
    """Let every parameter learn again."""
    model.requires_grad_(True)


def _find_part(model: Classifier, part: str) -> list[nn.Parameter]:
    """Return the parameters of one part; those of a layer are its own, without those of layers inside it."""
    stages = {name: module for name, module in model.trunk.named_modules() if name and list(module.parameters())}
    if part == "trunk":
        return [one for module in model.published_parts() for one in module.parameters()]
    name, colon, count = ("", ":", part) if part.isdecimal() else part.partition(":")
    if name not in stages and not part.isdecimal():
        near = get_close_matches(name, stages, n=1)
        known = ", ".join(child for child in stages if "." not in child)
        hint = f"did you mean {near[0]}?" if near else f"use none, trunk, a number or stages of the trunk ({known})"
        raise UserError(f"--freeze {part}: no such stage", fix=hint)
    start = stages.get(name, model)
    if not colon:
        return list(start.parameters())
    layers = [module for module in start.modules() if list(module.parameters(recurse=False))]
    if not count.isdecimal() or int(count) > len(layers):
        raise UserError(
            f"--freeze {part}: no such number of layers", fix=f"there are {len(layers)} layers with weights"
        )
    return [one for layer in layers[: int(count)] for one in layer.parameters(recurse=False)]


def set_training_mode(model: nn.Module, *, batch_norm: str) -> None:
    """Switch to training mode, leaving whatever is frozen as in evaluation.

    A frozen batch norm whose statistics still moved would not be frozen, nor would a frozen trunk that drops paths.

    Args:
        model: the network.
        batch_norm: "frozen" keeps the statistics of every batch norm.
    """
    model.train()
    _rest(model)
    for module in model.modules():
        if batch_norm == "frozen" and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _rest(module: nn.Module) -> None:
    """Put the largest parts without a trained parameter into evaluation mode."""
    parameters = list(module.parameters())
    if parameters and not any(one.requires_grad for one in parameters):
        module.eval()
        return
    for child in module.children():
        _rest(child)
