"""Threads stand in for processes: they meet at a barrier where processes would exchange tensors."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, EvoNorm2dB0
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from breastcli.errors import UserError
from breastcli.losses import class_weights_of, make_loss
from breastcli.models import ARCHITECTURES, ModelOptions, build_model
from breastcli.models.freezing import set_training_mode
from breastcli.system.batch_norm import share_batch_norm
from breastcli.system.distributed import ALONE, Processes

EXACT = {"rtol": 1e-9, "atol": 1e-11}  # in float64


@dataclass
class Meeting:
    barrier: threading.Barrier
    brought: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Threads(Processes):
    meeting: Meeting | None = None

    def total(self, values: Tensor) -> Tensor:
        assert self.meeting is not None
        self.meeting.brought[self.rank] = values.clone()
        self.meeting.barrier.wait()
        summed = sum(self.meeting.brought[rank] for rank in range(self.count))
        self.meeting.barrier.wait()
        return summed


def together(count: int, work: Callable[[Processes], Any]) -> list[Any]:
    meeting = Meeting(threading.Barrier(count, timeout=30))
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: work(Threads(rank, count, meeting=meeting)), range(count)))


def trained_once(module: nn.Module, inputs: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    """Everything that a training step gives whose loss is the sum of outputs times ``wanted``."""
    inputs = inputs.clone().requires_grad_()
    outputs = module(inputs)
    (outputs * wanted).sum().backward()
    gradients = {name: one.grad for name, one in module.named_parameters()}
    return {"outputs": outputs.detach(), "inputs": inputs.grad, **gradients, **dict(module.named_buffers())}


KINDS = {
    "1d": (nn.BatchNorm1d(3), (11, 3)),
    "1d with length": (nn.BatchNorm1d(3), (11, 3, 4)),
    "2d": (nn.BatchNorm2d(3), (11, 3, 5, 4)),
    "2d without weights": (nn.BatchNorm2d(3, affine=False), (11, 3, 5, 4)),
    "2d without running statistics": (nn.BatchNorm2d(3, track_running_stats=False), (11, 3, 5, 4)),
    "2d with a cumulative average": (nn.BatchNorm2d(3, momentum=None), (11, 3, 5, 4)),
    "with activation": (BatchNormAct2d(3), (11, 3, 5, 4)),
}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_shared_batch_norm_is_torchs_on_the_whole_batch(kind: str, count: int) -> None:
    module, shape = KINDS[kind]
    torch.manual_seed(0)
    whole = copy.deepcopy(module).double()
    for one in whole.parameters():
        nn.init.normal_(one)
    inputs, wanted = (torch.randn(shape, dtype=torch.float64) * 2 + 3 for _ in range(2))

    def work(processes: Processes) -> dict[str, Tensor]:
        own = copy.deepcopy(start)
        share_batch_norm(own, processes)
        part = processes.share(len(inputs))
        for _ in range(2):  # the second step shows that the running statistics were moved
            own.zero_grad()
            found = trained_once(own, inputs[part], wanted[part])
        if module.affine:
            processes.sum_gradients(own.parameters())
        evaluated = own.eval()(inputs)
        return found | {name: one.grad for name, one in own.named_parameters()} | {"evaluated": evaluated}

    start = copy.deepcopy(whole)
    parts = together(count, work)
    trained_once(whole, inputs, wanted)
    whole.zero_grad()
    expected = trained_once(whole, inputs, wanted) | {"evaluated": whole.eval()(inputs)}
    for name, values in expected.items():
        joined = torch.cat([part[name] for part in parts]) if name in ("outputs", "inputs") else parts[0][name]
        torch.testing.assert_close(joined, values, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
    assert all(torch.equal(part[name], parts[0][name]) for part in parts for name in dict(whole.named_buffers()))


def test_a_large_mean_costs_no_digits() -> None:
    inputs = torch.randn(12, 2, 8, 8, generator=torch.Generator().manual_seed(0)) + 1000

    def work(processes: Processes) -> Tensor:
        module = nn.BatchNorm2d(2)
        share_batch_norm(module, processes)
        return module(inputs[processes.share(12)])

    expected = nn.BatchNorm2d(2).double()(inputs.double())
    torch.testing.assert_close(torch.cat(together(3, work)).double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_half_precision_keeps_its_type_and_layout(layout: torch.memory_format) -> None:
    inputs = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0)) + 3
    given = inputs.to(torch.bfloat16, memory_format=layout)

    def work(processes: Processes) -> tuple[Tensor, Tensor]:
        module = nn.BatchNorm2d(4)
        share_batch_norm(module, processes)
        own = given[processes.share(8)].clone().requires_grad_()
        outputs = module(own)
        (outputs.float() ** 3).sum().backward()
        assert outputs.is_contiguous(memory_format=layout)
        return outputs, own.grad

    whole = given.clone().requires_grad_()
    expected = nn.BatchNorm2d(4)(whole)
    (expected.float() ** 3).sum().backward()
    outputs, gradients = (torch.cat(parts) for parts in zip(*together(2, work), strict=True))
    assert outputs.dtype == gradients.dtype == torch.bfloat16
    torch.testing.assert_close(outputs, expected, rtol=0.01, atol=0.01)
    torch.testing.assert_close(gradients, whole.grad, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("arch", ["timm/test_resnet", "timm/test_efficientnet"])
@pytest.mark.parametrize("loss", ["cross_entropy", "cosface"])
def test_shares_of_the_gradient_add_up_to_that_of_the_whole_batch(arch: str, loss: str, count: int) -> None:
    torch.manual_seed(0)
    start = build_model(ModelOptions(arch, 3, 32, dropout=0.0)).double()
    set_training_mode(start, batch_norm="train")
    images, labels = torch.randn(10, 3, 32, 32, dtype=torch.float64), torch.arange(10) % 3
    weights = class_weights_of(torch.tensor([1, 4, 10]), "weights")
    criterion = make_loss(loss, 0.3, 8.0, weights.double())

    def work(processes: Processes) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        model = copy.deepcopy(start)
        if processes.count > 1:
            share_batch_norm(model, processes)
        part = processes.share(10)
        logits, every = (processes.gather(one, 10) for one in (model(images[part]), labels[part]))
        value = criterion.training(logits, every, 0.5)
        value.backward()
        processes.sum_gradients(model.parameters())
        return value.detach(), [one.grad for one in model.parameters()], list(model.buffers())

    expected = work(ALONE)
    for found in together(count, work):
        torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("name", [*ARCHITECTURES.names(), "timm/test_efficientnet", "timm/densenet121"])
def test_every_batch_norm_of_every_network_is_shared_under_its_own_name(name: str) -> None:
    with torch.device("meta"):
        if name.startswith("timm/"):
            model = timm.create_model(name.removeprefix("timm/"))
        else:
            model = ARCHITECTURES.get(name).build(ModelOptions(name, 2), False)
    names, norms = list(model.state_dict()), [one for one in model.modules() if isinstance(one, _BatchNorm)]
    share_batch_norm(model, ALONE)
    assert list(model.state_dict()) == names
    assert all(one.processes is ALONE for one in norms)
    assert [one for one in model.modules() if isinstance(one, _BatchNorm)] == norms
    set_training_mode(model, batch_norm="frozen")
    assert not any(one.training for one in norms)


@pytest.mark.parametrize("layer", [nn.BatchNorm3d(2), EvoNorm2dB0(2)], ids=lambda layer: type(layer).__name__)
def test_other_layers_with_running_statistics_are_refused(layer: nn.Module) -> None:
    with pytest.raises(UserError, match=rf"{type(layer).__name__} \(0\) cannot be shared by processes"):
        share_batch_norm(nn.Sequential(layer), ALONE)
