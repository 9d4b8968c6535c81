from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from breastcli.data.datasets import DATASETS, breakhis, find_dataset
from breastcli.data.datasets.breakhis import SUBTYPES, describe
from breastcli.errors import UsageError, UserError


@pytest.mark.parametrize(
    ("name", "label", "subtype", "patient", "exam", "magnification"),
    [
        ("SOB_B_A-14-22549AB-40-001.png", "benign", "adenosis", "22549AB", "22549", "40X"),
        ("SOB_M_DC-14-2523-100-001.png", "malignant", "ductal_carcinoma", "2523", "2523", "100X"),
        ("SOB_M_PC-15-190EF-400-009.png", "malignant", "papillary_carcinoma", "190EF", "190", "400X"),
        ("a/b/SOB_M_LC-14-13412-200-031.png", "malignant", "lobular_carcinoma", "13412", "13412", "200X"),
        ("SOB_B_PT-14-21998AB-100-061.tif", "benign", "phyllodes_tumor", "21998AB", "21998", "100X"),
    ],
)
def test_names(name: str, label: str, subtype: str, patient: str, exam: str, magnification: str) -> None:
    record = describe(name)
    assert record is not None
    found = (record.label, record.subtype, record.patient, record.exam, record.magnification)
    assert found == (label, subtype, patient, exam, magnification)
    assert record.image_id == Path(name).stem
    assert record.path == name


@pytest.mark.parametrize(
    "name",
    [
        "SOB_B_DC-14-2523-100-001.png",  # a ductal carcinoma is not benign
        "SOB_M_A-14-2523-100-001.png",
        "SOB_M_DC-14-2523-50-001.png",
        "SOB_M_DC-2523-100-001.png",
        "copy of SOB_M_DC-14-2523-100-001.png",
        "field.png",
    ],
)
def test_other_names_are_not_read(name: str) -> None:
    assert describe(name) is None


def write_tree(root: Path, names: list[str]) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_the_tree_is_found_from_above_and_below(raw: Path) -> None:
    tree = raw / "BreaKHis_v1"
    above = {record.image_id for record in DATASETS.get("sample").scan(raw).records}
    below = {record.image_id for record in breakhis.scan(tree / "histology_slides" / "breast").records}
    assert len(above) == 96
    assert above == below


def test_flat_folders_foreign_and_doubled_names(tmp_path: Path) -> None:
    names = ["SOB_B_A-14-1AB-40-001.png", "x/SOB_B_A-14-1AB-40-001.png", "SOB_M_DC-14-2-40-001.png", "cat.png"]
    write_tree(tmp_path, [*names, "notes.txt", "._SOB_M_DC-14-2-40-002.png"])
    scan = breakhis.scan(tmp_path)
    assert [record.path for record in scan.records] == ["SOB_B_A-14-1AB-40-001.png", "SOB_M_DC-14-2-40-001.png"]
    reasons = {one.path: one.reason for one in scan.rejected}
    assert reasons["cat.png"] == "not a BreakHis file name"
    assert "same name as" in reasons["x/SOB_B_A-14-1AB-40-001.png"]
    assert len(reasons) == 2
    assert scan.notes == ["2 of 7,909 images of BreakHis"]


def full_set() -> list[str]:
    """Names with the published number of images of every subtype and magnification."""
    names = []
    for code, (_, counts) in SUBTYPES.items():
        group = "B" if code in ("A", "F", "PT", "TA") else "M"
        for magnification, count in zip((40, 100, 200, 400), counts, strict=True):
            for number in range(count):
                names.append(f"SOB_{group}_{code}-14-{100 + number % 9}{code}-{magnification}-{number:03d}.png")
    return names


def test_published_counts_add_up() -> None:
    records = [describe(name) for name in full_set()]
    assert len(records) == 7909
    assert Counter(record.label for record in records) == {"benign": 2480, "malignant": 5429}
    assert Counter(record.magnification for record in records) == {
        "40X": 1995,
        "100X": 2081,
        "200X": 2013,
        "400X": 1820,
    }


def test_the_full_set_is_checked_against_the_published_counts() -> None:
    names = full_set()
    records = [describe(name) for name in names]
    assert breakhis.count_notes(records) == ["all 7,909 images of BreakHis; every count is as published"]
    moved = names[0].replace("SOB_B_A-14-100A-40-", "SOB_B_A-14-100A-100-9")
    changed = [describe(moved), *records[1:]]
    assert breakhis.count_notes(changed) == [
        "adenosis 40X: 113 images, expected 114",
        "adenosis 100X: 114 images, expected 113",
    ]


def test_auto_tells_drawn_from_real(raw: Path, tmp_path: Path) -> None:
    assert find_dataset("auto", raw).name == "sample"
    write_tree(tmp_path, ["SOB_B_A-14-1AB-40-001.png"])
    assert find_dataset("auto", tmp_path).name == "breakhis"


def test_unknown_data_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no data set that breastcli knows"):
        find_dataset("auto", tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        find_dataset("auto", tmp_path / "none")
    with pytest.raises(UsageError, match="did you mean 'breakhis'"):
        find_dataset("breakhs", tmp_path)
    with pytest.raises(UserError, match="no BreakHis image"):
        breakhis.scan(tmp_path)


def test_every_adapter_says_where_it_comes_from() -> None:
    for name in DATASETS.names():
        adapter = DATASETS.get(name)
        assert adapter.name == name
        assert all((adapter.title, adapter.licence, adapter.citation, adapter.homepage))
        assert (adapter.draw is not None) == adapter.drawn


@pytest.mark.real
def test_real_names_and_shared_exams(real_data: Path) -> None:
    scan = breakhis.scan(real_data / "breakhis_original")
    assert len(scan.records) == 111
    assert not scan.rejected
    by_exam: dict[str, set[str]] = {}
    for record in scan.records:
        by_exam.setdefault(record.exam, set()).add(record.patient)
    assert by_exam["22549"] == {"22549AB", "22549CD", "22549G"}
    assert by_exam["18842"] == {"18842", "18842D"}
    assert {record.subtype for record in scan.records if record.exam == "29960"} == {"adenosis", "fibroadenoma"}
