"""Images of any origin: class folders and lists."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Outcome
from PIL import Image

from breastcli.config import PrepareConfig
from breastcli.data.datasets import DATASETS, find_dataset
from breastcli.data.datasets.folder import order_classes
from breastcli.data.store import PreparedData
from breastcli.errors import UsageError, UserError
from breastcli.prepare import prepare

FOLDER = DATASETS.get("folder")


def draw(root: Path, *paths: str, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (24, 20, 3), np.uint8)).save(root / path)
    return root


def tree(root: Path, classes: tuple[str, ...] = ("tumour", "normal"), patients: int = 6) -> Path:
    names = [f"{name}/p{k}_{view}.png" for name in classes for k in range(patients) for view in "ab"]
    return draw(root, *names)


def run(raw: Path, out: Path, **options: object) -> PreparedData:
    prepare(PrepareConfig(raw=str(raw), out=str(out), **({"size": 16, "workers": 1} | options)))
    return PreparedData.open(out)


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (["cancer", "normal"], ("normal", "cancer")),
        (["malignant", "Benign"], ("Benign", "malignant")),
        (["covid", "non-covid"], ("non-covid", "covid")),
        (["b", "a"], ("a", "b")),
        (["invasive", "healthy_tissue", "benign"], ("benign", "healthy_tissue", "invasive")),
        (["nodule", "cyst"], ("cyst", "nodule")),  # "no" as a word only
    ],
)
def test_harmless_classes_come_first(names: list[str], ordered: tuple[str, ...]) -> None:
    assert order_classes(names) == ordered


@pytest.mark.parametrize("wrapped", ["", "set/images"])
def test_class_folders_wherever_they_begin(wrapped: str, tmp_path: Path) -> None:
    tree(tmp_path / "raw" / wrapped)
    assert find_dataset("auto", tmp_path / "raw").name == "folder"
    data = run(tmp_path / "raw", tmp_path / "out", patients=r"(p\d+)_")
    assert data.classes == ("normal", "tumour")
    assert (data.card["name"], data.card["task"], data.card["split"]["level"]) == ("folder", "subtype", "patient")
    assert (data.card["num_images"], data.card["num_patients"]) == (24, 6)
    assert any(note.startswith("positive class: tumour") for note in data.card["notes"])
    assert "24 images of 2 classes, which are those of the folders" in data.card["notes"]
    before = (tmp_path / "out" / "manifest.csv").stat().st_mtime_ns
    run(tmp_path / "raw", tmp_path / "out", patients=r"(p\d+)_", resume=True)
    assert (tmp_path / "out" / "manifest.csv").stat().st_mtime_ns == before


def test_the_user_may_say_which_class_is_positive(tmp_path: Path) -> None:
    raw = tree(tmp_path / "raw", ("cyst", "nodule", "other"))
    data = run(raw, tmp_path / "three", group_by="image")
    assert data.classes == ("cyst", "nodule", "other")
    data = run(raw, tmp_path / "two", group_by="image", classes="nodule,cyst")
    assert data.classes == ("nodule", "cyst")
    with pytest.raises(UsageError, match="no such class 'nodul': did you mean 'nodule'"):
        run(raw, tmp_path / "none", classes="nodul,cyst")
    assert not (tmp_path / "none").exists()


def test_files_beside_the_class_folders_and_doubtful_ones_are_left_out(tmp_path: Path) -> None:
    raw = tree(tmp_path / "raw")
    draw(raw, "stray.png")
    (raw / "tumour" / "broken.png").write_text("no image")
    (raw / "tumour" / "notes.txt").write_text("")
    data = run(raw, tmp_path / "out", group_by="image")
    reasons = dict(line.split(",", 1) for line in (tmp_path / "out" / "rejected.csv").read_text().splitlines()[1:])
    assert reasons == {"stray.png": "not in the folder of a class", "tumour/broken.png": "not an image"}
    assert data.card["split"]["leaky"] == "LEAKY: image-level split, patients unknown, so leakage cannot be excluded"


def test_unknown_patients_are_not_invented(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--group-by exam: no patient is known.*--group-by image"):
        run(tree(tmp_path / "raw"), tmp_path / "out")


def test_parts_of_a_split_are_no_classes(tmp_path: Path) -> None:
    raw = draw(tmp_path / "raw", "Train/benign/1.png", "Test/benign/1.png")
    with pytest.raises(UserError, match="Test, Train are parts of a split, not classes: give the folder of one part"):
        run(raw, tmp_path / "out")


def test_known_data_sets_come_before_any_folder(tmp_path: Path) -> None:
    raw = tree(tmp_path / "raw")
    draw(raw, "normal/SOB_B_A-14-1AB-40-001.png")
    assert find_dataset("auto", raw).name == "breakhis"
    with pytest.raises(UsageError, match="holds no data set that breastcli knows"):
        find_dataset("auto", draw(tmp_path / "one", "only/1.png"))
    with pytest.raises(UserError, match="no such folder"):
        find_dataset("auto", tmp_path / "nowhere")
    with pytest.raises(UserError, match="no labelled image in .*: give a folder that holds a folder"):
        FOLDER.scan(draw(tmp_path / "flat", "1.png"))


def lines(*rows: str) -> str:
    return "\n".join(["path,class,patient_id,mag", *rows]) + "\n"


def test_a_list_of_images(tmp_path: Path) -> None:
    raw = tree(tmp_path / "raw", ("x",), patients=8)
    rows = [
        f"x/p{k}_{view}.png,{'ill' if k % 2 else 'healthy'},p{k},{40 + 60 * (view == 'b')}"
        for k in range(8)
        for view in "ab"
    ]
    (raw / "labels.csv").write_text(lines(*rows))
    assert find_dataset("auto", raw / "labels.csv").name == "folder"
    data = run(raw / "labels.csv", tmp_path / "out", split="2:1:1")
    assert data.classes == ("healthy", "ill")
    assert [row.record.magnification for row in data.rows] == ["40X", "100X"] * 8
    assert {row.record.patient for row in data.rows} == {f"p{k}" for k in range(8)}
    assert data.card["split"]["level"] == "patient"
    assert np.array_equal(
        data.images[3], run(raw / "labels.csv", tmp_path / "one", split="2:1:1", mag="100x").images[1]
    )


def test_lines_that_name_no_usable_image_are_listed_with_the_reason(tmp_path: Path) -> None:
    raw = draw(tmp_path / "raw", *(f"{k}.png" for k in range(6)))
    draw(tmp_path, "secret.png", seed=1)
    (raw / "text.md").write_text("")
    rows = [f"{k}.png,{'ab'[k % 2]},p{k}," for k in range(6)]
    rows += [
        "../secret.png,a,p7,",
        f"{tmp_path / 'secret.png'},a,p7,",
        "none.png,a,p7,",
        "0.png,a,p0,",
        "text.md,a,p8,",
    ]
    rows += ["1.png,,p1,"]
    (raw / "labels.csv").write_text(lines(*rows))
    scan = FOLDER.scan(raw / "labels.csv")
    assert [one.path for one in scan.records] == [f"{k}.png" for k in range(6)]
    reasons = {one.path: one.reason for one in scan.rejected}
    assert reasons["../secret.png"] == reasons[str(tmp_path / "secret.png")] == "lies outside of the list's folder"
    assert (reasons["none.png"], reasons["0.png"], reasons["1.png"]) == ("no such file", "listed twice", "no label")
    assert reasons["text.md"].startswith("is no image")
    (raw / "bare.csv").write_text("path,patient\n0.png,1\n")
    with pytest.raises(UserError, match="has no column of labels: head it label or class"):
        FOLDER.scan(raw / "bare.csv")


def test_from_list_to_prediction(tmp_path: Path, breastcli: Callable[..., Outcome]) -> None:
    """A list that also gives the split goes through every command."""
    raw = draw(tmp_path / "raw", *(f"{k:02}.png" for k in range(24)))
    sides = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    rows = [f"{k:02}.png,{('normal', 'cancer')[k % 2]},p{k // 3},{sides[k // 3]}" for k in range(24)]
    (raw / "labels.csv").write_text("path,label,patient,split\n" + "\n".join(rows))
    listed = ("prepare", "raw/labels.csv", "--import-split", "raw/labels.csv", "--out", "data", "--size", 64)
    done = breastcli(*listed)
    assert done.code == 0, done.stderr
    assert "12 train, 6 val, 6 test images" in done.stdout
    train = ("train", "--data", "data", "--arch", "timm/test_resnet", "--epochs", 1, "--batch-size", 8)
    done = breastcli(*train, "--device", "cpu", "--out", "run")
    assert done.code == 0, done.stderr
    done = breastcli("evaluate", "run", "--device", "cpu", "--resamples", 100, "--json")
    assert done.code == 0, done.stderr
    assert done.json["patient"]["vote"]["n"] == 4  # two patients, each with images of both classes
    assert "positive class: cancer" in done.json["image"]["notes"]
    done = breastcli("explain", "run", "--device", "cpu", "--num", 2)
    assert done.code == 0, done.stderr
    done = breastcli("predict", "run", "raw", "--device", "cpu", "--json")
    assert done.code == 0, done.stderr
    assert len(json.loads(done.stdout)["images"]) == 24
