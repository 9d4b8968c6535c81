from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from breastcli.config import EvaluateConfig, PrepareConfig, TrainConfig
from breastcli.data.store import PreparedData, write_manifest
from breastcli.errors import UsageError, UserError
from breastcli.evaluate import EvaluateResult, evaluate
from breastcli.metrics.calibration import fit_temperature, temper
from breastcli.metrics.classification import choose_threshold
from breastcli.prepare import prepare
from breastcli.records import Predictions
from breastcli.system import inference
from breastcli.train import train

QUICK = {"device": "cpu", "precision": "fp32", "resamples": 200}


def run(folder: Path, **options: object) -> dict:
    return evaluate(EvaluateConfig(runs=(str(folder),), **(QUICK | options))).document


def run_pooled(names: tuple[str, ...], out: Path, **options: object) -> EvaluateResult:
    return evaluate(EvaluateConfig(runs=names, out=str(out), **(QUICK | options)))


def test_outputs_agree_with_each_other_and_with_scikit_learn(own_run: Path, prepared: Path) -> None:
    document = run(own_run)
    folder = own_run / "evaluate" / "test"
    assert {path.name for path in folder.iterdir()} == {
        "predictions.csv",
        "metrics.json",
        "confusion.png",
        "roc.png",
        "precision_recall.png",
        "reliability.png",
        "patients.png",
        "errors",
    }
    assert json.loads((folder / "metrics.json").read_text()) == document
    predictions = Predictions.from_csv(folder / "predictions.csv")
    data = PreparedData.open(prepared)
    rows = data.select("test")
    assert predictions.image_ids.tolist() == [data.rows[row].record.image_id for row in rows]
    assert predictions.column("exam").tolist() == [data.rows[row].record.exam for row in rows]
    overall = document["image"]["overall"]
    assert document["image"]["n"] == len(rows)
    expected = balanced_accuracy_score(predictions.labels, predictions.predicted)
    assert overall["balanced_accuracy"]["value"] == pytest.approx(expected, abs=1e-12)
    assert overall["roc_auc"]["value"] == pytest.approx(roc_auc_score(predictions.labels, predictions.probs[:, 1]))
    assert overall["accuracy"]["low"] <= overall["accuracy"]["value"] <= overall["accuracy"]["high"]
    assert document["patient"]["vote"]["n"] == len(set(predictions.column("patient")))
    assert set(document["by_magnification"]) == {"40X", "100X", "200X", "400X"}
    assert "drawn by a program" in (own_run / "report.html").read_text()


