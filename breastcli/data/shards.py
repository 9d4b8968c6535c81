"""Decoding a data set in parts that array jobs share, and joining what they decoded."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from breastcli.data.journal import decode_into, read_finished, write_finished
from breastcli.data.store import IMAGES, PARTIAL, npy_header, row_bytes, write_header
from breastcli.errors import UsageError
from breastcli.files import claimed_folder, require_space, writing
from breastcli.progress import Progress
from breastcli.records import ImageRecord


@dataclass(frozen=True)
class ShardResult:
    """What one array job decoded.

    Attributes:
        out: folder of the part.
        number: number of the part, from 1 on.
        count: how many parts there are.
        num_images: images that were decoded.
        num_rejected: files that could not be.
    """

    out: Path
    number: int
    count: int
    num_images: int
    num_rejected: int

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-safe dictionary."""
        names = ("number", "count", "num_images", "num_rejected")
        return {"shard": {name: getattr(self, name) for name in names}}


def parse_shard(text: str) -> tuple[int, int]:
    """Return (2, 4) for "2/4".

    Raises:
        UsageError: not a part of a whole.
    """
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UsageError(f"--shard {text}: not a part", fix="give I/N as in 1/4 to 4/4")
    return int(number), int(count)


def shard_folder(out: Path, number: int, count: int) -> Path:
    """Return where one part is decoded: beside the folder that will hold the whole."""
    return out.with_name(f"{out.name}.shards") / f"{number}-of-{count}"


def share(records: Sequence[ImageRecord], number: int, count: int) -> list[ImageRecord]:
    """Return the images of one part: consecutive ones, so that the parts in order are the whole."""
    size, larger = divmod(len(records), count)
    start = (number - 1) * size + min(number - 1, larger)
    return list(records[start : start + size + (number <= larger)])


def decode_shard(
    records: Sequence[ImageRecord],
    raw: Path,
    out: Path,
    shard: tuple[int, int],
    size_px: int,
    workers: int,
    *,
    resume: bool,
    overwrite: bool,
    progress: Progress,
) -> ShardResult:
    """Decode one part of a data set into a folder of its own, where nobody but ``merge_shards`` looks.

    Raises:
        UserError: the folder is not empty, another job holds it, the disk is too full, or the work to resume is
            another.
    """
    own, folder = share(records, *shard), shard_folder(out, *shard)
    hint = "use --resume or --overwrite"
    with claimed_folder(folder, allowed=resume or overwrite, hint=hint):
        require_space(folder, len(own) * row_bytes(size_px), "or choose another --out")
        journal = decode_into(folder / PARTIAL, own, raw, size_px, workers, resume=resume, progress=progress)
    rejected = sum(bool(entry.reason) for entry in journal)
    return ShardResult(folder, *shard, len(journal) - rejected, rejected)


def merge_shards(
    records: Sequence[ImageRecord], raw: Path, out: Path, count: int, size_px: int, progress: Progress
) -> None:
    """Join the parts into the work in progress of ``out``, as if one job had decoded everything.

    Raises:
        UserError: a part is missing or unfinished, or was decoded from other images, or the disk is too full.
    """
    parts = [(shard_folder(out, number, count) / PARTIAL, share(records, number, count)) for number in _upto(count)]
    journals = [read_finished(folder, own, raw, size_px) for folder, own in parts]
    entries = [entry for journal in journals for entry in journal]
    num_rows = sum(not entry.reason for entry in entries)
    require_space(out, num_rows * row_bytes(size_px), "or choose another --out")
    partial = out / PARTIAL
    partial.mkdir(exist_ok=True)
    progress.begin("merging", count, "parts")
    with writing(partial / IMAGES), (partial / IMAGES).open("wb") as file:
        write_header(file, num_rows, size_px)
        for folder, _ in parts:
            with (folder / IMAGES).open("rb") as part:
                part.seek(len(npy_header(0, size_px)))
                shutil.copyfileobj(part, file, 1 << 20)
            progress.advance("merging")
    write_finished(partial, records, entries, raw, size_px)


def remove_shards(out: Path, count: int) -> None:
    """Remove the parts that were joined; nothing else."""
    for number in _upto(count):
        folder = shard_folder(out, number, count)
        shutil.rmtree(folder / PARTIAL, ignore_errors=True)
        _remove_empty(folder)
    _remove_empty(shard_folder(out, 1, count).parent)


def _upto(count: int) -> range:
    return range(1, count + 1)


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def check_options(shard: str | None, merge: int | None, *, audit: bool, overwrite: bool) -> tuple[int, int] | None:
    """Return the part that is asked for, or None; refuse options that do not go with parts.

    Raises:
        UsageError: there are such options.
    """
    if shard and merge:
        raise UsageError("--shard and --merge: first decode the parts, then join them", fix="leave one of them out")
    if audit and (shard or merge):
        raise UsageError("--audit keeps no images, so it has no parts", fix="leave --shard and --merge out")
    if merge and overwrite:
        raise UsageError("--merge does not replace a finished folder", fix="choose another --out, or remove it")
    return parse_shard(shard) if shard else None
