"""Writing so that a kill at any moment leaves either the old file or the new one, and nothing of others is touched."""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from breastcli.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last because libraries choose a format by it.
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: Any) -> None:
    """Write indented JSON in one step; NaN is refused, since JSON has none."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


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


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file in one step."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read a CSV file with a header line.

    Raises:
        UserError: the file is missing or is not text.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file ({error})", fix="make it again") from error


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


def claim_folder(folder: Path, *, allowed: bool, hint: str, dry_run: bool = False) -> None:
    """Create an output folder, or refuse one that already holds something.

    Args:
        folder: the folder to write into.
        allowed: whether the user agreed to what is there (``--overwrite`` or ``--resume``).
        hint: what the user can do when the folder is refused.
        dry_run: only refuse; create nothing.

    Raises:
        UserError: the folder is not empty and not allowed, is a file, or cannot be created.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file", fix="choose another --out")
    try:
        if dry_run:
            require_writable(folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
        occupied = folder.exists() and any(folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}", fix="choose another --out") from error
    if occupied and not allowed:
        raise UserError(f"{folder} is not empty", fix=hint)
