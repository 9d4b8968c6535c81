"""Training a head on cached embeddings gives what training it behind the frozen network gives."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from breastcli.config import PrepareConfig, TrainConfig
from breastcli.data.augment import POLICIES
from breastcli.data.store import PreparedData
from breastcli.errors import UsageError
from breastcli.models import ModelOptions, build_model
from breastcli.prepare import prepare
from breastcli.system import embeddings
from breastcli.system.embeddings import embed_rows, views_of
from breastcli.system.feeding import EmbeddingFeed, ImageFeed
from breastcli.train import train

CPU = torch.device("cpu")
FROZEN = {"freeze": "trunk", "epochs": 8, "dropout": 0.5, "lr": 0.01}


def changed(config: TrainConfig, out: Path, **options: object) -> TrainConfig:
    return dataclasses.replace(config, out=str(out), **options)


@pytest.fixture
def own_data(prepared: Path, tmp_path: Path) -> Path:
    """A copy of the prepared folder, because caching writes into it."""
    return Path(shutil.copytree(prepared, tmp_path / "data"))


@pytest.fixture
def config(tiny_config: TrainConfig, own_data: Path) -> TrainConfig:
    return dataclasses.replace(tiny_config, data=str(own_data), **FROZEN)


def test_views_of_the_policies() -> None:
    views = {name: views_of(policy) for name, policy in POLICIES.items()}
    assert views["none"] == (0,)
    assert views["light"] == tuple(range(8))
    assert views["wang"] is not None
    assert len(set(views["wang"])) == 6
    assert [name for name, one in views.items() if one is None] == ["paper", "strong", "deebani"]


@pytest.mark.parametrize("augment", ["none", "light", "wang"])
@pytest.mark.parametrize("loss", ["cross_entropy", "arcface"])
def test_cached_training_is_the_slow_training(augment: str, loss: str, config: TrainConfig, tmp_path: Path) -> None:
    options = {"augment": augment, "loss": loss, "imbalance": "oversample"}
    slow = train(changed(config, tmp_path / "slow", cache_embeddings="off", **options))
    fast = train(changed(config, tmp_path / "fast", **options))
    assert "embedded once" in (tmp_path / "fast/log.txt").read_text()
    assert "embedded once" not in (tmp_path / "slow/log.txt").read_text()
    for one, other in zip(slow.history, fast.history, strict=True):
        assert one == pytest.approx(other, abs=2e-5)
    assert slow.history[0]["train_loss"] != pytest.approx(slow.history[-1]["train_loss"], abs=1e-3)


def test_a_cached_run_evaluates_as_any_other(
    config: TrainConfig, tmp_path: Path, breastcli: Callable[..., object]
) -> None:
    train(changed(config, tmp_path / "run", augment="none"))
    outcome = breastcli(
        "evaluate", tmp_path / "run", "--split", "val", "--json", "--device", "cpu", "--precision", "fp32"
    )
    assert outcome.code == 0, outcome.stderr
    best = json.loads((tmp_path / "run/run.json").read_text())["best"]
    assert outcome.json["image"]["overall"]["accuracy"]["value"] == pytest.approx(best["val_accuracy"])


def test_embeddings_are_kept_and_used_again(
    config: TrainConfig, own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(changed(config, tmp_path / "one", augment="none"))
    (file,) = (own_data / "embeddings").iterdir()
    kept = file.read_bytes()
    data = PreparedData.open(own_data)
    known = ~np.isnan(np.load(file)).any(axis=1)
    assert not known[data.select("test")].any()  # nobody looks at the test images
    assert known[data.select("train")].all()
    monkeypatch.setattr(embeddings, "load_batches", None)  # not called when everything is known
    again = train(changed(config, tmp_path / "two", augment="none", loss="cosface"))
    assert file.read_bytes() == kept
    assert len(again.history) == len(first.history)


def test_other_weights_have_other_embeddings(own_data: Path) -> None:
    data = PreparedData.open(own_data)
    options = ModelOptions("timm/test_resnet", 2, data.size_px)
    rows = data.select("train")[:5]
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(embed_rows(build_model(options), options, data, rows, (0,), torch.float32))
    assert not torch.allclose(*found)
    assert len(list((own_data / "embeddings").iterdir())) == 2
    embed_rows(build_model(options), options, data, rows, (0,), torch.bfloat16)
    assert len(list((own_data / "embeddings").iterdir())) == 3


def test_the_head_does_not_matter_to_the_cache(own_data: Path) -> None:
    data = PreparedData.open(own_data)
    rows = data.select("train")[:5]
    for last in ("linear", "cosine"):
        options = ModelOptions("timm/test_resnet", 2, data.size_px, last_layer=last, dropout=0.1)
        torch.manual_seed(0)
        embed_rows(build_model(options), options, data, rows, (0,), torch.float32)
    assert len(list((own_data / "embeddings").iterdir())) == 1


def test_a_damaged_cache_is_computed_again(own_data: Path) -> None:
    data = PreparedData.open(own_data)
    options = ModelOptions("timm/test_resnet", 2, data.size_px)
    torch.manual_seed(0)
    model = build_model(options)
    rows = data.select("train")[:5]
    expected = embed_rows(model, options, data, rows, (0,), torch.float32)
    (file,) = (own_data / "embeddings").iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:200], whole[:-4], b"no array at all" * 100):
        file.write_bytes(damaged)
        assert torch.equal(embed_rows(model, options, data, rows, (0,), torch.float32), expected)
    assert file.read_bytes() == whole


def test_resuming_embeds_with_the_saved_trunk(
    config: TrainConfig, trained: Path, own_data: Path, tmp_path: Path
) -> None:
    """The weights to start from are not read again, and the head must not meet a random trunk."""
    source = shutil.copytree(trained, tmp_path / "source")
    options = {"augment": "none", "init_from": str(source)}
    train(changed(config, tmp_path / "whole", **{**options, "epochs": 4}))
    train(changed(config, tmp_path / "part", **{**options, "epochs": 2}))
    shutil.rmtree(source)
    shutil.rmtree(own_data / "embeddings")
    train(changed(config, tmp_path / "part", **{**options, "epochs": 4, "resume": True}))
    assert (tmp_path / "part/history.csv").read_bytes() == (tmp_path / "whole/history.csv").read_bytes()
    assert json.loads((tmp_path / "part/run.json").read_text())["ancestors"]


def test_an_embedding_does_not_depend_on_its_company(own_data: Path) -> None:
    data = PreparedData.open(own_data)
    options = ModelOptions("timm/test_resnet", 2, data.size_px)
    model = build_model(options)
    rows = data.select("train")
    whole = embed_rows(model, options, data, rows, (0,), torch.float32, batch_size=8)
    shutil.rmtree(own_data / "embeddings")
    embed_rows(model, options, data, rows[3:9], (0,), torch.float32, batch_size=8)
    assert torch.equal(embed_rows(model, options, data, rows, (0,), torch.float32, batch_size=8), whole)


def test_positions_agree_with_the_images(own_data: Path) -> None:
    """The embedding of a drawn position is that of the image so placed."""
    data = PreparedData.open(own_data)
    options = ModelOptions("timm/test_resnet", 2, data.size_px)
    model = build_model(options).eval()
    rows = data.select("train")[:12]
    views = tuple(range(8))
    table = embed_rows(model, options, data, rows, views, torch.float32)
    fast = EmbeddingFeed(table, data.labels, rows, views, torch.float32)
    slow = ImageFeed(data, POLICIES["light"], CPU, torch.float32, 4, None)
    batches = [rows[:5], rows[5:]]
    with torch.no_grad():
        pairs = zip(
            fast.batches(batches, None, torch.Generator().manual_seed(3)),
            slow.batches(batches, None, torch.Generator().manual_seed(3)),
            strict=True,
        )
        for (embedding, labels), (images, same) in pairs:
            assert torch.equal(labels, same)
            torch.testing.assert_close(embedding, model.embed(model.features(images)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": "layer1"}, r"more than the head learns \(trunk\): use --freeze trunk"),
        ({"unfreeze_at": 3}, "more than the head learns"),
        ({"augment": "paper"}, "--augment paper makes every image a new one: use --augment none, light or wang"),
    ],
)
def test_what_cannot_be_cached_is_refused(options: dict, message: str, config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        train(changed(config, tmp_path / "run", **({"cache_embeddings": "on", "augment": "none"} | options)))


def test_caching_happens_only_where_it_pays(config: TrainConfig, own_data: Path, tmp_path: Path) -> None:
    train(changed(config, tmp_path / "short", augment="light", epochs=2))
    train(changed(config, tmp_path / "warp", augment="paper", epochs=2))
    assert not (own_data / "embeddings").exists()


def test_a_folder_that_cannot_be_written_costs_time_only(config: TrainConfig, own_data: Path, tmp_path: Path) -> None:
    (own_data / "embeddings").write_text("somebody's file")
    result = train(changed(config, tmp_path / "run", augment="none"))
    assert len(result.history) == 8
    assert "embeddings are not kept" in (tmp_path / "run/log.txt").read_text()


def test_preparing_again_removes_the_cache_and_nothing_else(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    config = PrepareConfig(raw=str(raw), out=str(out), size=32)
    prepare(config)
    data = PreparedData.open(out)
    options = ModelOptions("timm/test_resnet", 2, 32)
    embed_rows(build_model(options), options, data, data.select("train")[:3], (0,), torch.float32)
    (out / "embeddings/notes.txt").write_text("mine")
    prepare(dataclasses.replace(config, overwrite=True))
    assert [path.name for path in (out / "embeddings").iterdir()] == ["notes.txt"]
