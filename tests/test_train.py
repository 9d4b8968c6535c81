from __future__ import annotations

import csv
import dataclasses
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from breastcli.config import TrainConfig
from breastcli.configfile import to_yaml
from breastcli.data.store import PreparedData
from breastcli.errors import UserError
from breastcli.losses import Loss
from breastcli.models import ModelOptions, build_model
from breastcli.system import feeding, training
from breastcli.system.runfolder import find_run
from breastcli.system.training import learning_rate_factor
from breastcli.train import default_out, train


def changed(config: TrainConfig, out: Path, **options: object) -> TrainConfig:
    return dataclasses.replace(config, out=str(out), **options)


def history_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open() as file:
        return list(csv.DictReader(file))


def test_outputs(trained: Path) -> None:
    names = {path.relative_to(trained).as_posix() for path in trained.rglob("*") if path.is_file()}
    assert names == {
        "run.json",
        "config.yaml",
        "history.csv",
        "timing.csv",
        "log.txt",
        "curves.png",
        "report.html",
        "model_card.md",
        "checkpoints/best.safetensors",
        "checkpoints/best.json",
        "checkpoints/last.safetensors",
        "checkpoints/last.json",
        "checkpoints/resume.pt",
    }
    info = json.loads((trained / "run.json").read_text())
    assert info["status"] == "finished"
    assert info["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["num_images"]["train"] + info["num_images"]["val"] < 96
    assert [row["epoch"] for row in history_of(trained)] == ["1", "2"]
    assert find_run(str(trained)).config.epochs == 2


def test_config_of_a_run_trains_the_same_again(trained: Path, tmp_path: Path, tiny_config: TrainConfig) -> None:
    result = train(changed(find_run(str(trained)).config, tmp_path / "again"))
    assert (tmp_path / "again" / "history.csv").read_bytes() == (trained / "history.csv").read_bytes()
    first, again = (load_file(run / "checkpoints/last.safetensors") for run in (trained, tmp_path / "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert result.best in result.history


def test_another_seed_gives_another_history(trained: Path, tmp_path: Path, tiny_config: TrainConfig) -> None:
    train(changed(tiny_config, tmp_path / "run", seed=1))
    assert history_of(tmp_path / "run") != history_of(trained)


def test_resume_gives_the_uninterrupted_history(
    tmp_path: Path, tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"epochs": 4, "schedule": "cosine", "imbalance": "oversample", "dropout": 0.5, "augment": "strong"}
    train(changed(tiny_config, tmp_path / "whole", **options))
    whole = tmp_path / "whole"
    real = feeding.predict_log_probs
    calls = []

    def interrupt(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:  # after the training of the third epoch, before anything of it is saved
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(feeding, "predict_log_probs", interrupt)
    part = changed(tiny_config, tmp_path / "part", **options)
    with pytest.raises(KeyboardInterrupt):
        train(part)
    assert json.loads((tmp_path / "part/run.json").read_text())["status"] == "interrupted"
    assert len(history_of(tmp_path / "part")) == 2
    monkeypatch.setattr(feeding, "predict_log_probs", real)
    with pytest.raises(UserError, match="not empty.*--resume"):
        train(part)
    with pytest.raises(UserError, match="--epochs 4, not 5"):  # another cosine would be another history
        train(dataclasses.replace(part, resume=True, epochs=5))
    result = train(dataclasses.replace(part, resume=True))
    assert len(result.history) == 4
    assert (tmp_path / "part/history.csv").read_bytes() == (whole / "history.csv").read_bytes()
    for name in ("best", "last"):
        one, other = (load_file(run / f"checkpoints/{name}.safetensors") for run in (whole, tmp_path / "part"))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_sigkill_and_resume_give_the_uninterrupted_history(tmp_path: Path, tiny_config: TrainConfig) -> None:
    config = changed(tiny_config, tmp_path / "run", epochs=6)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-m", "breastcli", "train", "--config", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    history = tmp_path / "run" / "history.csv"
    for _ in range(1200):
        time.sleep(0.05)
        if history.is_file() and len(history.read_text().splitlines()) > 2:
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len(history_of(tmp_path / "run"))
    assert 2 <= done < 6
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "running"
    train(dataclasses.replace(config, resume=True))
    train(dataclasses.replace(config, out=str(tmp_path / "whole")))
    assert (tmp_path / "run/history.csv").read_bytes() == (tmp_path / "whole/history.csv").read_bytes()


def test_resume_refuses_other_options_and_goes_on_with_more_epochs(own_run: Path, tiny_config: TrainConfig) -> None:
    config = changed(tiny_config, own_run, resume=True)
    with pytest.raises(UserError, match=r"was trained with --lr 0\.001, not 0\.5"):
        train(dataclasses.replace(config, lr=0.5))
    before = history_of(own_run)
    assert len(train(config).history) == 2  # nothing left to do
    train(dataclasses.replace(config, epochs=3))
    assert history_of(own_run)[:2] == before
    assert len(history_of(own_run)) == 3


def test_overwrite_starts_afresh_and_keeps_foreign_files(own_run: Path, tiny_config: TrainConfig) -> None:
    (own_run / "notes.txt").write_text("mine")
    (own_run / "evaluate" / "test").mkdir(parents=True)
    (own_run / "evaluate" / "test" / "metrics.json").write_text("{}")
    (own_run / "evaluate" / "test" / "mine.png").write_text("mine")
    train(changed(tiny_config, own_run, overwrite=True, epochs=1))
    assert len(history_of(own_run)) == 1
    assert (own_run / "notes.txt").read_text() == "mine"
    assert [path.name for path in (own_run / "evaluate" / "test").iterdir()] == ["mine.png"]


def test_loss_falls_and_every_part_learns(tmp_path: Path, tiny_config: TrainConfig) -> None:
    result = train(changed(tiny_config, tmp_path / "run", epochs=8, augment="none", dropout=0.0))
    losses = [row["train_loss"] for row in result.history]
    assert losses[-1] < 0.7 * losses[0]


def test_best_epoch_is_the_best_and_is_what_is_saved(trained: Path, tmp_path: Path, tiny_config: TrainConfig) -> None:
    for monitor, choose in (("val_loss", min), ("val_balanced_accuracy", max)):
        out = tmp_path / monitor
        result = train(changed(tiny_config, out, epochs=3, monitor=monitor))
        expected = choose(row[monitor] for row in result.history)
        assert result.best[monitor] == expected
        assert json.loads((out / "checkpoints/best.json").read_text())["scores"][monitor] == expected


def test_patience_stops_early(tmp_path: Path, tiny_config: TrainConfig) -> None:
    # Nothing is learned at a vanishing rate with batch norm as loaded, so the first epoch stays the best.
    options = {"lr": 0.0, "batch_norm": "frozen", "epochs": 10, "patience": 2, "monitor": "val_loss"}
    result = train(changed(tiny_config, tmp_path / "run", **options))
    assert [row["epoch"] for row in result.history] == [1, 2, 3]
    assert result.best["epoch"] == 1


def test_a_loss_that_is_no_number_stops_with_epoch_and_step(
    tmp_path: Path, tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(changed(tiny_config, tmp_path / "run", epochs=1))
    before = (tmp_path / "run/checkpoints/best.safetensors").read_bytes()
    config = changed(tiny_config, tmp_path / "run", resume=True, epochs=2)
    with monkeypatch.context() as patched:
        patched.setattr(Loss, "training", lambda self, logits, labels, progress: logits.sum() * math.nan)
        with pytest.raises(UserError, match=r"not a finite number in epoch 2, step 1: lower --lr"):
            train(config)
    assert (tmp_path / "run/checkpoints/best.safetensors").read_bytes() == before
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "failed"
    assert len(train(config).history) == 2


def test_running_out_of_memory_suggests_a_batch_size(
    tmp_path: Path, tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("breastcli.train.train_epoch", exhausted)
    with pytest.raises(UserError, match="--batch-size 16: try --batch-size 8"):
        train(changed(tiny_config, tmp_path / "run"))


def test_frozen_trunk_stays_and_the_head_learns(tmp_path: Path, tiny_config: TrainConfig) -> None:
    torch.manual_seed(3)
    model = build_model(ModelOptions("timm/test_resnet", 2, 32))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    train(changed(tiny_config, tmp_path / "run", weights=str(tmp_path / "w.pth"), freeze="trunk"))
    after = load_file(tmp_path / "run/checkpoints/last.safetensors")
    before = model.state_dict()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == name.startswith("trunk."), name
    assert "tensors loaded" in (tmp_path / "run/log.txt").read_text()


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd"},
        {"optimizer": "adamw", "weight_decay": 0.1},
        {"loss": "focal", "imbalance": "weights"},
        {"precision": "bf16"},
        {"schedule": "exponential"},
        {"mag": "100x"},
    ],
    ids=str,
)
def test_options_train(options: dict, tmp_path: Path, tiny_config: TrainConfig) -> None:
    result = train(changed(tiny_config, tmp_path / "run", epochs=1, **options))
    assert math.isfinite(result.history[0]["train_loss"])


def test_folds_train_on_the_others(folds: Path, tmp_path: Path, tiny_config: TrainConfig) -> None:
    data = PreparedData.open(folds)
    result = train(changed(tiny_config, tmp_path / "run", data=str(folds), fold=1, epochs=1))
    assert result.num_images["train"] == len(data.select("train", fold=1))
    with pytest.raises(UserError, match="folds 0 to 2"):
        train(changed(tiny_config, tmp_path / "other", data=str(folds)))


def test_smoke_is_one_short_epoch(prepared: Path, tmp_path: Path, tiny_config: TrainConfig) -> None:
    result = train(changed(tiny_config, tmp_path / "run", smoke=True, epochs=50))
    assert len(result.history) == 1
    assert max(result.num_images.values()) <= 64


def test_dalaresnet50_trains_through_its_attention(tmp_path: Path, tiny_config: TrainConfig) -> None:
    config = changed(tiny_config, tmp_path / "run", arch="dalaresnet50", smoke=True, batch_size=8)
    train(config)
    weights = load_file(tmp_path / "run/checkpoints/last.safetensors")
    # At its start every bias of the gate is exactly 1 (see the module); gradients have moved nearly all.
    assert (weights["attention.up.bias"] != 1).float().mean() > 0.9


def test_learning_rates_by_hand() -> None:
    config = TrainConfig(epochs=5)
    assert learning_rate_factor(config, 3) == 1.0
    cosine = dataclasses.replace(config, schedule="cosine")
    assert [learning_rate_factor(cosine, epoch) for epoch in (1, 3, 5)] == pytest.approx([1.0, 0.5, 0.0])
    exponential = dataclasses.replace(config, schedule="exponential")
    assert [learning_rate_factor(exponential, epoch) for epoch in (1, 3, 5)] == pytest.approx([1.0, 0.1, 0.01])


def test_oversampling_equalises_the_classes() -> None:
    labels = np.array([0] * 5 + [1] * 45)
    rows = np.arange(50)
    order, elements = training._order(labels, rows, TrainConfig(imbalance="oversample"), 1)
    assert elements is None
    assert np.bincount(labels[order]).tolist() == [45, 45]
    assert set(order) == set(rows)
    plain, _ = training._order(labels, rows, TrainConfig(), 1)
    assert sorted(plain) == rows.tolist()
    assert plain.tolist() != training._order(labels, rows, TrainConfig(), 2)[0].tolist()


def test_default_run_folders() -> None:
    assert default_out(TrainConfig(mag="100x")).as_posix() == "runs/dalaresnet50-100x"
    assert default_out(TrainConfig(arch="timm/resnet18", fold=2)).as_posix() == "runs/timm-resnet18-all-fold2"
    assert default_out(TrainConfig(smoke=True)).as_posix() == "runs/dalaresnet50-all-smoke"


def test_a_leaky_split_stamps_the_run(raw: Path, tmp_path: Path, tiny_config: TrainConfig) -> None:
    from breastcli.config import PrepareConfig
    from breastcli.prepare import prepare

    prepare(PrepareConfig(raw=str(raw), out=str(tmp_path / "data"), size=32, group_by="image"))
    result = train(changed(tiny_config, tmp_path / "run", data=str(tmp_path / "data"), epochs=1))
    stamp = "LEAKY: image-level split"
    assert result.leaky == stamp
    assert json.loads((tmp_path / "run/run.json").read_text())["dataset"]["split"]["leaky"] == stamp
    assert stamp in (tmp_path / "run/report.html").read_text()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cuda_trains_and_repeats_itself(precision: str, tmp_path: Path, tiny_config: TrainConfig) -> None:
    options = {"device": "cuda", "precision": precision, "deterministic": True}
    for name in ("one", "two"):
        train(changed(tiny_config, tmp_path / name, **options))
    assert (tmp_path / "one/history.csv").read_bytes() == (tmp_path / "two/history.csv").read_bytes()
