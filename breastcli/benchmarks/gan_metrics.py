"""FID and KID of given features beside those of torch-fidelity and torchmetrics."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from breastcli.benchmarks import COMPARISONS, Comparison, Setting
from breastcli.benchmarks.timing import Pair, Run, compare, find_rival
from breastcli.gan.fidelity import frechet_distance, kernel_distance

NUM_FEATURES, WIDTH = 2000, 2048  # per set, and of Inception's embedding
NUM_SUBSETS, SUBSET_SIZE = 100, 1000
DECAY = -0.6  # exponent by which deviations of real images' features fall off


def compare_gan_metrics(setting: Setting) -> list[Pair]:
    """Time both distances of two random sets of features; both sides compute on the CPU."""
    generator = np.random.default_rng(setting.seed)
    scale = np.arange(1, WIDTH + 1) ** DECAY
    real, made = (
        (factor * scale * generator.standard_normal((NUM_FEATURES, WIDTH))).astype(np.float32) for factor in (1.0, 1.1)
    )

    def kid() -> None:
        draws = np.random.default_rng(setting.seed)
        kernel_distance(real, made, subset_size=SUBSET_SIZE, num_subsets=NUM_SUBSETS, rng=draws)

    def pair(title: str, ours: Run, package: str, make: Callable[[], Run]) -> Pair:
        whole = f"{title} / {package}"
        return compare(whole, "figures/s", 1, ours, find_rival(package, make), setting.rounds)

    def fid() -> None:
        frechet_distance(real, made)

    size = f"{NUM_FEATURES:,} x {WIDTH:,}"
    fid_title, kid_title = (
        f"FID of features {size}",
        f"KID of features {size}, {NUM_SUBSETS} subsets of {SUBSET_SIZE:,}",
    )
    return [
        pair(fid_title, fid, "torch-fidelity", lambda: _fidelity_fid(real, made)),
        pair(kid_title, kid, "torch-fidelity", lambda: _fidelity_kid(real, made, setting.seed)),
        pair(fid_title, fid, "torchmetrics", lambda: _torchmetrics_fid(real, made)),
        pair(kid_title, kid, "torchmetrics", lambda: _torchmetrics_kid(real, made)),
    ]


def _fidelity_fid(real: np.ndarray, made: np.ndarray) -> Run:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    tensors = torch.from_numpy(real), torch.from_numpy(made)
    return lambda: fid_statistics_to_metric(*map(fid_features_to_statistics, tensors), verbose=False)


def _fidelity_kid(real: np.ndarray, made: np.ndarray, seed: int) -> Run:
    from torch_fidelity.metric_kid import kid_features_to_metric

    tensors = torch.from_numpy(real), torch.from_numpy(made)
    options = {"kid_subsets": NUM_SUBSETS, "kid_subset_size": SUBSET_SIZE, "rng_seed": seed, "verbose": False}
    return lambda: kid_features_to_metric(*tensors, **options)


def _torchmetrics_fid(real: np.ndarray, made: np.ndarray) -> Run:
    """Return torchmetrics' FID, which is in float64 from the features on."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    network = nn.Identity()  # stands for Inception: what is given to the metric are features already
    network.num_features = real.shape[1]
    return _update_and_compute(FrechetInceptionDistance(network), real, made)


def _torchmetrics_kid(real: np.ndarray, made: np.ndarray) -> Run:
    """Return torchmetrics' KID, which stays in float32."""
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all features
        metric = KernelInceptionDistance(nn.Identity(), subsets=NUM_SUBSETS, subset_size=SUBSET_SIZE)
    return _update_and_compute(metric, real, made)


def _update_and_compute(metric: Any, real: np.ndarray, made: np.ndarray) -> Run:
    def run() -> object:
        metric.reset()
        metric.update(torch.from_numpy(real), real=True)
        metric.update(torch.from_numpy(made), real=False)
        return metric.compute()

    return run


COMPARISONS.register("gan-metrics")(Comparison(compare_gan_metrics))
