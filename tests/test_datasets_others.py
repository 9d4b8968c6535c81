"""BACH, Mini-DDSM, LC25000 and SARS-CoV-2 CT: their trees in their own naming, from recognition to prepared folder."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import Outcome
from PIL import Image

from breastcli.config import PrepareConfig, TrainConfig
from breastcli.data.datasets import DATASETS, bach, find_dataset, lc25000, mini_ddsm, sars_cov2_ct
from breastcli.data.store import PreparedData
from breastcli.errors import UsageError, UserError
from breastcli.prepare import prepare
from breastcli.records import Predictions
from breastcli.train import train

UNKNOWN = "LEAKY: image-level split, patients unknown, so leakage cannot be excluded"
VIEWS = ("LEFT_CC", "LEFT_MLO", "RIGHT_CC", "RIGHT_MLO")
# Class folder, and names of the class by number.
BACH = {"Photos/Normal": "n{:03d}.tif", "Photos/Benign": "b{:03d}.tif", "Photos/InSitu": "is{:03d}.tif"}
BACH |= {"Photos/Invasive": "iv{:03d}.tif"}
LC25000 = {"lung_image_sets/lung_n": "lungn{}.jpeg", "lung_image_sets/lung_aca": "lungaca{}.jpeg"}
LC25000 |= {"lung_image_sets/lung_scc": "lungscc{}.jpeg", "colon_image_sets/colon_n": "colonn{}.jpeg"}
LC25000 |= {"colon_image_sets/colon_aca": "colonca{}.jpeg"}
SARS = {"COVID": "Covid ({}).png", "non-COVID": "Non-Covid ({}).png"}
BY_NAME = {"bach": BACH, "lc25000": LC25000, "sars_cov2_ct": SARS}
NAMES = ("bach", "lc25000", "mini_ddsm", "sars_cov2_ct")
WITHOUT_GROUPS = ("bach", "sars_cov2_ct")  # of lc25000 siblings are found, see test_siblings.py


def mammograms(num_cases: int, malignant: str = "Cancer") -> list[str]:
    """Four views of each case, under the scanners' letters and the case's own folder."""
    cases = [
        (folder, f"{letter}_{number:04d}")
        for folder, letter in (("Normal", "A"), ("Benign", "C"), (malignant, "B"))
        for number in range(1, num_cases + 1)
    ]
    return [f"{folder}/{case[2:]}/{case}_1.{view}.png" for folder, case in cases for view in VIEWS]


def paths_of(name: str, per_class: int = 8, *, flat: bool = False) -> list[str]:
    if name == "mini_ddsm":
        return mammograms(per_class)
    return [
        ("" if flat else f"{folder}/") + pattern.format(number)
        for folder, pattern in BY_NAME[name].items()
        for number in range(1, per_class + 1)
    ]


def touch(root: Path, paths: list[str]) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def draw(root: Path, paths: list[str], mode: str = "RGB") -> Path:
    generator = np.random.default_rng(0)
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (24, 20, 3), np.uint8)
        Image.fromarray(pixels).convert(mode).save(root / path)
    return root


def run(raw: Path, out: Path, **options: object) -> PreparedData:
    prepare(PrepareConfig(raw=str(raw), out=str(out), **({"size": 16, "workers": 1} | options)))
    return PreparedData.open(out)


@pytest.mark.parametrize(
    ("name", "path", "label", "subtype", "patient"),
    [
        ("bach", "Photos/Normal/n001.tif", "benign", "normal", ""),
        ("bach", "b100.tif", "benign", "benign", ""),
        ("bach", "is042.tif", "malignant", "in_situ", ""),
        ("bach", "Invasive/iv099.png", "malignant", "invasive", ""),
        ("mini_ddsm", "Normal/1539/A_1539_1.LEFT_MLO.png", "benign", "normal", "A_1539"),
        ("mini_ddsm", "x/Benign/C_0029_1.RIGHT_CC.jpg", "benign", "benign", "C_0029"),
        ("mini_ddsm", "Cancer/0001/C_0001_1.RIGHT_CC.png", "malignant", "malignant", "C_0001"),
        ("mini_ddsm", "Malignant/B_3081_1.LEFT_CC.png", "malignant", "malignant", "B_3081"),
        ("mini_ddsm", "D_4562_1.LEFT_CC.png", "", "", "D_4562"),  # its class is in the folder only
        ("lc25000", "lung_colon_image_set/lung_image_sets/lung_n/lungn1.jpeg", "benign", "lung_n", ""),
        ("lc25000", "lungaca5000.jpeg", "malignant", "lung_aca", ""),
        ("lc25000", "lungscc1.jpeg", "malignant", "lung_scc", ""),
        ("lc25000", "colonn1.jpeg", "benign", "colon_n", ""),
        ("lc25000", "colon_aca/colonca1.jpeg", "malignant", "colon_aca", ""),
        ("sars_cov2_ct", "COVID/Covid (1).png", "covid", "covid", ""),
        ("sars_cov2_ct", "Non-Covid (1230).png", "non_covid", "non_covid", ""),
    ],
)
def test_names(name: str, path: str, label: str, subtype: str, patient: str) -> None:
    record = DATASETS.get(name).describe(path)
    assert record is not None
    assert (record.label, record.subtype, record.patient) == (label, subtype, patient)
    assert (record.exam, record.magnification) == ("", None)
    assert record.image_id == Path(path).stem


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("bach", ["test0.tif", "n1.tif", "ib001.tif", "n001_copy.tif", "Normal/0001.tif"]),
        ("mini_ddsm", ["Cancer/C_0001_1.LEFT_CC_Mask.png", "Cancer/0001.png", "Cancer/C_0001.LEFT_CC.png"]),
        ("lc25000", ["lung1.jpeg", "lungaca.jpeg", "colonaca1.jpeg", "lung_n/1.jpeg"]),
        ("sars_cov2_ct", ["Covid.png", "COVID-1.png", "Normal (1).png", "COVID/scan.png"]),
    ],
)
def test_other_names_are_not_read(name: str, paths: list[str]) -> None:
    assert [DATASETS.get(name).describe(path) for path in paths] == [None] * len(paths)


@pytest.mark.parametrize("name", NAMES)
def test_each_tree_is_recognised_as_itself(name: str, tmp_path: Path) -> None:
    trees = [touch(tmp_path / "folders", paths_of(name, 2))]
    if name != "mini_ddsm":
        trees.append(touch(tmp_path / "flat", paths_of(name, 2, flat=True)))
    for tree in trees:
        assert find_dataset("auto", tree).name == name
        assert len(DATASETS.get(name).scan(tree).records) == len(paths_of(name, 2))
        for other in {*DATASETS.names()} - {name, "folder"}:  # a folder is any, asked last
            assert not DATASETS.get(other).recognises(tree), other


def test_breakhis_is_still_itself_and_two_data_sets_in_one_folder_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, ["BreaKHis_v1/SOB_B_A-14-1AB-40-001.png"])
    assert find_dataset("auto", tmp_path).name == "breakhis"
    touch(tmp_path, ["b001.png"])
    with pytest.raises(UsageError, match=r"named like those of bach, breakhis: name one with --dataset"):
        find_dataset("auto", tmp_path)


@pytest.mark.parametrize(
    ("name", "moved"), [("bach", "Photos/Benign/n001.tif"), ("sars_cov2_ct", "COVID/Non-Covid (1).png")]
)
def test_a_folder_of_another_class_is_no_class_at_all(name: str, moved: str, tmp_path: Path) -> None:
    tree = touch(tmp_path, [path for path in paths_of(name, 2) if Path(path).name != Path(moved).name])
    touch(tree, [moved, "cat.png"])
    scan = DATASETS.get(name).scan(tree)
    assert len(scan.records) == len(paths_of(name, 2)) - 1
    reasons = {one.path: one.reason for one in scan.rejected}
    assert reasons[moved] == "its name and folders do not tell one class"
    assert "file name" in reasons["cat.png"]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_without_images_is_refused(name: str, tmp_path: Path) -> None:
    touch(tmp_path, ["cat.png"])
    with pytest.raises(UserError, match="no .* image below .*: give the folder"):
        DATASETS.get(name).scan(tmp_path)


@pytest.mark.parametrize(
    ("adapter", "total", "counts"),
    [
        (bach, 400, [("normal", 100), ("benign", 100), ("in_situ", 100), ("invasive", 100)]),
        (mini_ddsm, 9684, [("normal", 2728), ("benign", 3360), ("malignant", 3596)]),
        (sars_cov2_ct, 2482, [("non_covid", 1230), ("covid", 1252)]),
        (lc25000, 25_000, [(name, 5000) for name in ("lung_n", "colon_n", "lung_aca", "lung_scc", "colon_aca")]),
    ],
)
def test_published_counts(adapter: ModuleType, total: int, counts: list[tuple[str, int]]) -> None:
    assert list(adapter.NUM_IMAGES.items()) == counts
    assert sum(adapter.NUM_IMAGES.values()) == total
    entry = DATASETS.get(adapter.__name__.split(".")[-1])
    assert (entry.scan, entry.subtypes) == (adapter.scan, tuple(name for name, _ in counts))


@pytest.mark.parametrize(("name", "total", "title"), [("bach", 400, "BACH"), ("lc25000", 25_000, "LC25000")])
def test_the_full_set_and_one_that_lacks_images(name: str, total: int, title: str, tmp_path: Path) -> None:
    per_class = total // len(BY_NAME[name])
    scan = DATASETS.get(name).scan(touch(tmp_path, paths_of(name, per_class)))
    assert scan.notes[0] == f"all {total:,} images of {title}; every count is as published"
    (tmp_path / paths_of(name, 7)[0]).unlink()  # the first class is the first subtype
    first = DATASETS.get(name).subtypes[0]
    note = f"{total - 1:,} of {total:,} images of {title} ({first} {per_class - 1:,} of {per_class:,})"
    assert DATASETS.get(name).scan(tmp_path).notes[0] == note


def test_ct_counts_name_each_class(tmp_path: Path) -> None:
    touch(tmp_path, [SARS["COVID"].format(k) for k in range(1252)] + [SARS["non-COVID"].format(1)])
    assert sars_cov2_ct.scan(tmp_path).notes == ["1,253 of 2,482 images of SARS-CoV-2 CT (non_covid 1 of 1,230)"]


def test_siblings_of_lc25000_are_told(tmp_path: Path) -> None:
    notes = lc25000.scan(touch(tmp_path, ["lungn1.jpeg"])).notes
    assert "1,250 originals" in notes[1]
    assert "which images are siblings" in notes[1]


def test_views_of_a_case_stay_together_and_masks_are_left_aside(tmp_path: Path) -> None:
    raw = draw(tmp_path / "raw", paths_of("mini_ddsm", 6), "L")
    draw(raw, ["Cancer/0001/B_0001_1.LEFT_CC_Mask.png", "Benign/0002/C_0002_1.LEFT_CC_Mask2.png"], "L")
    data = run(raw, tmp_path / "out")
    assert len(data.rows) == 72
    assert "lesion masks left aside: 2" in data.card["notes"]
    assert data.card["num_rejected"] == 0
    assert "exams are unknown: grouped by patient" in data.card["notes"]
    split, options = data.card["split"], data.card["options"]
    assert (split["level"], split["leaky"], split["shared_with_training"]) == ("patient", None, 0)
    assert options["group_by"] == "exam"
    assert (data.card["num_exams"], data.card["num_patients"]) == (None, 18)
    sides = defaultdict(set)
    for row in data.rows:
        sides[row.record.patient].add(row.split)
    assert len(sides) == 18
    assert all(len(found) == 1 for found in sides.values())
    before = (tmp_path / "out" / "manifest.csv").stat().st_mtime_ns
    run(raw, tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "manifest.csv").stat().st_mtime_ns == before


def test_an_image_split_of_known_patients_counts_them(tmp_path: Path) -> None:
    data = run(draw(tmp_path / "raw", paths_of("mini_ddsm", 6), "L"), tmp_path / "out", group_by="image")
    shared, held_out = data.card["split"]["shared_with_training"], data.card["split"]["num_held_out"]
    assert 0 < shared <= held_out
    assert data.card["split"]["leaky"] == "LEAKY: image-level split"
    note = f"LEAKY: image-level split; {shared} of {held_out} held-out images share a patient with training"
    assert note in data.card["notes"]


def test_sixteen_bit_mammograms_keep_the_full_range(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    for number, path in enumerate(paths_of("mini_ddsm", 3)):
        (raw / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 20), 257 * number, np.uint16)).save(raw / path)
    data = run(raw, tmp_path / "out")
    expected = {Path(path).stem: number for number, path in enumerate(paths_of("mini_ddsm", 3))}
    for row, pixels in zip(data.rows, data.images, strict=True):
        assert np.array_equal(pixels, np.full((16, 16, 3), expected[row.record.image_id]))


def test_ct_slices_of_any_size_lie_on_white(tmp_path: Path) -> None:
    raw = draw(tmp_path / "raw", paths_of("sars_cov2_ct"), "RGBA")
    clear, opaque = raw / "COVID" / "Covid (1).png", raw / "COVID" / "Covid (2).png"
    Image.new("RGBA", (50, 31), (9, 9, 9, 0)).save(clear)
    Image.new("RGBA", (17, 44), (9, 8, 7, 255)).save(opaque)
    data = run(raw, tmp_path / "out", group_by="image")
    pixels = {row.record.image_id: image for row, image in zip(data.rows, data.images, strict=True)}
    assert data.card["num_rejected"] == 0
    assert (pixels["Covid (1)"] == 255).all()
    assert (pixels["Covid (2)"] == (9, 8, 7)).all()


@pytest.mark.parametrize("level", ["exam", "patient"])
@pytest.mark.parametrize("name", WITHOUT_GROUPS)
def test_groups_are_refused_where_no_patient_is_known(name: str, level: str, tmp_path: Path) -> None:
    raw = touch(tmp_path / "raw", paths_of(name))  # empty files: refused before any is decoded
    with pytest.raises(UserError, match=f"--group-by {level}: no patient is known.*--group-by image") as caught:
        run(raw, tmp_path / "out", group_by=level)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / ".partial").exists()


@pytest.mark.parametrize("name", WITHOUT_GROUPS)
def test_the_stamp_says_that_patients_are_unknown(name: str, tmp_path: Path) -> None:
    data = run(draw(tmp_path / "raw", paths_of(name)), tmp_path / "out", group_by="image")
    split = data.card["split"]
    assert (split["leaky"], split["shared_with_training"]) == (UNKNOWN, None)
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["verdict"] == UNKNOWN
    assert any(note.startswith(f"{UNKNOWN}; any of {split['num_held_out']} ") for note in data.card["notes"])
    assert (data.card["num_exams"], data.card["num_patients"]) == (None, None)


@pytest.mark.parametrize(
    ("name", "options", "classes"),
    [
        ("bach", {}, ("benign", "malignant")),
        ("bach", {"task": "subtype"}, ("benign", "in_situ", "invasive", "normal")),
        ("bach", {"task": "subtype", "classes": "benign,normal"}, ("normal", "benign")),
        ("mini_ddsm", {"task": "subtype", "classes": "malignant, normal"}, ("normal", "malignant")),
        ("lc25000", {}, ("benign", "malignant")),
        ("lc25000", {"task": "subtype", "classes": "lung_aca,lung_n"}, ("lung_n", "lung_aca")),
        ("sars_cov2_ct", {}, ("non_covid", "covid")),
        ("sars_cov2_ct", {"task": "subtype"}, ("non_covid", "covid")),
    ],
)
def test_the_harmful_of_two_classes_is_the_positive_one(
    name: str, options: dict, classes: tuple[str, ...], tmp_path: Path
) -> None:
    data = run(draw(tmp_path / "raw", paths_of(name)), tmp_path / "out", group_by="image", **options)
    assert data.classes == classes


@pytest.mark.parametrize(
    ("name", "classes", "subtypes"),
    [
        ("lc25000", "lung_n,lung_aca,lung_scc", {"lung_n", "lung_aca", "lung_scc"}),
        ("lc25000", "malignant,lung_n", {"lung_n", "lung_aca", "lung_scc", "colon_aca"}),
        ("mini_ddsm", "benign,malignant", {"benign", "malignant"}),  # the subtype, not normal as well
        ("mini_ddsm", "all", {"normal", "benign", "malignant"}),
    ],
)
def test_classes_to_keep(name: str, classes: str, subtypes: set[str], tmp_path: Path) -> None:
    raw = draw(tmp_path / "raw", paths_of(name, 6))
    data = run(raw, tmp_path / "out", group_by="image", classes=classes)
    assert {row.record.subtype for row in data.rows} == subtypes
    note = f"{len(data.rows)} of them of {', '.join(classes.split(','))}"
    assert (note in data.card["notes"]) == (classes != "all")
    with pytest.raises(UserError, match="another --classes"):
        run(raw, tmp_path / "out", group_by="image", classes=sorted(subtypes)[0], resume=True)


def test_refusals_are_one_line(tmp_path: Path) -> None:
    raw, out = touch(tmp_path / "raw", paths_of("lc25000")), tmp_path / "out"
    with pytest.raises(UsageError, match="no such class 'lungn': did you mean 'lung_n'"):
        run(raw, out, classes="lung_aca,lungn")
    with pytest.raises(UsageError, match="no such class '': use lung_n, colon_n, lung_aca"):
        run(raw, out, classes="lung_aca,")
    with pytest.raises(UserError, match="--mag 40x: lc25000 has no magnifications: leave --mag out"):
        run(raw, out, mag="40x", overwrite=True)
    draw(raw, paths_of("lc25000"))
    with pytest.raises(UserError, match="one class only .*--classes"):
        run(raw, out, classes="lung_aca,lung_scc", group_by="image", overwrite=True)
    mammography = touch(tmp_path / "mammography", mammograms(2, "Malignant"))
    with pytest.raises(UserError, match="--stain macenko: mini_ddsm is not H&E-stained"):
        run(mammography, tmp_path / "stained", stain="macenko")


# Images of each class, and the positive class: every data set's miniature goes through the whole chain.
MINIATURES = {"bach": (12, "malignant"), "lc25000": (8, "malignant"), "mini_ddsm": (6, "malignant")}
MINIATURES |= {"sars_cov2_ct": (20, "covid")}


@pytest.mark.parametrize("name", NAMES)
def test_from_raw_folder_to_report(name: str, tmp_path: Path, breastcli: Callable[..., Outcome]) -> None:
    """Patients are counted where they are known, and not invented where they are not."""
    per_class, positive = MINIATURES[name]
    draw(tmp_path / "raw", paths_of(name, per_class))
    known = name == "mini_ddsm"
    level = "image" if name in WITHOUT_GROUPS else "exam"
    done = breastcli("prepare", "raw", "--out", "data", "--size", 64, "--group-by", level)
    assert done.code == 0, done.stderr
    assert ("patients unknown" in done.stdout) == (name in WITHOUT_GROUPS)
    assert ("(2 patients)" in done.stdout) == known
    train = ("train", "--data", "data", "--arch", "timm/test_resnet", "--epochs", 1, "--batch-size", 8)
    done = breastcli(*train, "--device", "cpu", "--out", "run")
    assert done.code == 0, done.stderr
    done = breastcli("evaluate", "run", "--device", "cpu", "--resamples", 100, "--json")
    assert done.code == 0, done.stderr
    scores, report = done.json, (tmp_path / "run" / "report.html").read_text()
    assert f"positive class: {positive}" in scores["image"]["notes"]
    if known:
        predictions = Predictions.from_csv(tmp_path / "run" / "evaluate" / "test" / "predictions.csv")
        assert scores["patient"]["vote"]["n"] == len({*predictions.column("patient")}) < len(predictions)
        return
    assert scores["patient"] is None
    assert not (tmp_path / "run" / "evaluate" / "test" / "patients.png").exists()
    if name == "lc25000":
        assert "patients stay unknown" in report
        return
    assert any("patients are unknown" in note for note in scores["image"]["notes"])
    assert UNKNOWN in report
    assert "Images of one patient can be on both sides" in report


def test_lesion_masks_of_mammograms_serve_explain(tmp_path: Path, breastcli: Callable[..., Outcome]) -> None:
    """The masks that prepare leaves aside are found among the images, several of one image joined."""
    raw = draw(tmp_path / "raw", mammograms(6), "L")
    run(raw, tmp_path / "data", size=64)
    tested = [row.record for row in PreparedData.open(tmp_path / "data").rows if row.split == "test"]
    lesions = np.zeros((24, 20), np.uint8)
    lesions[:8, :8] = 255
    for number, record in enumerate(tested[:4]):
        path = raw / record.path
        Image.fromarray(lesions).save(path.with_name(f"{path.stem}_Mask.png"))
        if number == 0:
            Image.fromarray(lesions[::-1]).save(path.with_name(f"{path.stem}_Mask2.png"))
    config = TrainConfig(arch="timm/test_resnet", data=str(tmp_path / "data"), out=str(tmp_path / "run"), epochs=1)
    train(dataclasses.replace(config, device="cpu", batch_size=8))
    done = breastcli(
        "explain", "run", "--method", "gradcam", "--masks", "raw", "--num", "all", "--device", "cpu", "--json"
    )
    assert done.code == 0, done.stderr
    assert done.json["localisation"]["n"] == 4
