"""FID and KID of given features beside torch-fidelity's."""

from __future__ import annotations

import numpy as np
import torch

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

    size = f"{NUM_FEATURES:,} x {WIDTH:,}"
    their_fid = find_rival("torch-fidelity", lambda: _their_fid(real, made))
    their_kid = find_rival("torch-fidelity", lambda: _their_kid(real, made, setting.seed))
    fid_title = f"FID of features {size} / torch-fidelity"
    kid_title = f"KID of features {size}, {NUM_SUBSETS} subsets of {SUBSET_SIZE:,} / torch-fidelity"
    return [
        compare(fid_title, "figures/s", 1, lambda: frechet_distance(real, made), their_fid, setting.rounds),
        compare(kid_title, "figures/s", 1, kid, their_kid, setting.rounds),
    ]


def _their_fid(real: np.ndarray, made: np.ndarray) -> Run:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    tensors = torch.from_numpy(real), torch.from_numpy(made)
    return lambda: fid_statistics_to_metric(*map(fid_features_to_statistics, tensors), verbose=False)


def _their_kid(real: np.ndarray, made: np.ndarray, seed: int) -> Run:
    from torch_fidelity.metric_kid import kid_features_to_metric

    tensors = torch.from_numpy(real), torch.from_numpy(made)
    options = {"kid_subsets": NUM_SUBSETS, "kid_subset_size": SUBSET_SIZE, "rng_seed": seed, "verbose": False}
    return lambda: kid_features_to_metric(*tensors, **options)


COMPARISONS.register("gan-metrics")(Comparison(compare_gan_metrics))
