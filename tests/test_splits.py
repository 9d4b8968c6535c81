from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from breastcli.data.splits import fold_records, known_level, largest_remainder, split_records
from breastcli.errors import UserError
from breastcli.records import ImageRecord

# The paper's Table 6: data set size, then training, validation and test images.
PAPER_TOTALS = [
    (1995, (1197, 199, 599)),
    (2081, (1249, 208, 624)),
    (2013, (1208, 201, 604)),
    (1820, (1092, 182, 546)),
    (400, (240, 40, 120)),
    (2000, (1200, 200, 600)),
]


def make(groups: list[tuple[str, str, int]], magnification: str = "100X") -> list[ImageRecord]:
    """Records from (exam, label, number of images)."""
    return [
        ImageRecord(
            f"{exam}-{label}-{magnification}-{i}", "p", label, label, f"{exam}{'AB'[i % 2]}", exam, magnification
        )
        for exam, label, count in groups
        for i in range(count)
    ]


def realistic(seed: int = 0) -> list[ImageRecord]:
    """About as many exams of as unequal sizes as BreakHis has at one magnification."""
    generator = np.random.default_rng(seed)
    benign = [(f"b{i}", "benign", int(generator.integers(8, 90))) for i in range(16)]
    malignant = [(f"m{i}", "malignant", int(generator.integers(8, 60))) for i in range(54)]
    return make(benign + malignant)


@pytest.mark.parametrize(("n", "expected"), PAPER_TOTALS)
def test_totals_of_the_paper(n: int, expected: tuple[int, int, int]) -> None:
    assert tuple(largest_remainder(n, (6, 1, 3))) == expected


def test_image_split_gives_the_paper_totals_per_magnification_and_is_stratified() -> None:
    benign = {"40X": 625, "100X": 644, "200X": 623, "400X": 588}
    totals = {"40X": 1995, "100X": 2081, "200X": 2013, "400X": 1820}
    records = []
    for magnification, count in benign.items():
        records += make([("1", "benign", count), ("2", "malignant", totals[magnification] - count)], magnification)
    parts = split_records(records, (6, 1, 3), "image", seed=3)
    for magnification, (n, expected) in zip(totals, PAPER_TOTALS[:4], strict=True):
        rows = [(part, r.label) for part, r in zip(parts, records, strict=True) if r.magnification == magnification]
        counts = Counter(part for part, _ in rows)
        assert (counts["train"], counts["val"], counts["test"]) == expected
        for part, share in (("train", 0.6), ("val", 0.1), ("test", 0.3)):
            assert abs(sum(row == (part, "benign") for row in rows) - share * benign[magnification]) <= 1
        assert len(rows) == n


def test_image_split_is_not_by_file_order() -> None:
    records = make([("1", "benign", 100), ("2", "malignant", 100)])
    parts = split_records(records, (6, 1, 3), "image", seed=0)
    assert "test" in parts[:50]
    assert "train" in parts[50:100]


@pytest.mark.parametrize("level", ["exam", "patient"])
@pytest.mark.parametrize("ratio", [(6, 1, 3), (7, 1, 2), (70, 15, 15)])
def test_groups_stay_together_near_the_ratio(level: str, ratio: tuple[int, int, int]) -> None:
    records = realistic()
    parts = split_records(records, ratio, level, seed=1)
    sides = defaultdict(set)
    for part, record in zip(parts, records, strict=True):
        sides[getattr(record, level)].add(part)
    assert all(len(found) == 1 for found in sides.values())
    for label in ("benign", "malignant"):
        own = Counter(part for part, record in zip(parts, records, strict=True) if record.label == label)
        for part, share in zip(("train", "val", "test"), ratio, strict=True):
            assert abs(own[part] / sum(own.values()) - share / sum(ratio)) < 0.03


def test_slides_of_an_exam_may_part_only_by_patient() -> None:
    records = realistic()
    parts = split_records(records, (6, 1, 3), "patient", seed=0)
    sides = defaultdict(set)
    for part, record in zip(parts, records, strict=True):
        sides[record.exam].add(part)
    assert any(len(found) > 1 for found in sides.values())


def deviation(records: list[ImageRecord], folds: list[int], num_folds: int) -> float:
    labels = [record.label for record in records]
    worst = 0.0
    for label, total in Counter(labels).items():
        counts = Counter(fold for fold, own in zip(folds, labels, strict=True) if own == label)
        worst = max(worst, max(abs(counts[fold] - total / num_folds) / total for fold in range(num_folds)))
    return worst


