"""Several processes of one job, as PyTorch's launcher ``torchrun`` starts them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor, nn

from breastcli.errors import UserError


@dataclass(frozen=True)
class Processes:
    """The processes that share a job.

    Attributes:
        rank: number of this one; 0 writes.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes; one transfer for all of them."""
        if self.count == 1:
            return
        gradients = [one.grad for one in parameters if one.grad is not None]
        flat = torch.cat([one.flatten() for one in gradients])
        torch.distributed.all_reduce(flat)
        flat /= self.count
        for gradient, values in zip(gradients, flat.split([one.numel() for one in gradients]), strict=True):
            gradient.copy_(values.view_as(gradient))

    def average(self, values: Tensor) -> Tensor:
        """Return the mean of a tensor over the processes."""
        if self.count > 1:
            torch.distributed.all_reduce(values)
        return values / self.count

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.count > 1:
            torch.distributed.barrier()


def num_processes() -> int:
    """Return how many processes torchrun started for this job; 1 where it did not."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


@contextlib.contextmanager
def joined_processes(device: torch.device) -> Iterator[tuple[Processes, torch.device]]:
    """Join the processes that torchrun started; alone where it did not.

    Yields:
        the processes, and the device of this one: of several CUDA devices each process gets its own.

    Raises:
        UserError: more processes than CUDA devices.
    """
    count = num_processes()
    if count == 1:
        yield Processes(), device
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            fix = "start as many processes as there are devices"
            raise UserError(f"process {local} has no CUDA device: there are {torch.cuda.device_count()}", fix)
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(torch.distributed.get_rank(), count), device
    finally:
        torch.distributed.destroy_process_group()
