"""Device, precision and seeds."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch

from breastcli.errors import UsageError, UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """Return the device called ``name``; "auto" prefers CUDA, then MPS, then the CPU.

    Raises:
        UsageError: not a device name.
        UserError: the device is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: not a device", fix="use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: no CUDA device is visible", fix="use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: there are {torch.cuda.device_count()} CUDA devices", fix="use a lower number"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: no Apple GPU is visible", fix="use --device cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"--device {name}: not supported", fix="use auto, cpu, cuda, cuda:N or mps")
    return device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the arithmetic type; "auto" is bfloat16 where the hardware multiplies it, else float32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        # Private, because torch has no public question for it; without an answer the safe choice is float32.
        multiplies_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        return torch.bfloat16 if multiplies_bf16() else torch.float32
    return torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Return the autocast context of ``dtype``; none for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def full_precision(device: torch.device) -> AbstractContextManager:
    """Return a context in which autocast is off."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def seed_everything(*parts: int) -> None:
    """Seed Python, NumPy and torch from one or more numbers (such as seed and epoch)."""
    mixed = mix_seed(*parts)
    random.seed(mixed)
    np.random.seed(mixed % 2**32)  # noqa: NPY002  third-party code may draw from the global state
    torch.manual_seed(mixed)


def mix_seed(*parts: int) -> int:
    """Return one well-mixed 63-bit seed of several small numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def use_deterministic_kernels() -> None:
    """Ask CUDA for kernels whose results do not change from run to run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True


@contextmanager
def clear_memory_errors(what: str, batch_size: int) -> Iterator[None]:
    """Turn running out of device memory into one line.

    Args:
        what: what did not fit, such as the network's name.
        batch_size: that of the job, half of which is worth a try.

    Raises:
        UserError: memory ran out.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        problem = f"the device's memory does not hold {what} with --batch-size {batch_size}"
        raise UserError(problem, fix=f"try --batch-size {max(1, batch_size // 2)} with --overwrite") from error


def describe_device(device: torch.device) -> str:
    """Return the device's name as a person would write it."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)
