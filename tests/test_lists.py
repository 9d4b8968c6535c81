"""Lists that a user or a publication wrote: what is read, what belongs to which image, and what is refused."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome

from breastcli.config import PrepareConfig
from breastcli.data.lists import read_list
from breastcli.data.patients import assign_patients, find_in_names
from breastcli.data.store import PreparedData
from breastcli.errors import LeakError, UsageError, UserError
from breastcli.prepare import prepare
from breastcli.records import ImageRecord

HEADINGS = {"split": ("split", "grp"), "fold": ("fold",)}
HEADLESS = (("image", "split"), ("image", "magnification", "fold", "split"))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def record(path: str, **known: str) -> ImageRecord:
    return ImageRecord(image_id=path, path=path, label="benign", **known)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        (
            "SOB_B_A-14-1AB-40-001.png|40|1|train\n",
            {"image": "SOB_B_A-14-1AB-40-001.png", "split": "train", "fold": "1"},
        ),
        ("fold,mag,grp,filename\n1,40,train,a/x.png\n", {"image": "a/x.png", "split": "train", "fold": "1"}),
        ("\ufeffPath;Split\r\n x.png ; test \r\n", {"image": "x.png", "split": "test"}),
        ("image_id\tpath\tsplit\n7\tb/y.tif\tval\n", {"image": "b/y.tif", "split": "val"}),  # a path before an id
        ('path,split\n"a, b.png",val\n\n', {"image": "a, b.png", "split": "val"}),
        ("x.png,test", {"image": "x.png", "split": "test"}),
    ],
)
def test_common_forms_are_read(text: str, first: dict[str, str], tmp_path: Path) -> None:
    rows = read_list(write(tmp_path / "list.txt", text), HEADINGS, HEADLESS).rows
    assert len(rows) == 1
    assert first.items() <= rows[0].items()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("path,split\n", "lists no image"),
        ("number,split\n1,train\n", "has no column of images: head it"),
        ("path,split\na.png,train\nb.png\n", "line 3 has 1 values, the first line 2"),
        ("path,split\n,train\n", "line 2 names no image"),
        ('path,split\n"a.png,train\n', "is not a CSV file"),
    ],
)
def test_other_texts_are_refused_by_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_list(write(tmp_path / "list.csv", text), HEADINGS, HEADLESS)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(b"path,split\n\xff\xfe.png,train\n")
    with pytest.raises(UserError, match="is not a text file"):
        read_list(tmp_path / "list.csv", HEADINGS, HEADLESS)
    with pytest.raises(UserError, match="cannot read .*No such file"):
        read_list(tmp_path / "none.csv", HEADINGS, HEADLESS)


@pytest.mark.parametrize(
    ("listed", "path", "matches"),
    [
        ("x.png", "deep/below/x.png", True),
        ("BreaKHis_v1/breast/x.png", "breast/x.png", True),  # RAW lies below what the list starts from
        ("breast/x.png", "BreaKHis_v1/breast/x.jpg", True),  # or above it
        ("/home/someone/breast/x.png", "breast/x.png", True),
        ("C:\\data\\breast\\x.png", "breast/x.png", True),
        ("benign/x.png", "malignant/x.png", False),
        ("x", "x.png", True),
        ("C_0001_1.LEFT_CC", "Cancer/C_0001_1.LEFT_CC.png", True),  # a name with a full stop, without its suffix
        ("y.png", "x.png", False),
    ],
)
def test_a_line_names_an_image_by_any_end_of_its_path(listed: str, path: str, matches: bool, tmp_path: Path) -> None:
    found = read_list(write(tmp_path / "list.csv", f"path,split\n{listed},train\n"), HEADINGS, ())
    assert [row is not None for row in found.match([record(path)])] == [matches]


def test_a_line_of_a_bare_name_and_two_that_disagree(tmp_path: Path) -> None:
    listed = read_list(write(tmp_path / "a.csv", "path,split\nx.png,train\na/x.png,train\n"), HEADINGS, ())
    assert listed.match([record("a/x.png"), record("b/x.png")]) == [listed.rows[0], listed.rows[0]]
    listed = read_list(write(tmp_path / "b.csv", "path,split\nx.png,train\na/x.png,test\n"), HEADINGS, ())
    with pytest.raises(UserError, match="says two things of a/x.png"):
        listed.match([record("a/x.png")])


def test_patients_from_names_and_lists(tmp_path: Path) -> None:
    images = [record("a/P1_x.png", patient="old", exam="7"), record("a/P2_x.png", exam="7")]
    assert [(one.patient, one.exam) for one in assign_patients(images, r"(P\d)_")] == [("P1", ""), ("P2", "")]
    listed = write(tmp_path / "p.csv", "file,patient,cluster\nP1_x.png,anna,1\nP2_x.png,,1\n")
    assert [(one.patient, one.exam) for one in assign_patients(images, str(listed))] == [("anna", "1"), ("", "1")]
    listed = write(tmp_path / "headless.csv", "P1_x.png,anna\nP2_x.png,berta\n")
    assert [one.patient for one in assign_patients(images, str(listed))] == ["anna", "berta"]
    assert find_in_names("P.", ["P1", "xP2"]) == ["P1", "P2"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("(", "not a regular expression"),
        ("Q", "finds nothing in a/P1_x.png: make it fit every image"),
        ("(Q?)", "finds nothing in"),
        ("nowhere.csv", "no such file: give a CSV file, or a regular expression"),
    ],
)
def test_patients_that_cannot_be_found_are_refused(given: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        assign_patients([record("a/P1_x.png")], given)


def test_a_list_of_patients_must_name_all(tmp_path: Path) -> None:
    images = [record("a.png"), record("b.png"), record("c.png")]
    with pytest.raises(UserError, match=r"does not name b.png and 1 other images: add them"):
        assign_patients(images, str(write(tmp_path / "p.csv", "path,patient\na.png,1\n")))
    with pytest.raises(UserError, match="has no column of patients: head it patient"):
        assign_patients(images, str(write(tmp_path / "q.csv", "path,age\na.png,1\n")))


def rows_of(prepared: Path) -> list:
    return PreparedData.open(prepared).rows


def run(raw: Path, out: Path, **options: object) -> PreparedData:
    prepare(PrepareConfig(raw=str(raw), out=str(out), **({"size": 16, "workers": 1} | options)))
    return PreparedData.open(out)


def official(rows: list, path: Path, *, level: str, folds: int = 2) -> Path:
    """Write a list as BreakHis's official ones are, its folds divided by whole groups of ``level``."""
    lines = []
    for fold in range(1, folds + 1):
        groups = sorted({getattr(row.record, level) for row in rows})
        test = {group for place, group in enumerate(groups) if (place + fold) % 3 == 0}
        for row in rows:
            side = "test" if getattr(row.record, level) in test else "train"
            name, magnification = Path(row.record.path).name, row.record.magnification.removesuffix("X")
            lines.append(f"{name}|{magnification}|{fold}|{side}")
    return write(path, "\n".join(lines) + "\n")