@pytest.mark.parametrize("seed", range(3))
def test_folds_are_no_worse_than_scikit_learn(seed: int) -> None:
    records = realistic(seed)
    ours = fold_records(records, 5, "exam", seed)
    labels, exams = [r.label for r in records], [r.exam for r in records]
    theirs = [0] * len(records)
    splitter = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
    for fold, (_, held_out) in enumerate(splitter.split(labels, labels, exams)):
        for row in held_out:
            theirs[row] = fold
    assert deviation(records, ours, 5) <= deviation(records, theirs, 5)
    by_exam = defaultdict(set)
    for fold, exam in zip(ours, exams, strict=True):
        by_exam[exam].add(fold)
    assert all(len(found) == 1 for found in by_exam.values())


def test_image_folds_are_equal_and_stratified() -> None:
    records = make([("1", "benign", 103), ("2", "malignant", 207)])
    folds = fold_records(records, 5, "image", seed=0)
    assert set(Counter(folds).values()) == {62}
    benign = Counter(fold for fold, record in zip(folds, records, strict=True) if record.label == "benign")
    assert max(benign.values()) - min(benign.values()) <= 1


def test_same_seed_same_split_and_other_seed_another() -> None:
    records = realistic()
    first, again = (split_records(records, (6, 1, 3), "exam", 0) for _ in range(2))
    assert first == again
    assert split_records(records, (6, 1, 3), "exam", 1) != first


def test_a_class_with_too_few_groups_is_refused_with_ways_out() -> None:
    records = make([("1", "adenosis", 50), ("2", "adenosis", 60)] + [(f"m{i}", "ductal", 30) for i in range(20)])
    with pytest.raises(UserError, match=r"class adenosis has 2 exams \(1, 2\), but 3 parts") as caught:
        split_records(records, (6, 1, 3), "exam", 0)
    message = str(caught.value)
    assert "--task binary" in message
    assert "--group-by patient" in message  # its four slides would do
    assert "--group-by image" in message
    assert "--folds" not in message  # two groups make no three folds
    assert "\n" not in message


def test_fewer_folds_are_offered_where_they_would_work() -> None:
    records = make([(f"b{i}", "benign", 9) for i in range(4)] + [(f"m{i}", "malignant", 9) for i in range(20)])
    with pytest.raises(UserError, match=r"4 exams.*5 parts.*--folds 4"):
        fold_records(records, 5, "exam", 0)
    assert set(fold_records(records, 4, "exam", 0)) == {0, 1, 2, 3}


def test_one_class_and_unknown_groups_are_refused() -> None:
    with pytest.raises(UserError, match="one class only"):
        split_records(make([(f"b{i}", "benign", 9) for i in range(9)]), (6, 1, 3), "exam", 0)
    nameless = [ImageRecord(str(i), f"{i}.png", "ab"[i % 2]) for i in range(40)]
    with pytest.raises(UserError, match=r"--group-by exam: 0\.png has no known exam"):
        split_records(nameless, (6, 1, 3), "exam", 0)
    assert Counter(split_records(nameless, (6, 1, 3), "image", 0)) == {"train": 24, "val": 4, "test": 12}


def test_the_coarsest_known_level_is_used_and_none_is_refused() -> None:
    def level(asked: str, *groups: tuple[str, str]) -> str:
        return known_level(
            [ImageRecord("i", "i.png", "a", patient=patient, exam=exam) for patient, exam in groups], asked
        )

    assert [level(asked, ("1A", "1"), ("2", "2")) for asked in ("exam", "patient", "image")] == [
        "exam",
        "patient",
        "image",
    ]
    assert level("exam", ("1A", ""), ("2", "")) == "patient"
    assert level("image", ("", "")) == "image"
    for asked in ("exam", "patient"):
        with pytest.raises(UserError, match=rf"--group-by {asked}: no patient is known of any of the 2 images.*image"):
            level(asked, ("", ""), ("", ""))
    with pytest.raises(UserError, match="--group-by patient: i.png has no known patient"):
        level("exam", ("1A", ""), ("", ""))
    with pytest.raises(UserError, match="--group-by exam: i.png has no known exam"):
        level("exam", ("1A", "1"), ("2", ""))
