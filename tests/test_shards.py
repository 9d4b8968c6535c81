"""Array jobs decode a data set in parts, and joining them gives what one job would have made."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome

from breastcli.config import PrepareConfig
from breastcli.data.shards import ShardResult, parse_shard, shard_folder, share
from breastcli.data.store import PreparedData
from breastcli.errors import UsageError, UserError
from breastcli.prepare import prepare
from breastcli.records import ImageRecord

MADE = ("images.npy", "manifest.csv", "dataset.json", "audit.json", "rejected.csv", "contact_sheet.png")


def run(raw: Path, out: Path, **options: object) -> object:
    return prepare(PrepareConfig(raw=str(raw), out=str(out), **({"size": 32, "workers": 1} | options)))


def decode(raw: Path, out: Path, count: int, **options: object) -> list[ShardResult]:
    return [run(raw, out, shard=f"{number}/{count}", **options) for number in range(1, count + 1)]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12])
def test_parts_in_order_are_the_whole(count: int) -> None:
    records = [ImageRecord(str(number), f"{number}.png", "a") for number in range(11)]
    parts = [share(records, number, count) for number in range(1, count + 1)]
    assert [one for part in parts for one in part] == records
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_joined_parts_are_what_one_job_makes(prepared: Path, raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "joined"
    parts = decode(raw, out, 3)
    assert [part.num_images for part in parts] == [32, 32, 32]
    assert [part.out for part in parts] == [shard_folder(out, number, 3) for number in (1, 2, 3)]
    assert not out.exists()
    run(raw, out, merge=3)
    for name in MADE:
        assert (out / name).read_bytes() == (prepared / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["joined"]  # the parts are gone
    assert {path.name for path in out.iterdir()} == set(MADE)
    again = run(raw, out, resume=True)
    assert again.seconds == 0


def test_more_parts_than_images_damaged_files_and_stain(raw: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(raw, tmp_path / "raw"))
    images = sorted((copy / "BreaKHis_v1").rglob("*.png"))
    images[4].write_text("no image")
    run(copy, tmp_path / "whole", stain="macenko")
    results = decode(copy, tmp_path / "joined", 97, stain="macenko")
    assert sum(part.num_rejected for part in results) == 1
    assert results[-1].num_images == 0
    run(copy, tmp_path / "joined", merge=97, stain="macenko")
    for name in MADE:
        assert (tmp_path / "joined" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_part_that_was_interrupted_goes_on(raw: Path, tmp_path: Path, prepared: Path) -> None:
    out = tmp_path / "joined"
    decode(raw, out, 2)
    journal = shard_folder(out, 2, 2) / ".partial" / "decoded.csv"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:20]))
    with pytest.raises(UserError, match="2-of-2 is unfinished: run that part again with --resume"):
        run(raw, out, merge=2)
    with pytest.raises(UserError, match="is not empty: use --resume or --overwrite"):
        run(raw, out, shard="2/2")
    run(raw, out, shard="2/2", resume=True)
    run(raw, out, merge=2, resume=True)  # of the attempt before
    assert (out / "images.npy").read_bytes() == (prepared / "images.npy").read_bytes()


def test_parts_that_do_not_belong_together_are_refused(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "joined"
    run(raw, out, shard="1/2")
    with pytest.raises(UserError, match="2-of-2 holds no decoded images: run that part with --shard"):
        run(raw, out, merge=2)
    run(raw, out, shard="2/2", mag="100x")
    with pytest.raises(UserError, match="was begun for another choice of images"):
        run(raw, out, merge=2, resume=True)
    run(raw, out, shard="2/2", overwrite=True)
    with pytest.raises(UserError, match="was begun for another size of images"):
        run(raw, out, merge=2, resume=True, size=64)
    assert run(raw, out, merge=2, resume=True).card["num_images"] == 96


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/", "/2", "a/b", "-1/2", "1/2/3", "1.5/2"])
def test_other_parts_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a part: give I/N"):
        parse_shard(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard": "1/2", "merge": 2}, "first decode the parts, then join them"),
        ({"shard": "1/2", "audit": True}, "--audit keeps no images"),
        ({"merge": 2, "audit": True}, "--audit keeps no images"),
        ({"merge": 2, "overwrite": True}, "--merge does not replace a finished folder"),
    ],
)
def test_options_that_do_not_go_together(options: dict, message: str, raw: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        run(raw, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_command_says_how_to_go_on(raw: Path, tmp_path: Path, breastcli: Callable[..., Outcome]) -> None:
    for number in (1, 2):
        done = breastcli("prepare", raw, "--out", "data", "--size", 16, "--shard", f"{number}/2")
        assert done.code == 0, done.stderr
        assert f"part {number} of 2: 48 images decoded" in done.stdout
        assert done.stdout.strip().endswith(f"data.shards/{number}-of-2")
    assert "--size 16 --merge 2 (once all parts are decoded)" in done.stderr
    assert "--shard" not in done.stderr
    done = breastcli("prepare", raw, "--out", "data", "--size", 16, "--merge", 2, "--json")
    assert done.code == 0, done.stderr
    assert done.json["dataset"]["num_images"] == 96
    assert len(PreparedData.open(tmp_path / "data").rows) == 96
