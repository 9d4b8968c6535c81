"""One job at a time in an output folder: locks that end with the process that holds them, however it ends.

The system drops such a lock when the process is gone, killed or not, so nothing has to be tidied up after a crash. The
file that carries it is removed with it where that is possible; one that stays behind locks nothing.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from breastcli.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt

logger = logging.getLogger(__name__)

LOCK = ".lock"
PATIENCE_S = 1.0  # for a job that is just ending
POLL_S = 0.02
HELD = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)  # what the systems say of a lock that another has
FAR = 2**30  # Windows' locks keep others from reading what they cover, so they cover a byte that is not there

_held: dict[int, str] = {}  # descriptors of this process' locks, and how each is signed


@contextlib.contextmanager
def locked(folder: Path, *, shared: bool = False, dry_run: bool = False) -> Iterator[None]:
    """Hold a folder until the block ends: alone, or with other jobs that do not change what it holds already.

    Where the file system has no locks, or a shared one cannot be put because the folder is read-only, the block runs
    without one; the former is warned of.

    Args:
        folder: it must exist.
        shared: whether others may hold it in the same way.
        dry_run: hold nothing, and leave nothing behind.

    Raises:
        UserError: another job holds it, or it cannot be written.
    """
    file = folder / LOCK
    descriptor = None if dry_run else _acquire(file, shared)
    try:
        yield
    finally:
        if descriptor is not None:
            _release(descriptor, file)


@contextlib.contextmanager
def alone_with(file: Path) -> Iterator[None]:
    """Create a file and wait until no other process is in such a block with it; where there are no locks, go on.

    Raises:
        OSError: it cannot be created.
    """
    while True:
        if file.is_symlink():
            file.unlink()  # it would lead the writing to somebody's file
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if fcntl is not None:
                with contextlib.suppress(OSError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
            if fcntl is None or _is_still(descriptor, file):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever had it has renamed or removed it
    if fcntl is None:  # Windows renames no open file
        os.close(descriptor)
        yield
        return
    _held[descriptor] = ""
    try:
        yield
    finally:
        _close(descriptor)


def _acquire(file: Path, shared: bool) -> int | None:
    """Return the descriptor of a lock file that is now held, or None where there can be no lock."""
    given_up = time.monotonic() + PATIENCE_S
    while True:
        descriptor = _open(file, shared)
        if descriptor is None:
            return None
        try:
            _lock(descriptor, shared)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in HELD:
                logger.warning("%s cannot be locked (%s): do not start two jobs on it", file.parent, error.strerror)
                return None
            if time.monotonic() > given_up:
                fix = "wait until it has finished" + ("" if shared else ", or choose another --out")
                raise UserError(f"{file.parent} is in use by {_describe_holder(file)}", fix=fix) from None
            time.sleep(POLL_S)
            continue
        if _is_still(descriptor, file):
            _held[descriptor] = _signature()
            _sign(descriptor, alone=not shared)
            return descriptor
        os.close(descriptor)  # its holder removed it just now


def _open(file: Path, shared: bool) -> int | None:
    """Open a lock file, to write where that is allowed; None where a shared one cannot be opened at all."""
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        with contextlib.suppress(OSError):  # one that another user's job holds or left behind
            return os.open(file, os.O_RDONLY)
        if shared:
            return None
        raise UserError(f"cannot write {file.parent}: {error.strerror}", fix="choose another --out") from error


def _lock(descriptor: int, shared: bool) -> None:
    """Lock an open file without waiting.

    Raises:
        OSError: it is held, or cannot be locked.
    """
    if fcntl is not None:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return
    os.lseek(descriptor, FAR, os.SEEK_SET)
    msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    if shared:  # which Windows' locks cannot be: that nobody writes now must do
        os.lseek(descriptor, FAR, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)


def _release(descriptor: int, file: Path) -> None:
    """Give a lock back, and remove its file unless others hold it too."""
    if descriptor in _held:  # not in a forked process
        try:
            _lock(descriptor, shared=False)
            if _is_still(descriptor, file):
                file.unlink()
        except OSError:
            _sign(descriptor, alone=False)  # a second time: gone
        _close(descriptor)


def _close(descriptor: int) -> None:
    if descriptor in _held:
        del _held[descriptor]
        os.close(descriptor)


def _is_still(descriptor: int, file: Path) -> bool:
    """Return whether the file of that name is the open one."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _signature() -> str:
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="milliseconds")
    return json.dumps({"pid": os.getpid(), "host": platform.node(), "since": now})


def _sign(descriptor: int, *, alone: bool) -> None:
    """Write down who holds a lock; the names of others that share it stay."""
    with contextlib.suppress(OSError):  # read-only or full: the lock holds without a name
        if alone:
            os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_END)
        os.write(descriptor, f"{_held[descriptor]}\n".encode())


def _describe_holder(file: Path) -> str:
    """Return who holds a lock, as far as its file tells: the last that signed once and is not known to have ended."""
    living, ended = [], ["another job"]
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        for line, times in Counter(file.read_text(encoding="utf-8").splitlines()).items():
            one = json.loads(line)
            alive = times == 1 and (one["host"] != platform.node() or _is_alive(int(one["pid"])))
            text = f"process {one['pid']} on {one['host']} since {one['since'][:19]}"
            (living if alive else ended).append(text)
    return (living or ended)[-1]


def _is_alive(pid: int) -> bool:
    if fcntl is not None:  # on Windows the question would end it
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            return True  # another user's
    return True


def _forget() -> None:
    """Close the locks that a forked process got from its parent, with whom they shall end."""
    while _held:
        os.close(_held.popitem()[0])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
