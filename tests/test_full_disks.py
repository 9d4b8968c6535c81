"""Disks that fill up, or that nothing may be written to: one line that names a file, and everything finished stays."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import CASES, PREPARE, Undisturbed, World, check_wreck, complete, differing, run_undisturbed
from injecting import COUNTS, NOBODY, Ended, files_of, remount, small_disk

from breastcli import files
from breastcli.errors import UserError, WriteError
from breastcli.files import claimed_folder, replacing, require_space, sync, write_json
from breastcli.system.checkpoint import save_resume
from breastcli.system.runfolder import logging_to

FEW, MANY = 1, 5
SHORT = ("prepare", "train", "synthesize generate", "explain")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a megabyte, where this user can mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        with small_disk(folder, 10**6):
            yield folder
    except OSError as error:
        pytest.skip(f"no disk of our own: {error}")


@dataclass(frozen=True)
class Shortage:
    """A way to leave a job too little room.

    Attributes:
        what: happens to it, for the counts.
        most: bytes of room that are enough.
        attempt: runs the job in a folder, with so many bytes of room.
        said: part of what it must say.
    """

    what: str
    most: int
    attempt: Callable[[Path, int], Ended]
    said: str


def starve(name: str, shortage: Shortage, number: int, world: World, folder: Path, whole: Undisturbed) -> None:
    """Run a job in a folder with too little room, ``number`` times, and check what it left each time."""
    case, draw = CASES[name], random.Random(zlib.crc32(name.encode()))
    most, failed = shortage.most, 0
    while failed < number and most:  # what replaces as much as it removed fits always
        cwd = case.start(world, folder / "work")
        room = draw.randrange(most)
        ended = shortage.attempt(cwd, room)
        if ended.code:
            failed += 1
            COUNTS[f"{name}: {shortage.what}"] += 1
            assert ended.refused_in_one_line, (room, ended.stderr)
            assert shortage.said in ended.stderr, ended.stderr
            check_wreck(case, world, cwd)
            complete(case, world, cwd)
        else:
            most = room  # enough: less next time
        left = differing(files_of(cwd / "out"), whole.files)
        assert not left, left
        shutil.rmtree(cwd)


def fill_at_random(name: str, number: int, world: World, folder: Path, disk: Path) -> None:
    """Run a job on a disk with too little room."""

    def attempt(cwd: Path, room: int) -> Ended:
        used = sum(path.stat().st_blocks * 512 for path in disk.rglob("*"))
        remount(disk, f"size={used + 8192 + room}")
        ended = world.do(cwd, CASES[name].words)
        remount(disk, "size=64m")
        return ended

    remount(disk, "size=64m")
    whole = run_undisturbed(CASES[name], world, folder)
    most = sum(map(len, whole.files.values()))
    starve(name, Shortage("disk filled", most, attempt, "out"), number, world, disk, whole)


@pytest.mark.parametrize("name", SHORT)
def test_a_disk_fills_up(name: str, world: World, tmp_path: Path, disk: Path) -> None:
    fill_at_random(name, FEW, world, tmp_path, disk)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_disks_of_many_sizes_fill_up(name: str, world: World, tmp_path: Path, disk: Path) -> None:
    fill_at_random(name, MANY, world, tmp_path, disk)


def limit_at_random(name: str, number: int, world: World, folder: Path) -> None:
    """Let no file grow beyond a size, which needs no rights: a stand-in for a full disk."""
    whole = run_undisturbed(CASES[name], world, folder)
    largest = max(map(len, whole.files.values()))

    def attempt(cwd: Path, room: int) -> Ended:
        return world.do(cwd, CASES[name].words, file_bytes=room)

    starve(name, Shortage("file too large", largest, attempt, "File too large"), number, world, folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_files_may_not_grow(name: str, world: World, tmp_path: Path) -> None:
    limit_at_random(name, MANY, world, tmp_path)


@pytest.mark.parametrize("name", ["train"])
def test_a_file_may_not_grow(name: str, world: World, tmp_path: Path) -> None:
    limit_at_random(name, FEW, world, tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_what_is_read_only_is_refused_and_stays(name: str, world: World, disk: Path) -> None:
    case = CASES[name]
    remount(disk, "size=64m")
    for place, holds in (("empty", False), ("work", True)):
        cwd = case.start(world, disk / place) if holds else disk / place
        cwd.mkdir(exist_ok=True)
    before = files_of(disk)
    remount(disk, "ro")
    for place in ("empty", "work"):
        if place == "empty" and case.source:
            continue  # it works on what is there
        ended = world.do(disk / place, case.words)
        assert ended.refused_in_one_line, ended.stderr
        assert "Read-only file system" in ended.stderr
        COUNTS["read-only disk"] += 1
    remount(disk, "rw")
    assert files_of(disk) == before


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.source])
def test_what_belongs_to_another_user_is_refused_and_stays(name: str, world: World, tmp_path: Path) -> None:
    case = CASES[name]
    cwd = case.start(world, tmp_path / "work")
    _open_to_all(tmp_path, world)
    before = files_of(cwd)
    ended = world.do(cwd, case.words, uid=NOBODY)
    assert ended.refused_in_one_line, ended.stderr
    assert "Permission denied" in ended.stderr
    assert files_of(cwd) == before
    COUNTS["another user's folder"] += 1


def _open_to_all(*parts: object) -> None:
    """Let other users read the tests' folder; pytest keeps it to itself."""
    for part in parts:
        folder = part.data if isinstance(part, World) else Path(str(part))
        while folder.stat().st_mode & 0o005 != 0o005:
            folder.chmod(folder.stat().st_mode | 0o055)
            folder = folder.parent


