from __future__ import annotations

import dataclasses
import json

import pytest

from breastcli.data.audit import LEAKY, UNKNOWN, Audit, Inspection, PreparedRecord, audit
from breastcli.data.duplicates import Duplicate
from breastcli.data.measures import Measures
from breastcli.records import ImageRecord


def row(
    image: str, split: str, *, exam: str = "", patient: str = "", label: str = "benign", pixels: str = ""
) -> PreparedRecord:
    record = ImageRecord(image, f"{image}.png", label, label, patient or exam, exam)
    return PreparedRecord(record, split, None, 70, 46, pixels or image)


CLEAN = [
    row("a", "train", exam="1"),
    row("b", "train", exam="2", label="malignant"),
    row("c", "test", exam="3"),
    row("d", "val", exam="4", label="malignant"),
]


def test_a_clean_split_is_clean() -> None:
    found = audit(CLEAN, "exam")
    assert found.leaks == []
    assert found.warnings() == []
    assert found.to_json()["verdict"] == "clean"
    assert (found.num_held_out, found.shared_with_training) == (2, 0)
    assert found.sizes == {"70x46": 4}


def test_a_group_on_two_sides_is_a_leak() -> None:
    found = audit([*CLEAN, row("e", "test", exam="1")], "exam")
    assert found.leaks == ["exam 1 is on two sides of the split"]
    assert found.crossing["exam"] == ["1"]
    assert found.to_json()["verdict"] == "leak"


def test_identical_pixels_on_two_sides_are_a_leak() -> None:
    rows = [row("a", "train", exam="1", pixels="x"), row("b", "test", exam="9", pixels="x"), *CLEAN[1:]]
    found = audit(rows, "exam")
    assert found.identical_across_splits == [["a", "b"]]
    assert found.leaks == ["identical pixels on two sides: a, b"]
    assert found.label_conflicts == []


def test_identical_pixels_on_one_side_are_no_leak() -> None:
    found = audit([*CLEAN, row("e", "train", exam="1", pixels="a", label="malignant")], "exam")
    assert found.leaks == []
    assert found.identical_images == [["a", "e"]]
    assert found.label_conflicts == [["a", "e"]]
    assert found.groups_with_two_labels["exam"] == {"1": ["benign", "malignant"]}


def test_exams_shared_by_a_patient_split_are_told_but_asked_for() -> None:
    rows = [*CLEAN, row("e", "test", exam="1", patient="1B")]
    found = audit(rows, "patient")
    assert found.leaks == []
    assert found.shared_with_training == 1
    assert "1 of 3 held-out images share an exam" in found.warnings()[0]


def test_an_image_split_is_stamped_with_the_number_of_shared_exams() -> None:
    rows = [row(f"i{k}", "train" if k < 6 else "test", exam=str(k % 4)) for k in range(10)]
    found = audit(rows, "image")
    assert found.stamp == LEAKY
    assert found.leaks == []
    assert (found.num_held_out, found.shared_with_training) == (4, 4)
    assert found.warnings()[0].startswith(LEAKY)


@pytest.mark.parametrize(("second_fold", "shared"), [(0, 0), (1, 2)])
def test_folds_hold_every_image_out_once(second_fold: int, shared: int) -> None:
    def in_fold(image: str, fold: int, exam: str) -> PreparedRecord:
        return PreparedRecord(ImageRecord(image, "p", "benign", patient=image, exam=exam), "", fold, 1, 1, image)

    rows = [in_fold("a", 0, "1"), in_fold("b", second_fold, "1"), in_fold("c", 2, "2")]
    found = audit(rows, "patient")
    assert (found.num_held_out, found.shared_with_training) == (3, shared)


def test_slide_under_two_subtypes_is_told() -> None:
    found = audit([*CLEAN, row("e", "train", exam="1", label="malignant")], "exam")
    assert found.warnings() == ["slide 1 is filed under benign and malignant"]


def test_an_image_split_of_unknown_patients_claims_nothing() -> None:
    found = audit([row("a", "train"), row("b", "test", pixels="a"), row("c", "val")], "image")
    assert (found.stamp, found.coarsest, found.shared_with_training) == (UNKNOWN, "", None)
    assert found.to_json()["verdict"] == UNKNOWN
    assert found.warnings() == [
        f"{UNKNOWN}; any of 2 held-out images may share a patient with training",
        "1 sets of identical images are on two sides of the split",
    ]


