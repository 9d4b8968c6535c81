"""``torchrun … -m breastcli train``: the history of one process, whatever their number."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from breastcli.cli import _speaks
from breastcli.config import EvaluateConfig, TrainConfig
from breastcli.configfile import to_yaml
from breastcli.data.augment import POLICIES
from breastcli.data.store import PreparedData
from breastcli.errors import UserError
from breastcli.evaluate import evaluate
from breastcli.launch import num_processes
from breastcli.progress import SILENT
from breastcli.records import Predictions
from breastcli.system.checkpoint import load_checkpoint, load_resume
from breastcli.system.distributed import Processes, joined_processes
from breastcli.system.feeding import ImageFeed
from breastcli.system.inference import Predictor
from breastcli.system.runfolder import RESUME
from breastcli.system.session import start_session
from breastcli.train import train

CPU = torch.device("cpu")
# Rounding grows from step to step, with the default rate (1e-4) slowly enough for a few epochs: a change of the first
# weights by 1e-7 does as much.
SAME = 1e-5


@pytest.fixture(scope="session")
def config(tiny_config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(
        tiny_config, epochs=3, lr=1e-4, dropout=0.0, augment="strong", imbalance="weights", workers=1
    )


def launch(count: int, *words: str, folder: Path) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.Popen(
        [*launcher, "-m", "breastcli", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    printed, said = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, printed, said)


def torchrun(count: int, config: TrainConfig, *words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "config.yaml").write_text(to_yaml(config))
    return finish(launch(count, "train", "--config", "config.yaml", *words, folder=folder))


def history_of(folder: Path) -> list[dict[str, float]]:
    with (folder / "history.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def assert_same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=SAME, nan_ok=True)


def test_two_processes_are_one_and_only_the_first_writes(own_run: Path, config: TrainConfig, tmp_path: Path) -> None:
    alone = train(dataclasses.replace(config, out=str(tmp_path / "alone"))).history
    # Into a folder with a finished run of other options, which the second process must not take for its own.
    two = dataclasses.replace(config, epochs=2, out=str(own_run))
    done = torchrun(2, two, "--overwrite", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same(history_of(own_run), alone[:2])
    objects = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(objects) == 1
    info = json.loads((own_run / "run.json").read_text())
    assert (info["status"], info["processes"]) == ("finished", 2)
    log = (own_run / "log.txt").read_text()
    assert [log.count(f"epoch {epoch}:") for epoch in (1, 2, 3)] == [1, 1, 0]
    names = {path.relative_to(own_run).as_posix() for path in own_run.rglob("*") if path.is_file()}
    assert names == {path.relative_to(tmp_path / "alone").as_posix() for path in (tmp_path / "alone").rglob("*.*")}
    # One process goes on where two stopped.
    assert_same(train(dataclasses.replace(two, epochs=3, resume=True)).history, alone)
    assert json.loads((own_run / "run.json").read_text())["processes"] == 1


def test_three_processes_are_one(config: TrainConfig, tmp_path: Path) -> None:
    options = {"arch": "timm/test_efficientnet", "augment": "paper", "loss": "focal", "epochs": 2}
    alone = dataclasses.replace(config, out=str(tmp_path / "alone"), **options)
    done = torchrun(3, dataclasses.replace(alone, out=str(tmp_path / "three")), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same(history_of(tmp_path / "three"), train(alone).history)


def test_several_processes_go_on_where_one_stopped(config: TrainConfig, tmp_path: Path) -> None:
    options = {"augment": "light", "imbalance": "oversample", "epochs": 2}
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"), **options)
    part = dataclasses.replace(whole, out=str(tmp_path / "part"))
    train(dataclasses.replace(part, epochs=1))
    done = torchrun(2, part, "--resume", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same(history_of(tmp_path / "part"), train(whole).history)


def test_a_process_that_dies_ends_the_run_which_another_number_goes_on_with(
    config: TrainConfig, tmp_path: Path
) -> None:
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"), epochs=12)
    part = dataclasses.replace(whole, out=str(tmp_path / "part"))
    (tmp_path / "config.yaml").write_text(to_yaml(part))
    process = launch(2, "train", "--config", "config.yaml", folder=tmp_path)
    begun = time.monotonic()
    while not (tmp_path / "part" / RESUME).is_file():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - begun < 200
        time.sleep(0.05)
    ranks = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            told = dict(one.split("=", 1) for one in (folder / "environ").read_text().split("\0") if "=" in one)
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == process.pid and "RANK" in told:
                ranks[told["RANK"]] = int(folder.name)
    os.kill(ranks["1"], signal.SIGKILL)
    done = finish(process)
    assert done.returncode != 0
    assert "breastcli/train.py" not in done.stderr  # the launcher shows its own traceback, we none
    assert "another process of this run stopped" in done.stderr or "terminated" in done.stderr
    assert 1 <= len(history_of(tmp_path / "part")) < 12
    done = torchrun(3, part, "--resume", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same(history_of(tmp_path / "part")[:3], train(dataclasses.replace(whole, epochs=3)).history)
    assert len(history_of(tmp_path / "part")) == 12


def numbers_in(value: object) -> Iterator[float]:
    """Yield every number of figures, in order."""
    if isinstance(value, dict):
        value = [one for name, one in value.items() if name not in ("predictions", "config")]
    if isinstance(value, list):
        for one in value:
            yield from numbers_in(one)
    elif isinstance(value, (int, float)):
        yield float(value)


def test_three_processes_evaluate_like_one(own_run: Path, tmp_path: Path) -> None:
    """With shares of unequal size, everything that is fitted or gathered, and no image counted twice."""
    asked = ("evaluate", "run", "--device", "cpu", "--precision", "fp32", "--resamples", "100", "--workers", "1")
    asked += ("--calibrate", "--threshold", "val-youden", "--embedding", "--stress", "--batch-size", "3")
    evaluate(
        EvaluateConfig(
            runs=(str(own_run),), out=str(tmp_path / "alone"), device="cpu", precision="fp32", resamples=100,
            calibrate=True, threshold="val-youden", embedding=True, stress=True, workers=1,
        )
    )  # fmt: skip
    done = finish(launch(3, *asked, "--out", "three", "--json", folder=tmp_path))
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith("{")]) == 1
    alone, three = (Predictions.from_csv(tmp_path / name / "predictions.csv") for name in ("alone", "three"))
    assert len(alone) % 3 != 0
    assert list(three.image_ids) == list(alone.image_ids)
    np.testing.assert_allclose(three.probs, alone.probs, rtol=0, atol=SAME)
    found, expected = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("three", "alone"))
    assert list(numbers_in(found)) == pytest.approx(list(numbers_in(expected)), rel=1e-4, abs=1e-4)
    assert found["image"]["confusion"] == expected["image"]["confusion"]
    assert found["stress"] is not None


def test_evaluation_takes_predictions_again_and_refuses_too_many(own_run: Path, tmp_path: Path) -> None:
    asked = ("evaluate", "run", "--device", "cpu", "--resamples", "100", "--overwrite", "--workers", "1")
    first = finish(launch(2, *asked, folder=tmp_path))
    assert first.returncode == 0, first.stderr
    before = (own_run / "evaluate/test/predictions.csv").read_bytes()
    again = finish(launch(2, *asked, folder=tmp_path))
    assert again.returncode == 0, again.stderr
    assert "predictions of the earlier evaluation are taken again" in again.stderr
    assert (own_run / "evaluate/test/predictions.csv").read_bytes() == before
    data = PreparedData.open(Path(json.loads((own_run / "run.json").read_text())["data"]))
    model, _ = load_checkpoint(own_run / "checkpoints/best.safetensors", CPU)
    predictor = Predictor(model, data, CPU, torch.float32, "none", 4, 1, SILENT, Processes(0, 4))
    with pytest.raises(UserError, match="4 processes cannot share the 3 images of val: start fewer"):
        predictor(data.select("val")[:3], "val")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [::1]", "another process of this run stopped"),
        ("mat1 and mat2 shapes cannot be multiplied", "mat1 and mat2"),
    ],
)
def test_a_lost_connection_is_one_clear_line(text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    left: list[Processes] = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: None)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left.append(joined[0]))
    joined = []

    def lose() -> None:
        with joined_processes(CPU) as (processes, _):
            joined.append(processes)
            raise RuntimeError(text)

    with pytest.raises(UserError if expected.startswith("another") else RuntimeError, match=expected):
        lose()
    assert left == [Processes(1, 2, CPU)]
    assert not left[0].writes


@pytest.mark.parametrize(
    ("options", "count", "message"),
    [
        ({"compile": True}, 2, "--compile: .*start one process"),
        ({"cache_embeddings": "on", "freeze": "trunk", "augment": "none"}, 2, "--cache-embeddings on: .*one process"),
        ({"batch_size": 2}, 3, "3 processes cannot share a batch or validation set of 2 images: start fewer"),
        ({}, 10, "10 processes cannot share a batch or validation set of 9 images"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(
    options: dict, count: int, message: str, config: TrainConfig
) -> None:
    asked = dataclasses.replace(config, **options)
    with pytest.raises(UserError, match=message):
        start_session(asked, PreparedData.open(Path(config.data)), CPU, SILENT, None, Processes(1, count))


def test_several_processes_cache_no_embeddings(config: TrainConfig, tmp_path: Path) -> None:
    own = str(shutil.copytree(config.data, tmp_path / "data"))  # one process writes its embeddings there
    options = {"freeze": "trunk", "augment": "none", "data": own, "out": str(tmp_path / "run"), "epochs": 1}
    frozen, data = dataclasses.replace(config, **options), PreparedData.open(Path(own))
    assert isinstance(start_session(frozen, data, CPU, SILENT, None, Processes(0, 2)).feed, ImageFeed)
    train(frozen)
    saved = load_resume(tmp_path / "run" / RESUME, CPU)
    with pytest.raises(UserError, match="trains its head on cached embeddings: resume it with one process"):
        start_session(frozen, data, CPU, SILENT, saved, Processes(0, 2))


@pytest.mark.parametrize("name", ["strong", "wang"])
def test_three_feeds_give_the_batches_of_one(name: str, config: TrainConfig) -> None:
    data, policy = PreparedData.open(Path(config.data)), POLICIES[name]
    rows = [data.select("train")[:11], data.select("train")[11:16]]
    elements = [np.resize(policy.copies, len(batch)) for batch in rows] if policy.copies else None

    def batches(processes: Processes) -> list[tuple[torch.Tensor, torch.Tensor]]:
        feed = ImageFeed(data, policy, CPU, torch.float32, 4, None, processes)
        return list(feed.batches(rows, elements, torch.Generator().manual_seed(3)))

    parts = [batches(Processes(rank, 3)) for rank in range(3)]
    for number, (images, labels) in enumerate(batches(Processes())):
        joined = torch.cat([part[number][0] for part in parts])
        torch.testing.assert_close(joined, images, rtol=0, atol=1e-6)
        assert torch.equal(torch.cat([part[number][1] for part in parts]), labels)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_shares_are_nearly_equal_and_cover_everything_once(count: int) -> None:
    for number in range(12):
        parts = [list(range(number))[Processes(rank, count).share(number)] for rank in range(count)]
        assert [one for part in parts for one in part] == list(range(number))
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1


def test_only_the_first_process_speaks_and_other_jobs_take_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert (num_processes(), _speaks("explain")) == (1, True)  # of a cluster's scheduler, not of torchrun
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert num_processes() == 2
    assert not _speaks("train")
    with pytest.raises(UserError, match="explain runs in one process: start it without torchrun"):
        _speaks("explain")
    monkeypatch.setenv("RANK", "0")
    assert _speaks("train")
