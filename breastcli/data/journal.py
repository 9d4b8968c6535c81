"""Decoding a whole data set into one array file, so that a killed run goes on where it stopped."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from breastcli.data.images import decode_in_order
from breastcli.data.measures import Measures
from breastcli.data.store import DERIVED, IMAGES, npy_header, remove_partial, row_bytes, write_header
from breastcli.errors import UserError
from breastcli.files import csv_line, read_csv, read_json, refuse_links, write_csv, write_json, writing
from breastcli.progress import Progress
from breastcli.records import ImageRecord

JOURNAL, REQUEST = "decoded.csv", "request.json"


@dataclass(frozen=True)
class JournalEntry:
    """One decoded file; the i-th entry without a reason is the i-th image of the array.

    Attributes:
        path: relative to the raw folder.
        width_px: width of the file.
        height_px: height of the file.
        pixel_hash: SHA-256 of the full-size pixels.
        reason: why the file was rejected, or "".
        measures: numbers about the full-size pixels; None where the file was rejected.
    """

    path: str
    width_px: int
    height_px: int
    pixel_hash: str
    reason: str
    measures: Measures | None = None


MEASURES = tuple(field.name for field in dataclasses.fields(Measures))
FIELDS = ("path", "width_px", "height_px", "pixel_hash", "reason", *MEASURES)


def decode_into(
    partial: Path,
    records: list[ImageRecord],
    raw: Path,
    size_px: int,
    workers: int,
    *,
    resume: bool,
    progress: Progress,
) -> list[JournalEntry]:
    """Decode the files of ``records`` in order into ``partial/images.npy``, keeping a journal beside it.

    Every image is in the file before its line is in the journal. After a kill the array is cut back to what the journal
    vouches for, and decoding goes on from there.

    Raises:
        UserError: the work to resume was begun for another raw folder, size or images, by an older version, is damaged,
            or lies elsewhere.
    """
    request = _request(records, raw, size_px)
    entries = _open_journal(partial, request, resume=resume)
    progress.begin("decoding", len(records), "images")
    progress.advance("decoding", len(entries))
    todo = [raw / record.path for record in records[len(entries) :]]
    num_rows = sum(not entry.reason for entry in entries)
    images, journal = partial / IMAGES, partial / JOURNAL
    # Closing a file writes what is left in its buffer, and can fail again.
    with (
        writing(images),
        images.open("r+b") as array,
        writing(journal),
        journal.open("a", newline="", encoding="utf-8") as file,
    ):
        array.truncate(len(npy_header(0, size_px)) + num_rows * row_bytes(size_px))
        array.seek(0, os.SEEK_END)
        for path, image in zip(todo, decode_in_order(todo, size_px, workers), strict=True):
            name = path.relative_to(raw).as_posix()
            entry = JournalEntry(name, image.width_px, image.height_px, image.pixel_hash, image.reason, image.measures)
            if image.pixels is not None:
                with writing(images):
                    array.write(image.pixels.tobytes())
                    array.flush()
                num_rows += 1
            _append(file, entry)
            entries.append(entry)
            progress.advance("decoding")
        with writing(images):
            write_header(array, num_rows, size_px)
            array.flush()
    return entries


def read_finished(partial: Path, records: Sequence[ImageRecord], raw: Path, size_px: int) -> list[JournalEntry]:
    """Return the journal of images that were all decoded.

    Raises:
        UserError: the work is missing, unfinished or damaged, or was begun for another raw folder, size or images.
    """
    request = _request(records, raw, size_px)
    if not all((partial / name).is_file() for name in (IMAGES, JOURNAL, REQUEST)):
        raise UserError(f"{partial.parent} holds no decoded images", fix="run that part with --shard")
    _check_request(partial, request)
    entries = _backed(_complete_lines(partial / JOURNAL, request["paths"]), _num_whole(partial, size_px))
    if len(entries) < len(records):
        raise UserError(f"{partial.parent} is unfinished", fix="run that part again with --resume")
    return entries


def write_finished(
    partial: Path, records: Sequence[ImageRecord], entries: Sequence[JournalEntry], raw: Path, size_px: int
) -> None:
    """Put a journal beside an array of images that were decoded elsewhere, so that ``--resume`` finds nothing to do."""
    write_json(partial / REQUEST, _request(records, raw, size_px))
    write_csv(partial / JOURNAL, FIELDS, map(_cells, entries))


def _request(records: Sequence[ImageRecord], raw: Path, size_px: int) -> dict[str, Any]:
    return {"size": size_px, "paths": [record.path for record in records], "raw": str(raw.resolve())}


def _num_whole(partial: Path, size_px: int) -> int:
    """Return how many whole images the array file holds."""
    return ((partial / IMAGES).stat().st_size - len(npy_header(0, size_px))) // row_bytes(size_px)


def _append(file: TextIO, entry: JournalEntry) -> None:
    file.write(csv_line(_cells(entry)))
    file.flush()


def _cells(entry: JournalEntry) -> list[Any]:
    """Return the values of ``FIELDS``; numbers in CSV are written so that they read back as they were."""
    known = [entry.path, entry.width_px, entry.height_px, entry.pixel_hash, entry.reason]
    return known + (["" for _ in MEASURES] if entry.measures is None else list(dataclasses.astuple(entry.measures)))


def _open_journal(partial: Path, request: dict[str, Any], *, resume: bool) -> list[JournalEntry]:
    """Return the journal of an interrupted run of the same request, or start afresh."""
    refuse_links(partial.parent, *(f"{partial.name}/{name}" for name in (IMAGES, JOURNAL, REQUEST, *DERIVED)))
    if resume and all((partial / name).is_file() for name in (IMAGES, JOURNAL, REQUEST)):
        _check_request(partial, request)
        num_rows = _num_whole(partial, request["size"])
        entries = _backed(_complete_lines(partial / JOURNAL, request["paths"]), num_rows)
        write_csv(partial / JOURNAL, FIELDS, map(_cells, entries))
        return entries
    remove_partial(partial.parent)
    partial.mkdir(parents=True)
    write_json(partial / REQUEST, request)
    with writing(partial / IMAGES), (partial / IMAGES).open("wb") as file:
        write_header(file, 0, request["size"])
    write_csv(partial / JOURNAL, FIELDS, [])
    return []


def _check_request(partial: Path, request: dict[str, Any]) -> None:
    begun = read_json(partial / REQUEST)
    begun = begun if isinstance(begun, dict) else {}
    names = {"raw": "another raw folder", "size": "another size of images", "paths": "another choice of images"}
    different = [name for key, name in names.items() if begun.get(key) != request[key]]
    if different:
        raise UserError(f"{partial} was begun for {' and '.join(different)}", fix="use another --out, or --overwrite")


def _backed(entries: list[JournalEntry], num_rows: int) -> list[JournalEntry]:
    """Return the entries before the first whose image is missing from an array of ``num_rows`` whole images.

    After a power loss the journal can be ahead of the array, which would be filled up with black images.
    """
    kept: list[JournalEntry] = []
    for entry in entries:
        num_rows -= not entry.reason
        if num_rows < 0:
            break
        kept.append(entry)
    return kept


def _complete_lines(path: Path, wanted: list[str]) -> list[JournalEntry]:
    """Read the journal without its last line where a kill cut that short; its image is decoded again.

    Raises:
        UserError: the journal is older than what an audit needs to know of every image, or damaged.
    """
    rows = read_csv(path, cut=True)
    if rows and set(FIELDS) - set(rows[0]):
        raise UserError(f"{path} was begun by an older breastcli", fix="use --overwrite")
    try:
        entries = [_read_entry(row) for row in rows]
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error})", fix="use --overwrite") from error
    if [entry.path for entry in entries] != wanted[: len(entries)]:
        raise UserError(f"{path} is damaged (it tells of other images)", fix="use --overwrite")
    return entries


def _read_entry(row: dict[str, str]) -> JournalEntry:
    known = (row["path"], int(row["width_px"]), int(row["height_px"]), row["pixel_hash"], row["reason"])
    if row["reason"]:
        return JournalEntry(*known)
    first, *numbers = (row[name] for name in MEASURES)
    measures = Measures(first, *map(float, numbers))
    if not re.fullmatch(r"([0-9a-f]{64})?", first) or not all(map(math.isfinite, dataclasses.astuple(measures)[1:])):
        raise ValueError("a measure is out of range")
    return JournalEntry(*known, measures)
