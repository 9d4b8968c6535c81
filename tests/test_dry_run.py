"""``--dry-run``: everything is checked and counted, and nothing is written."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from breastcli.benchmark import benchmark
from breastcli.config import (
    BenchmarkConfig,
    EvaluateConfig,
    ExplainConfig,
    PlannedConfig,
    PredictConfig,
    PrepareConfig,
    SynthesizeConfig,
    TrainConfig,
)
from breastcli.data.store import IMAGES, PreparedData
from breastcli.errors import LeakError, UsageError, UserError
from breastcli.evaluate import evaluate
from breastcli.explain import explain
from breastcli.plan import Plan
from breastcli.predict import predict
from breastcli.prepare import prepare
from breastcli.synthesize import synthesize
from breastcli.train import train

CPU = {"device": "cpu", "precision": "fp32"}


@pytest.fixture
def plan_of(tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """Run a job dry in an empty folder, and see that neither that folder nor the data changed."""
    monkeypatch.chdir(tmp_path)

    def run(job: Callable[[Any], Any], config: PlannedConfig) -> Plan:
        before = state_of(tmp_path, prepared)
        plan = job(dataclasses.replace(config, dry_run=True))
        assert state_of(tmp_path, prepared) == before
        assert isinstance(plan, Plan)
        json.dumps(plan.to_json(), allow_nan=False)
        return plan

    return run


def state_of(*folders: Path) -> dict[Path, tuple[int, int]]:
    files = (path for folder in folders for path in (folder, *folder.rglob("*")))
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def refused(job: Callable[[Any], Any], config: PlannedConfig) -> UserError:
    with pytest.raises(UserError) as caught:
        job(dataclasses.replace(config, dry_run=True))
    return caught.value


@pytest.mark.parametrize("options", [{}, {"folds": 3}, {"group_by": "image"}, {"task": "subtype", "group_by": "image"}])
def test_prepare_divides_as_it_would(plan_of: Callable, raw: Path, tmp_path: Path, options: dict) -> None:
    config = PrepareConfig(raw=str(raw), out=str(tmp_path / "out"), size=32, **options)
    plan = plan_of(prepare, config)
    assert not (tmp_path / "out").exists()
    made = prepare(config)
    for row in made.card["counts"]:
        side = f"fold {row['side']}" if config.folds else row["side"]
        assert plan.facts[side][row["class"]] == row["images"]
    assert plan.facts["images"] == made.card["num_images"]
    assert plan.num_bytes == pytest.approx((tmp_path / "out" / IMAGES).stat().st_size, rel=0.01)
    assert plan.stamp.startswith(made.card["split"]["leaky"] or "drawn")
    assert (plan.output, plan.resumes) == ("replaces", False)  # now that it is there


def test_prepare_says_that_it_would_draw(plan_of: Callable, tmp_path: Path) -> None:
    plan = plan_of(prepare, PrepareConfig(raw="raw", dataset="sample", out="data", draw=64, size=32))
    assert plan.facts["raw"] == "raw (would be drawn)"
    assert plan.facts["images"] == 64
    assert plan.output == "new"


def test_prepare_refuses_what_it_would_refuse(raw: Path, prepared: Path, tmp_path: Path) -> None:
    settings = {"raw": str(raw), "size": 32}
    assert "is not empty" in str(refused(prepare, PrepareConfig(out=str(prepared), **settings)))
    (tmp_path / "file").touch()
    out = str(tmp_path / "file" / "data")
    assert f"cannot write {out}" in str(refused(prepare, PrepareConfig(out=out, **settings)))
    assert "--folds" in str(refused(prepare, PrepareConfig(out=str(tmp_path / "x"), folds=40, **settings)))
    with pytest.raises(UsageError, match="--exact"):
        prepare(PrepareConfig(out=str(tmp_path / "x"), exact=True, dry_run=True, **settings))


def test_a_published_split_that_leaks_is_found_without_opening_files(
    plan_of: Callable, breastcli: Callable, raw: Path, prepared: Path, tmp_path: Path
) -> None:
    rows = PreparedData.open(prepared).rows
    by_exam: dict[str, list[str]] = {}
    for row in rows:
        by_exam.setdefault(row.record.exam, []).append(row.record.path)
    torn = next(paths for paths in by_exam.values() if len(paths) > 1)
    sides = {row.record.path: row.split for row in rows} | {torn[0]: "train", torn[1]: "test"}
    (tmp_path / "list.csv").write_text("path,split\n" + "".join(f"{path},{side}\n" for path, side in sides.items()))
    plan = plan_of(prepare, PrepareConfig(raw=str(raw), out="out", import_split="list.csv"))
    assert isinstance(plan.failure, LeakError)
    done = breastcli("prepare", raw, "--out", "out", "--import-split", "list.csv", "--dry-run", "--json")
    assert done.code == 3
    assert done.json["failure"] == str(plan.failure)
    assert "the split would leak" in done.stderr
    assert "next:" not in done.stderr


def test_train_counts_what_it_would_do(plan_of: Callable, tiny_config: TrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(tiny_config, out="run", augment="light", imbalance="oversample")
    plan = plan_of(train, config)
    made = train(config)
    assert {split: sum(plan.facts[split].values()) for split in ("train", "val")} == made.num_images
    assert plan.facts["parameters"] == made.num_parameters["all"]
    assert plan.facts["trained_parameters"] == made.num_parameters["trainable"]
    largest = max(plan.facts["train"].values())
    assert plan.facts["steps_per_epoch"] == int(np.ceil(2 * largest / config.batch_size))
    assert plan.facts["steps_left"] == plan.facts["steps_per_epoch"] * config.epochs
    written = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert written == pytest.approx(plan.num_bytes, rel=0.1)


def test_train_says_that_it_would_go_on(plan_of: Callable, tiny_config: TrainConfig, own_run: Path) -> None:
    config = dataclasses.replace(tiny_config, out=str(own_run))
    plan = plan_of(train, dataclasses.replace(config, resume=True, epochs=5))
    assert (plan.output, plan.facts["epochs_done"]) == ("resumes", 2)
    assert plan.facts["steps_left"] == 3 * plan.facts["steps_per_epoch"]
    assert plan_of(train, dataclasses.replace(config, overwrite=True)).output == "replaces"
    assert "is not empty" in str(refused(train, config))
    assert "--lr" in str(refused(train, dataclasses.replace(config, resume=True, lr=0.5)))


def test_train_with_a_frozen_trunk_embeds_nothing(plan_of: Callable, tiny_config: TrainConfig) -> None:
    config = dataclasses.replace(tiny_config, out="run", freeze="trunk", augment="none", cache_embeddings="on")
    plan = plan_of(train, config)
    assert 0 < plan.facts["trained_parameters"] < plan.facts["parameters"]
    assert "makes every image a new one" in str(refused(train, dataclasses.replace(config, augment="paper")))


def test_train_fetches_no_weights(plan_of: Callable, tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("would be downloaded"))
    config = dataclasses.replace(tiny_config, out="run", arch="torchvision/resnet18", pretrained=True)
    assert plan_of(train, config).facts["starts_from"].startswith("published weights")
    assert "vit has none" in str(refused(train, dataclasses.replace(config, arch="vit")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "none"}, "none is not a prepared folder"),
        ({"arch": "resnet05"}, "did you mean"),
        ({"unfreeze_at": 2}, "nothing is frozen"),
        ({"fold": 1}, "has no folds"),
        ({"weights": "none.safetensors"}, "none.safetensors"),
        ({"init_from": "none"}, "not a run folder"),
        ({"device": "tpu"}, "--device tpu"),
    ],
)
def test_train_refuses_what_it_would_refuse(
    tiny_config: TrainConfig, tmp_path: Path, changes: dict, message: str
) -> None:
    config = dataclasses.replace(tiny_config, out=str(tmp_path / "run"), **changes)
    assert message in str(refused(train, config))
    assert not (tmp_path / "run").exists()


def test_evaluate_counts_what_it_would_score(plan_of: Callable, own_run: Path, prepared: Path) -> None:
    plan = plan_of(evaluate, EvaluateConfig(run=str(own_run), **CPU))
    assert plan.facts["images"] == len(PreparedData.open(prepared).select("test"))
    assert sum(plan.facts["of_classes"].values()) == plan.facts["images"]
    assert plan.output == "new"
    for changes, message in (
        ({"threshold": "val-yuoden"}, "no such rule"),
        ({"runs": (str(own_run), str(own_run)), "run": None}, "predicted by two runs"),
        ({"data": "none"}, "none is not a prepared folder"),
        ({"split": "val", "calibrate": True}, "fitted on the images it scores"),
    ):
        config = dataclasses.replace(EvaluateConfig(run=str(own_run), **CPU), **changes)
        assert message in str(refused(evaluate, config))


def test_evaluate_without_weights_is_refused(own_run: Path) -> None:
    (own_run / "checkpoints" / "best.safetensors").unlink()
    assert "no such checkpoint" in str(refused(evaluate, EvaluateConfig(run=str(own_run))))


def test_a_comparison_says_what_must_be_evaluated_first(plan_of: Callable, own_run: Path, trained: Path) -> None:
    plan = plan_of(evaluate, EvaluateConfig(runs=(str(own_run), str(trained)), compare=True, out="both"))
    assert plan.facts["compares"] == plan.facts["evaluates_first"] == [str(own_run), str(trained)]


def test_explain_counts_images_and_masks(
    plan_of: Callable, tiny_config: TrainConfig, own_run: Path, raw: Path, tmp_path: Path
) -> None:
    prepare(PrepareConfig(raw=str(raw), out="data", size=64))
    train(dataclasses.replace(tiny_config, data="data", out="at_64", epochs=1))
    config = ExplainConfig(run=str(own_run), num="6", masks=str(raw / "masks"), method="gradcam,eigencam", **CPU)
    assert "a single cell" in str(refused(explain, config))
    config = dataclasses.replace(config, run="at_64")
    plan = plan_of(explain, config)
    assert (plan.facts["images"], plan.facts["masks"]) == (6, 6)
    assert plan.facts["methods"] == ["gradcam", "eigencam"]
    assert "drawn by a program" in plan.stamp
    for changes in ({"target": "malignat"}, {"method": "gradcan"}, {"masks": "none"}, {"layer": "none"}):
        refused(explain, dataclasses.replace(config, **changes))


def test_predict_counts_files(plan_of: Callable, own_run: Path, raw: Path, tmp_path: Path) -> None:
    config = PredictConfig(run=str(own_run), images=(str(raw / "BreaKHis_v1"),), out="out.csv", **CPU)
    assert plan_of(predict, config).facts["files"] == 96
    (tmp_path / "file").touch()
    assert "cannot write" in str(refused(predict, dataclasses.replace(config, out=str(tmp_path / "file" / "x.csv"))))
    assert "no validation images" in str(refused(predict, dataclasses.replace(config, threshold="val-youden")))


def test_synthesize_plans_each_step(plan_of: Callable, prepared: Path, trained: Path, tmp_path: Path) -> None:
    config = SynthesizeConfig(data=str(prepared), run="gan", smoke=True, out="images", num=5, label="all", **CPU)
    plan = plan_of(synthesize, config)
    assert plan.out == Path("gan")
    assert plan.facts["generates"] == "10 images into images"
    assert (plan.facts["steps"], plan.facts["images_shown"]) == (16, 256)
    fit = dataclasses.replace(config, step="fit", out=None)
    assert plan_of(synthesize, fit).facts["generates"] is None
    synthesize(dataclasses.replace(fit, on_collapse="warn"))
    written = sum(path.stat().st_size for path in (tmp_path / "gan" / "checkpoints").iterdir())
    assert written == pytest.approx(plan_of(synthesize, dataclasses.replace(fit, overwrite=True)).num_bytes, rel=0.1)
    going_on = plan_of(synthesize, dataclasses.replace(fit, resume=True))
    assert (going_on.output, going_on.facts["steps_done"]) == ("resumes", 16)
    generation = plan_of(synthesize, dataclasses.replace(config, step="generate"))
    assert sum(generation.facts["images"].values()) == 10
    assert generation.out == Path("images")
    assert "not known to this generator" in str(
        refused(synthesize, dataclasses.replace(config, step="generate", label="bening"))
    )
    assess = SynthesizeConfig(step="assess", run="gan", features=str(trained), **CPU)
    assessment = plan_of(synthesize, assess)
    assert (assessment.facts["features"], assessment.out) == (str(trained), Path("gan/assess"))
    assert "not a run folder" in str(refused(synthesize, dataclasses.replace(assess, features="none")))


def test_benchmark_lists_what_it_would_measure(plan_of: Callable, prepared: Path) -> None:
    config = BenchmarkConfig(archs="timm/test_resnet", size=32, device="cpu")
    plan = plan_of(benchmark, config)
    assert list(plan.facts["networks"]) == ["timm/test_resnet"]
    assert plan.facts["images"] == "would be drawn"
    assert "stain" in plan.facts["comparisons"]
    converging = plan_of(benchmark, dataclasses.replace(config, what="convergence", data=str(prepared)))
    assert converging.facts["images"]["test"] == len(PreparedData.open(prepared).select("test"))
    assert "did you mean" in str(refused(benchmark, dataclasses.replace(config, archs="timm/test_resnt")))
    assert "reads no raw images" in str(refused(benchmark, dataclasses.replace(config, what="cams", raw="x")))


def test_the_command_prints_the_plan(breastcli: Callable, prepared: Path, tmp_path: Path) -> None:
    words = ("train", "--data", prepared, "--arch", "timm/test_resnet", "--device", "cpu", "--out", "my run")
    done = breastcli(*words, "--dry-run")
    assert done.code == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "my run"
    assert "train would do this; nothing was written" in done.stdout
    assert "my run (new)" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("next: breastcli train --data")
    assert "--dry-run" not in done.stderr
    done = breastcli(*words, "--dry-run", "--json", "--quiet")
    assert done.json["dry_run"] is True
    assert list(done.json)[-1] == "out"
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_decides_what_becomes_of_it(tmp_path: Path) -> None:
    plan = Plan("train", tmp_path / "run", {})
    assert plan.output == "new"
    plan.out.mkdir()
    assert plan.output == "new"
    (plan.out / "log.txt").touch()
    assert plan.output == "replaces"
    assert dataclasses.replace(plan, resumes=True).output == "resumes"
    assert plan.free_bytes == shutil.disk_usage(tmp_path).free
