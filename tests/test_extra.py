"""Synthetic images join the training images of minority classes, and nothing else changes."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from breastcli.config import EvaluateConfig, ExplainConfig, PrepareConfig, TrainConfig
from breastcli.data.audit import PreparedRecord
from breastcli.data.augment import POLICIES
from breastcli.data.joined import JoinedData
from breastcli.data.loading import load_batches
from breastcli.data.store import CARD, IMAGES, PreparedData, fingerprints, write_header, write_manifest
from breastcli.errors import LeakError, UsageError, UserError
from breastcli.evaluate import evaluate
from breastcli.explain import explain
from breastcli.files import write_json
from breastcli.prepare import prepare
from breastcli.progress import SILENT
from breastcli.records import TRAINED_WITH_SYNTHETIC, ImageRecord, stamp_of
from breastcli.reporting import plots
from breastcli.reporting.report import write_report
from breastcli.show import show_explain
from breastcli.system import feeding
from breastcli.system.feeding import ImageFeed
from breastcli.system.runfolder import find_run
from breastcli.system.session import start_session
from breastcli.system.training import Session
from breastcli.train import train

CPU = torch.device("cpu")
NUMBERS = {"benign": 30, "malignant": 10}  # of 25 and 33 real training images: benign is the minority
RATIO = 0.5  # 12 of them, which is what 25 / 2 is rounded to
MAGNIFICATIONS = ("100X", "200X", None)


def synthesize(original: Path, out: Path, numbers: dict[str, int] = NUMBERS, seed: int = 0, **changes: Any) -> Path:
    """Write what ``synthesize generate`` writes: noise as images, their magnifications taking turns.

    ``changes`` are of the card's part about where the images come from.
    """
    card = json.loads((original / CARD).read_text())
    names = ("name", "fingerprint", "split_fingerprint", "task", "stain", "size_px")
    source = {name: card[name] for name in names} | {"fold": None} | changes
    pixels = np.random.default_rng(seed).integers(0, 256, (sum(numbers.values()), *[card["size_px"]] * 2, 3), np.uint8)
    rows = []
    for label, count in numbers.items():
        for number in range(count):
            name = f"synthetic_{label}_{number}"
            record = ImageRecord(name, f"{name}.png", label, magnification=MAGNIFICATIONS[number % 3])
            rows.append(PreparedRecord(record, "train", None, 64, 64, f"{seed} {len(rows)}"))
    out.mkdir()
    with (out / IMAGES).open("wb") as file:
        write_header(file, len(rows), card["size_px"])
        file.write(pixels.tobytes())
    fingerprint, split_fingerprint = fingerprints(rows, {})
    made = {"run": "runs/cwgan-all", "kimg": 120.0, "truncation": 1.0, "seed": seed, "generated_px": 64}
    split = card["split"] | {"folds": None}
    card |= {"split": split, "num_images": len(rows), "synthetic": made | {"source": source}}
    write_json(out / CARD, card | {"fingerprint": fingerprint, "split_fingerprint": split_fingerprint})
    write_manifest(out, rows)
    return out


@pytest.fixture
def extra(prepared: Path, tmp_path: Path) -> Path:
    return synthesize(prepared, tmp_path / "synthetic")


@pytest.fixture
def config(tiny_config: TrainConfig, extra: Path, tmp_path: Path) -> TrainConfig:
    return dataclasses.replace(tiny_config, out=str(tmp_path / "run"), extra=str(extra))


def start(config: TrainConfig, **options: Any) -> Session:
    config = dataclasses.replace(config, **options)
    return start_session(config, PreparedData.open(Path(config.data)), CPU, progress=SILENT)


def labels_of(session: Session) -> tuple[list[int], list[int]]:
    """Return the numbers of real and of synthetic training images of each class."""
    rows, num_real = session.rows["train"], len(PreparedData.open(session.data.folder).rows)
    parts = (rows[rows < num_real], rows[rows >= num_real])
    real, synthetic = ([int((session.data.labels[part] == label).sum()) for label in (0, 1)] for part in parts)
    return real, synthetic


def test_only_the_minority_class_takes_images(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "breastcli"):
        session = start(config)
    assert labels_of(session) == ([25, 33], [30, 0])
    assert "30 synthetic images join the training images (benign 30)" in caplog.text
    assert "10 images are left out, which show no minority class (malignant 10)" in caplog.text
    rows = session.rows["train"]
    assert len(np.unique(rows)) == len(rows)
    assert {session.data.rows[row].record.label for row in rows[58:]} == {"benign"}
    plain = start(config, extra=None)
    assert session.rows["val"].tolist() == plain.rows["val"].tolist()
    assert rows[:58].tolist() == plain.rows["train"].tolist()


def test_class_weights_count_the_synthetic_images(config: TrainConfig) -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    labels = torch.tensor([0, 1])
    loss = start(config, imbalance="weights").loss.training(logits, labels, 0.0)
    weights = 1 / torch.tensor([55.0, 33.0])
    expected = torch.nn.functional.cross_entropy(logits, labels, weight=weights)
    assert float(loss) == pytest.approx(float(expected))


def test_the_ratio_is_of_the_real_images_and_drawn_with_the_seed(config: TrainConfig) -> None:
    drawn = [start(config, extra_ratio=RATIO, seed=seed) for seed in (0, 0, 1)]
    assert [labels_of(session) for session in drawn] == [([25, 33], [12, 0])] * 3
    first, again, other = (session.rows["train"].tolist() for session in drawn)
    assert first == again
    assert first != other
    assert labels_of(start(config, extra_ratio=9.0)) == ([25, 33], [30, 0])


def test_magnification_leaves_out_others_and_keeps_unknown_ones(config: TrainConfig) -> None:
    session = start(config, mag="200x")
    assert labels_of(session) == ([5, 9], [20, 0])
    known = {session.data.rows[row].record.magnification for row in session.rows["train"]}
    assert known == {"200X", None}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """Make --smoke draw fewer images than either split has."""
    monkeypatch.setattr("breastcli.system.session.SMOKE_IMAGES", 8)
    return 8


def test_smoke_draws_from_all_and_validates_on_the_same(
    few: int, prepared: Path, config: TrainConfig, tmp_path: Path
) -> None:
    many = synthesize(prepared, tmp_path / "many", {"benign": 90})
    session = start(config, extra=str(many), smoke=True)
    plain = start(config, extra=None, smoke=True)
    real, synthetic = labels_of(session)
    assert sum(real) + sum(synthetic) == len(session.rows["val"]) == few
    assert synthetic[0] > 0
    assert session.synthetic is not None
    assert session.synthetic["num_images"] == {"benign": synthetic[0]}
    assert session.rows["val"].tolist() == plain.rows["val"].tolist()


def test_without_extra_the_rows_are_drawn_as_ever(few: int, prepared: Path, config: TrainConfig) -> None:
    session = start(config, extra=None, smoke=True, seed=3)
    data = PreparedData.open(prepared)
    generator = np.random.default_rng(3)
    assert type(session.data) is PreparedData
    for split in ("train", "val"):
        expected = np.sort(generator.permutation(data.select(split))[:few])
        assert session.rows[split].tolist() == expected.tolist()
    assert session.synthetic is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "bach"}, "was made from bach, not from sample: synthesize from this split and fold"),
        ({"split_fingerprint": "0" * 16}, "was made from another split of sample"),
        ({"fold": 1}, "was made from another fold of sample (made for fold 1, not no fold)"),
    ],
)
def test_leaks_are_refused(
    changes: dict, message: str, prepared: Path, tmp_path: Path, breastcli: Callable[..., Any]
) -> None:
    extra = synthesize(prepared, tmp_path / "synthetic", **changes)
    outcome = breastcli("train", "--data", prepared, "--extra", extra, "--arch", "timm/test_resnet", "--device", "cpu")
    assert outcome.code == 3
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert str(extra) in errors[0]


def test_another_fold_is_refused_and_its_own_accepted(folds: Path, config: TrainConfig, tmp_path: Path) -> None:
    own = dataclasses.replace(config, data=str(folds), extra=str(synthesize(folds, tmp_path / "fold1", fold=1)), fold=1)
    labels = labels_of(start(own))
    assert sum(labels[1]) == NUMBERS[["benign", "malignant"][int(np.argmin(labels[0]))]]
    with pytest.raises(LeakError, match="made for fold 1, not fold 0"):
        start(own, fold=0)


def test_folders_that_do_not_fit_are_refused(prepared: Path, config: TrainConfig, tmp_path: Path) -> None:
    def refused(problem: str, folder: Path, **options: Any) -> None:
        with pytest.raises(UserError, match=problem) as caught:
            start(config, extra=str(folder), **options)
        assert type(caught.value) is UserError
        assert caught.value.fix

    refused("is no folder of synthetic images", tmp_path)
    refused("holds no synthetic images", prepared)
    refused("made from images of another size", synthesize(prepared, tmp_path / "size", size_px=64))
    refused("was made from other images", synthesize(prepared, tmp_path / "pixels", fingerprint="0"))
    stain = {"fingerprint": "0", "stain": {"method": "macenko"}}
    refused("was made from another stain", synthesize(prepared, tmp_path / "stain", **stain))
    refused("has no image of a minority class", synthesize(prepared, tmp_path / "majority", {"malignant": 4}))
    refused("has no image .* at 400X", synthesize(prepared, tmp_path / "mag", {"benign": 2}), mag="400x")
    other = synthesize(prepared, tmp_path / "classes")
    card = json.loads((other / CARD).read_text())
    write_json(other / CARD, card | {"classes": ["malignant", "benign"]})
    refused("has other classes", other)


def test_ratios_that_cannot_be_are_refused(config: TrainConfig) -> None:
    with pytest.raises(UserError, match="leaves no synthetic image: leave --extra out"):
        start(config, extra_ratio=0.0)
    with pytest.raises(UsageError, match="--extra-ratio 0.5: there is no --extra"):
        start(config, extra=None, extra_ratio=0.5)


def test_every_row_has_its_own_pixels(prepared: Path, extra: Path, config: TrainConfig) -> None:
    real, synthetic = PreparedData.open(prepared), PreparedData.open(extra)
    joined = JoinedData.join(real, synthetic)
    order = np.random.default_rng(0).permutation(len(joined.rows))
    expected = np.concatenate([real.images, synthetic.images])
    assert len(joined.images) == len(expected)
    batches = [order[:50], order[50:], np.array([3]), np.array([len(real.rows)])]
    for rows, batch in zip(batches, load_batches(joined, batches, CPU), strict=True):
        assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), expected[rows])
        assert batch.labels.tolist() == [joined.classes.index(joined.rows[row].record.label) for row in rows]
    session = start(config, augment="none")
    assert isinstance(session.feed, ImageFeed)
    rows = session.rows["train"][[0, -1]]
    ((inputs, labels),) = session.feed.batches([rows], None, torch.Generator())
    assert torch.allclose(
        inputs.permute(0, 2, 3, 1) * 127.5 + 127.5, torch.from_numpy(expected[rows]).float(), atol=0.01
    )
    assert labels.tolist() == session.data.labels[rows].tolist()


def test_joined_data_never_offers_synthetic_images_as_a_split(prepared: Path, extra: Path) -> None:
    real = PreparedData.open(prepared)
    joined = JoinedData.join(real, PreparedData.open(extra))
    for split in ("train", "val", "test"):
        assert joined.select(split).tolist() == real.select(split).tolist()


@pytest.mark.parametrize("augment", ["none", "light"])
def test_cached_embeddings_give_the_slow_history(
    augment: str, prepared: Path, config: TrainConfig, extra: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(prepared, tmp_path / "data")  # because caching writes into it
    options = {"data": str(own), "freeze": "trunk", "epochs": 3, "lr": 0.01, "augment": augment}
    slow, fast = (
        train(dataclasses.replace(config, out=str(tmp_path / cache), cache_embeddings=cache, **options))
        for cache in ("off", "on")
    )
    assert fast.num_synthetic == 30
    for one, other in zip(slow.history, fast.history, strict=True):
        assert one == pytest.approx(other, abs=2e-5)
    num_views = len(POLICIES[augment].copies) or (8 if POLICIES[augment].turn else 1)
    for folder, num_rows, num_known in ((own, 96, 67), (extra, 40, 30)):
        files = list((folder / "embeddings").glob("*.npy"))
        assert len(files) == num_views
        table = np.load(files[0])
        assert len(table) == num_rows
        assert (~np.isnan(table).any(axis=1)).sum() == num_known
    (own / "embeddings").rename(tmp_path / "gone")
    again = train(dataclasses.replace(config, out=str(tmp_path / "again"), cache_embeddings="on", **options))
    assert again.history == fast.history


def test_files_say_what_joined(config: TrainConfig, extra: Path) -> None:
    result = train(config)
    out = result.out
    synthetic = {
        "folder": str(extra),
        "run": "runs/cwgan-all",
        "fingerprint": PreparedData.open(extra).card["fingerprint"],
        "num_images": {"benign": 30},
    }
    run = json.loads((out / "run.json").read_text())
    assert run["synthetic"] == synthetic
    assert run["num_images"] == result.num_images == {"train": 88, "val": 9}
    assert run["dataset"]["name"] == "sample"
    assert "synthetic" not in run["dataset"]
    assert json.loads((out / "checkpoints/best.json").read_text())["synthetic"] == synthetic
    assert result.to_json()["num_synthetic"] == 30
    assert "Trained with synthetic images." in (out / "report.html").read_text()


def test_every_figure_is_stamped(
    prepared: Path, extra: Path, tmp_path: Path, breastcli: Callable[..., Any], trained: Path
) -> None:
    common = ("--device", "cpu", "--precision", "fp32")
    options = ("--data", prepared, "--extra", extra, "--arch", "timm/test_resnet", "--epochs", "1", "--out", "run")
    outcome = breastcli("train", *options, *common)
    assert outcome.code == 0, outcome.stderr
    assert TRAINED_WITH_SYNTHETIC in outcome.stdout
    assert "88 images, 30 of them synthetic" in outcome.stdout
    outcome = breastcli("evaluate", "run", *common)
    assert outcome.code == 0, outcome.stderr
    assert TRAINED_WITH_SYNTHETIC in outcome.stdout
    run = tmp_path / "run"
    assert json.loads((run / "evaluate/test/metrics.json").read_text())["dataset"]["synthetic"] is True
    page = (run / "report.html").read_text()
    assert page.count(TRAINED_WITH_SYNTHETIC) > 5  # beside the heading and every table, the history's too
    assert TRAINED_WITH_SYNTHETIC not in (trained / "report.html").read_text()


def test_a_run_that_starts_from_a_marked_one_is_marked(
    config: TrainConfig, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    train(config)
    second = dataclasses.replace(tiny_config, out=str(tmp_path / "second"), epochs=1, init_from=config.out)
    train(second)
    result = evaluate(EvaluateConfig(runs=(second.out,), resamples=100, device="cpu"))
    assert result.document["dataset"]["synthetic"] is True


def test_plots_are_stamped(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    stamps = {}
    for name in ("plot_confusion", "plot_roc", "plot_precision_recall", "plot_reliability", "plot_patients"):
        monkeypatch.setattr(plots, name, lambda *args, stamp, name=name: stamps.update({name: stamp}))
    monkeypatch.setattr("breastcli.train.plot_curves", lambda *args, stamp: stamps.update(curves=stamp))
    monkeypatch.setattr(
        "breastcli.evaluate.plot_embedding", lambda *args, stamp: stamps.update(embedding=stamp) or {"within_deg": 1.0}
    )
    train(config)
    evaluate(EvaluateConfig(run=config.out, device="cpu", embedding=True, resamples=100))
    assert len(stamps) == 7
    assert all(TRAINED_WITH_SYNTHETIC in stamp for stamp in stamps.values())


def test_explanations_are_stamped(
    raw: Path, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    data = prepare(PrepareConfig(raw=str(raw), out=str(tmp_path / "larger"), size=64)).out  # for maps of 2 x 2
    large = synthesize(data, tmp_path / "larger-synthetic")
    run = train(dataclasses.replace(config, data=str(data), extra=str(large), epochs=1)).out
    stamps = []
    monkeypatch.setattr("breastcli.explain.plot_panel", lambda *args, stamp: stamps.append(stamp))
    result = explain(ExplainConfig(run=str(run), num="2", method="gradcam", device="cpu"))
    show_explain(result)
    assert TRAINED_WITH_SYNTHETIC in capsys.readouterr().out
    assert len(stamps) == 2
    assert all(TRAINED_WITH_SYNTHETIC in stamp for stamp in stamps)
    assert result.document["dataset"]["synthetic"] is True
    (run / "run.json").unlink()  # the explanation alone tells the report
    page = write_report(run).read_text()
    assert "Trained with synthetic images." in page
    assert "Images of one examination are on both sides" not in page


def test_what_older_runs_left_is_read(own_run: Path) -> None:
    """Runs older than --extra say nothing of synthetic images."""
    run = json.loads((own_run / "run.json").read_text())
    del run["synthetic"]
    write_json(own_run / "run.json", run)
    saved = torch.load(own_run / "checkpoints/resume.pt", weights_only=True)
    del saved["synthetic"]
    torch.save(saved, own_run / "checkpoints/resume.pt")
    evaluate(EvaluateConfig(run=str(own_run), device="cpu", resamples=100))
    metrics = own_run / "evaluate/test/metrics.json"
    document = json.loads(metrics.read_text())
    assert document["dataset"].pop("synthetic") is False
    write_json(metrics, document)
    assert "synthetic" not in write_report(own_run).read_text()
    config = dataclasses.replace(find_run(str(own_run)).config, out=str(own_run), resume=True, epochs=3)
    assert len(train(config).history) == 3


def test_resume_gives_the_uninterrupted_history(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(config, epochs=3, imbalance="oversample", extra_ratio=RATIO)
    whole = train(dataclasses.replace(config, out=f"{config.out}-whole")).out
    real, calls = feeding.predict_log_probs, []

    def interrupt(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(feeding, "predict_log_probs", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.setattr(feeding, "predict_log_probs", real)
    with pytest.raises(UserError, match="--extra-ratio 0.5, not 1.0"):
        train(dataclasses.replace(config, resume=True, extra_ratio=1.0))
    part = train(dataclasses.replace(config, resume=True)).out
    assert (part / "history.csv").read_bytes() == (whole / "history.csv").read_bytes()
    one, other = (load_file(run / "checkpoints/last.safetensors") for run in (whole, part))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_resume_notices_other_synthetic_images(prepared: Path, extra: Path, config: TrainConfig) -> None:
    train(config)
    history = (Path(config.out) / "history.csv").read_bytes()
    shutil.rmtree(extra)
    synthesize(prepared, extra, seed=1)
    with pytest.raises(UserError, match="was trained with other synthetic images than"):
        train(dataclasses.replace(config, resume=True, epochs=3))
    assert (Path(config.out) / "history.csv").read_bytes() == history


def test_training_on_nothing_else_is_refused(
    extra: Path, config: TrainConfig, tmp_path: Path, breastcli: Callable[..., Any]
) -> None:
    for options in ({}, {"mag": "400x"}, {"fold": 0}):
        with pytest.raises(UserError, match="holds synthetic training images only"):
            start(config, data=str(extra), extra=None, **options)
    outcome = breastcli("train", "--data", "synthetic", "--arch", "timm/test_resnet", "--device", "cpu")
    assert outcome.code == 1
    assert outcome.stderr.count("error:") == 1
    assert "synthetic holds synthetic training images only: pass it to train with --extra" in outcome.stderr


def test_other_jobs_refuse_a_synthetic_folder(extra: Path, raw: Path, own_run: Path) -> None:
    data = PreparedData.open(extra)
    for split in ("val", "test"):
        with pytest.raises(UserError, match="holds synthetic training images only"):
            data.select(split)
    assert len(data.select("train")) == 40
    with pytest.raises(UserError, match="another split than"):
        evaluate(EvaluateConfig(run=str(own_run), data=str(extra), device="cpu"))
    with pytest.raises(UserError, match="which prepare did not make"):
        prepare(PrepareConfig(raw=str(raw), out=str(extra), size=32, resume=True))


def test_stamps() -> None:
    assert stamp_of(None, False) == ""
    assert stamp_of(None, False, True) == TRAINED_WITH_SYNTHETIC
    assert stamp_of("LEAKY", True, True).split(", ")[0] == "LEAKY"
    assert stamp_of("LEAKY", True, True).endswith(TRAINED_WITH_SYNTHETIC)
