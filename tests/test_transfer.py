"""Starting from another run: its weights, and no leak."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from breastcli.config import PrepareConfig, TrainConfig
from breastcli.errors import LeakError, UsageError, UserError
from breastcli.models import ModelOptions, build_model
from breastcli.prepare import prepare
from breastcli.system.session import start_session
from breastcli.system.transfer import load_start, trained_on
from breastcli.train import train


def changed(config: TrainConfig, out: Path, **options: object) -> TrainConfig:
    return dataclasses.replace(config, out=str(out), **({"epochs": 1} | options))


def card(**values: object) -> dict:
    return {"name": "sample", "split_fingerprint": "other", **values}


def test_init_from_takes_everything_but_the_head(trained: Path, tiny_config: TrainConfig) -> None:
    torch.manual_seed(9)
    model = build_model(ModelOptions("timm/test_resnet", 2, 32))
    head = {name: one.clone() for name, one in model.head.state_dict().items()}
    before = load_file(trained / "checkpoints/best.safetensors")
    facts = json.loads((trained / "checkpoints/best.json").read_text())
    load_start(model, dataclasses.replace(tiny_config, init_from=str(trained)), card(**facts["dataset"]))
    assert all(torch.equal(one, head[name]) for name, one in model.head.state_dict().items())
    assert all(torch.equal(one, before[f"trunk.{name}"]) for name, one in model.trunk.state_dict().items())


def test_weights_of_a_run_bring_the_head(trained: Path, tiny_config: TrainConfig) -> None:
    model = build_model(ModelOptions("timm/test_resnet", 2, 32))
    path = trained / "checkpoints/best.safetensors"
    facts = json.loads(path.with_suffix(".json").read_text())
    load_start(model, dataclasses.replace(tiny_config, weights=str(path)), card(**facts["dataset"]))
    assert torch.equal(model.head[1].weight, load_file(path)["head.1.weight"])


def test_a_chain_of_runs_knows_its_ancestors(trained: Path, tiny_config: TrainConfig, tmp_path: Path) -> None:
    train(changed(tiny_config, tmp_path / "second", init_from=str(trained)))
    facts = json.loads((tmp_path / "second/checkpoints/best.json").read_text())
    assert len(trained_on(facts)) == 2
    assert json.loads((tmp_path / "second/run.json").read_text())["ancestors"] == trained_on(facts)[:1]
    assert trained_on(None) == []


def test_another_split_of_the_same_data_leaks(
    trained: Path, raw: Path, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    prepare(PrepareConfig(raw=str(raw), out=str(tmp_path / "other"), size=32, seed=5))
    second = changed(tiny_config, tmp_path / "second", data=str(tmp_path / "other"), init_from=str(trained))
    with pytest.raises(LeakError, match="--init-from .* another split or fold of sample.*train it on this split"):
        train(second)
    weights = str(trained / "checkpoints/best.safetensors")
    with pytest.raises(LeakError, match="--weights .* another split"):
        train(dataclasses.replace(second, init_from=None, weights=weights))


def test_a_leak_two_runs_ago_is_found(tiny_config: TrainConfig, trained: Path) -> None:
    """First run on split A of one set, second on another set, third on split B of the first."""
    model = build_model(ModelOptions("timm/test_resnet", 2, 32))
    config = dataclasses.replace(tiny_config, init_from=str(trained))
    path = trained / "checkpoints/best.safetensors"
    last = json.loads(path.with_suffix(".json").read_text())["dataset"]["split_fingerprint"]
    assert load_start(model, config, card(name="elsewhere"))  # another data set: no leak
    with pytest.raises(LeakError):
        load_start(model, config, card(split_fingerprint="b"))
    assert load_start(model, config, card(split_fingerprint=last))


def test_another_fold_leaks(folds: Path, tiny_config: TrainConfig, tmp_path: Path) -> None:
    first = changed(tiny_config, tmp_path / "first", data=str(folds), fold=0)
    train(first)
    with pytest.raises(LeakError, match="fold"):
        train(dataclasses.replace(first, out=str(tmp_path / "b"), fold=1, init_from=str(tmp_path / "first")))
    train(dataclasses.replace(first, out=str(tmp_path / "a"), init_from=str(tmp_path / "first")))


def test_both_starts_are_refused(trained: Path, tiny_config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="both given"):
        train(changed(tiny_config, tmp_path / "run", init_from=str(trained), weights="w.pth"))
    with pytest.raises(UserError, match="nowhere"):
        train(changed(tiny_config, tmp_path / "run2", init_from="nowhere"))


def test_resume_files_are_no_weights(trained: Path, tiny_config: TrainConfig, tmp_path: Path) -> None:
    weights = str(trained / "checkpoints/resume.pt")
    with pytest.raises(UserError, match="is for --resume: give .*best.safetensors"):
        train(changed(tiny_config, tmp_path / "run", weights=weights))


def test_a_run_that_cannot_start_leaves_the_old_one(trained: Path, tiny_config: TrainConfig, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    before = (run / "checkpoints/best.safetensors").read_bytes()
    with pytest.raises(UserError, match="no such stage"):
        train(changed(tiny_config, run, overwrite=True, freeze="layr1"))
    assert (run / "checkpoints/best.safetensors").read_bytes() == before
    train(changed(tiny_config, run, overwrite=True, init_from=str(run)))  # its own weights are read before they go
    assert (run / "checkpoints/best.safetensors").read_bytes() != before


def test_options_without_effect_are_refused(tiny_config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the trunk is frozen"):
        train(changed(tiny_config, tmp_path / "a", freeze="trunk", trunk_lr=0.1))
    with pytest.raises(UsageError, match="there are 2 epochs"):
        train(changed(tiny_config, tmp_path / "b", freeze="trunk", unfreeze_at=3, epochs=2))


def test_unfreeze_at_lets_the_trunk_learn_later(tiny_config: TrainConfig, trained: Path, tmp_path: Path) -> None:
    options = {"freeze": "trunk", "unfreeze_at": 3, "init_from": str(trained)}
    before = load_file(trained / "checkpoints/best.safetensors")
    train(changed(tiny_config, tmp_path / "two", epochs=2, **{**options, "unfreeze_at": None}))
    two = load_file(tmp_path / "two/checkpoints/last.safetensors")
    assert all(torch.equal(one, before[name]) for name, one in two.items() if name.startswith("trunk."))
    train(changed(tiny_config, tmp_path / "three", epochs=3, **options))
    three = load_file(tmp_path / "three/checkpoints/last.safetensors")
    moved = [name for name, one in three.items() if name.startswith("trunk.") and not torch.equal(one, before[name])]
    assert len(moved) == len([name for name in three if name.startswith("trunk.")])
    for epochs in (3, 4):
        again = changed(tiny_config, tmp_path / "again", epochs=epochs, resume=epochs == 4, **options)
        train(again)
    train(changed(tiny_config, tmp_path / "four", epochs=4, **options))
    assert (tmp_path / "again/history.csv").read_bytes() == (tmp_path / "four/history.csv").read_bytes()
    with pytest.raises(UsageError, match="--unfreeze-at 3: nothing is frozen"):
        train(changed(tiny_config, tmp_path / "none", unfreeze_at=3))


def test_trunk_learning_rate(tiny_config: TrainConfig, tmp_path: Path) -> None:
    from breastcli.data.store import PreparedData
    from breastcli.progress import SILENT

    data = PreparedData.open(Path(tiny_config.data))
    config = dataclasses.replace(tiny_config, lr=0.1, trunk_lr=0.01)
    session = start_session(config, data, torch.device("cpu"), SILENT)
    rate_of = {id(one): group["initial_lr"] for group in session.optimizer.param_groups for one in group["params"]}
    assert {rate_of[id(one)] for one in session.model.trunk.parameters()} == {0.01}
    assert {rate_of[id(one)] for one in session.model.head.parameters()} == {0.1}
    still = changed(tiny_config, tmp_path / "still", trunk_lr=0.0, optimizer="sgd", batch_norm="frozen")
    train(still)
    torch.manual_seed(0)
    after = load_file(tmp_path / "still/checkpoints/last.safetensors")
    start = start_session(still, data, torch.device("cpu"), SILENT).model.state_dict()
    assert all(torch.equal(one, start[name]) for name, one in after.items() if name.startswith("trunk."))
    assert not torch.equal(after["head.1.weight"], start["head.1.weight"])
