"""Time our hot paths against what a user would otherwise run: ``make bench``.

Both sides of a pair run in this process, in turn, several times; the medians and their ratio are printed. Nothing here
is a test: machines differ, so no figure is asserted.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from breastcli.cams import CamOptions, saliency_maps
from breastcli.config import PrepareConfig
from breastcli.data.augment import POLICIES
from breastcli.data.loading import load_batches, make_batches, to_network
from breastcli.data.sample_tree import draw_sample
from breastcli.data.stain import fit_reference, normalise_stain
from breastcli.data.store import PreparedData
from breastcli.gan.fidelity import frechet_distance, kernel_distance
from breastcli.metrics.classification import score_images
from breastcli.models import ModelOptions, build_model
from breastcli.prepare import prepare
from breastcli.records import Predictions
from breastcli.system.runtime import describe_device, resolve_device, resolve_precision

BATCH_SIZE = 32
ROUNDS = 5


def compare(
    title: str,
    unit: str,
    count: int,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    rounds: int = ROUNDS,
) -> None:
    """Run both in turn and print their speeds and the ratio of the medians."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(rounds + 1):
        for name, run in (("ours", ours), ("theirs", theirs)):
            began = time.perf_counter()
            run()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    mine, other = (statistics.median(seconds[name]) for name in ("ours", "theirs"))
    print(f"{title:58} {count / mine:10,.1f} {count / other:10,.1f} {unit:12} {other / mine:6.1f}x")


class Files(Dataset):
    """The usual input path: decode, resize and augment one PNG at a time."""

    def __init__(self, paths: list[Path], transform: v2.Transform) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


def bench_input(raw: Path, data: PreparedData, device: torch.device) -> None:
    """Compare augmented batches from the store with a DataLoader of two workers over the PNG files."""
    paths = sorted((raw / "BreaKHis_v1").rglob("*.png"))
    base = [v2.ToImage(), v2.Resize((224, 224), antialias=True)]
    tail = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    policies = {
        "paper": [v2.RandomHorizontalFlip(), v2.RandomRotation(180)],
        "light": [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()],
    }
    for name, transforms in policies.items():
        loader = DataLoader(Files(paths, v2.Compose([*base, *transforms, *tail])), BATCH_SIZE, num_workers=2)
        generator = torch.Generator(device).manual_seed(0)
        order = np.random.default_rng(0).permutation(len(data.rows))

        def ours(policy: str = name, generator: torch.Generator = generator, order: np.ndarray = order) -> None:
            for batch in load_batches(data, make_batches(order, BATCH_SIZE), device):
                POLICIES[policy](batch.images, generator)
            if device.type == "cuda":
                torch.cuda.synchronize()

        def theirs(loader: DataLoader = loader) -> None:
            for images in loader:
                images.to(device)

        compare(f"batches, augmentation {name} / PIL DataLoader, 2 workers", "images/s", len(paths), ours, theirs)


def bench_stain(raw: Path, device: torch.device) -> None:
    """Compare Macenko at 700 x 460 with torchstain's torch backend."""
    from torchstain.base.normalizers import HENormalizer  # noqa: F401  fails early where torchstain is absent
    from torchstain.torch.normalizers.macenko import TorchMacenkoNormalizer

    paths = sorted((raw / "BreaKHis_v1").rglob("*.png"))[:16]
    arrays = [np.asarray(Image.open(path).resize((700, 460), Image.Resampling.BICUBIC)) for path in paths]
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous().to(device)
    reference = fit_reference(images[:1], "macenko", source="benchmark")
    rival = TorchMacenkoNormalizer()
    rival.fit(images[0].cpu())

    def theirs() -> None:
        for image in images.cpu():
            rival.normalize(image, stains=False)

    compare(
        "Macenko at 700x460, 20,000 pixels / torchstain",
        "images/s",
        len(paths),
        lambda: normalise_stain(images, reference)[0].cpu(),
        theirs,
    )
    compare(
        "Macenko at 700x460, every pixel / torchstain",
        "images/s",
        len(paths),
        lambda: normalise_stain(images, reference, max_pixels=None)[0].cpu(),
        theirs,
    )


