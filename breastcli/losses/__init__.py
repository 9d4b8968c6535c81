"""Training objectives: functions of logits and labels."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from breastcli.registry import Registry

Loss = Callable[[Tensor, Tensor], Tensor]

# An entry takes (K,) class weights, or None, and returns the loss: (B, K) logits, (B,) labels -> scalar.
LOSSES: Registry[Callable[[Tensor | None], Loss]] = Registry("loss", "breastcli.losses")
