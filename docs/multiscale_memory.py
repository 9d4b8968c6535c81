"""How much memory a training step of the multi-scale framework needs:

    python docs/multiscale_memory.py

Counts, on the CPU, what autograd keeps between forward and backward in bfloat16 autocast at 224 pixels, for two small
batches, and extends the straight line through them to the batch asked for. Adds parameters and running statistics,
gradients and Adam's two moments. What kernels need for themselves and the CUDA context (some 0.5 GiB) come on top.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional

from breastcli.models import Classifier, ModelOptions, build_model, num_parameters
from breastcli.models.freezing import freeze, set_training_mode
from breastcli.models.multiscale import PUBLISHED_FREEZING

SIZE_PX = 224
BATCHES = (2, 4)
FLOAT32_BYTES = 4


def kept_bytes(model: nn.Module, batch_size: int) -> int:
    """Return the bytes of all storages that a forward pass keeps for backward, parameters and statistics left out."""
    own = {one.untyped_storage().data_ptr() for one in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # holding the tensors keeps their addresses from being given away again

    def keep(one: Tensor) -> Tensor:
        kept.setdefault(one.untyped_storage().data_ptr(), one)
        return one

    images = torch.randn(batch_size, 3, SIZE_PX, SIZE_PX)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one), torch.autocast("cpu", torch.bfloat16):
        functional.cross_entropy(model(images).float(), torch.zeros(batch_size, dtype=torch.long))
    return sum(one.untyped_storage().nbytes() for address, one in kept.items() if address not in own)


def step_bytes(model: Classifier, batch_size: int) -> dict[str, int]:
    """Return the bytes that a training step needs, by what they hold."""
    set_training_mode(model, batch_norm="train")
    small, large = BATCHES
    few, many = (kept_bytes(model, one) for one in BATCHES)
    activations = few + (many - few) * (batch_size - small) // (large - small)
    statistics = sum(one.numel() for one in model.buffers())
    learned = num_parameters(model, trainable=True)
    return {
        "activations": activations,
        "parameters": FLOAT32_BYTES * (num_parameters(model) + statistics),
        "gradients": FLOAT32_BYTES * learned,
        "Adam": FLOAT32_BYTES * 2 * learned,
    }


def main() -> None:
    """Print the figures with and without the published freezing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--fusion", default="pyramid")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for what in ("none", PUBLISHED_FREEZING, "trunk"):
        model = build_model(ModelOptions("multiscale", 2, SIZE_PX, fusion=arguments.fusion))
        freeze(model, what)
        parts = step_bytes(model, arguments.batch_size)
        figures = ", ".join(f"{name} {count / 2**30:.2f}" for name, count in parts.items())
        print(f"--freeze {what}, batch {arguments.batch_size}: {sum(parts.values()) / 2**30:.2f} GiB ({figures})")


if __name__ == "__main__":
    main()
