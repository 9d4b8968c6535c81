"""Two jobs on one folder, and jobs that are told to stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cases import CASES, CPU, TINY, World
from injecting import COUNTS, files_of

from breastcli.data.store import PreparedData
from breastcli.errors import UserError
from breastcli.files import write_json
from breastcli.locks import locked

LONG = ("train", *TINY, "--epochs", "2000", "--out")


@pytest.mark.parametrize("name", CASES)
def test_a_second_job_is_refused_and_touches_nothing(name: str, world: World, tmp_path: Path) -> None:
    case = CASES[name]
    cwd = case.start(world, tmp_path / "work")
    # evaluate, explain and assess write into a folder of their own within the run's, which they read.
    held = cwd / "out" / {"evaluate": "evaluate/test", "explain": "explain/gradcam"}.get(name, "")
    held = held / "assess" if name == "synthesize assess" else held
    held.mkdir(parents=True, exist_ok=True)
    with locked(held):
        before = files_of(cwd)
        ended = world.do(cwd, case.words)
        assert ended.refused_in_one_line
        assert ended.code == 1
        assert f"{held.relative_to(cwd)} is in use by process {os.getpid()} on " in ended.stderr
        assert files_of(cwd) == before
    COUNTS["two jobs on one folder"] += 1


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("evaluate", "run", "--resamples", "100", "--overwrite", *CPU), "run"),
        (("explain", "run", "--method", "gradcam", "--num", "2", "--overwrite", *CPU), "run"),
        (("synthesize", "generate", "gan", "--out", "g", "--label", "all", "--num", "4", *CPU), "gan"),
        (("synthesize", "assess", "gan", "--features", "{run}", "--draws", "2", "--overwrite", *CPU), "gan"),
    ],
)
def test_who_reads_a_run_keeps_training_out_and_the_other_way_round(
    words: tuple[str, ...], name: str, world: World, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(getattr(world, name), tmp_path / name))
    before = files_of(run)
    with locked(run):
        ended = world.do(tmp_path, words)
        assert ended.refused_in_one_line
        assert ended.stderr.endswith(": wait until it has finished\n")
    assert files_of(run) == before
    with locked(run, shared=True):  # as another evaluation does
        assert world.do(tmp_path, words).code == 0
        before = files_of(run)
        begin = ("train", "--data", "{data}", *TINY) if name == "run" else ("synthesize", "fit", "--data", "{data}")
        ended = world.do(tmp_path, (*begin, "--out", name, "--overwrite"))
        assert ended.refused_in_one_line
        assert files_of(run) == before
    COUNTS["two jobs on one folder"] += 1


@pytest.fixture
def training(world: World, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Start a training that has finished an epoch and does not end by itself."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "breastcli", *LONG, "run", "--data", str(world.data)]
        started.append(subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True))
        wait_for(tmp_path / "run/history.csv")
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(file: Path) -> None:
    for _ in range(1200):
        if file.is_file():
            return
        time.sleep(0.1)
    pytest.fail(f"{file} does not come")


def test_a_killed_job_holds_nothing(training: Callable, world: World, tmp_path: Path) -> None:
    process = training()
    again = ("train", "--data", "{data}", *TINY, "--epochs", "1", "--out", "run")
    for more in ((), ("--resume",), ("--overwrite",)):
        ended = world.do(tmp_path, (*again, *more))
        assert ended.refused_in_one_line
        assert f"run is in use by process {process.pid} on " in ended.stderr
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    ended = world.do(tmp_path, (*again, "--overwrite"))
    assert ended.code == 0, ended.stderr


def test_sigterm_stops_as_ctrl_c_does(training: Callable, world: World, tmp_path: Path) -> None:
    for number, code, said in ((signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        process = training()
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == code
        assert stderr.splitlines()[-1] == f"error: {said}; continue with the same command and --resume"
        assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "interrupted"
        assert not (tmp_path / "run/.lock").exists()
        COUNTS[f"stopped by {number.name}"] += 1


def test_sigterm_at_any_moment(world: World, tmp_path: Path) -> None:
    case = CASES["train"]
    for number, after in enumerate((0.1, 0.5, 0.9)):
        cwd = case.start(world, tmp_path / str(number))
        ended = world.do(cwd, case.words, after=after, signal=int(signal.SIGTERM))
        assert ended.code in (0, 143, -signal.SIGTERM), ended.stderr
        assert ended.is_plain, ended.stderr
        COUNTS["stopped by SIGTERM"] += 1


def test_a_benchmark_stops_its_child(world: World, tmp_path: Path) -> None:
    words = ["benchmark", "convergence", "--data", str(world.data), "--archs", "timm/test_resnet", "--out", "b", *CPU]
    process = subprocess.Popen(
        [sys.executable, "-m", "breastcli", *words, "--epochs", "2000"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    run = tmp_path / "b/convergence/timm-test_resnet"
    try:
        wait_for(run / "history.csv")
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 143
    assert "terminated; continue with the same command and --resume" in stderr
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    with locked(run):  # which the child no longer holds
        COUNTS["stopped by SIGTERM"] += 1


def test_several_processes_do_not_wait_for_a_folder_that_is_held(world: World, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "breastcli", *LONG, "run", "--data", str(world.data)]
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert f"error: run is in use by process {os.getpid()} on " in done.stderr
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("moment", ["dataset.json", "manifest.csv", "images.npy"])
def test_data_that_are_overwritten_while_they_are_opened_are_refused(
    moment: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(shutil.copytree(world.data, tmp_path / "data"))
    other = PreparedData.open(world.data)
    real = Path.open

    def overwrite(path: Path, *words: object, **more: object) -> object:
        opened = real(path, *words, **more)  # type: ignore[arg-type]
        if path == data / moment:
            (data / "manifest.csv").unlink()  # as prepare --overwrite does, in its order
            write_json(data / "dataset.json", other.card)
            for name in ("images.npy", "manifest.csv"):
                shutil.copy(world.data / name, data / f"new-{name}")
                (data / f"new-{name}").replace(data / name)
        return opened

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", overwrite)
        if moment == "images.npy":  # which is mapped without being opened in this way
            patched.setattr("numpy.load", lambda path, **_: overwrite(Path(path), "rb") and other.images)
        with pytest.raises(UserError, match="data was overwritten while it was opened: start again"):
            PreparedData.open(data)
    assert len(PreparedData.open(data).rows) == len(other.rows)


def test_data_that_are_overwritten_later_stay_as_they_were_opened(world: World, tmp_path: Path) -> None:
    data = Path(shutil.copytree(world.data, tmp_path / "data"))
    opened = PreparedData.open(data)
    ended = world.do(
        tmp_path, ("prepare", "{raw}", "--out", "data", "--size", "64", "--stain", "macenko", "--overwrite")
    )
    assert ended.code == 0, ended.stderr
    assert (opened.images == PreparedData.open(world.data).images).all()
    assert not (PreparedData.open(data).images == opened.images).all()
