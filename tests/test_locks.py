"""Locks of output folders: who holds one, who may hold it too, and that nothing of it outlives its holder."""

from __future__ import annotations

import errno
import os
import platform
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from breastcli import locks
from breastcli.errors import UserError
from breastcli.files import claimed_folder, replacing
from breastcli.locks import LOCK, locked

HOLD = """
import sys, time
from pathlib import Path
from breastcli.locks import locked
with locked(Path(sys.argv[1]), shared=sys.argv[2] == "shared"):
    print("held", flush=True)
    time.sleep(600)
"""
COUNT = """
import sys
from pathlib import Path
from breastcli.errors import UserError
from breastcli.locks import locked
folder, number = Path(sys.argv[1]), 0
while number < 40:
    try:
        with locked(folder):
            total = int((folder / "total").read_text())
            (folder / "total").write_text("")  # what another would stumble over
            (folder / "total").write_text(str(total + 1))
        number += 1
    except UserError:
        pass
"""
REPLACE = """
import sys
from pathlib import Path
from breastcli.files import replacing
for _ in range(60):
    with replacing(Path(sys.argv[1])) as temporary:
        number = int(Path(sys.argv[1]).read_text())
        temporary.write_text(" " * 100_000 + str(number + 1))
"""


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE_S", 0.0)


@pytest.fixture
def holder(tmp_path: Path) -> Callable[[str], subprocess.Popen[str]]:
    """Start a process that holds ``tmp_path``."""
    with ExitStack() as started:

        def start(kind: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", HOLD, str(tmp_path), kind]
            process = started.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            started.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            return process

        yield start


def take(folder: Path, *, shared: bool = False) -> None:
    with locked(folder, shared=shared):
        pass


def test_who_holds_a_folder_is_named_and_a_kill_frees_it(tmp_path: Path, holder: Callable) -> None:
    process = holder("alone")
    for shared in (False, True):
        with pytest.raises(UserError, match=rf"is in use by process {process.pid} on {platform.node()} since 20"):
            take(tmp_path, shared=shared)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / LOCK).exists()  # and locks nothing
    take(tmp_path)
    assert not list(tmp_path.iterdir())


def test_readers_share_and_keep_a_writer_out(tmp_path: Path, holder: Callable) -> None:
    first, second = holder("shared"), holder("shared")
    take(tmp_path, shared=True)
    second.kill()
    second.wait()
    with pytest.raises(UserError, match=f"in use by process {first.pid} "):  # not the one that is gone
        take(tmp_path)
    first.kill()
    first.wait()
    take(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_last_of_several_removes_the_file(tmp_path: Path) -> None:
    with locked(tmp_path, shared=True):
        take(tmp_path, shared=True)
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()


def test_one_process_does_not_hold_a_folder_twice(tmp_path: Path) -> None:
    with claimed_folder(tmp_path / "out", allowed=False, hint=""):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} "):
            take(tmp_path / "out")
        with (
            pytest.raises(UserError, match="in use by"),  # rather than "not empty"
            claimed_folder(tmp_path / "out", allowed=False, hint="use --overwrite"),
        ):
            pass


def test_no_two_processes_hold_a_folder_at_once(tmp_path: Path) -> None:
    """The file is removed at every release, which is where such locks go wrong."""
    (tmp_path / "total").write_text("0")
    counting = [subprocess.Popen([sys.executable, "-c", COUNT, str(tmp_path)]) for _ in range(4)]
    assert [process.wait(120) for process in counting] == [0] * 4
    assert (tmp_path / "total").read_text() == "160"
    assert [path.name for path in tmp_path.iterdir()] == ["total"]


def test_writers_of_one_file_wait_for_each_other(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("0")
    writing = [subprocess.Popen([sys.executable, "-c", REPLACE, str(tmp_path / "file.txt")]) for _ in range(3)]
    assert [process.wait(120) for process in writing] == [0] * 3
    assert int((tmp_path / "file.txt").read_text()) == 180
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_a_forked_process_does_not_keep_the_lock_of_its_parent(tmp_path: Path) -> None:
    with locked(tmp_path):
        pid = os.fork()
        if pid == 0:
            signal.pause()
            os._exit(0)
    try:
        take(tmp_path)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    take(tmp_path)
    assert "cannot be locked (No locks available): do not start two jobs on it" in caplog.text
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("written")
    assert (tmp_path / "file").read_text() == "written"


def test_locks_of_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in: its locks belong to the process, cover a byte, and are never shared."""
    covered: set[tuple[int, int]] = set()

    def locking(descriptor: int, mode: int, count: int) -> None:
        place = (os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR))
        assert count == 1
        if mode == 0:
            covered.remove(place)
        elif place in covered:
            raise PermissionError(errno.EACCES, "Permission denied")
        else:
            covered.add(place)

    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(locks, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=1, LK_UNLCK=0), raising=False)
    with locked(tmp_path):
        for shared in (False, True):
            with pytest.raises(UserError, match=f"in use by process {os.getpid()} "):
                take(tmp_path, shared=shared)
    covered.clear()  # as closing the file does
    with locked(tmp_path, shared=True):
        take(tmp_path, shared=True)
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("written")
    assert (tmp_path / "file").read_text() == "written"


def test_a_lock_that_was_left_by_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def open_read_only(path: object, flags: int, *mode: int) -> int:
        if Path(str(path)).name == LOCK and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *mode)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", open_read_only)
    with pytest.raises(UserError, match="cannot write .*Permission denied"):
        take(tmp_path)
    take(tmp_path, shared=True)  # who only reads needs none
    (tmp_path / LOCK).write_text("")
    with locked(tmp_path), pytest.raises(UserError, match="in use by another job"):
        take(tmp_path)
