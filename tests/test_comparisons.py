"""What single comparisons of the benchmark do on each side, and what they remark."""

from __future__ import annotations

import csv
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

from breastcli.benchmark import benchmark
from breastcli.benchmarks import Setting, gan_metrics, inference, prepare, training
from breastcli.benchmarks.timing import CPU
from breastcli.benchmarks.usual import file_loader
from breastcli.config import BenchmarkConfig, PrepareConfig
from breastcli.data.loading import Batch, load_batches
from breastcli.data.store import IMAGES, PreparedData
from breastcli.gan.fidelity import frechet_distance, unbiased_mmd
from breastcli.prepare import prepare as run_prepare
from breastcli.system import feeding

SIZE_PX = 32


@pytest.fixture
def setting(raw: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    """A setting in which every comparison does little."""
    monkeypatch.setattr(prepare, "MAX_IMAGES", 8)
    for module in (training, inference):
        monkeypatch.setattr(module, "ARCH", TINY)
        monkeypatch.setattr(module, "MAX_IMAGES", 27)
    return Setting(CPU, size_px=SIZE_PX, batch_size=8, rounds=1, workers=1, raw=raw)


def test_ours_makes_the_array_that_prepare_makes(setting: Setting, raw: Path, tmp_path: Path) -> None:
    for stain in ("none", "macenko"):  # with folds the reference is the published one
        config = PrepareConfig(raw=str(raw), out=str(tmp_path / stain), size=SIZE_PX, stain=stain, folds=3)
        run_prepare(config)
        records = [row.record for row in PreparedData.open(tmp_path / stain).rows]
        array = prepare.make_array(records, tmp_path / "ours", SIZE_PX, setting, stained=stain == "macenko")
        assert array.read_bytes() == (tmp_path / stain / IMAGES).read_bytes()
    assert (tmp_path / "none" / IMAGES).read_bytes() != (tmp_path / "macenko" / IMAGES).read_bytes()


def test_the_loop_over_files_makes_nearly_the_same(setting: Setting, raw: Path, tmp_path: Path) -> None:
    """Exactly the same without normalisation; the order of normalising and resizing moves a few grey levels."""
    pytest.importorskip("torchstain")
    data, paths = prepare.prepare_sample(tmp_path, setting, 8)
    records, theirs = [row.record for row in data.rows], tmp_path / "theirs.npy"
    plain = np.load(prepare.make_array(records, tmp_path, SIZE_PX, setting, stained=False))
    prepare._loop(paths, SIZE_PX, theirs)()
    np.testing.assert_array_equal(np.load(theirs), plain)
    stained = np.load(prepare.make_array(records, tmp_path, SIZE_PX, setting, stained=True)).astype(float)
    prepare._loop(paths, SIZE_PX, theirs, prepare._torchstain(CPU))()
    assert np.abs(np.load(theirs) - stained).mean() < 0.3 * np.abs(plain - stained).mean()


def test_images_without_stain_are_decoded_only(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prepare, "find_dataset", lambda *_: SimpleNamespace(stained=False))
    (pair,) = prepare.compare_prepare(setting)
    assert "Macenko" not in pair.title
    assert re.fullmatch(r"decoding alone, by all threads, takes \d+% of our time", pair.remark)
    assert "is not H&E-stained" in caplog.text


def shares_of_waiting(setting: Setting) -> list[float]:
    (pair,) = training.compare_training(setting)
    found = re.fullmatch(r"waiting for input: ([\d.]+)% of ours, ([\d.]+)% of theirs", pair.remark)
    assert found, pair.remark
    return [float(percent) / 100 for percent in found.groups()]


def test_waiting_for_input_rises_with_a_slow_feed(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(*arguments: object) -> Iterator[Batch]:
        for batch in load_batches(*arguments):
            time.sleep(0.5)
            yield batch

    quick = shares_of_waiting(setting)
    monkeypatch.setattr(feeding, "load_batches", slowly)
    slow = shares_of_waiting(setting)
    assert all(0 < share < 1 for share in quick + slow)
    assert slow[0] > quick[0]


def test_both_sides_train_on_the_same_images(setting: Setting, raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions, loaders = [], []

    def start(*arguments: object) -> object:
        sessions.append(start_session(*arguments))
        return sessions[-1]

    def load(paths: list[Path], labels: np.ndarray, *arguments: object, **options: object) -> object:
        loaders.append(dict(zip(paths, labels, strict=True)))
        return file_loader(paths, labels, *arguments, **options)

    start_session = training.start_session
    monkeypatch.setattr(training, "start_session", start)
    monkeypatch.setattr(training, "file_loader", load)
    (pair,) = training.compare_training(setting)
    (session,), (loader,) = sessions, loaders
    rows = [session.data.rows[number].record for number in session.rows["train"]]
    assert loader == {raw / record.path: session.data.classes.index(record.label) for record in rows}
    assert pair.count == len(rows) == 24
    assert session.config.augment == "paper"
    assert session.dtype == setting.dtype


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.float32, 0.0, 1e-5), (torch.bfloat16, 1e-5, 0.2)])
def test_inference_says_how_far_its_arithmetic_moves_probabilities(
    setting: Setting, dtype: torch.dtype, least: float, most: float
) -> None:
    (pair,) = inference.compare_inference(Setting(**{**vars(setting), "dtype": dtype}))
    found = re.match(r"probabilities \((.+) to (.+)\) differ by (\S+) at most", pair.remark)
    assert found, pair.remark
    low, high, difference = map(float, found.groups())
    assert 0 < low < high < 1  # a network that says the same of all images would agree with anything
    assert least <= difference <= most


def test_the_usual_loader_reads_files_as_they_are(raw: Path, setting: Setting) -> None:
    paths = sorted(raw.rglob("*.png"))[:3]
    ((images, labels),) = file_loader(paths, np.array([1, 0, 1]), 46, setting)
    assert labels.tolist() == [1, 0, 1]
    expected = np.asarray(Image.open(paths[0]).convert("RGB").resize((46, 46), Image.Resampling.BILINEAR))
    assert images.is_contiguous()
    np.testing.assert_allclose(images[0].permute(1, 2, 0) * 127.5 + 127.5, expected, atol=1.5)


def test_torchmetrics_gives_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchmetrics")
    monkeypatch.setattr(gan_metrics, "NUM_SUBSETS", 2)
    monkeypatch.setattr(gan_metrics, "SUBSET_SIZE", 60)  # all of them, in another order
    generator = np.random.default_rng(0)
    real, made = (generator.standard_normal((60, 8)).astype(np.float32) for _ in range(2))
    for _ in range(2):  # nothing of the first call may be left in the second
        assert float(gan_metrics._torchmetrics_fid(real, made)()) == pytest.approx(
            frechet_distance(real, made), rel=1e-4
        )
    kid, _ = gan_metrics._torchmetrics_kid(real, 1.2 * made)()
    assert float(kid) == pytest.approx(unbiased_mmd(real, 1.2 * made), abs=1e-4)


def test_remarks_are_written(setting: Setting, raw: Path, tmp_path: Path) -> None:
    options = {"size": SIZE_PX, "batch_size": 8, "rounds": 1, "workers": 1, "device": "cpu"}
    result = benchmark(BenchmarkConfig(what="inference", out=str(tmp_path), raw=str(raw), **options))
    (pair,) = result.document["pairs"]
    assert pair["remark"].startswith("probabilities")
    assert json.loads((tmp_path / "benchmark.json").read_text())["pairs"] == [pair]
    with (tmp_path / "pairs.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert line["remark"] == pair["remark"]
