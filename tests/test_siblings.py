"""Siblings of one original: found again after every step of the recipe, kept together, and nothing else joined."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from breastcli.config import EvaluateConfig, PrepareConfig, TrainConfig
from breastcli.data import checking
from breastcli.data.datasets import DATASETS, Recipe
from breastcli.data.datasets.lc25000 import kept_by_turn
from breastcli.data.duplicates import Duplicate
from breastcli.data.images import read_rgb
from breastcli.data.siblings import (
    ALIKE,
    CONFIRM,
    THUMBNAIL_PX,
    describe_groups,
    find_siblings,
    group_pairs,
    group_thumbnails,
    join_duplicates,
    likenesses,
    undo,
)
from breastcli.data.store import PreparedData
from breastcli.errors import UserError
from breastcli.evaluate import EvaluateResult, evaluate
from breastcli.prepare import prepare
from breastcli.progress import SILENT
from breastcli.records import ImageRecord
from breastcli.train import train

RECIPE = DATASETS.get("lc25000").recipe
SIDE_PX = 160
MADE = [(0, False, False), (25, False, True), (-14, True, False), (0, True, True)]


@cache
def texture(seed: int, side: int = SIDE_PX) -> Image.Image:
    """Blobs of several sizes: noise whose amplitude falls with the frequency, in pink and violet."""
    generator = np.random.default_rng(seed)
    across = np.fft.fftfreq(side)
    falling = 1 / (np.hypot(across[:, None], across) + 2 / side)
    waves = np.fft.ifft2(np.fft.fft2(generator.normal(size=(side, side))) * falling).real
    depth = np.clip(waves / waves.std() * 0.2 + 0.5, 0, 1)[..., None]
    return Image.fromarray((np.array([240, 200, 225]) * (1 - depth) + np.array([90, 40, 120]) * depth).astype(np.uint8))


def make(original: Image.Image, degrees: int, left_right: bool, top_bottom: bool) -> Image.Image:
    """The recipe: turned (counterclockwise), cut out about the centre, stretched back, mirrored."""
    side, turned = original.width, original.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    width, height = (share * side for share in kept_by_turn(degrees))
    left, top = (turned.width - width) / 2, (turned.height - height) / 2
    made = turned.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
    made = made.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if left_right else made
    return made.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if top_bottom else made


def thumbnail(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L").resize((THUMBNAIL_PX, THUMBNAIL_PX))).ravel()


def likeness(first: Image.Image, second: Image.Image) -> float:
    thumbnails = np.stack([thumbnail(first), thumbnail(second)])
    return float(likenesses(undo(thumbnails, RECIPE, CONFIRM), np.array([[0, 1]]))[0])


def partition(names: Sequence[object]) -> set[frozenset[int]]:
    members = defaultdict(set)
    for number, name in enumerate(names):
        members[name].add(number)
    return {frozenset(one) for one in members.values()}


def test_what_a_turn_leaves() -> None:
    """Of 768 px the released program keeps 513 x 306 px at 25 degrees, 631 x 622 at 10 and all without a turn."""
    for degrees, kept in ((0, (768, 768)), (10, (631, 622)), (-10, (631, 622)), (25, (513, 306))):
        assert kept_by_turn(degrees) == pytest.approx([one / 768 for one in kept], abs=1 / 768)
    for degrees in range(26):  # nothing that lies outside the original
        angle, (width, height) = math.radians(degrees), kept_by_turn(degrees)
        assert width * math.cos(angle) + height * math.sin(angle) <= 1 + 1e-9
        assert width * math.sin(angle) + height * math.cos(angle) <= 1 + 1e-9


@pytest.mark.parametrize("degrees", [-25, -12, -1, 0, 3, 18, 25])
@pytest.mark.parametrize("mirrored", [(False, False), (True, False), (False, True), (True, True)])
def test_every_turn_and_mirroring_is_undone(degrees: int, mirrored: tuple[bool, bool]) -> None:
    original = texture(0)
    made = make(original, degrees, *mirrored)
    assert likeness(original, made) > 0.8
    assert likeness(make(original, -20, True, False), made) > ALIKE
    assert likeness(texture(1), made) < 0.5


def test_groups_are_exactly_the_originals() -> None:
    generator = np.random.default_rng(0)
    originals = np.repeat(np.arange(12), generator.integers(1, 12, 12))
    generator.shuffle(originals)
    images = [
        make(texture(number), int(generator.integers(-25, 26)), *(generator.random(2) < 0.5)) for number in originals
    ]
    thumbnails = np.stack([thumbnail(image) for image in images])
    groups = group_thumbnails(thumbnails, RECIPE)
    assert partition(groups) == partition(originals)
    assert all(group == min(np.flatnonzero(groups == group)) for group in groups)
    order = generator.permutation(len(images))
    assert partition(group_thumbnails(thumbnails[order], RECIPE)) == partition(originals[order])


def test_more_images_than_one_block_and_than_candidates() -> None:
    """Sixty images of one original are one group though each has only forty candidates."""
    generator = np.random.default_rng(1)
    originals = np.array([0] * 60 + list(range(1, 241)))
    thumbnails = [thumbnail(make(texture(0, 96), int(turn), False, False)) for turn in generator.integers(-25, 26, 60)]
    thumbnails += [thumbnail(texture(int(number), 96)) for number in originals[60:]]
    assert partition(group_thumbnails(np.stack(thumbnails), RECIPE)) == partition(originals)


def test_overlapping_fields_are_not_siblings() -> None:
    field = texture(2, 2 * SIDE_PX)
    first, second = (field.crop((left, 0, left + SIDE_PX, SIDE_PX)) for left in (0, SIDE_PX // 3))
    assert likeness(first, second) < 0.5


def test_images_that_show_nothing_stay_alone() -> None:
    generator = np.random.default_rng(0)
    blank = np.clip(240 + generator.normal(0, 0.6, (6, THUMBNAIL_PX**2)), 0, 255).astype(np.uint8)
    assert group_thumbnails(blank, RECIPE).tolist() == list(range(6))
    assert group_thumbnails(blank[:1], RECIPE).tolist() == [0]


def test_one_false_pair_does_not_chain_groups() -> None:
    def all_pairs(members: range) -> list[tuple[int, int]]:
        return [(one, two) for one in members for two in members if one < two]

    apart = all_pairs(range(6)) + all_pairs(range(6, 12))
    two = [frozenset(range(6)), frozenset(range(6, 12))]
    assert partition(group_pairs(12, np.array(apart))) == {*two}
    assert partition(group_pairs(12, np.array([*apart, (2, 9)]))) == {*two}
    # An image that only one sibling vouches for joins, and so do two images with no others.
    joined = group_pairs(15, np.array([*apart, (2, 12), (13, 14)]))
    assert partition(joined) == {frozenset([*range(6), 12]), two[1], frozenset([13, 14])}
    assert group_pairs(3, np.empty((0, 2), int)).tolist() == [0, 1, 2]


def test_near_duplicates_join_the_groups_of_two_originals() -> None:
    records = [
        ImageRecord(name, f"{name}.png", "benign", exam=exam) for name, exam in zip("abcde", "aacce", strict=True)
    ]
    pair = Duplicate(records[3], records[1], 20, 0, 0.9)
    assert [one.exam for one in join_duplicates(records, [pair])] == ["a", "a", "a", "a", "e"]
    assert join_duplicates(records, []) == records
    assert "2 groups of at most 4 images, 1 of one image alone" in describe_groups(join_duplicates(records, [pair]))


@pytest.mark.parametrize("suffix", ["jpeg", "png"])
def test_small_images_are_read_from_a_fraction_of_a_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"image.{suffix}"
    texture(3, 640).save(path, quality=95)
    small, full = read_rgb(path, least_px=128), read_rgb(path)
    assert full.size == (640, 640)
    assert small.size == ((160, 160) if suffix == "jpeg" else (640, 640))
    assert np.abs(thumbnail(small).astype(float) - thumbnail(full)).mean() < 3


def write_miniature(root: Path, originals: int = 6, siblings: int = 4) -> dict[str, int]:
    """Write an LC25000 of two classes; return each image's original."""
    generator, of = np.random.default_rng(0), {}
    for code, seed in (("lungn", 100), ("lungaca", 200)):
        folder = root / {"lungn": "lung_n", "lungaca": "lung_aca"}[code]
        folder.mkdir(parents=True)
        numbers = generator.permutation(originals * siblings) + 1
        for place, number in enumerate(numbers.tolist()):
            original = seed + place // siblings
            made = make(texture(original), *MADE[place % siblings])
            made.save(folder / f"{code}{number}.jpeg")
            of[f"{code}{number}"] = original
    return of


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    root = tmp_path_factory.mktemp("lc25000")
    return root, write_miniature(root)


