"""breastcli report on folders that real commands wrote: runs, pooled folds, generators, synthetic images."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_extra import synthesize as make_synthetic
from test_report import Page
from test_synthesize import fitted, tiny_gan  # noqa: F401 (fixtures)

from breastcli.config import EvaluateConfig, ReportConfig, TrainConfig
from breastcli.evaluate import evaluate
from breastcli.report import report
from breastcli.show import show_report
from breastcli.train import train


@pytest.fixture(scope="module")
def pooled(folds: Path, tiny_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pooled evaluation of two folds; tests must not change it."""
    root = tmp_path_factory.mktemp("folds")
    runs = [root / f"tiny-fold{fold}" for fold in (0, 1)]
    for fold, out in enumerate(runs):
        train(dataclasses.replace(tiny_config, data=str(folds), fold=fold, epochs=1, out=str(out)))
    evaluate(EvaluateConfig(runs=tuple(map(str, runs)), resamples=100, device="cpu"))
    return root / "tiny-pooled"


def page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_the_command_rebuilds_the_page_of_one_run(own_run: Path, breastcli: Callable) -> None:
    for name in ("report.html", "model_card.md"):
        (own_run / name).unlink()
    done = breastcli("report", own_run, "--json", "--quiet")
    assert done.code == 0, done.stderr
    assert done.stderr == ""
    assert done.json["pages"] == [done.json["out"]] == [str(own_run / "report.html")]
    assert done.json["model_cards"] == [str(own_run / "model_card.md")]
    assert done.json["runs"][0]["arch"] == "timm/test_resnet"
    assert list(done.json)[-1] == "out"
    assert "has not been evaluated yet" in page(own_run / "report.html").text


def test_two_runs_are_compared_in_runs_report(
    own_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    other = Path(shutil.copytree(own_run, tmp_path / "other run"))
    evaluate(EvaluateConfig(runs=(str(own_run),), resamples=100, device="cpu"))
    config = ReportConfig(runs=(str(own_run), str(other)))
    show_report(report(config))
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "runs/report/report.html"
    assert "run: drawn by a program" in printed
    found = page(tmp_path / "runs/report/report.html")
    assert "Not evaluated on this split: other run" in found.text
    assert "Drawn by a program, not real tissue: run, other run" in found.text


def test_pooled_folds_have_a_page_and_a_card(pooled: Path) -> None:
    made = report(ReportConfig(runs=(str(pooled),)))
    row = made.document["runs"][0]
    assert (row["arch"], row["fold"], row["best_epochs"]) == ("timm/test_resnet", "pooled", [1, 1])
    assert made.model_cards == [pooled / "model_card.md"]
    assert "- Runs: 2, pooled" in made.model_cards[0].read_text()
    found = page(made.out)
    assert len(found.table("By fold")) == 3
    alts = [attributes["alt"] for tag, attributes in found.tags if tag == "img"]
    assert any("the image as the network saw it" in alt for alt in alts)


def test_a_pooled_folder_and_a_fold_are_not_comparable(
    pooled: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    fold = pooled.with_name("tiny-fold0")
    config = ReportConfig(runs=(str(pooled), str(fold)), out=str(tmp_path / "both"), overwrite=True)
    assert "These runs were not tested" not in page(report(config).out).text  # the fold has no evaluation
    evaluate(EvaluateConfig(runs=(str(fold),), resamples=100, device="cpu"))
    show_report(report(config))
    assert "not tested on the same images: they differ in fold, number of tested images" in capsys.readouterr().out


def test_a_generator_has_a_page_alone(
    fitted: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    gan = Path(shutil.copytree(fitted, tmp_path / "gan"))
    (gan / "report.html").unlink()
    made = report(ReportConfig(runs=(str(gan),)))
    assert "Generated images" in page(gan / "report.html").text
    assert made.model_cards == []
    show_report(made)
    assert capsys.readouterr().out.splitlines() == [str(gan / "report.html")]


def test_synthetic_training_images_have_a_sheet(prepared: Path, tiny_config: TrainConfig, tmp_path: Path) -> None:
    extra = make_synthetic(prepared, tmp_path / "synthetic")
    out = train(dataclasses.replace(tiny_config, epochs=1, extra=str(extra), out=str(tmp_path / "run"))).out
    alts = [attributes["alt"] for tag, attributes in page(out / "report.html").tags if tag == "img"]
    assert "Synthetic training images: a few images of each class." in alts
    assert "A generative network made part of the training images" in (out / "model_card.md").read_text()
    train(dataclasses.replace(tiny_config, epochs=1, out=str(out), overwrite=True))
    assert not (out / "synthetic.png").exists()
