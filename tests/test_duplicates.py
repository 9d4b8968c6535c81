from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from breastcli.data.duplicates import Duplicate, choose_dropped, find_duplicates
from breastcli.data.images import decode
from breastcli.errors import UserError
from breastcli.progress import SILENT
from breastcli.records import ImageRecord


def record(name: str, label: str = "benign") -> ImageRecord:
    return ImageRecord(name, f"{name}.png", label, label)


def pair(first: ImageRecord, second: ImageRecord, position: int | None = 0, distance: int = 3) -> Duplicate:
    return Duplicate(first, second, distance, position, 0.9)


A, B, C, D, E = (record(name) for name in "abcde")
CHAIN = [pair(B, C, 6), pair(A, B, None), pair(D, E, 1)]


def test_none_drops_none() -> None:
    assert choose_dropped(CHAIN, "none") == []


def test_keep_first_keeps_one_of_each_set() -> None:
    dropped = {one.path: one.reason for one in choose_dropped(CHAIN, "keep-first")}
    assert dropped == {
        "b.png": "identical to a",
        "c.png": "near-duplicate of b (distance 3, turned 90)",
        "e.png": "near-duplicate of d (distance 3, mirrored left-right)",
    }


def test_drop_all_keeps_none_and_turns_back() -> None:
    dropped = {one.path: one.reason for one in choose_dropped([pair(A, B, 6)], "drop-all")}
    assert dropped == {
        "b.png": "near-duplicate of a (distance 3, turned 90)",
        "a.png": "near-duplicate of b (distance 3, turned 270)",
    }


def test_a_set_whose_labels_differ_goes_as_a_whole() -> None:
    other = record("c", "malignant")
    dropped = {one.path: one.reason for one in choose_dropped([pair(A, B), pair(B, other), pair(D, E)], "keep-first")}
    assert sorted(dropped) == ["a.png", "b.png", "c.png", "e.png"]
    assert dropped["a.png"].endswith("labels differ")
    assert not dropped["e.png"].endswith("labels differ")


def save(folder: Path, images: dict[str, Image.Image]) -> tuple[list[ImageRecord], list[str], list[str]]:
    found = []
    for name, image in images.items():
        image.save(folder / f"{name}.png")
        found.append(decode(folder / f"{name}.png", 16))
    looks = [one.measures.perceptual_hash for one in found]
    return [record(name) for name in images], [one.pixel_hash for one in found], looks


def test_identical_images_are_paired_with_the_first_and_turned_ones_with_it(raw: Path, tmp_path: Path) -> None:
    files = sorted((raw / "BreaKHis_v1").rglob("*.png"))
    image, other = Image.open(files[0]), Image.open(files[50])
    images = {"c": image, "a": image, "b": image, "e": image.transpose(Image.Transpose.ROTATE_90), "d": other}
    found = find_duplicates(*save(tmp_path, images), tmp_path, SILENT)
    assert [(one.first.image_id, one.second.image_id, one.position) for one in found] == [
        ("a", "b", None),
        ("a", "c", None),
        ("a", "e", 6),
    ]


def test_a_file_that_vanished_is_one_clear_line(raw: Path, tmp_path: Path) -> None:
    image = Image.open(next((raw / "BreaKHis_v1").rglob("*.png")))
    saved = save(tmp_path, {"a": image, "b": image.transpose(Image.Transpose.ROTATE_180)})
    (tmp_path / "b.png").unlink()
    with pytest.raises(UserError, match=r"b\.png changed while it was worked on.*--overwrite"):
        find_duplicates(*saved, tmp_path, SILENT)


def test_a_file_replaced_after_it_was_hashed_is_no_acquittal(raw: Path, tmp_path: Path) -> None:
    files = sorted((raw / "BreaKHis_v1").rglob("*.png"))
    image = Image.open(files[0])
    saved = save(tmp_path, {"a": image, "b": image.transpose(Image.Transpose.ROTATE_180)})
    Image.open(files[50]).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"b\.png changed while it was worked on: start again with --overwrite"):
        find_duplicates(*saved, tmp_path, SILENT)
