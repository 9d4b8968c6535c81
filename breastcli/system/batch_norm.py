"""Batch norm whose statistics are those of the whole batch, where several processes share it.

``torch.nn.SyncBatchNorm`` does the same for CUDA tensors only. This one takes CPU tensors too, and is the one used on
both; on CUDA with several processes it has not been run.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from breastcli.errors import UserError
from breastcli.system.distributed import Processes


def share_batch_norm(model: nn.Module, processes: Processes) -> None:
    """Let every batch norm of a network take its training statistics from the batches of all processes.

    Parameters, buffers and their names stay as they are, and so does evaluation.

    Raises:
        UserError: the network has a layer with running statistics that is no batch norm known here.
    """
    for name, module in model.named_modules():
        shared = SHARED.get(type(module))
        if shared:
            module.__class__ = shared  # replacing the module would leave the network's own references behind
            module.processes = processes
        elif isinstance(module, _BatchNorm) or hasattr(module, "running_var"):
            raise UserError(f"{type(module).__name__} ({name}) cannot be shared by processes", fix="start one process")


class _Shared(_BatchNorm):
    """What the shared batch norms have in common.

    Attributes:
        processes: those that share the batch.
    """

    processes: Processes

    def forward(self, inputs: Tensor) -> Tensor:
        """Return normalised maps (B, C, ...) of the inputs' type."""
        if not self.training:
            return super().forward(inputs)
        self._check_input_dim(inputs)
        outputs, mean, variance, size = _Normalise.apply(inputs, self.weight, self.bias, self.eps, self.processes)
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance * (size / (size - 1)), share)
        return outputs


class _SharedBatchNorm1d(_Shared, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` over all processes."""


class _SharedBatchNorm2d(_Shared, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` over all processes."""


class _SharedBatchNormAct2d(_Shared, BatchNormAct2d):
    """timm's batch norm with dropout and activation behind it, over all processes."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return normalised and activated maps (B, C, H, W) of the inputs' type."""
        outputs = super().forward(inputs)
        return self.act(self.drop(outputs)) if self.training else outputs  # in evaluation timm's own has done it


SHARED: dict[type[nn.Module], type[_Shared]] = {
    nn.BatchNorm1d: _SharedBatchNorm1d,
    nn.BatchNorm2d: _SharedBatchNorm2d,
    BatchNormAct2d: _SharedBatchNormAct2d,
}


class _Normalise(torch.autograd.Function):
    """Normalise by mean and variance of all processes' inputs, which are worked out in float32 at least.

    Source: Ioffe and Szegedy, Batch Normalization, ICML 2015, algorithm 1 and the gradients of section 3.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, processes: Processes
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return outputs, and the whole batch's mean (C,), biased variance (C,) and number of values per channel."""
        own_variance, own_mean = torch.var_mean(_precise(inputs), _all_but_channels(inputs), correction=0)
        own_size = own_mean.new_full((1,), inputs.numel() / inputs.shape[1])
        known = processes.gather(torch.cat([own_mean, own_variance, own_size])[None], processes.count)
        means, variances, sizes = known.split([len(own_mean), len(own_mean), 1], dim=1)
        size = sizes.sum()
        shares = sizes / size
        mean = (shares * means).sum(dim=0)
        # From differences of means, because a difference of squares would lose digits.
        variance = (shares * (variances + (means - mean) ** 2)).sum(dim=0)
        outputs = functional.batch_norm(inputs, mean, variance, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(inputs, weight, mean, (variance + eps).rsqrt(), size)
        ctx.processes = processes
        ctx.mark_non_differentiable(mean, variance, size)
        return outputs, mean, variance, size

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the inputs, and this process' part of those of weight and bias."""
        inputs, weight, mean, scale, size = ctx.saved_tensors
        axes, shape = _all_but_channels(inputs), (-1, *[1] * (inputs.dim() - 2))
        incoming = _precise(gradient)
        normalised = (_precise(inputs) - mean.view(shape)) * scale.view(shape)
        of_bias, of_weight = incoming.sum(axes), (incoming * normalised).sum(axes)
        result = None
        if ctx.needs_input_grad[0]:
            totals = ctx.processes.total(torch.stack([of_bias, of_weight])) / size
            factor = scale if weight is None else scale * weight
            result = incoming - totals[0].view(shape) - normalised * totals[1].view(shape)
            result = (result * factor.view(shape)).to(inputs.dtype)
        wanted = ctx.needs_input_grad
        return result, of_weight if wanted[1] else None, of_bias if wanted[2] else None, None, None


def _precise(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _all_but_channels(inputs: Tensor) -> list[int]:
    return [axis for axis in range(inputs.dim()) if axis != 1]