def run(raw: Path, out: Path, **options: object) -> PreparedData:
    prepare(PrepareConfig(raw=str(raw), out=str(out), **({"size": 32, "workers": 1} | options)))
    return PreparedData.open(out)


def test_order_and_threads_do_not_change_the_groups(miniature: tuple[Path, dict[str, int]]) -> None:
    raw, of = miniature
    records = DATASETS.get("lc25000").scan(raw).records
    found = find_siblings(records, RECIPE, raw, 1, SILENT)
    assert partition([one.exam for one in found]) == partition([of[one.image_id] for one in records])
    assert found == find_siblings(records, RECIPE, raw, 3, SILENT)
    assert all(one.exam in of and of[one.exam] == of[one.image_id] for one in found)
    assert [dataclasses.replace(one, exam="") for one in found] == records
    backwards = find_siblings(records[::-1], RECIPE, raw, 1, SILENT)[::-1]
    assert partition([one.exam for one in backwards]) == partition([one.exam for one in found])


def test_a_file_that_vanished_is_one_line(tmp_path: Path) -> None:
    record = ImageRecord("lungn1", "lungn1.jpeg", "benign")
    with pytest.raises(UserError, match=r"lungn1.jpeg changed while .*: start again with --overwrite"):
        find_siblings([record], RECIPE, tmp_path, 1, SILENT)