def test_where_exams_are_unknown_patients_are_counted() -> None:
    rows = [
        row("a", "train", patient="p"),
        row("b", "test", patient="p", label="malignant"),
        row("c", "test", patient="q"),
    ]
    found = audit(rows, "image")
    assert (found.stamp, found.coarsest, found.shared_with_training) == (LEAKY, "patient", 1)
    assert found.warnings() == [
        f"{LEAKY}; 1 of 2 held-out images share a patient with training",
        "patient p is filed under benign and malignant",
    ]
    assert audit(rows, "patient").leaks == ["patient p is on two sides of the split"]


def measured(**values: float | str) -> Measures:
    return dataclasses.replace(Measures("0f" * 32, 180.0, 40.0, 0.3, 100.0, 0.1, 0.3, 0.2), **values)


def inspected(rows: list[PreparedRecord], *pairs: tuple[str, str], level: str = "exam", dropped: int = 0) -> Audit:
    known = {row.record.image_id: row.record for row in rows}
    gone = ImageRecord("z", "z.png", "benign", "benign")
    duplicates = [Duplicate(known[one], known.get(two, gone), 7, 6, 0.95) for one, two in pairs]
    return audit(rows, level, Inspection([measured() for _ in rows], duplicates, dropped))


def test_near_duplicates_on_two_sides_of_a_group_split_are_a_leak() -> None:
    found = inspected(CLEAN, ("a", "c"), ("a", "b"))
    assert found.leaks == ["near-duplicates on two sides: a, c (distance 7, turned 90)"]
    values = found.to_json()
    assert values["verdict"] == "leak"
    assert values["near_duplicates"][0] == {
        "images": ("a", "c"),
        "distance": 7,
        "likeness": 0.95,
        "position": "turned 90",
        "sides": ("train", "test"),
        "labels": ("benign", "benign"),
    }
    assert values["near_duplicates_across_splits"] == [("a", "c")]
    assert values["near_duplicates_with_two_labels"] == [("a", "b")]


def test_near_duplicates_on_one_side_or_dropped_or_in_an_image_split_are_no_leak() -> None:
    assert inspected(CLEAN, ("a", "b")).leaks == []
    by_image = inspected(CLEAN, ("a", "c"), level="image")
    assert by_image.leaks == []
    assert any("1 on two sides of the split" in line for line in by_image.warnings())
    dropped = inspected(CLEAN, ("c", "z"), dropped=1)
    assert dropped.leaks == []
    assert dropped.near_duplicates[0].sides == ("test", "dropped")
    assert dropped.warnings() == ["images left out because others are identical or nearly so: 1"]


def test_an_audit_is_read_back_as_it_was_written() -> None:
    rows = [*CLEAN, row("e", "test", exam="5")]
    measures = [measured(contrast=0.5), *(measured(green_density=0.1 * k) for k in range(4))]
    pair = Duplicate(rows[0].record, rows[2].record, 7, 6, 0.95)
    found = audit(rows, "exam", Inspection(measures, [pair], 0))
    assert [one.finding for one in found.outliers] == ["blank"]
    assert [one.side for one in found.drift] == ["val", "test"]
    assert Audit.from_json(json.loads(json.dumps(found.to_json()))) == found
    older = json.loads(json.dumps(audit(CLEAN, "exam").to_json()))
    for name in ("near_duplicates", "num_dropped", "num_not_compared", "outliers", "drift", "counts", "shared_exams"):
        del older[name]
    read = Audit.from_json(older)
    assert (read.near_duplicates, read.num_not_compared) == (None, None)


def test_counts_and_shared_exams() -> None:
    record = ImageRecord("x", "x.png", "benign", "benign", patient="1B", exam="1", magnification="40X")
    found = audit([*CLEAN, PreparedRecord(record, "train", None, 70, 46, "x")], "exam")
    assert found.shared_exams == {"1": ["1", "1B"]}
    assert {"class": "benign", "magnification": "40X", "group": "1", "images": 1} in found.counts
    assert sum(one["images"] for one in found.counts) == 5


def test_odd_images_are_named_in_the_warnings() -> None:
    rows = [dataclasses.replace(one, width_px=70 + (number == 3)) for number, one in enumerate(CLEAN)]
    found = audit(rows, "exam", Inspection([measured(plain=0.99), *[measured()] * 3], [], 0))
    assert found.warnings() == ["images nearly blank: 1 (a)", "images not of the usual size: 1 (d)"]


def test_images_that_could_not_be_compared_are_counted() -> None:
    found = audit(CLEAN, "exam", Inspection([*[measured(perceptual_hash="")] * 2, *[measured()] * 2], [], 0))
    assert found.num_not_compared == 2
    assert found.warnings() == ["2 images show too little contrast to be compared with others"]
