"""Writing so that a kill at any moment leaves either the old file or the new one, and nothing of others is touched."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from breastcli.errors import UserError, WriteError, first_line
from breastcli.locks import LOCK, alone_with, locked

FULL = (errno.ENOSPC, errno.EDQUOT)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
OVERWRITE = "use --overwrite or another --out"
MAX_BYTES = 2**29  # of a text file that is read, far more than any that breastcli writes
MAX_DEPTH = 64  # of JSON; our own has about eight levels
MAX_WHOLE = 2**64  # what seeds stay below
MAX_STEM = 200  # bytes of a temporary name, because file systems allow 255
# What a spreadsheet takes for a formula, at the start of a cell and behind any apostrophes.
FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")


def partial_of(path: Path) -> Path:
    """Return what a file is called until it is whole."""
    # The suffix stays last because libraries choose a format by it.
    stem = path.stem.encode(errors="surrogateescape")[:MAX_STEM].decode(errors="ignore")
    return path.with_name(f".{stem}.partial{path.suffix}")


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
        UserError: the file is missing or is not JSON as ``parse_json`` takes it.
    """
    try:
        return parse_json(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({first_line(error, 160)})", fix="make it again") from error


def parse_json(text: str) -> Any:
    """Return what JSON text holds.

    Raises:
        ValueError: it is not JSON, or holds NaN, numbers that nothing here can work with, or too many levels.
    """
    try:
        document = json.loads(text, parse_constant=_refuse, parse_float=_finite, parse_int=_whole)
    except RecursionError:
        raise ValueError("too many levels") from None
    level = [document]
    for _ in range(MAX_DEPTH):
        level = [inner for one in level if isinstance(one, (dict, list)) for inner in _items(one)]
    if level:
        raise ValueError("too many levels")
    return document


def _items(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _refuse(text: str) -> Any:
    raise ValueError(f"{text[:20]} is no number of JSON")


def _finite(text: str) -> float:
    return value if math.isfinite(value := float(text)) else _refuse(text)


def _whole(text: str) -> int:
    return value if len(text) < 25 and abs(value := int(text)) < MAX_WHOLE else _refuse(text)


def read_text(path: Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        UserError: it cannot be read, is no regular file (a pipe would be waited for) or too large.
        ValueError: it is not UTF-8.
    """
    try:
        known = path.stat()
        if not stat.S_ISREG(known.st_mode):
            raise UserError(f"cannot read {path}: it is no regular file", fix="give a plain file")
        if known.st_size > MAX_BYTES:
            size = f"{known.st_size:,} bytes, more than {MAX_BYTES:,}"
            raise UserError(f"cannot read {path}: it has {size}", fix="make it again")
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def is_utf8(name: object) -> bool:
    """Return whether a name can be written to a text file; Python keeps bytes that are no UTF-8 as surrogates."""
    try:
        str(name).encode()
    except UnicodeEncodeError:
        return False
    return True


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]], *, durable: bool = False) -> None:
    """Write a CSV file in one step; see ``replacing``, and ``csv_line`` for texts that look like formulas."""
    with replacing(path, durable=durable) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        file.write(csv_line(header))
        file.writelines(map(csv_line, rows))


def csv_line(cells: Sequence[Any]) -> str:
    """Return a line of CSV with its end.

    A spreadsheet would run a text that begins like a formula, such as a file's name: it gets an apostrophe in front,
    which ``read_csv`` takes away. Numbers stay as they are.
    """
    buffer = io.StringIO()
    csv.writer(buffer).writerow([_guarded(cell) if isinstance(cell, str) else cell for cell in cells])
    return buffer.getvalue()


def read_csv(path: Path, *, cut: bool = False) -> list[dict[str, str]]:
    """Read a CSV file with a header line, as ``write_csv`` writes it.

    Args:
        path: the file.
        cut: whether a kill may have cut the last line short, which is then left out.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        text = read_text(path)
        if "\0" in text:
            raise ValueError("it holds NUL")
        if not cut and not text.endswith("\n"):
            raise UserError(f"{path} is cut short", fix="make it again")
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file ({first_line(error, 160)})", fix="make it again") from error
    if cut and rows and (not text.endswith("\n") or _is_uneven(rows[-1])):
        rows.pop()
    for number, row in enumerate(rows, start=2):
        if _is_uneven(row):
            raise UserError(f"{path} line {number} is damaged (not as many cells as its header)", fix="make it again")
    return [{name: _unguarded(cell) for name, cell in row.items()} for row in rows]


def _is_uneven(row: dict[Any, Any]) -> bool:
    return None in row or None in row.values()


def _guarded(text: str) -> str:
    return f"'{text}" if FORMULA.match(text) and not _is_number(text) else text


def _unguarded(text: str) -> str:
    return text[1:] if text.startswith("'") and FORMULA.match(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return not text[0].isspace()  # float() passes over white space


def existing_parent(path: Path) -> Path:
    """Return the nearest of a path and the folders above it that is there."""
    return next(one for one in (path, *path.absolute().parents) if one.exists())


def require_writable(path: Path) -> None:
    """Refuse an output that could not be created, without creating it.

    Raises:
        UserError: what would have to hold it is a file, or cannot be written.
    """
    parent = existing_parent(path)
    if path == parent and not path.is_dir():
        parent = path.absolute().parent  # the file itself is replaced
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        reason = "Permission denied" if parent.is_dir() else "Not a directory"
        raise UserError(f"cannot write {path}: {reason}", fix="choose another --out")


@contextlib.contextmanager
def claimed_folder(folder: Path, *, allowed: bool, hint: str = OVERWRITE, dry_run: bool = False) -> Iterator[None]:
    """Create an output folder and hold it until the block ends, or refuse one that already holds something.

    Args:
        folder: the folder to write into.
        allowed: whether the user agreed to what is there (``--overwrite`` or ``--resume``).
        hint: what the user can do when the folder is refused.
        dry_run: only refuse; create and hold nothing.

    Raises:
        UserError: the folder is not empty and not allowed, is a file, cannot be created, or another job holds it.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file", fix="choose another --out")
    try:
        if dry_run:
            require_writable(folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
        # Before a lock is put into a folder that is none of ours; where there is one, its holder is the better answer.
        _refuse_occupied(folder, allowed=allowed or (folder / LOCK).exists(), hint=hint)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}", fix="choose another --out") from error
    with locked(folder, dry_run=dry_run):
        _refuse_occupied(folder, allowed=allowed, hint=hint)
        yield


def names_in(folder: Path) -> set[str]:
    """Return what a folder holds, a lock aside; nothing where there is no folder."""
    return {path.name for path in folder.iterdir()} - {LOCK} if folder.is_dir() else set()


def _refuse_occupied(folder: Path, *, allowed: bool, hint: str) -> None:
    if not allowed and names_in(folder):
        raise UserError(f"{folder} is not empty", fix=hint)


def refuse_links(folder: Path, *names: str) -> None:
    """Refuse an output folder in which a name of ours is a link: what is written or removed there lies elsewhere.

    The folder itself may be a link, which is the user's choice.

    Args:
        folder: the folder to write into.
        names: paths below it.

    Raises:
        UserError: one of them, or of the folders that lead there, is a link.
    """
    for name in names:
        for part in (Path(name), *Path(name).parents):
            if part.name and (folder / part).is_symlink():
                raise UserError(f"{folder / part} is a link", fix="remove it, or choose another --out")


def stays_below(name: str) -> bool:
    """Return whether a path that a document names stays below the folder that it is relative to, links aside."""
    path = Path(name)
    return not (path.drive or path.root or ".." in path.parts)


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove files of ours below a folder, as far as they are there; never one that lies elsewhere, be it by a link."""
    root = folder.resolve()
    for path in (folder / name for name in names):
        if path.parent.resolve().is_relative_to(root):
            remove_written(path)
