"""Size and speed of networks: parameters, FLOPs, images per second, latency, memory."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from breastcli.benchmarks import SIZE_PX, Setting
from breastcli.benchmarks.timing import measure, speeds
from breastcli.config import TrainConfig
from breastcli.errors import UsageError, UserError, first_line
from breastcli.models import ARCHITECTURES, Classifier, ModelOptions, build_model, num_parameters
from breastcli.models.freezing import set_training_mode
from breastcli.system.runtime import autocast, seed_everything
from breastcli.system.training import make_optimizer

logger = logging.getLogger(__name__)

NUM_CLASSES = 2
LATENCIES_PER_ROUND = 10  # single images, so that a 95th percentile means something
ROUND_S = 0.5  # a round of a fast network takes several steps, lest a GPU's first one decides
WARMUP = {"cuda": 3}  # steps; elsewhere one, since no kernels are chosen at run time
MEGA, GIGA = 1e6, 1e9
CONVENTIONS = (
    f"parameters and GFLOPs for {NUM_CLASSES} classes; GFLOPs: forward pass of one image, a multiplication with its "
    "addition counting as 2, of convolutions and matrix products only",
    "MB are millions of bytes; checkpoint: weights and running statistics as stored (float32)",
    "training: forward, backward and one Adam step of a batch that is on the device already",
    "inference: forward pass of such a batch; latency: of one image, percentiles over single calls",
    "images/s: median of the rounds, low and high the slowest and fastest round",
    "memory: largest amount allocated by PyTorch on a CUDA device; not measured elsewhere",
)


@dataclass(frozen=True)
class NetworkFigures:
    """What is known of one network; None where it was not measured.

    Attributes:
        arch: as ``train --arch`` takes it.
        size_px: side of the images.
        source: who described it.
        parameters: exact number, for two classes.
        printed: the number that a paper prints, or None.
        remark: why the two differ, or "".
        trainable: parameters that learn unless something is frozen.
        gflops: of one image's forward pass, see ``CONVENTIONS``.
        checkpoint_mb: size of the weights on disk.
        training_images_per_s: median of the rounds.
        training_images_per_s_low: slowest round.
        training_images_per_s_high: fastest round.
        training_memory_mb: peak of the training steps.
        inference_images_per_s: median of the rounds.
        inference_images_per_s_low: slowest round.
        inference_images_per_s_high: fastest round.
        inference_memory_mb: peak of the inference steps.
        latency_p50_ms: median time of a single image.
        latency_p95_ms: 95th percentile of it.
        problem: what could not be measured and why, or "".
    """

    arch: str
    size_px: int
    source: str = ""
    parameters: int | None = None
    printed: int | None = None
    remark: str = ""
    trainable: int | None = None
    gflops: float | None = None
    checkpoint_mb: float | None = None
    training_images_per_s: float | None = None
    training_images_per_s_low: float | None = None
    training_images_per_s_high: float | None = None
    training_memory_mb: float | None = None
    inference_images_per_s: float | None = None
    inference_images_per_s_low: float | None = None
    inference_images_per_s_high: float | None = None
    inference_memory_mb: float | None = None
    latency_p50_ms: float | None = None
    latency_p95_ms: float | None = None
    problem: str = ""


def parse_archs(text: str) -> list[str]:
    """Return the networks of a list separated by commas, each once; "all" means every one of the registry.

    Raises:
        UsageError: an empty name.
    """
    if text == "all":
        return ARCHITECTURES.names()
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise UsageError(f"--archs {text!r}: an empty name", fix="separate networks by single commas")
    return list(dict.fromkeys(names))


def describe_network(arch: str, setting: Setting) -> NetworkFigures:
    """Return what needs no measurement, from a network without memory (PyTorch's meta device).

    Raises:
        UsageError: no such network; the nearest one is named.
    """
    known = ARCHITECTURES.get(arch) if arch in ARCHITECTURES.names() else None
    size_px = setting.size_px or (known.size_px if known else SIZE_PX)
    figures = NetworkFigures(arch, size_px, source=known.source if known else arch.partition("/")[0])
    try:
        with torch.device("meta"):
            model = build_model(_options(figures))
    except UsageError:
        raise
    except UserError as error:
        return replace(figures, problem=error.problem)
    parameters = num_parameters(model)
    printed = known.published.get(NUM_CLASSES) if known else None
    return replace(
        figures,
        parameters=parameters,
        printed=printed,
        remark=known.remark if known and printed not in (None, parameters) else "",
        trainable=num_parameters(model, trainable=True),
        gflops=count_flops(model, size_px) / GIGA,
        checkpoint_mb=sum(one.numel() * one.element_size() for one in model.state_dict().values()) / MEGA,
    )


def count_flops(model: nn.Module, size_px: int) -> int:
    """Return the FLOPs of one image's forward pass: 2 for each multiplication with its addition.

    Convolutions and matrix products are counted, those of attention included; normalisation, activations and pooling
    are not.

    Args:
        model: network on the meta device.
        size_px: side of the image.
    """
    images = torch.zeros(1, 3, size_px, size_px, device="meta")
    # Attention as plain matrix products: not every fused kernel is known to every PyTorch's counter.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(images)
    return counter.get_total_flops()


def time_network(figures: NetworkFigures, setting: Setting) -> NetworkFigures:
    """Return the figures with speed and memory of the network with random weights.

    What fails, for lack of memory above all, leaves its figures None and its reason in ``problem``.
    """
    if figures.problem:
        return figures
    problems = []
    measured: dict[str, float | None] = {}
    try:
        seed_everything(setting.seed)
        model = build_model(_options(figures)).to(setting.device, memory_format=torch.channels_last)
        images = torch.rand(setting.batch_size, 3, figures.size_px, figures.size_px) * 2 - 1
        images = images.to(setting.device, memory_format=torch.channels_last)
    except (RuntimeError, MemoryError, UserError) as error:
        return replace(figures, problem=first_line(error, 120))
    for name, work in (("training", _time_training), ("inference", _time_inference), ("latency", _time_latency)):
        try:
            measured |= work(model, images, setting)
        except (RuntimeError, MemoryError, ValueError) as error:  # ValueError: batch norm of too small maps
            problems.append(f"{name}: {first_line(error, 120)}")
        model.zero_grad(set_to_none=True)
        _free_memory(setting.device)
    return replace(figures, **measured, problem="; ".join(problems))


def _options(figures: NetworkFigures) -> ModelOptions:
    return ModelOptions(figures.arch, NUM_CLASSES, figures.size_px)


def _time_training(model: Classifier, images: Tensor, setting: Setting) -> dict[str, float | None]:
    """Return images/s and memory of training steps as ``train`` takes them, with its own optimiser."""
    device = setting.device
    set_training_mode(model, batch_norm="train")
    optimizer = make_optimizer(model, TrainConfig(), device)
    scaler = torch.amp.GradScaler(device.type, enabled=setting.dtype == torch.float16)
    labels = torch.arange(len(images), device=device) % NUM_CLASSES

    def step() -> None:
        with autocast(device, setting.dtype):
            logits = model(images)
        loss = functional.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return _speed_and_memory("training", step, setting)


def _time_inference(model: Classifier, images: Tensor, setting: Setting) -> dict[str, float | None]:
    """Return images/s and memory of forward passes."""
    with torch.inference_mode():
        return _speed_and_memory("inference", _forward(model, images, setting), setting)


def _time_latency(model: Classifier, images: Tensor, setting: Setting) -> dict[str, float | None]:
    """Return percentiles of the time of single images."""
    device = setting.device
    with torch.inference_mode():
        run = _forward(model, images[:1].contiguous(memory_format=torch.channels_last), setting)
        rounds = LATENCIES_PER_ROUND * setting.rounds
        timing = measure(run, device, rounds, warmup=WARMUP.get(device.type, 1))
    return {"latency_p50_ms": timing.p50_ms, "latency_p95_ms": timing.p95_ms}


def _forward(model: Classifier, images: Tensor, setting: Setting) -> Callable[[], object]:
    model.eval()

    def run() -> None:
        with autocast(setting.device, setting.dtype):
            model(images)

    return run


def _speed_and_memory(name: str, run: Callable[[], object], setting: Setting) -> dict[str, float | None]:
    device = setting.device
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    timing = measure(run, device, setting.rounds, warmup=WARMUP.get(device.type, 1), round_s=ROUND_S)
    memory_mb = torch.cuda.max_memory_allocated(device) / MEGA if on_cuda else None
    return {**speeds(f"{name}_images_per_s", setting.batch_size, timing), f"{name}_memory_mb": memory_mb}


def _free_memory(device: torch.device) -> None:
    gc.collect()  # an error's traceback may have held what a failed step computed
    if device.type == "cuda":
        torch.cuda.empty_cache()
