from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from breastcli.config import EvaluateConfig, PredictConfig, PrepareConfig, TrainConfig
from breastcli.data.store import PreparedData
from breastcli.errors import UsageError, UserError
from breastcli.evaluate import evaluate
from breastcli.predict import predict
from breastcli.prepare import prepare
from breastcli.records import Predictions
from breastcli.train import train

QUICK = {"device": "cpu", "precision": "fp32"}


def run(run_folder: Path, *images: Path, out: Path, **options: object) -> Predictions:
    config = PredictConfig(run=str(run_folder), images=tuple(map(str, images)), out=str(out), **(QUICK | options))
    return predict(config).predictions


@pytest.mark.parametrize("stain", ["none", "macenko"])
def test_files_are_prepared_as_the_data_set_was(
    stain: str, raw: Path, tmp_path: Path, tiny_config: TrainConfig
) -> None:
    """predict on the raw files gives what evaluate gave on the prepared images."""
    prepare(PrepareConfig(raw=str(raw), out=str(tmp_path / "data"), size=32, stain=stain))
    train(dataclasses.replace(tiny_config, data=str(tmp_path / "data"), out=str(tmp_path / "run"), epochs=1))
    evaluate(EvaluateConfig(run=str(tmp_path / "run"), resamples=100, **QUICK))
    expected = Predictions.from_csv(tmp_path / "run/evaluate/test/predictions.csv")
    files = [raw / path for path in expected.column("path")]
    found = run(tmp_path / "run", *files, out=tmp_path / "p.csv", batch_size=7)
    assert found.image_ids.tolist() == expected.image_ids.tolist()
    assert np.abs(found.probs - expected.probs).max() < 1e-5
    assert found.column("patient").tolist() == expected.column("patient").tolist()
    assert np.array_equal(Predictions.from_csv(tmp_path / "p.csv").probs, found.probs)


def test_folders_unreadable_files_and_patients(own_run: Path, raw: Path, tmp_path: Path) -> None:
    folder = raw / "BreaKHis_v1/histology_slides/breast/benign/SOB/adenosis"
    (tmp_path / "broken.png").write_text("no image")
    config = PredictConfig(
        run=str(own_run), images=(str(folder), str(tmp_path / "broken.png")), out=str(tmp_path / "p.csv"), **QUICK
    )
    result = predict(config)
    assert len(result.predictions) == len(list(folder.rglob("*.png")))
    assert [one.reason for one in result.rejected] == ["not an image"]
    assert result.patients is not None
    names = {path.name.split("-")[2] for path in folder.rglob("*.png")}
    assert set(result.patients.image_ids) == names
    assert result.to_json()["num_images"] == len(result.predictions)


def test_names_without_patients_give_no_patient_figures(own_run: Path, tmp_path: Path) -> None:
    Image.new("RGB", (50, 40), (200, 120, 160)).save(tmp_path / "field.png")
    config = PredictConfig(
        run=str(own_run), images=(str(tmp_path / "field.png"),), out=str(tmp_path / "p.csv"), **QUICK
    )
    assert predict(config).patients is None


def test_threshold(own_run: Path, raw: Path, tmp_path: Path) -> None:
    files = sorted((raw / "BreaKHis_v1").rglob("*.png"))[:6]
    assert set(run(own_run, *files, out=tmp_path / "a.csv", threshold="0").predicted) == {1}
    found = run(own_run, *files, out=tmp_path / "b.csv")
    assert np.array_equal(found.predicted, (found.probs[:, 1] >= 0.5).astype(int))
    with pytest.raises(UsageError, match="predict has no validation images"):
        run(own_run, *files, out=tmp_path / "c.csv", threshold="val-youden")


def test_outputs_are_not_overwritten_unasked_and_foreign_files_never(own_run: Path, raw: Path, tmp_path: Path) -> None:
    file = next((raw / "BreaKHis_v1").rglob("*.png"))
    run(own_run, file, out=tmp_path / "p.csv")
    with pytest.raises(UserError, match="is there already"):
        run(own_run, file, out=tmp_path / "p.csv")
    run(own_run, file, out=tmp_path / "p.csv", overwrite=True)
    (tmp_path / "thesis.csv").write_text("chapter,pages\n1,20\n")
    with pytest.raises(UserError, match="not a predictions file"):
        run(own_run, file, out=tmp_path / "thesis.csv", overwrite=True)
    assert (tmp_path / "thesis.csv").read_text() == "chapter,pages\n1,20\n"


def test_bad_requests(own_run: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").touch()
    out = tmp_path / "p.csv"
    with pytest.raises(UsageError, match="needs images"):
        run(own_run, out=out)
    with pytest.raises(UserError, match="no such file or folder"):
        run(own_run, tmp_path / "none", out=out)
    with pytest.raises(UserError, match="none of the 1 files.*empty file"):
        run(own_run, tmp_path / "bad.png", out=out)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="no image file below"):
        run(own_run, tmp_path / "nothing", out=out)
    assert not out.exists()


def test_data_sets_are_not_needed_any_more(own_run: Path, raw: Path, tmp_path: Path, prepared: Path) -> None:
    """A run folder alone is enough to predict."""
    assert PreparedData.open(prepared).folder.is_dir()
    for name in ("config.yaml", "run.json"):
        (own_run / name).write_text((own_run / name).read_text().replace(str(prepared), str(tmp_path / "gone")))
    assert len(run(own_run, next((raw / "BreaKHis_v1").rglob("*.png")), out=tmp_path / "p.csv")) == 1
