"""The commands of a report give the very configuration that a result was made with."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from breastcli.config import EvaluateConfig, ExplainConfig, JobConfig, PrepareConfig, TrainConfig
from breastcli.configfile import to_command, to_document
from breastcli.reporting.reproduce import commands
from breastcli.reporting.run_files import RunFiles

CONFIGS: list[JobConfig] = [
    PrepareConfig(raw="my raw; rm -rf", stain="macenko", folds=5, group_by="patient", mag="200x", strict=True),
    TrainConfig(arch="timm/resnet18", lr=3e-4, freeze="50", cache_embeddings="off", out="runs/$HOME `x`", fold=0),
    EvaluateConfig(runs=("runs/a", "runs/b'c"), threshold="val-sensitivity=0.95", calibrate=True, resamples=100),
    ExplainConfig(run="runs/a", images=("one", "two words"), method="all", num="all", patients=r"^(\d+)_", top_k=64),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_a_command_gives_its_configuration_back(config: JobConfig, breastcli: Callable) -> None:
    values = json.loads(json.dumps(to_document(config)))
    program, *words = shlex.split(to_command(type(config), values | {"no_option": 1}))
    assert program == "breastcli"
    done = breastcli(*words, "--print-config")
    assert done.code == 0, done.stderr
    (printed,) = yaml.safe_load(done.stdout).values()
    assert {name: tuple(v) if isinstance(v, list) else v for name, v in printed.items()} == dataclasses.asdict(config)


def test_defaults_and_what_is_about_existing_files_are_left_out() -> None:
    values = to_document(EvaluateConfig(runs=("r",), overwrite=True))
    assert values == json.loads(json.dumps(values))
    assert to_command(EvaluateConfig, values) == "breastcli evaluate r"
    assert to_command(TrainConfig, to_document(TrainConfig(resume=True, smoke=True))) == "breastcli train --smoke"


def test_every_step_of_a_run_has_its_command(tmp_path: Path) -> None:
    options = {"dataset": "breakhis", "size": 224, "group_by": "image", "folds": None, "classes": "all"}
    info = {
        "command": "train",
        "argv": ["/opt/bin/breastcli", "train", "--data", "my data"],
        "data": "my data",
        "dataset": {"options": options},
    }
    evaluation = {"runs": ["runs/a"], "config": {"run": "latest", "runs": [], "tta": "d4", "calibrate": True}}
    explanation = {"run": "runs/a", "config": {"run": "latest", "method": "gradcam"}, "methods": {"gradcam": {}}}
    for name, values in {
        "run.json": info,
        "evaluate/test/metrics.json": evaluation,
        "evaluate/val/metrics.json": {"runs": ["runs/a"]},  # of an older version, which did not keep its options
        "explain/gradcam/explain.json": explanation,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(values))
    assert [command for _, command in commands(RunFiles.read(tmp_path))] == [
        "breastcli prepare RAW --out 'my data' --dataset breakhis --group-by image",
        "breastcli train --data 'my data'",
        "breastcli evaluate runs/a --tta d4 --calibrate",
        "breastcli explain runs/a --method gradcam",
    ]


def test_a_pooled_folder_has_no_training_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"command": "evaluate", "argv": ["breastcli", "evaluate", "a", "b"]}))
    assert commands(RunFiles.read(tmp_path)) == []
