"""A network's probabilities of a whole split, beside the usual loop in float32."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

from breastcli.benchmarks import COMPARISONS, Comparison, Setting
from breastcli.benchmarks.samples import prepare_sample
from breastcli.benchmarks.timing import Pair, compare
from breastcli.benchmarks.usual import file_loader
from breastcli.data.loading import load_batches, make_batches, to_network
from breastcli.models import Classifier, ModelOptions, build_model
from breastcli.system.inference import predict_log_probs
from breastcli.system.runtime import seed_everything

ARCH = "resnet50"
MAX_IMAGES = 64


def compare_inference(setting: Setting) -> list[Pair]:
    """Time the same network on the same images: ours as ``evaluate`` runs it, theirs from files and in float32.

    The weights are random, the statistics of batch norm those of the images: with its initial ones a deep network
    tells no image from another. The remark compares our probabilities with those of float32 on the same stored pixels,
    so without what resizing changes.
    """
    device = setting.device
    with tempfile.TemporaryDirectory() as folder:
        data, paths = prepare_sample(Path(folder), setting, MAX_IMAGES)
        batches = make_batches(np.arange(len(paths)), setting.batch_size)
        seed_everything(setting.seed)
        model = build_model(ModelOptions(ARCH, len(data.classes), data.size_px))
        model = model.to(device, memory_format=torch.channels_last)
        update_bn((to_network(batch.images) for batch in load_batches(data, batches, device)), model)
        usual = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        loader = file_loader(paths, data.labels, data.size_px, setting)

        def probabilities(network: Classifier, dtype: torch.dtype) -> Tensor:
            images = (batch.images for batch in load_batches(data, batches, device, setting.workers))
            return predict_log_probs(network, images, device, dtype).exp()

        @torch.no_grad()
        def theirs() -> Tensor:
            usual.eval()
            return torch.cat([usual(images.to(device, non_blocking=True)).softmax(dim=1).cpu() for images, _ in loader])

        def ours() -> Tensor:
            return probabilities(model, setting.dtype)

        rival = f"loop over files, {setting.num_workers} workers, float32"
        title = f"inference of {ARCH} at {data.size_px} px, {setting.arithmetic} / {rival}"
        pair = compare(title, "images/s", len(paths), ours, theirs, setting.rounds, device)
        exact = probabilities(usual, torch.float32)
        low, high = exact[:, -1].aminmax()
        remark = f"probabilities ({low:.2f} to {high:.2f}) differ by {(ours() - exact).abs().max():.1e} at most"
        return [dataclasses.replace(pair, remark=f"{remark} from float32 on the same pixels")]


COMPARISONS.register("inference")(Comparison(compare_inference, needs_images=True))