def test_an_imported_split_is_that_of_the_list(raw: Path, prepared: Path, tmp_path: Path) -> None:
    listed = official(rows_of(prepared), tmp_path / "dsfold.txt", level="exam")
    data = run(raw, tmp_path / "out", import_split=str(listed), import_fold="2")
    wanted = {line.split("|")[0]: line.split("|")[3] for line in listed.read_text().split() if "|2|" in line}
    sides = {Path(row.record.path).name: row.split for row in data.rows}
    assert {name for name, side in sides.items() if side == "test"} == {n for n, s in wanted.items() if s == "test"}
    assert {"train", "val"} == {side for name, side in sides.items() if wanted[name] == "train"}
    exams = defaultdict(set)
    for row in data.rows:
        exams[row.record.exam].add(row.split)
    assert all(len(found) == 1 for found in exams.values())
    split = data.card["split"]
    assert (split["imported"]["file"], split["imported"]["fold"], split["ratio"]) == ("dsfold.txt", "2", None)
    (note,) = [note for note in data.card["notes"] if note.startswith("split imported")]
    num_test = sum(side == "test" for side in wanted.values())
    assert f"fold 2: {len(wanted) - num_test} train, {num_test} test images" in note
    assert note.endswith("validation images are drawn from its training images")


def test_a_published_split_that_parts_exams_leaks(raw: Path, prepared: Path, tmp_path: Path) -> None:
    """What the official folds do: slides are kept together, but not the exams they were cut from."""
    rows = rows_of(prepared)
    listed = official(rows, tmp_path / "dsfold.txt", level="patient", folds=1)
    side_of = {line.split("|")[0]: line.split("|")[3] for line in listed.read_text().split()}
    with pytest.raises(LeakError, match="exam .* is on two sides.*a coarser --group-by takes the published split"):
        run(raw, tmp_path / "exam", import_split=str(listed))
    data = run(raw, tmp_path / "patient", import_split=str(listed), group_by="patient")
    exams = defaultdict(set)
    for row in rows:
        exams[row.record.exam].add(side_of[Path(row.record.path).name])
    expected = {
        label: (
            sum(row.record.label == label for row in found),
            sum(row.record.label == label and len(exams[row.record.exam]) > 1 for row in found),
        )
        for found in [[row for row in rows if side_of[Path(row.record.path).name] == "test"]]
        for label in ("benign", "malignant")
    }
    audit = json.loads((tmp_path / "patient" / "audit.json").read_text())
    shared = {row["class"]: (row["images"], row["shared"]) for row in audit["shared_by_class"] if row["side"] == "test"}
    assert shared == expected
    assert sum(count for _, count in shared.values()) > 0
    assert {row.split for row in data.rows} == {"train", "val", "test"}


