"""Class activation maps beside those of the grad-cam package."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor

from breastcli.benchmarks import COMPARISONS, SIZE_PX, Comparison, Setting
from breastcli.benchmarks.timing import Pair, Run, compare, find_rival
from breastcli.cams import CamOptions, saliency_maps
from breastcli.data.loading import to_network
from breastcli.models import ModelOptions, build_model


@dataclass(frozen=True)
class Case:
    """One method on one residual network of torchvision.

    Attributes:
        method: what we call it.
        rival: class of the grad-cam package.
        network: what torchvision calls the network.
        num_images: explained at once.
        copies: how often the rival explains the images. The package has no DT Grad-CAM, so its Grad-CAM is run once for
            each noisy copy.
    """

    method: str
    rival: str
    network: str = "resnet50"
    num_images: int = 8
    copies: int = 1


CASES = (
    Case("gradcam", "GradCAM"),
    Case("eigencam", "EigenCAM"),
    Case("dtgradcam", "GradCAM", copies=10),
    Case("scorecam", "ScoreCAM", "resnet18", num_images=1),  # 512 channels, each of them a run through the network
)
MASKED_AT_ONCE = 32  # images that Score-CAM puts through the network at once, on both sides


def compare_cams(setting: Setting) -> list[Pair]:
    """Time maps of random images: ours in the setting's arithmetic, the package's in float32, all that it offers."""
    with contextlib.redirect_stderr(io.StringIO()):  # the package's progress bar
        return [_compare_case(case, setting) for case in CASES]


def _compare_case(case: Case, setting: Setting) -> Pair:
    size_px, device = setting.size_px or SIZE_PX, setting.device
    generator = torch.Generator().manual_seed(setting.seed)
    images = torch.randint(0, 256, (case.num_images, 3, size_px, size_px), dtype=torch.uint8, generator=generator)
    images = images.to(device)
    model = build_model(ModelOptions(f"torchvision/{case.network}", 2, size_px)).eval()
    model = model.to(device, memory_format=torch.channels_last)
    targets = torch.zeros(case.num_images, dtype=torch.long, device=device)
    options = CamOptions(samples=case.copies, batch_size=MASKED_AT_ONCE, seed=setting.seed)

    def ours() -> None:
        saliency_maps(model, images, targets, case.method, options, setting.dtype)

    theirs = find_rival("grad-cam", lambda: _grad_cam(case, images))
    copies = f", {case.copies} copies" if case.copies > 1 else ""
    title = f"{case.method} of {case.network} at {size_px} px{copies}, {setting.arithmetic} / grad-cam, float32"
    return compare(title, "images/s", case.num_images, ours, theirs, setting.rounds, device)


def _grad_cam(case: Case, images: Tensor) -> Run:
    """Return the package's explanation of images (B, 3, H, W) uint8, as its users run it."""
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    network = torchvision.models.get_model(case.network, num_classes=2).to(images.device).eval()
    kind = getattr(pytorch_grad_cam, case.rival)

    def run() -> None:
        with kind(network, [network.layer4[-1]]) as explain:
            explain.batch_size = MASKED_AT_ONCE
            for _ in range(case.copies):
                explain(to_network(images), [ClassifierOutputTarget(0)] * len(images))

    return run


COMPARISONS.register("cams")(Comparison(compare_cams))