def test_readers_work_on_read_only_folders(world: World, disk: Path, tmp_path: Path) -> None:
    """Data and runs may lie where nothing can be written; what is written lies elsewhere."""
    remount(disk, "size=64m")
    for name in ("data", "run", "gan"):
        shutil.copytree(getattr(world, name), disk / name)
    shutil.rmtree(disk / "data" / "embeddings")
    remount(disk, "ro")
    run, cpu = disk / "run", ("--device", "cpu")
    for words in (
        ("train", "--data", disk / "data", "--out", "t", "--arch", "timm/test_resnet", "--epochs", 1, *cpu),
        ("train", "--data", disk / "data", "--out", "f", "--arch", "timm/test_resnet", "--epochs", 1, "--freeze",
         "trunk", "--augment", "none", *cpu),
        ("evaluate", run, "--data", disk / "data", "--out", "e", "--resamples", 100, *cpu),
        ("explain", run, "--data", disk / "data", "--out", "x", "--method", "gradcam", "--num", 2, *cpu),
        ("predict", run, world.image, *cpu),
        ("synthesize", "generate", disk / "gan", "--out", "g", "--label", "all", "--num", 4, *cpu),
        ("synthesize", "assess", disk / "gan", "--features", run, "--draws", 2, "--out", "a", *cpu),
        ("prepare", world.raw, "--out", disk / "data", "--size", 64, "--resume"),
    ):  # fmt: skip
        ended = world.injector.run(tmp_path, *words)
        assert ended.code == 0, (words, ended.stderr)
        assert ended.is_plain
    assert (
        "report stays as it is"
        in world.injector.run(tmp_path, "evaluate", run, "--out", "e", "--overwrite", "--resamples", 100, *cpu).stderr
    )


def test_room_is_asked_for_before_anything_is_decoded(world: World, disk: Path) -> None:
    """96 images of 64 pixels are 1.2 MB."""
    ended = world.do(disk, PREPARE)
    assert ended.refused_in_one_line
    assert "out needs 1.2 MB, and 1.0 MB are free on its disk: make room, or" in ended.stderr
    assert files_of(disk) == {}
    remount(disk, "size=2m")
    assert "out needs 2.4 MB, and 2." in world.do(disk, (*PREPARE, "--stain", "macenko")).stderr
    remount(disk, "size=3m")
    assert world.do(disk, PREPARE).code == 0
    # What a killed run has decoded before is not asked for again.
    (disk / "out/.partial").mkdir()
    (disk / "out/images.npy").rename(disk / "out/.partial/images.npy")
    ended = world.do(disk, (*PREPARE, "--resume"))
    assert ended.code == 0, ended.stderr
    refused = world.do(disk, ("synthesize", "generate", "{gan}", "--out", "g", "--label", "all", "--num", "200"))
    assert "g needs" in refused.stderr
    assert not (disk / "g/images.npy").exists()