def test_siblings_never_cross_a_split(miniature: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    raw, of = miniature
    data = run(raw, tmp_path / "out", split="2:1:1")
    sides = defaultdict(set)
    for row in data.rows:
        sides[of[row.record.image_id]].add(row.split)
    assert all(len(found) == 1 for found in sides.values())
    assert {side for found in sides.values() for side in found} == {"train", "val", "test"}
    split = data.card["split"]
    assert (split["level"], split["leaky"], split["shared_with_training"]) == ("exam", None, 0)
    assert (data.card["num_exams"], data.card["num_patients"]) == (12, None)
    (note,) = (one for one in data.card["notes"] if "groups of siblings" in one)
    assert "12 groups of at most 4 images, 0 of one image alone; patients stay unknown" in note
    # Siblings that are near-duplicates too stand on one side, which is no leak.
    audit = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert audit["verdict"] == "clean"
    assert audit["near_duplicates"]
    assert partition([row.record.exam for row in data.rows]) == partition(
        [of[row.record.image_id] for row in data.rows]
    )


def test_resuming_gives_the_same_groups(
    miniature: tuple[Path, dict[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, _ = miniature
    run(raw, tmp_path / "whole")

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checking, "find_siblings", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(raw, tmp_path / "out")
    run(raw, tmp_path / "out", resume=True)
    for name in ("manifest.csv", "dataset.json", "images.npy"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_image_split_counts_the_siblings_that_it_leaks(
    miniature: tuple[Path, dict[str, int]], tmp_path: Path
) -> None:
    raw, of = miniature
    data = run(raw, tmp_path / "out", group_by="image")
    train_originals = {of[row.record.image_id] for row in data.rows if row.split == "train"}
    held_out = [row for row in data.rows if row.split != "train"]
    shared = sum(of[row.record.image_id] in train_originals for row in held_out)
    split = data.card["split"]
    assert (split["leaky"], split["shared_with_training"]) == ("LEAKY: image-level split", shared)
    assert shared > 0
    with pytest.raises(UserError, match="--group-by patient: no patient is known"):
        run(raw, tmp_path / "patient", group_by="patient")


def test_given_groups_take_the_place_of_found_ones(
    miniature: tuple[Path, dict[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, of = miniature
    listed = tmp_path / "groups.csv"
    listed.write_text("filename,group\n" + "".join(f"{name}.jpeg,{one // 2}\n" for name, one in of.items()))
    monkeypatch.setattr(checking, "find_siblings", None)  # would fail if it were called
    data = run(raw, tmp_path / "out", patients=str(listed))
    assert data.card["num_exams"] == 6
    assert not any("groups of siblings" in note for note in data.card["notes"])


def test_no_figures_of_patients_are_made_up(miniature: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    raw, _ = miniature
    run(raw, tmp_path / "data")
    config = TrainConfig(arch="timm/test_resnet", data=str(tmp_path / "data"), out=str(tmp_path / "run"), epochs=1)
    train(dataclasses.replace(config, batch_size=8, device="cpu", precision="fp32"))
    result = evaluate(EvaluateConfig(run=str(tmp_path / "run"), device="cpu", resamples=100))
    assert isinstance(result, EvaluateResult)
    assert result.patient is None
    assert result.image.num_groups == len(
        {row.record.exam for row in PreparedData.open(tmp_path / "data").rows if row.split == "test"}
    )
    report = (tmp_path / "run" / "report.html").read_text()
    assert "patients stay unknown" in report
    assert "LEAKY" not in report


def test_only_lc25000_has_a_recipe() -> None:
    assert [name for name in DATASETS.names() if DATASETS.get(name).recipe is not None] == ["lc25000"]
    assert isinstance(RECIPE, Recipe)


@pytest.mark.real
def test_siblings_of_real_fields(real_data: Path) -> None:
    """Fields of the same slides look alike, and stay apart."""
    generator = np.random.default_rng(0)
    fields = sorted((real_data / "breakhis_original").rglob("*-100-*.png"))[::2]
    thumbnails, originals = [], []
    for number, path in enumerate(fields):
        original = Image.open(path).convert("RGB").crop((120, 0, 580, 460)).resize((230, 230))
        for _ in range(6):
            made = make(original, int(generator.integers(-25, 26)), *(generator.random(2) < 0.5))
            thumbnails.append(thumbnail(made))
            originals.append(number)
    groups = group_thumbnails(np.stack(thumbnails), RECIPE)
    together = np.equal.outer(groups, groups), np.equal.outer(originals, originals)
    right = (together[0] & together[1]).sum()
    assert len(fields) > 35
    assert right / together[1].sum() > 0.99  # of the pairs of siblings, those in one group
    assert right / together[0].sum() > 0.99  # of the pairs in one group, those of siblings
