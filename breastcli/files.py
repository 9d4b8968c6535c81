"""Writing so that a kill at any moment leaves either the old file or the new one, and nothing of others is touched."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from breastcli.errors import UserError, WriteError, first_line
from breastcli.locks import LOCK, alone_with, locked

FULL = (errno.ENOSPC, errno.EDQUOT)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


def partial_of(path: Path) -> Path:
    """Return what a file is called until it is whole."""
    # The suffix stays last because libraries choose a format by it.
    return path.with_name(f".{path.stem}.partial{path.suffix}")


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block ends without an error.

    Processes that write the same file do so one after another, each from the start to the end of its block.

    Args:
        path: file to write.
        durable: whether it must survive a loss of power from then on, as a file by which something counts as finished.

    Raises:
        WriteError: it cannot be written.
    """
    temporary = partial_of(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with alone_with(temporary):
            try:
                yield temporary
                if durable:
                    sync(temporary)
                temporary.replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
        if durable:
            sync(path.parent)


def remove_written(path: Path) -> None:
    """Remove a file of ours that may be there, and what a killed process left of it half-written."""
    partial_of(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says of ``path`` while it is written into one line that names it.

    Raises:
        WriteError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        named = None if error.filename is None else Path(error.filename)
        if named not in (None, path, partial_of(path), *path.parents):
            raise  # another file's
        fix = "make room" if error.errno in FULL else ""
        problem = f"cannot write {path}: {error.strerror or first_line(error)}"
        raise WriteError(problem, fix, read_only=error.errno in READ_ONLY) from error


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a file system that cannot
            raise
    finally:
        os.close(descriptor)


def require_space(folder: Path, num_bytes: int, fix: str) -> None:
    """Refuse to begin what the disk has no room for.

    Args:
        folder: where it is going to be written.
        num_bytes: how much.
        fix: what else the user can do.

    Raises:
        UserError: there is less.
    """
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        problem = f"{folder} needs {num_bytes / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free on its disk"
        raise UserError(problem, fix=f"make room, {fix}")


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a UTF-8 text file in one step; see ``replacing``."""
    with replacing(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: Any, *, durable: bool = False) -> None:
    """Write indented JSON in one step, see ``replacing``; NaN is refused, since JSON has none."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n", durable=durable)


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})", fix="make it again") from error


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]], *, durable: bool = False) -> None:
    """Write a CSV file in one step; see ``replacing``."""
    with replacing(path, durable=durable) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def read_csv(path: Path, *, whole: bool = True) -> list[dict[str, str]]:
    """Read a CSV file with a header line.

    Args:
        path: the file.
        whole: whether to refuse a file whose last line does not end, which ours all do.

    Raises:
        UserError: the file is missing, cut short or not text.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            text = file.read()
        if whole and not text.endswith("\n"):
            raise UserError(f"{path} is cut short", fix="make it again")
        return list(csv.DictReader(io.StringIO(text, newline="")))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file ({error})", fix="make it again") from error


@contextlib.contextmanager
def claimed_folder(folder: Path, *, allowed: bool, hint: str) -> Iterator[None]:
    """Create an output folder and hold it until the block ends, or refuse one that already holds something.

    Args:
        folder: the folder to write into.
        allowed: whether the user agreed to what is there (``--overwrite`` or ``--resume``).
        hint: what the user can do when the folder is refused.

    Raises:
        UserError: the folder is not empty and not allowed, is a file, cannot be created, or another job holds it.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file", fix="choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Before a lock is put into a folder that is none of ours; where there is one, its holder is the better answer.
        _refuse_occupied(folder, allowed=allowed or (folder / LOCK).exists(), hint=hint)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}", fix="choose another --out") from error
    with locked(folder):
        _refuse_occupied(folder, allowed=allowed, hint=hint)
        yield


def names_in(folder: Path) -> set[str]:
    """Return what a folder holds, a lock aside; nothing where there is no folder."""
    return {path.name for path in folder.iterdir()} - {LOCK} if folder.is_dir() else set()


def _refuse_occupied(folder: Path, *, allowed: bool, hint: str) -> None:
    if not allowed and names_in(folder):
        raise UserError(f"{folder} is not empty", fix=hint)