def test_a_result_that_cannot_be_printed(world: World, tmp_path: Path) -> None:
    for more in ((), ("--json", "--overwrite")):
        ended = world.do(tmp_path, ("predict", "{run}", "{image}", "--device", "cpu", *more), stdout="/dev/full")
        assert ended.refused_in_one_line
        assert "cannot write the result to stdout: No space left on device" in ended.stderr
        assert (tmp_path / "predictions.csv").is_file()


def test_space_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=2_000_000))
    require_space(tmp_path, 2_000_000, "or go elsewhere")
    with pytest.raises(UserError, match=r"needs 2\.1 MB, and 2\.0 MB are free on its disk: make room, or go elsewhere"):
        require_space(tmp_path, 2_100_000, "or go elsewhere")


@pytest.mark.parametrize(
    ("number", "ending"),
    [
        (errno.ENOSPC, "No space left on device: make room"),
        (errno.EIO, "Input/output error"),
        (errno.EROFS, "Read-only file system"),
    ],
)
def test_what_the_system_says_is_one_line_that_names_the_file(
    number: int, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    write_json(tmp_path / "a.json", 1, durable=True)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(WriteError) as caught:
        write_json(tmp_path / "a.json", 2, durable=True)
    assert str(caught.value) == f"cannot write {tmp_path / 'a.json'}: {ending}"
    assert caught.value.read_only == (number == errno.EROFS)
    assert files_of(tmp_path) == {"a.json": b"1\n"}


def test_durable_files_are_synced_before_they_get_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, bool]] = []
    monkeypatch.setattr(files, "sync", lambda path: synced.append((path.name, (tmp_path / "a.json").exists())))
    write_json(tmp_path / "b.json", 1)
    assert synced == []
    write_json(tmp_path / "a.json", 1, durable=True)
    assert synced == [(".a.partial.json", False), (tmp_path.name, True)]


def test_a_disk_that_cannot_sync_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    sync(tmp_path)
    monkeypatch.setattr(os, "fsync", refuse)
    sync(tmp_path)


def test_errors_of_other_files_keep_their_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="elsewhere"), replacing(tmp_path / "a.txt"):
        (tmp_path / "elsewhere").read_text()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["tensors", "array", "log"])
def test_libraries_do_not_hide_that_a_disk_is_full(what: str, tmp_path: Path, disk: Path) -> None:
    def write() -> None:
        if what == "tensors":
            save_resume(disk / "resume.pt", {"a": torch.zeros(10**6)})
        elif what == "array":
            with replacing(disk / "a.npy") as temporary, temporary.open("wb") as file:
                np.save(file, np.zeros(10**6))
        else:
            with logging_to(disk / "log.txt"):
                logging.getLogger("breastcli.test").warning("x" * 2 * 10**6)

    name = {"tensors": "resume.pt", "array": "a.npy", "log": "log.txt"}[what]
    with pytest.raises(WriteError, match=f"cannot write {disk / name}: "):
        write()


def test_a_folder_that_cannot_be_made(tmp_path: Path, disk: Path) -> None:
    remount(disk, "ro")
    with (
        pytest.raises(UserError, match="cannot write .*new: Read-only file system"),
        claimed_folder(disk / "new", allowed=True, hint=""),
    ):
        pass


def test_a_failed_run_says_what_stopped_it(world: World, disk: Path) -> None:
    """Not that its account of that could not be written either."""
    remount(disk, "size=300k")
    case = CASES["train"]
    ended = world.do(disk, case.words)
    assert "cannot write out/checkpoints/best.safetensors: No space left on device: make room" in ended.stderr
    assert json.loads((disk / "out/run.json").read_text())["status"] in ("running", "failed")
