"""The next command after each job: accepted by the command line, and true."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from breastcli.cli import app
from breastcli.config import EvaluateConfig, ExplainConfig, PrepareConfig, SynthesizeConfig, TrainConfig
from breastcli.data.store import PreparedData
from breastcli.files import write_json
from breastcli.hints import hints_after
from breastcli.plan import Plan
from breastcli.prepare import prepare

TINY = ("--arch", "timm/test_resnet", "--epochs", "1", "--device", "cpu", "--lr", "1e-3")


def command_of(lines: list[str]) -> list[str]:
    """Return the words of the one hinted command, having seen that the command line accepts them."""
    (line,) = [line for line in lines if line.startswith("next: ")]
    program, *words = shlex.split(line.removeprefix("next: "))
    assert program == "breastcli"
    done = CliRunner().invoke(app, [*words, "--print-config"])
    assert done.exit_code == 0, done.output
    return words


def prepared_result(folder: Path) -> SimpleNamespace:
    return SimpleNamespace(out=folder, card=PreparedData.open(folder).card)


def test_after_prepare(prepared: Path, folds: Path) -> None:
    words = command_of(hints_after("prepare", PrepareConfig(), prepared_result(prepared), []))
    assert words == ["train", "--data", str(prepared)]
    words = command_of(hints_after("prepare", PrepareConfig(), prepared_result(folds), []))
    assert words == ["train", "--data", str(folds), "--fold", "0"]


def test_after_a_leaky_split_the_hint_says_so(raw: Path, tmp_path: Path) -> None:
    result = prepare(PrepareConfig(raw=str(raw), out=str(tmp_path / "out"), size=32, group_by="image"))
    lines = hints_after("prepare", PrepareConfig(group_by="image"), result, [])
    assert lines[0].startswith("note: every figure from this split will say LEAKY: image-level split; --group-by exam")
    assert command_of(lines) == ["train", "--data", str(tmp_path / "out")]
    result.card.update({"num_exams": None, "num_patients": None})
    assert "--patients" in hints_after("prepare", PrepareConfig(group_by="image"), result, [])[0]


def test_names_are_quoted() -> None:
    lines = hints_after("train", TrainConfig(), SimpleNamespace(out=Path("runs/it's mine")), [])
    assert command_of(lines) == ["evaluate", "runs/it's mine"]


def test_after_an_audit_or_a_dry_run_comes_the_command_itself() -> None:
    words = ["prepare", "my raw", "--audit", "--size", "32"]
    hinted = command_of(hints_after("prepare", PrepareConfig(audit=True), None, words))
    assert hinted == ["prepare", "my raw", "--size", "32"]
    hinted = command_of(hints_after("prepare", PrepareConfig(audit=True, out="x"), None, [*words, "--out", "x"]))
    assert hinted == ["prepare", "my raw", "--size", "32", "--out", "x", "--overwrite"]
    words = ["train", "--dry-run", "--out", "a b"]
    assert command_of(hints_after("train", None, Plan("train", Path("a b"), {}), words)) == ["train", "--out", "a b"]


def test_a_switch_of_a_configuration_file_is_turned_off() -> None:
    words = ["train", "--epochs", "7"]
    assert command_of(hints_after("train", None, Plan("train", Path("x"), {}), words)) == [*words, "--no-dry-run"]


def test_a_dry_run_of_torchrun_gives_no_command_that_would_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert hints_after("train", None, Plan("train", Path("x"), {}), ["train", "--dry-run"]) == []


def test_after_evaluate_only_a_single_run_is_explained() -> None:
    one = SimpleNamespace(document={"runs": ["runs/a"]})
    assert command_of(hints_after("evaluate", EvaluateConfig(), one, [])) == ["explain", "runs/a"]
    words = command_of(hints_after("evaluate", EvaluateConfig(data="copy"), one, []))
    assert words == ["explain", "runs/a", "--data", "copy"]
    several = SimpleNamespace(document={"runs": ["runs/a", "runs/b"]})
    assert hints_after("evaluate", EvaluateConfig(), several, []) == []
    assert hints_after("evaluate", EvaluateConfig(compare=True), SimpleNamespace(document={}), []) == []


def test_after_explain_come_new_images() -> None:
    result = SimpleNamespace(document={"run": "runs/a"})
    assert command_of(hints_after("explain", ExplainConfig(), result, [])) == ["predict", "runs/a", "IMAGE_OR_FOLDER"]


@pytest.mark.parametrize(
    ("counts", "asked"), [({"benign": 5, "malignant": 9}, []), ({"benign": 9, "malignant": 9}, ["--label", "all"])]
)
def test_after_a_fit_something_can_be_generated(tmp_path: Path, counts: dict, asked: list[str]) -> None:
    conditions = [{"label": label} for label in counts]
    facts = {"class_counts": counts, "conditions": conditions, "data": "data/x", "mag": "100x", "fold": 2}
    write_json(tmp_path / "checkpoints/generator.json", facts)
    result = SimpleNamespace(run=tmp_path, out=tmp_path, generated={}, collapse=None, assessment=None)
    words = command_of(hints_after("synthesize", SynthesizeConfig(step="fit"), result, []))
    assert words[:5] == ["synthesize", "generate", str(tmp_path), *asked][:5]
    result.generated, result.out = {"benign": 4}, Path("data/x-synthetic")
    words = command_of(hints_after("synthesize", SynthesizeConfig(step="generate"), result, []))
    assert words == ["train", "--data", "data/x", "--mag", "100x", "--fold", "2", "--extra", "data/x-synthetic"]
    result.collapse = "at 3 kimg: images are alike"
    assert hints_after("synthesize", SynthesizeConfig(), result, []) == []


def test_after_doctor_comes_what_is_possible(tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command_of(hints_after("doctor", None, None, []))[:3] == ["prepare", "--dataset", "sample"]
    shutil.copytree(prepared, tmp_path / "data" / "breakhis")
    assert command_of(hints_after("doctor", None, None, [])) == ["train"]


def test_hints_lead_from_raw_images_to_predictions(breastcli: Callable, raw: Path, tmp_path: Path) -> None:
    """Each command is the hint of the one before, with settings that make it fast."""
    shutil.copytree(raw, tmp_path / "raw images")
    fast = {"train": TINY, "evaluate": ("--resamples", "100"), "explain": ("--num", "2"), "predict": ()}
    words = ["prepare", "raw images", "--size", "64", "--out", "my data", "--audit", "--overwrite"]
    followed = []
    while words:
        done = breastcli(*words)
        assert done.code == 0, done.stderr
        followed.append(words[0])
        hints = [line for line in done.stderr.splitlines() if line.startswith("next: ")]
        words = shlex.split(hints[0].removeprefix("next: breastcli ")) if hints else []
        words = ["raw images/BreaKHis_v1" if word == "IMAGE_OR_FOLDER" else word for word in words]
        words += fast.get(words[0], ()) if words else ()
    assert followed == ["prepare", "prepare", "train", "evaluate", "explain", "predict"]


def test_scripts_see_no_hints(breastcli: Callable, raw: Path) -> None:
    done = breastcli("prepare", raw, "--size", "32", "--out", "a", "--json")
    assert "next:" not in done.stderr + done.stdout
    done = breastcli("prepare", raw, "--size", "32", "--out", "b", "--quiet")
    assert (done.stderr, "next:" in done.stdout) == ("", False)
