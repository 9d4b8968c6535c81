"""Patients that come out worst, and confident errors with their thumbnails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from breastcli.config import EvaluateConfig
from breastcli.data.store import PreparedData
from breastcli.evaluate import evaluate
from breastcli.records import Predictions
from breastcli.reporting.cases import MAX_ERRORS, confident_errors, rank_patients, thumbnail_name
from breastcli.system.runfolder import ERRORS, remove_results


def predictions(given: list[float], patients: list[str], labels: list[int] | None = None) -> Predictions:
    """Return images that give their true class these probabilities."""
    truth = np.array(labels or [1] * len(given))
    probs = np.array([[1 - p, p] if label else [p, 1 - p] for p, label in zip(given, truth, strict=True)])
    ids = np.array([f"image {k}" for k in range(len(given))], dtype=object)
    names = np.array(patients, dtype=object)
    return Predictions(ids, ("benign", "malignant"), probs, probs.argmax(axis=1), truth, {"patient": names})


def test_patients_are_ranked_by_images_right_then_by_probability() -> None:
    values = predictions([0.9, 0.1, 0.6, 0.2, 0.8, 0.3, 0.99], ["a", "a", "b", "b", "c", "", "d"])
    ranked = rank_patients(values)
    assert [case.patient for case in ranked] == ["b", "a", "c", "d"]  # b and a: 1 of 2, b with 0.4 against 0.5
    assert [(case.num_right, len(case.members)) for case in ranked] == [(1, 2), (1, 2), (1, 1), (1, 1)]
    assert ranked[0].given == pytest.approx(0.4)
    assert ranked[0].members.tolist() == [2, 3]


def test_a_patient_with_two_labels_counts_once_for_each() -> None:
    ranked = rank_patients(predictions([0.9, 0.1], ["a", "a"], [0, 1]))
    assert [(case.label, case.num_right) for case in ranked] == [(1, 0), (0, 1)]


def test_errors_are_the_most_probable_wrong_classes() -> None:
    values = predictions([0.4, 0.9, 0.01, 0.2, 0.2], ["a"] * 5)
    assert confident_errors(values).tolist() == [2, 3, 4, 0]
    many = predictions([0.1] * 40, ["a"] * 40)
    assert len(confident_errors(many)) == MAX_ERRORS
    assert confident_errors(predictions([0.9], ["a"])).tolist() == []


def test_thumbnails_are_named_after_the_image_and_stay_in_their_folder() -> None:
    evil = ["../../etc/passwd", "<script>alert(1)</script>", "..", "a/b", "a_b", "é" * 300, ".hidden"]
    names = [thumbnail_name(one) for one in evil]
    assert len(set(names)) == len(evil)
    for name in names:
        assert Path(name).name == name
        assert not name.startswith(".")
        assert len(name) < 100
        assert name.isascii()
    assert thumbnail_name("SOB_B_A-14-22549AB-100-001").startswith("SOB_B_A-14-22549AB-100-001-")


def test_evaluate_keeps_a_thumbnail_of_each_confident_error(own_run: Path, prepared: Path) -> None:
    config = EvaluateConfig(runs=(str(own_run),), resamples=100, device="cpu", overwrite=True, threshold="1.0")
    errors = own_run / "evaluate/test" / ERRORS
    errors.mkdir(parents=True)
    (errors / "mine.png").write_bytes(b"")
    (errors / "of-an-earlier-evaluation-0123abcd.png").write_bytes(b"")
    out = evaluate(config).out
    values = Predictions.from_csv(out / "predictions.csv")
    rows = confident_errors(values)
    assert len(rows) == MAX_ERRORS  # with this threshold every malignant image is wrong
    names = {thumbnail_name(values.image_ids[row]) for row in rows}
    assert {path.name for path in errors.iterdir()} == names | {"mine.png"}
    data = PreparedData.open(prepared)
    (place,) = [k for k, row in enumerate(data.rows) if row.record.image_id == values.image_ids[rows[0]]]
    with Image.open(errors / thumbnail_name(values.image_ids[rows[0]])) as drawn:
        assert np.array_equal(np.asarray(drawn), data.images[place])
    remove_results(own_run)
    assert [path.name for path in errors.iterdir()] == ["mine.png"]