def test_predictions_are_taken_again_while_nothing_they_depend_on_changes(
    own_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(own_run)
    asked = []
    ask = inference.predict_log_probs
    monkeypatch.setattr(inference, "predict_log_probs", lambda *given, **more: asked.append(1) or ask(*given, **more))
    again = run(own_run, overwrite=True, threshold="0.3")
    assert not asked
    assert again["image"]["overall"]["roc_auc"] == first["image"]["overall"]["roc_auc"]
    assert again["threshold"]["value"] == 0.3
    run(own_run, overwrite=True)
    assert not asked
    run(own_run, overwrite=True, tta="d4")
    assert len(asked) == 1
    run(own_run, overwrite=True)  # the folder now holds those of the eight positions
    assert len(asked) == 2
    file = own_run / "evaluate/test/predictions.csv"
    file.write_text(file.read_text().replace(",malignant,", ",benign,", 1))
    run(own_run, overwrite=True)
    assert len(asked) == 3
    run(own_run, overwrite=True, threshold="val-youden")
    assert len(asked) == 5  # both splits: validation images have no earlier evaluation that is looked at
    with (own_run / "checkpoints/best.safetensors").open("ab") as weights:
        weights.write(b" ")
    with pytest.raises(UserError, match="damaged"):
        run(own_run, overwrite=True)


def test_predictions_are_not_taken_for_other_rows(own_run: Path, prepared: Path, tmp_path: Path) -> None:
    before = run(own_run)
    copy = Path(shutil.copytree(prepared, tmp_path / "copy"))
    data = PreparedData.open(prepared)
    order = np.random.default_rng(0).permutation(len(data.rows))
    write_manifest(copy, [data.rows[row] for row in order])  # the same images and split, so the same fingerprints
    np.save(copy / "images.npy", data.images[order])
    after = run(own_run, data=str(copy), overwrite=True)
    assert after["predictions"]["key"] != before["predictions"]["key"]
    for name, figure in before["image"]["overall"].items():
        assert after["image"]["overall"][name]["value"] == pytest.approx(figure["value"]), name


def test_predictions_are_those_of_the_network(own_run: Path, prepared: Path) -> None:
    import torch

    from breastcli.data.loading import to_network
    from breastcli.system.checkpoint import load_checkpoint

    run(own_run, batch_size=5)
    predictions = Predictions.from_csv(own_run / "evaluate/test/predictions.csv")
    data = PreparedData.open(prepared)
    model, _ = load_checkpoint(own_run / "checkpoints/best.safetensors", torch.device("cpu"))
    images = torch.from_numpy(np.array(data.images[data.select("test")])).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model(to_network(images)).softmax(dim=1).numpy()
    assert np.abs(predictions.probs - expected).max() < 1e-5


def test_a_results_folder_is_not_overwritten_unasked(own_run: Path) -> None:
    run(own_run)
    with pytest.raises(UserError, match="not empty.*--overwrite"):
        run(own_run)
    run(own_run, overwrite=True)


def test_thresholds_come_from_validation_images_only(own_run: Path, prepared: Path) -> None:
    fixed = run(own_run, threshold="0.9")
    assert fixed["threshold"]["value"] == 0.9
    predictions = Predictions.from_csv(own_run / "evaluate/test/predictions.csv")
    assert np.array_equal(predictions.predicted, (predictions.probs[:, 1] >= 0.9).astype(int))
    fitted = run(own_run, threshold="val-sensitivity=0.95", overwrite=True)["threshold"]["value"]
    run(own_run, split="val")
    on_val = Predictions.from_csv(own_run / "evaluate/val/predictions.csv")
    positive = on_val.probs[on_val.labels == 1, 1]
    assert (positive >= fitted).mean() >= 0.95
    assert any(np.isclose(positive, fitted))
    with pytest.raises(UsageError, match="would be fitted on the images it scores"):
        run(own_run, split="val", threshold="val-youden", overwrite=True)
    with pytest.raises(UserError, match="threshold"):
        run(own_run, threshold="youden", overwrite=True)


def test_the_temperature_is_fitted_on_validation_images_and_applied_before_the_threshold(own_run: Path) -> None:
    run(own_run, split="val")
    plain = run(own_run)
    on_val = Predictions.from_csv(own_run / "evaluate/val/predictions.csv")
    before = Predictions.from_csv(own_run / "evaluate/test/predictions.csv")
    document = run(own_run, calibrate=True, threshold="val-youden", overwrite=True)
    (temperature,) = document["calibration"]["temperatures"]
    assert temperature == pytest.approx(fit_temperature(on_val.probs, on_val.labels))
    after = Predictions.from_csv(own_run / "evaluate/test/predictions.csv")
    assert after.probs == pytest.approx(temper(before.probs, temperature))
    assert np.abs(after.probs - before.probs).max() > 1e-3
    expected = choose_threshold(on_val.labels, temper(on_val.probs, temperature)[:, 1], "val-youden")
    assert document["threshold"]["value"] == pytest.approx(expected)
    assert np.array_equal(after.predicted, (after.probs[:, 1] >= document["threshold"]["value"]).astype(int))
    for name in ("brier", "ece"):
        assert document["calibration"]["before"][name] == pytest.approx(plain["image"]["overall"][name])
        assert document["calibration"]["after"][name] == pytest.approx(document["image"]["overall"][name])
    page = (own_run / "report.html").read_text()
    assert "Before and after calibration" in page
    assert f"<dd>{temperature:.3f}" in page
    with pytest.raises(UsageError, match="--calibrate: would be fitted on the images it scores"):
        run(own_run, split="val", calibrate=True, overwrite=True)


def test_without_a_temperature_that_fits_nothing_is_calibrated(
    own_run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = run(own_run)
    monkeypatch.setattr("breastcli.evaluate.fit_temperature", lambda probs, labels: None)
    document = run(own_run, calibrate=True, overwrite=True)
    assert "no temperature fits its validation images; nothing is calibrated" in caplog.text
    assert document["calibration"]["temperatures"] == [None]
    assert document["calibration"]["after"] == document["calibration"]["before"]
    assert document["image"]["overall"]["brier"]["value"] == plain["image"]["overall"]["brier"]["value"]
    assert "<dd>none fits" in (own_run / "report.html").read_text()


def test_calibrated_predictions_are_not_taken_for_others(own_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run(own_run)
    calibrated = run(own_run, calibrate=True, overwrite=True)
    assert calibrated["predictions"]["key"] != plain["predictions"]["key"]
    assert calibrated["image"]["overall"]["accuracy"] == plain["image"]["overall"]["accuracy"]
    assert calibrated["image"]["overall"]["roc_auc"] == plain["image"]["overall"]["roc_auc"]
    assert run(own_run, calibrate=True, overwrite=True)["calibration"] == calibrated["calibration"]
    again = run(own_run, overwrite=True)
    assert again == plain
    assert again["calibration"] is None


def test_the_command_tells_what_calibration_did(breastcli: Callable, own_run: Path) -> None:
    shown = breastcli("evaluate", own_run, "--calibrate", "--resamples", 100, "--device", "cpu").stdout
    document = json.loads((own_run / "evaluate/test/metrics.json").read_text())
    assert f"temperature {document['calibration']['temperatures'][0]:.3f}" in shown
    assert "Negative log-likelihood" in shown
    assert shown.splitlines()[-1] == str(own_run / "evaluate/test")


def test_test_time_augmentation_is_blind_to_position(own_run: Path) -> None:
    """With the mean over the eight positions, turning every image changes nothing but rounding."""
    import torch

    from breastcli.data.augment import dihedral
    from breastcli.system.checkpoint import load_checkpoint
    from breastcli.system.inference import predict_log_probs

    model, _ = load_checkpoint(own_run / "checkpoints/best.safetensors", torch.device("cpu"))
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)

    def probs(given: torch.Tensor, tta: str) -> torch.Tensor:
        return predict_log_probs(model, [given], torch.device("cpu"), torch.float32, tta).exp()

    assert torch.allclose(probs(images, "d4"), probs(dihedral(images, 5), "d4"), atol=1e-6)
    assert not torch.allclose(probs(images, "none"), probs(dihedral(images, 5), "none"), atol=1e-6)
    assert torch.allclose(probs(images, "d4").sum(dim=1), torch.ones(4, dtype=torch.float64), atol=1e-6)
    assert run(own_run, tta="d4")["tta"] == "d4"


def test_another_split_or_data_set_is_refused(own_run: Path, raw: Path, tmp_path: Path) -> None:
    prepare(PrepareConfig(raw=str(raw), out=str(tmp_path / "other"), size=32, seed=5))
    with pytest.raises(UserError, match="another split"):
        run(own_run, data=str(tmp_path / "other"))
    prepare(PrepareConfig(raw=str(raw), out=str(tmp_path / "stained"), size=32, stain="macenko"))
    with pytest.raises(UserError, match="other images"):
        run(own_run, data=str(tmp_path / "stained"))


def test_a_moved_copy_of_the_data_is_accepted(own_run: Path, prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "moved")
    assert run(own_run, data=str(tmp_path / "moved"))["image"]["n"] > 0


def test_runs_are_needed_and_must_exist(own_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a run folder"):
        evaluate(EvaluateConfig())
    with pytest.raises(UsageError, match="given twice"):
        evaluate(EvaluateConfig(runs=("a",), run="b"))
    with pytest.raises(UserError, match="is not a run folder"):
        evaluate(EvaluateConfig(run=str(tmp_path)))


def test_latest_is_the_run_written_last(own_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run below runs/"):
        evaluate(EvaluateConfig(run="latest"))
    shutil.copytree(own_run, "runs/one", copy_function=shutil.copy)
    Path("runs/one-pooled").mkdir()
    Path("runs/one-pooled/run.json").write_text("{}")  # of a pooled evaluation: nothing was trained there
    result = evaluate(EvaluateConfig(run="latest", **QUICK))
    assert result.out.as_posix() == "runs/one/evaluate/test"


@pytest.fixture(scope="module")
def fold_runs(folds: Path, tiny_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("fold-runs")
    runs = []
    for fold in range(3):
        out = root / f"tiny-fold{fold}"
        train(dataclasses.replace(tiny_config, data=str(folds), fold=fold, epochs=1, out=str(out)))
        runs.append(out)
    return runs


def test_folds_are_pooled_with_their_spread(fold_runs: list[Path]) -> None:
    result = evaluate(EvaluateConfig(runs=tuple(map(str, fold_runs)), **QUICK))
    assert result.out == fold_runs[0].parent / "tiny-pooled" / "evaluate" / "test"
    assert result.image.n == 96
    parts = [fold["overall"]["accuracy"] for fold in result.document["folds"]]
    assert result.document["spread"]["accuracy"]["mean"] == pytest.approx(np.mean(parts))
    assert result.document["spread"]["accuracy"]["sd"] == pytest.approx(np.std(parts, ddof=1))
    sizes = [fold["n"] for fold in result.document["folds"]]
    assert result.image.overall["accuracy"].value == pytest.approx(np.average(parts, weights=sizes))
    assert result.report.is_file()
    assert "tiny-fold2" in result.report.read_text()


def test_each_fold_has_its_own_temperature(fold_runs: list[Path], tmp_path: Path) -> None:
    names = tuple(map(str, fold_runs))
    before = run_pooled(names, tmp_path / "before").document
    result = run_pooled(names, tmp_path / "after", calibrate=True)
    told = result.document["calibration"]
    assert len(set(told["temperatures"])) == 3
    for name in ("brier", "ece"):
        assert told["before"][name] == pytest.approx(before["image"]["overall"][name])
    raw, scaled = (Predictions.from_csv(tmp_path / name / "predictions.csv") for name in ("before", "after"))
    for fold, temperature in enumerate(told["temperatures"]):
        rows = raw.column("run") == f"tiny-fold{fold}"
        assert scaled.probs[rows] == pytest.approx(temper(raw.probs[rows], temperature))


def test_an_image_predicted_twice_is_refused(fold_runs: list[Path]) -> None:
    with pytest.raises(UserError, match="predicted by two runs"):
        evaluate(EvaluateConfig(runs=(str(fold_runs[0]), str(fold_runs[0])), out=str(fold_runs[0] / "x"), **QUICK))


def test_eight_classes(raw: Path, tmp_path: Path, tiny_config: TrainConfig) -> None:
    prepare(PrepareConfig(raw=str(raw), out=str(tmp_path / "data"), size=32, task="subtype", group_by="image"))
    train(dataclasses.replace(tiny_config, data=str(tmp_path / "data"), out=str(tmp_path / "run"), epochs=1))
    document = run(tmp_path / "run")
    assert len(document["image"]["classes"]) == 8
    assert np.array(document["image"]["confusion"]).sum() == document["image"]["n"]
    assert document["dataset"]["leaky"] == "LEAKY: image-level split"
    assert "LEAKY: image-level split" in (tmp_path / "run/report.html").read_text()
    with pytest.raises(UsageError, match="needs two classes, not 8"):
        run(tmp_path / "run", threshold="0.3", overwrite=True)
