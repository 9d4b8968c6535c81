"""How cost grows with images, their size and processes: the figures of docs/scaling.md.

    python docs/scaling.py rows|size|memory|processes

Each prints one table in Markdown. ``rows`` fills a folder with up to 100,000 images of noise (1.2 GB), ``memory`` draws
up to 2,000 images and prepares and trains on them, ``processes`` needs ``torchrun`` (part of PyTorch).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from breastcli.data.audit import PreparedRecord
from breastcli.data.augment import POLICIES, Draws
from breastcli.data.loading import load_batches, make_batches
from breastcli.data.store import CARD, FORMAT, IMAGES, MANIFEST, PreparedData, fingerprints, npy_header, write_manifest
from breastcli.files import write_json
from breastcli.records import ImageRecord

BATCH = 32
SIDE_PX = 64
NETWORK = "timm/resnet10t"
CPU = torch.device("cpu")
MEGA = 1e6


def main() -> None:
    """Print the table that the first argument names."""
    tables: dict[str, Callable[[], None]] = {"rows": rows, "size": size, "memory": memory, "processes": processes}
    if len(sys.argv) != 2 or sys.argv[1] not in tables:
        sys.exit(__doc__)
    tables[sys.argv[1]]()


def rows() -> None:
    """Cost of a store of more and more images of 64 px."""
    head = ("images", "opening, s", "manifest, MB", "memory of the rows, MB", "light batches, images/s")
    print_head(head)
    for count in (100, 1_000, 10_000, 100_000):
        with tempfile.TemporaryDirectory() as folder:
            make_store(Path(folder), count)
            before, started = resident_mb("RssAnon"), time.perf_counter()
            data = PreparedData.open(Path(folder))
            opening = time.perf_counter() - started
            grown = resident_mb("RssAnon") - before
            speed = batches_per_second(data, "light")
            manifest = (Path(folder) / MANIFEST).stat().st_size / MEGA
            print_row((count, opening, manifest, grown, speed))


def make_store(folder: Path, count: int) -> None:
    """Write a finished prepared folder of noise, ten images per exam."""
    records = [
        ImageRecord(f"n{k:07}", f"n{k:07}.png", "AB"[k % 2], "AB"[k % 2], f"p{k // 20}", f"e{k // 10}", "40X")
        for k in range(count)
    ]
    split = ["val" if k // 10 % 10 == 0 else "train" for k in range(count)]
    entries = [
        PreparedRecord(one, side, None, 700, 460, f"{k:016x}")
        for k, (one, side) in enumerate(zip(records, split, strict=True))
    ]
    generator = np.random.default_rng(0)
    with (folder / IMAGES).open("wb") as file:
        file.write(npy_header(count, SIDE_PX))
        for start in range(0, count, 1000):
            shape = (min(1000, count - start), SIDE_PX, SIDE_PX, 3)
            file.write(generator.integers(0, 256, shape, dtype=np.uint8).tobytes())
    fingerprint, split_fingerprint = fingerprints(entries, {})
    known = {"format": FORMAT, "classes": ["A", "B"], "size_px": SIDE_PX, "fingerprint": fingerprint}
    write_json(folder / CARD, {**known, "split_fingerprint": split_fingerprint, "split": {"folds": None}})
    write_manifest(folder, entries)


def batches_per_second(data: PreparedData, policy: str, most: int = 10_000) -> float:
    """Return augmented images per second over shuffled images, after one warm-up pass over a few."""
    generator = torch.Generator().manual_seed(0)
    order = np.random.default_rng(0).permutation(len(data.rows))[:most]

    def run(chosen: np.ndarray) -> float:
        started = time.perf_counter()
        for batch in load_batches(data, make_batches(chosen, BATCH), CPU):
            POLICIES[policy](batch.images, Draws(generator, len(batch.images)))
        return len(chosen) / (time.perf_counter() - started)

    run(order[:320])
    return run(order)


def size() -> None:
    """Cost of larger images: input, training and inference of ResNet-50."""
    print_head(("side, px", "training, images/s", "inference, images/s", "latency, ms", "GFLOPs"))
    for side in (64, 128, 224, 384, 512):
        with tempfile.TemporaryDirectory() as folder:
            options = ["--archs", "resnet50", "--size", str(side), "--batch-size", "16", "--rounds", "3"]
            result = command("benchmark", "models", *options, "--out", folder, "--overwrite", "--json")
            (one,) = json.loads(result.stdout)["networks"]
            speeds = one["training_images_per_s"], one["inference_images_per_s"]
            print_row((side, *speeds, one["latency_p50_ms"], one["gflops"]))


def memory() -> None:
    """Peak memory of ``prepare`` and ``train`` on ten times the images."""
    print_head(("images", "prepare, MB", "train, MB", "train with files in memory, MB"))
    for count in (200, 2_000):
        with tempfile.TemporaryDirectory() as folder:
            data, run = f"{folder}/data", f"{folder}/run"
            command("prepare", "--dataset", "sample", "--draw", str(count), "--size", "16", "--out", data)
            options = ["--size", "128", "--stain", "macenko", "--out", data, "--overwrite"]
            preparing, _ = watched("prepare", f"{data}-raw", *options)
            options = ["--arch", NETWORK, "--data", data, "--out", run, "--epochs", "1"]
            own, mapped = watched("train", *options)
            print_row((count, preparing, own, own + mapped))


def processes() -> None:
    """Speed of ``train`` in one and two processes of one thread each."""
    print_head(("processes", "batch", "images/s"))
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/data"
        command("prepare", "--dataset", "sample", "--draw", "320", "--size", "128", "--out", data)
        for count in (1, 2):
            run = f"{folder}/run-{count}"
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
            options = ["--arch", "resnet50", "--data", data, "--out", run, "--epochs", "2", "--quiet"]
            subprocess.run(
                [sys.executable, *launcher, "-m", "breastcli", "train", *options, "--batch-size", str(BATCH)],
                check=True,
                capture_output=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            last = (Path(run) / "timing.csv").read_text().splitlines()[-1].split(",")
            print_row((count, BATCH, float(last[2])))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of breastcli to its end."""
    return subprocess.run([sys.executable, "-m", "breastcli", *arguments], check=True, capture_output=True, text=True)


def watched(*arguments: str) -> tuple[float, float]:
    """Run a command; return the largest amounts of its own memory and of files mapped into it, in MB."""
    child = subprocess.Popen(
        [sys.executable, "-m", "breastcli", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    own = mapped = 0.0
    while child.poll() is None:
        own = max(own, resident_mb("RssAnon", child.pid))
        mapped = max(mapped, resident_mb("RssFile", child.pid))
        time.sleep(0.02)
    if child.returncode:
        sys.exit(f"breastcli {' '.join(arguments)} failed")
    return own, mapped


def resident_mb(kind: str, process: int | str = "self") -> float:
    """Return a process's resident memory of one kind, in MB; 0 where it has ended."""
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(f"{kind}:"):
                return int(line.split()[1]) * 1024 / MEGA
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0.0


def print_head(names: Sequence[str]) -> None:
    """Print the head of a table."""
    print("| " + " | ".join(names) + " |")
    print("|" + "---|" * len(names), flush=True)


def print_row(values: Iterable[float]) -> None:
    """Print one row: three digits, whole numbers in full."""
    cells = (f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}" for value in values)
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
