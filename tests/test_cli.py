"""The real command line, as a shell sees it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

TRAIN = ["--arch", "timm/test_resnet", "--epochs", "1", "--device", "cpu", "--lr", "1e-3"]


def test_the_whole_chain(breastcli: Callable, tmp_path: Path) -> None:
    done = breastcli("prepare", "raw", "--dataset", "sample", "--draw", 64, "--out", "data", "--size", 32)
    assert done.code == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "data"
    assert "not real tissue" in done.stdout
    done = breastcli("train", "--data", "data", "--mag", "all", *TRAIN)
    assert done.code == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "runs/timm-test_resnet-all"
    assert "epoch 1: train_loss" in done.stderr
    done = breastcli("evaluate", "--run", "latest", "--resamples", 100)
    assert done.code == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "runs/timm-test_resnet-all/evaluate/test"
    for text in ("Balanced accuracy", "Patient recognition rate", "positive class: malignant", "95 % intervals"):
        assert text in done.stdout
    done = breastcli("predict", "latest", "raw/BreaKHis_v1")
    assert done.code == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "predictions.csv"
    assert (tmp_path / "predictions.csv").is_file()


def test_json_is_one_object_and_nothing_else(breastcli: Callable, raw: Path, trained: Path, tmp_path: Path) -> None:
    done = breastcli("prepare", raw, "--out", "data", "--size", 32, "--json")
    assert done.json["dataset"]["num_images"] == 96
    assert list(done.json)[-1] == "out"
    done = breastcli("train", "--data", "data", "--out", "run", *TRAIN, "--json")
    assert done.json["best"]["epoch"] == 1
    done = breastcli("evaluate", "run", "--resamples", 100, "--json", "--quiet")
    assert done.json["image"]["n"] > 0
    assert done.stderr == ""
    done = breastcli("predict", "run", raw / "BreaKHis_v1", "--json")
    assert done.json["num_images"] == 96
    assert done.json["out"] == "predictions.csv"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["prepare", "none"], 1, "error: none: no such folder"),
        (["prepare"], 2, "error: prepare needs the raw data set"),
        (["train", "--data", "none"], 1, "error: none is not a prepared folder: run breastcli prepare"),
        (["train", "--mag", "50x", "--out", "x"], 2, "--mag 50x"),
        (["train", "--optimizer", "adm"], 2, "did you mean 'adam'"),
        (["train", "--epochs", "many"], 2, "--epochs"),
        (["train", "--device", "tpu", "--out", "x"], 2, "--device tpu"),
        (["train", "--optimiser", "adam"], 2, "--optimi"),
        (["evaluate"], 2, "error: evaluate needs a run folder"),
        (["evaluate", "--run", "latest"], 1, "error: no run below runs/"),
        (["predict", "none"], 2, "error: predict needs images"),
        (["prepare", "x", "--config", "none.yaml"], 2, "cannot read none.yaml"),
        (["cook"], 2, "cook"),
    ],
)
def test_errors_are_one_line_with_their_exit_code(
    words: list[str], code: int, message: str, breastcli: Callable, prepared: Path, tmp_path: Path
) -> None:
    if "--out" in words:
        words = [*words, "--data", str(prepared)]
    done = breastcli(*words)
    assert (done.code, done.stdout) == (code, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    if done.stderr.startswith("error:"):
        assert len(done.stderr.splitlines()) == 1


def test_a_leak_exits_with_three(breastcli: Callable, raw: Path, prepared: Path, tmp_path: Path) -> None:
    from breastcli.data.store import PreparedData

    rows = PreparedData.open(prepared).rows
    source, target = (next(row for row in rows if row.split == split) for split in ("train", "test"))
    shutil.copytree(raw, tmp_path / "raw")
    shutil.copy(tmp_path / "raw" / source.record.path, tmp_path / "raw" / target.record.path)
    done = breastcli("prepare", "raw", "--out", "data", "--size", 32)
    assert done.code == 3
    assert "the split leaks" in done.stderr
    done = breastcli("prepare", "raw", "--out", "image", "--size", 32, "--group-by", "image")
    assert done.code == 0
    assert "LEAKY: image-level split" in done.stdout


def test_flag_beats_config_and_print_config_stops(breastcli: Callable, tmp_path: Path) -> None:
    (tmp_path / "some.yaml").write_text("train:\n  epochs: 7\n  lr: 1e-3\n")
    done = breastcli("train", "--config", "some.yaml", "--epochs", 9, "--print-config")
    assert done.code == 0
    assert "epochs: 9" in done.stdout
    assert "lr: 0.001" in done.stdout
    assert list(tmp_path.iterdir()) == [tmp_path / "some.yaml"]
    (tmp_path / "some.yaml").write_text("train:\n  epoch: 7\n")
    done = breastcli("train", "--config", "some.yaml")
    assert done.code == 2
    assert "did you mean 'epochs'" in done.stderr


def test_debug_shows_the_traceback(breastcli: Callable) -> None:
    done = breastcli("prepare", "none", "--debug")
    assert done.code == 1
    assert "Traceback" in done.stderr


def test_architectures_are_listed(breastcli: Callable) -> None:
    done = breastcli("train", "--arch", "help")
    assert done.code == 0
    assert "dalaresnet50" in done.stdout
    assert "25,611,842" in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion_knows_commands_flags_and_choices(shell: str, tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    def complete(words: str) -> str:
        environment = os.environ | {
            "_BREASTCLI_COMPLETE": f"complete_{shell}",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split(" ")) - 1),
            "_TYPER_COMPLETE_ARGS": words,
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        }
        program = Path(sys.executable).parent / "breastcli"
        return subprocess.run([program], env=environment, capture_output=True, text=True, timeout=60).stdout

    assert "evaluate" in complete("breastcli eva")
    assert "--optimizer" in complete("breastcli train --opti")
    assert "adamw" in complete("breastcli train --optimizer ad")


def test_an_unwritable_folder_is_one_line(breastcli: Callable, raw: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    done = breastcli("prepare", raw, "--out", "file")
    assert done.code == 1
    assert "file is a file" in done.stderr
    done = breastcli("prepare", raw, "--out", "file/data")
    assert done.code == 1
    assert "cannot write file/data" in done.stderr


def test_version_of_the_package(breastcli: Callable) -> None:
    from importlib.metadata import version

    assert breastcli("--version").stdout == f"breastcli {version('breastcli')}\n"
