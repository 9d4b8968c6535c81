import numpy as np
import pytest

from breastcli.errors import UserError
from breastcli.records import Predictions


def _strings(*values):
    return np.array(values, dtype=object)


def _predictions(probs, labels, patients, classes=("benign", "malignant")):
    probs = np.array(probs)
    return Predictions(
        image_ids=_strings(*(f"image{row}" for row in range(len(probs)))),
        classes=classes,
        probs=probs,
        predicted=probs.argmax(axis=1),
        labels=None if labels is None else np.array(labels),
        columns={"patient": _strings(*patients), "exam": _strings(*(name[0] for name in patients))},
    )


def test_by_patient_averages_probabilities():
    images = _predictions([[0.9, 0.1], [0.4, 0.6], [0.45, 0.55], [0.2, 0.8]], [0, 0, 0, 1], ["a1", "a1", "a1", "b1"])
    merged = images.by_patient("mean")
    assert merged.image_ids.tolist() == ["a1", "b1"]
    assert merged.probs == pytest.approx(np.array([[1.75 / 3, 1.25 / 3], [0.2, 0.8]]))
    assert merged.predicted.tolist() == [0, 1]
    assert merged.labels.tolist() == [0, 1]
    assert merged.column("exam").tolist() == ["a", "b"]


def test_by_patient_counts_votes_which_can_disagree_with_the_mean():
    images = _predictions([[0.9, 0.1], [0.4, 0.6], [0.45, 0.55], [0.2, 0.8]], [0, 0, 0, 1], ["a1", "a1", "a1", "b1"])
    merged = images.by_patient("vote")
    assert merged.probs == pytest.approx(np.array([[1 / 3, 2 / 3], [0, 1]]))
    assert merged.predicted.tolist() == [1, 1]


def test_by_patient_votes_with_the_thresholded_predictions():
    images = _predictions([[0.7, 0.3], [0.6, 0.4]], [1, 1], ["a1", "a1"])
    lowered = Predictions(
        images.image_ids, images.classes, images.probs, np.array([1, 1]), images.labels, images.columns
    )
    assert images.by_patient("vote").predicted.tolist() == [0]
    assert lowered.by_patient("vote").predicted.tolist() == [1]


def test_by_patient_calls_a_tie_of_two_classes_positive():
    images = _predictions([[0.1, 0.9], [0.9, 0.1]], [1, 1], ["a1", "a1"])
    assert images.by_patient("vote").probs.tolist() == [[0.5, 0.5]]
    assert images.by_patient("vote").predicted.tolist() == [1]
    assert images.by_patient("mean").predicted.tolist() == [1]


def test_by_patient_gives_a_tie_of_more_classes_to_the_first():
    images = _predictions([[0.1, 0.9, 0], [0.9, 0.1, 0]], [1, 1], ["a1", "a1"], classes=("x", "y", "z"))
    assert images.by_patient("vote").predicted.tolist() == [0]
    assert images.by_patient("mean").predicted.tolist() == [0]


def test_by_patient_holds_the_mean_against_the_images_threshold():
    images = _predictions([[0.6, 0.4], [0.8, 0.2], [0.6, 0.4]], [1, 1, 0], ["a1", "a1", "b1"])
    images.columns["threshold"] = _strings("0.25", "0.25", "0.5")
    assert images.by_patient("mean").predicted.tolist() == [1, 0]
    assert images.by_patient("vote").predicted.tolist() == [0, 0]


def test_by_patient_counts_a_patient_with_two_labels_once_per_label():
    images = _predictions(
        [[0.6, 0.4, 0], [0.2, 0.8, 0], [0, 0.3, 0.7]], [0, 1, 1], ["a1", "a1", "a1"], classes=("x", "y", "z")
    )
    merged = images.by_patient("mean")
    assert merged.image_ids.tolist() == ["a1", "a1"]
    assert merged.labels.tolist() == [0, 1]
    assert merged.probs == pytest.approx(np.array([[0.6, 0.4, 0], [0.1, 0.55, 0.35]]))


def test_by_patient_works_without_labels_and_refuses_unknown_patients():
    assert _predictions([[0.6, 0.4], [0.1, 0.9]], None, ["a1", "a1"]).by_patient("mean").labels is None
    unknown = _predictions([[0.6, 0.4], [0.1, 0.9]], [0, 1], ["a1", "a1"])
    unknown.columns["patient"][1] = ""
    with pytest.raises(UserError, match="patient"):
        unknown.by_patient("mean")


@pytest.mark.parametrize("labelled", [True, False])
def test_csv_round_trip_is_exact_to_the_bit(tmp_path, labelled):
    rng = np.random.default_rng(0)
    probs = rng.dirichlet([0.05, 1, 1], size=50)
    probs[0] = [1e-300, 0.1 + 0.2, 1 / 3]
    written = Predictions(
        image_ids=_strings(*(f"fold/ümlaut, {row}" for row in range(50))),
        classes=("Benign", "In situ", "Normal"),
        probs=probs,
        predicted=rng.integers(3, size=50),
        labels=rng.integers(3, size=50) if labelled else None,
        columns={"patient": _strings(*(f"0{row % 7}" for row in range(50))), "exam": _strings(*[""] * 50)},
    )
    written.to_csv(tmp_path / "predictions.csv")
    read = Predictions.from_csv(tmp_path / "predictions.csv")
    assert read.probs.tobytes() == written.probs.tobytes()
    assert read.classes == written.classes
    assert read.image_ids.tolist() == written.image_ids.tolist()
    assert read.predicted.tolist() == written.predicted.tolist()
    assert (read.labels is None) is not labelled
    assert not labelled or read.labels.tolist() == written.labels.tolist()
    assert {name: values.tolist() for name, values in read.columns.items()} == {
        name: values.tolist() for name, values in written.columns.items()
    }


def test_from_csv_names_a_file_that_is_missing_or_is_something_else(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        Predictions.from_csv(tmp_path / "missing.csv")
    (tmp_path / "other.csv").write_text("image_id,score\na,1\n")
    with pytest.raises(UserError, match="not a predictions file"):
        Predictions.from_csv(tmp_path / "other.csv")
    (tmp_path / "broken.csv").write_text("image_id,predicted,prob_a,prob_b\nx,a,0.5,half\n")
    with pytest.raises(UserError, match="half"):
        Predictions.from_csv(tmp_path / "broken.csv")


def test_groups_are_exams_then_patients_then_images():
    images = _predictions([[0.6, 0.4]] * 3, [0, 0, 1], ["a1", "b1", "c1"])
    images.columns["exam"][1:] = ""
    images.columns["patient"][2] = ""
    assert images.groups().tolist() == ["a", "b1", "image2"]