def bench_cams(device: torch.device) -> None:
    """Compare class activation maps with the grad-cam package as its users run it (float32, the same batches).

    The package has no DT Grad-CAM: the rival is its Grad-CAM of every noisy copy.
    """
    from pytorch_grad_cam import EigenCAM, GradCAM, ScoreCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    dtype = resolve_precision("auto", device)
    rivals = {"gradcam": GradCAM, "eigencam": EigenCAM, "dtgradcam": GradCAM, "scorecam": ScoreCAM}
    for method, rival in rivals.items():
        slow = method == "scorecam"
        network = torchvision.models.get_model("resnet18" if slow else "resnet50", num_classes=2).to(device).eval()
        arch = "torchvision/resnet18" if slow else "resnet50"
        model = build_model(ModelOptions(arch, 2)).to(device, memory_format=torch.channels_last).eval()
        images = torch.randint(0, 256, (1 if slow else 8, 3, 224, 224), dtype=torch.uint8, device=device)
        targets = torch.zeros(len(images), dtype=torch.long, device=device)
        options = CamOptions(samples=10)
        copies = options.samples if method == "dtgradcam" else 1

        def theirs(
            network: torch.nn.Module = network, images: torch.Tensor = images, kind: type = rival, copies: int = copies
        ) -> None:
            explain = kind(network, [network.layer4[-1]])
            explain.batch_size = 32
            for _ in range(copies):
                explain(to_network(images), [ClassifierOutputTarget(0)] * len(images))

        def ours(
            model: torch.nn.Module = model,
            images: torch.Tensor = images,
            targets: torch.Tensor = targets,
            method: str = method,
            options: CamOptions = options,
        ) -> None:
            saliency_maps(model, images, targets, method, options, dtype)

        title = f"{method} of {arch} / grad-cam" + (f", {copies} copies each" if copies > 1 else "")
        with contextlib.redirect_stderr(io.StringIO()):  # the package's progress bar
            compare(title, "images/s", len(images), ours, theirs, rounds=3)


def bench_intervals() -> None:
    """Compare all figures with bootstrap intervals with a loop over two scikit-learn metrics."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 600)
    positive = np.clip(0.3 * labels + generator.random(600) * 0.7, 0, 1)
    exams = np.array([f"e{k}" for k in generator.integers(0, 70, 600)], dtype=object)
    predictions = Predictions(
        image_ids=np.array([str(k) for k in range(600)], dtype=object),
        classes=("benign", "malignant"),
        probs=np.stack([1 - positive, positive], axis=1),
        predicted=(positive >= 0.5).astype(np.int64),
        labels=labels,
        columns={"exam": exams, "patient": exams},
    )
    members = [np.flatnonzero(exams == exam) for exam in np.unique(exams)]

    def theirs() -> None:
        draws = np.random.default_rng(0)
        for _ in range(200):
            rows = np.concatenate([members[k] for k in draws.integers(0, len(members), len(members))])
            balanced_accuracy_score(labels[rows], predictions.predicted[rows])
            roc_auc_score(labels[rows], positive[rows])

    compare(
        "bootstrap, 200 resamples: 20 metrics / 2 of scikit-learn",
        "resamples/s",
        200,
        lambda: score_images(predictions, resamples=200),
        theirs,
    )


def bench_fidelity() -> None:
    """Compare FID and KID of given features, 2,000 x 2,048 each, with torch-fidelity's."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    generator = np.random.default_rng(0)
    scale = np.arange(1, 2049) ** -0.6  # decays as that of real images' features does
    real, made = (
        (factor * scale * generator.standard_normal((2000, 2048))).astype(np.float32) for factor in (1.0, 1.1)
    )
    tensors = torch.from_numpy(real), torch.from_numpy(made)

    def fid() -> None:
        fid_statistics_to_metric(*map(fid_features_to_statistics, tensors), verbose=False)

    def kid() -> None:
        kid_features_to_metric(*tensors, kid_subsets=100, kid_subset_size=1000, verbose=False, rng_seed=0)

    compare("FID of features / torch-fidelity", "figures/s", 1, lambda: frechet_distance(real, made), fid, rounds=3)
    compare(
        "KID of features, 100 subsets of 1,000 / torch-fidelity",
        "figures/s",
        1,
        lambda: kernel_distance(real, made, rng=np.random.default_rng(0)),
        kid,
        rounds=3,
    )


def bench_start() -> None:
    """Time ``breastcli --help`` as a whole process."""
    seconds = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "breastcli", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - began)
    print(f"{'breastcli --help, whole process':58} {statistics.median(seconds[1:]):10.2f} s")


def main() -> None:
    """Run every comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    device = resolve_device(parser.parse_args().device)
    print(f"{describe_device(device)}, torch {torch.__version__}; medians of {ROUNDS} rounds, drawn images 700x460\n")
    print(f"{'ours / rival':58} {'ours':>10} {'rival':>10} {'':12} {'ratio':>7}")
    with tempfile.TemporaryDirectory() as folder:
        raw, out = Path(folder) / "raw", Path(folder) / "data"
        draw_sample(raw, num_images=128, height_px=460, width_px=700)
        prepare(PrepareConfig(raw=str(raw), out=str(out), size=224))
        bench_input(raw, PreparedData.open(out), device)
        bench_stain(raw, device)
    bench_cams(device)
    bench_intervals()
    bench_fidelity()
    bench_start()


if __name__ == "__main__":
    main()
