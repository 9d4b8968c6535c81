"""Several processes of one job, as PyTorch's launcher ``torchrun`` starts them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor, nn

from breastcli.errors import UserError
from breastcli.launch import local_rank, num_processes

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Processes:
    """The processes that share a job.

    Attributes:
        rank: number of this one; 0 writes.
        count: how many there are.
        device: where this one computes, and where what it exchanges has to lie.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = CPU

    @property
    def writes(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def share(self, number: int) -> slice:
        """Return which of ``number`` things are this process' own: contiguous parts of nearly equal size."""
        size, larger = divmod(number, self.count)
        start = self.rank * size + min(self.rank, larger)
        return slice(start, start + size + (self.rank < larger))

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over the processes; the tensor itself is used up."""
        if self.count == 1:
            return values
        summed = values.to(self.device)
        torch.distributed.all_reduce(summed)
        return summed.to(values.device)

    def average(self, values: Tensor) -> Tensor:
        """Return the mean of a tensor over the processes; the tensor itself is used up."""
        return self.total(values) / self.count

    def gather(self, own: Tensor, number: int) -> Tensor:
        """Return the shares of all processes, joined.

        Args:
            own: (n, ...) this process' share of ``number`` rows; its gradient is that of its own rows in the result.
            number: rows in all.

        Returns:
            (number, ...), the same in every process.
        """
        if self.count == 1:
            return own
        # A sum with zeros is exact, and needs no shares of equal size.
        place = self.share(number)
        known = own.new_zeros(number, *own.shape[1:])
        known[place] = own.detach()
        known = self.total(known)
        return torch.cat([known[: place.start], own, known[place.stop :]])

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes; one transfer for all of them."""
        if self.count == 1:
            return
        gradients = [one.grad for one in parameters if one.grad is not None]
        summed = self.total(torch.cat([one.flatten() for one in gradients]))
        for gradient, values in zip(gradients, summed.split([one.numel() for one in gradients]), strict=True):
            gradient.copy_(values.view_as(gradient))

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes."""
        learning = [one for one in parameters if one.grad is not None]
        self.sum_gradients(learning)
        for one in learning if self.count > 1 else ():
            one.grad /= self.count

    def agree(self, number: int) -> bool:
        """Return whether a number is the same in all processes."""
        numbers = self.gather(torch.tensor([number]), self.count)
        return bool((numbers == numbers[0]).all())

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.count > 1:
            torch.distributed.barrier()


ALONE = Processes()


@contextlib.contextmanager
def joined_processes(device: torch.device) -> Iterator[tuple[Processes, torch.device]]:
    """Join the processes that torchrun started; alone where it did not.

    Yields:
        the processes, and the device of this one: of several CUDA devices each process gets its own.

    Raises:
        UserError: more processes than CUDA devices, or another process stopped.
    """
    count = num_processes()
    if count == 1:
        yield ALONE, device
        return
    if device.type == "cuda":
        local = local_rank()
        if local >= torch.cuda.device_count():
            fix = "start as many processes as there are devices"
            raise UserError(f"process {local} has no CUDA device: there are {torch.cuda.device_count()}", fix)
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(torch.distributed.get_rank(), count, device), device
    except RuntimeError as error:
        if "by peer" not in str(error):
            raise
        raise UserError("another process of this run stopped", fix="see what it says") from error
    finally:
        torch.distributed.destroy_process_group()