def test_sides_of_a_list_with_validation_are_kept_and_others_left_out(
    raw: Path, prepared: Path, tmp_path: Path
) -> None:
    rows = rows_of(prepared)
    words = {"train": "Training", "val": "dev", "test": "TEST"}
    lines = [f"{row.record.path},{words[row.split]}" for row in rows[3:]] + ["nowhere.png,train"]
    listed = write(tmp_path / "split.csv", "path,set\n" + "\n".join(lines))
    data = run(raw, tmp_path / "out", import_split=str(listed))
    assert [row.side for row in data.rows] == [row.side for row in rows[3:]]
    assert (tmp_path / "out" / "rejected.csv").read_text().count("not in the split list") == 3
    assert any("1 of its lines name no image that is prepared" in note for note in data.card["notes"])
    with pytest.raises(UserError, match="--strict: 3 files were rejected"):
        run(raw, tmp_path / "strict", import_split=str(listed), strict=True)


def test_folds_of_a_list(raw: Path, folds: Path, tmp_path: Path) -> None:
    rows = rows_of(folds)
    lines = [f"{row.record.image_id};{row.fold + 1}" for row in rows]
    listed = write(tmp_path / "folds.csv", "image;fold\n" + "\n".join(lines))
    data = run(raw, tmp_path / "out", import_split=str(listed))
    assert data.num_folds == 3
    assert [row.fold for row in data.rows] == [row.fold for row in rows]
    assert data.card["split_fingerprint"] == PreparedData.open(folds).card["split_fingerprint"]
    before = (tmp_path / "out" / "manifest.csv").stat().st_mtime_ns
    run(raw, tmp_path / "out", import_split=str(listed), resume=True)
    assert (tmp_path / "out" / "manifest.csv").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("text", "options", "error", "message"),
    [
        ("{a}|40|1|train\n{b}|40|2|test\n", {}, UsageError, "holds 2 splits: choose one with --import-fold 1|2"),
        ("{a}|40|1|train\n{b}|40|1|test\n", {"import_fold": "3"}, UsageError, "no such fold: use 1"),
        ("{a}|40|train\n{b}|40|test\n", {"import_fold": "1"}, UsageError, "no such fold: leave it out"),
        ("{a}|40|1|train\n", {}, UserError, "has no test images"),
        ("{a},exam\n{b},test\n", {}, UserError, "stands on 'exam': use train, val or test"),
        ("path,fold\n{a},1\n{b},2\n", {}, UserError, "has 2 folds: three or more are needed"),
        ("path,fold\n{a},1\n{b},2\n", {"import_fold": "1"}, UsageError, "divides the images into folds"),
        ("path,age\n{a},1\n", {}, UserError, "has no column of splits: head it split"),
        ("x.png,train\ny.png,test\n", {}, UserError, "names none of the 96 images: compare its first line"),
        ("{a},train\n{b},test\n", {"folds": 3}, UsageError, "--folds: the split is imported"),
    ],
)
def test_lists_that_give_no_split_are_refused(
    text: str, options: dict, error: type[UserError], message: str, raw: Path, prepared: Path, tmp_path: Path
) -> None:
    names = {key: row.record.image_id + ".png" for key, row in zip("ab", rows_of(prepared), strict=False)}
    listed = write(tmp_path / "list.csv", text.format(**names))
    with pytest.raises(error, match=message.replace("|", r"\|")) as caught:
        run(raw, tmp_path / "out", import_split=str(listed), **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_import_fold_needs_a_list(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--import-fold: there is no --import-split"):
        run(raw, tmp_path / "out", import_fold="1")


@pytest.mark.real
def test_published_form_on_real_images(real_data: Path, tmp_path: Path, breastcli: Callable[..., Outcome]) -> None:
    """A split by slide of real names parts the exams that several slides come from, and the audit counts them."""
    root = real_data / "breakhis_original"
    slides = {"22549AB": "test", "18842": "test", "13412": "test", "16184CD": "test"}
    names = sorted(path.name for path in root.rglob("*.png"))
    lines = [f"{name}|{name.split('-')[-2]}|1|{slides.get(name.split('-')[2], 'train')}" for name in names]
    write(tmp_path / "dsfold1.txt", "\n".join(lines))
    command = ("prepare", root, "--size", 32, "--import-split", "dsfold1.txt")
    refused = breastcli(*command, "--out", "exam")
    assert refused.code == 3
    assert "on two sides of the split" in refused.stderr
    done = breastcli(*command, "--out", "patient", "--group-by", "patient", "--json")
    assert done.code == 0, done.stderr
    test = [row for row in done.json["audit"]["shared_by_class"] if row["side"] == "test"]
    others = {name.split("-")[2] for name in names} - set(slides)
    related = [
        name
        for name in names
        if slides.get(name.split("-")[2])
        and any(other.rstrip("ABCDEFG") == name.split("-")[2].rstrip("ABCDEFG") for other in others)
    ]
    assert sum(row["shared"] for row in test) == len(related) > 0
