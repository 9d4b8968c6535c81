from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from breastcli.errors import UsageError, UserError
from breastcli.system.runtime import mix_seed, resolve_device, resolve_precision, seed_everything

CPU = torch.device("cpu")


def test_devices() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("tpu", "gpu", "cuda:x", "meta"):
        with pytest.raises(UsageError, match=f"--device {name}"):
            resolve_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_absent_cuda_is_one_line() -> None:
    with pytest.raises(UserError, match="no CUDA device is visible: use --device cpu"):
        resolve_device("cuda")


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_precision("fp16", CPU) == torch.float16
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert resolve_precision("auto", CPU) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert resolve_precision("auto", CPU) == torch.float32


def test_seeding_reaches_every_generator_and_mixes_its_parts() -> None:
    def draw(*parts: int) -> tuple[float, float, float]:
        seed_everything(*parts)
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    first = draw(0, 1)
    assert draw(0, 1) == first
    other = draw(1, 0)
    assert all(one != two for one, two in zip(first, other, strict=True))
    assert len({mix_seed(a, b) for a in range(20) for b in range(20)}) == 400
