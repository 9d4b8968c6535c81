"""The prepared folder: one uint8 array of all images beside a manifest, a card and the audit."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from breastcli.data.audit import PreparedRecord
from breastcli.errors import UserError, first_line
from breastcli.files import read_csv, read_json, stays_below, write_csv, writing
from breastcli.records import ImageRecord
from breastcli.shapes import check_shape

CARD, MANIFEST, IMAGES = "dataset.json", "manifest.csv", "images.npy"
PARTIAL = ".partial"
STAINED, KEPT = "stained.npy", "kept.npy"  # in PARTIAL, what normalisation makes of IMAGES, and IMAGES less some
DERIVED = (STAINED, KEPT)
EMBEDDINGS = "embeddings"  # what training with a frozen network keeps beside the data
FORMAT = 1
OTHER_ROW_FIELDS = ("split", "fold", "width_px", "height_px", "pixel_hash", "stain_fallback")
# What every job relies on; documents of older versions may lack the rest.
CARD_SHAPE = {
    **dict.fromkeys(("name", "title", "task", "fingerprint", "split_fingerprint"), str),
    "drawn": bool,
    "classes": [str],
    "size_px": int,
    "stain": (dict, None),
    "notes": [str],
    "num_images": int,
    "counts": [dict],
    "options?": dict,
    "split": {"level": str, "folds": (int, None), "leaky": (str, None)},
    "synthetic?": (dict, None),
}
SOURCE_SHAPE = {
    **dict.fromkeys(("name", "split_fingerprint", "fingerprint"), str),
    **dict.fromkeys(("stain", "fold"), (dict, int, None)),
    "size_px": int,
}
RECORD_FIELDS = tuple(field.name for field in fields(ImageRecord))


def row_bytes(size_px: int) -> int:
    """Return the number of bytes of one (size, size, 3) uint8 image."""
    return size_px * size_px * 3


def npy_header(num_images: int, size_px: int) -> bytes:
    """Return the header of an ``images.npy`` of (num_images, size, size, 3) uint8.

    NumPy leaves room for the first axis to grow, so the header's length does not depend on ``num_images`` and can be
    written last.
    """
    buffer = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": (num_images, size_px, size_px, 3)}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def write_header(file: BinaryIO, num_images: int, size_px: int) -> None:
    """Put the right header at the start of an array file."""
    header = npy_header(num_images, size_px)
    assert len(header) == len(npy_header(0, size_px))
    file.seek(0)
    file.write(header)


def write_manifest(folder: Path, rows: Sequence[PreparedRecord]) -> None:
    """Write ``manifest.csv``, the file that makes the folder a finished one."""

    def values(row: PreparedRecord) -> list[Any]:
        known = [getattr(row.record, name) for name in RECORD_FIELDS]
        fold = "" if row.fold is None else row.fold
        return [*known, row.split, fold, row.width_px, row.height_px, row.pixel_hash, int(row.stain_fallback)]

    write_csv(folder / MANIFEST, [*RECORD_FIELDS, *OTHER_ROW_FIELDS], map(values, rows), durable=True)


def read_manifest(path: Path) -> list[PreparedRecord]:
    """Read ``manifest.csv``.

    Raises:
        UserError: the file is missing or damaged.
    """
    rows = []
    for number, values in enumerate(read_csv(path), start=2):
        try:
            known = {name: values[name] for name in RECORD_FIELDS}
            if not stays_below(known["path"]):
                raise ValueError(f"{known['path']} leads out of the raw folder")
            record = ImageRecord(**(known | {"magnification": known["magnification"] or None}))
            rows.append(
                PreparedRecord(
                    record=record,
                    split=values["split"],
                    fold=int(values["fold"]) if values["fold"] else None,
                    width_px=int(values["width_px"]),
                    height_px=int(values["height_px"]),
                    pixel_hash=values["pixel_hash"],
                    stain_fallback=values["stain_fallback"] == "1",
                )
            )
        except (KeyError, ValueError) as error:
            raise UserError(f"{path} line {number} is damaged ({error})", fix="run prepare again") from error
    return rows


def fingerprints(rows: Sequence[PreparedRecord], options: dict[str, Any]) -> tuple[str, str]:
    """Return the fingerprint of the images (pixels, labels and how they were prepared) and that of the split."""
    content, split = hashlib.sha256(), hashlib.sha256()
    content.update(json.dumps(options, sort_keys=True).encode())
    for row in sorted(rows, key=lambda row: row.record.image_id):
        content.update(f"{row.record.image_id}\t{row.record.label}\t{row.pixel_hash}\n".encode())
        split.update(f"{row.record.image_id}\t{row.record.label}\t{row.side}\n".encode())
    return content.hexdigest()[:16], split.hexdigest()[:16]


def difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> str | None:
    """Return in what two data sets' fingerprints differ: "another split", "other images", or None."""
    for key, what in (("split_fingerprint", "another split"), ("fingerprint", "other images")):
        if first[key] != second[key]:
            return what
    return None


@dataclass(frozen=True)
class PreparedData:
    """A finished prepared folder.

    Attributes:
        folder: where it is.
        card: the contents of ``dataset.json``.
        rows: N rows in the order of ``images``.
    """

    folder: Path
    card: dict[str, Any]
    rows: list[PreparedRecord]

    @classmethod
    def open(cls, folder: Path) -> PreparedData:
        """Open a prepared folder and check that its parts belong together.

        Raises:
            UserError: the folder is missing, unfinished, damaged or was edited by hand.
        """
        if not (folder / MANIFEST).is_file():
            unfinished = (folder / PARTIAL).is_dir()
            state = "is unfinished" if unfinished else "is not a prepared folder"
            fix = "run the same prepare with --resume" if unfinished else "run breastcli prepare, or pass --data"
            raise UserError(f"{folder} {state}", fix=fix)
        begun = _identity(folder / MANIFEST)
        card = read_json(folder / CARD)
        if not isinstance(card, dict) or card.get("format") != FORMAT:
            raise UserError(f"{folder / CARD} is of another version of breastcli", fix="run prepare again")
        check_shape(card, CARD_SHAPE, folder / CARD, "run prepare again")
        if card.get("synthetic"):
            check_shape(card["synthetic"], {"run": str, "source": SOURCE_SHAPE}, folder / CARD, "make the images again")
        rows = read_manifest(folder / MANIFEST)
        data = cls(folder, card, rows)
        _, split = fingerprints(rows, {})
        if split != card["split_fingerprint"] or not {row.record.label for row in rows} <= set(card["classes"]):
            raise UserError(f"{folder / MANIFEST} was changed after prepare", fix="run prepare again")
        images, shape = folder / IMAGES, (len(rows), data.size_px, data.size_px, 3)
        if not images.is_file() or images.stat().st_size != len(npy_header(0, data.size_px)) + math.prod(shape):
            raise UserError(f"{images} is missing or truncated", fix="run prepare again")
        # From now on what is mapped stays, whatever takes its name. The manifest is the last file written and the first
        # removed, so if it is the same still, all that was read in between belongs to it.
        if rows and (data.images.shape, data.images.dtype) != (shape, np.uint8):
            raise UserError(f"{images} does not hold the images of {folder / MANIFEST}", fix="run prepare again")
        if _identity(folder / MANIFEST) != begun:
            raise UserError(f"{folder} was overwritten while it was opened", fix="start again")
        return data

    @property
    def classes(self) -> tuple[str, ...]:
        """The K class names in index order."""
        return tuple(self.card["classes"])

    @property
    def size_px(self) -> int:
        """Side of the images in pixels."""
        return int(self.card["size_px"])

    @property
    def num_folds(self) -> int | None:
        """The number of folds, or None where there is one split."""
        return self.card["split"]["folds"]

    @cached_property
    def images(self) -> np.ndarray:
        """(N, size, size, 3) uint8, memory-mapped and read-only."""
        return open_array(self.folder / IMAGES)

    @cached_property
    def labels(self) -> np.ndarray:
        """(N,) int64 class indices."""
        index = {name: position for position, name in enumerate(self.classes)}
        return np.array([index[row.record.label] for row in self.rows], dtype=np.int64)

    def select(self, split: str, *, fold: int | None = None, magnification: str | None = None) -> np.ndarray:
        """Return the row numbers of one split, in manifest order.

        Where the data set has K folds, ``fold`` is the test split, the next fold (cyclically) is the validation split
        and the others are for training.

        Raises:
            UserError: the fold does not fit the data set, the images are synthetic, which none but training ones are,
                or the selection is empty.
        """
        if self.card.get("synthetic") and (split != "train" or fold is not None):
            raise self._only_synthetic()
        sides = {split} if self.num_folds is None else self._fold_sides(split, fold)
        if self.num_folds is None and fold is not None:
            raise UserError(f"{self.folder} has no folds", fix="leave --fold out, or prepare with --folds K")
        wanted = [
            number
            for number, row in enumerate(self.rows)
            if row.side in sides and magnification in (None, row.record.magnification)
        ]
        if not wanted and self.card.get("synthetic"):
            raise self._only_synthetic()
        if not wanted:
            where = f" at {magnification}" if magnification else ""
            raise UserError(f"{self.folder} has no {split} images{where}", fix="choose another --mag or --data")
        return np.array(wanted)

    def parts(self, rows: np.ndarray) -> list[tuple[PreparedData, np.ndarray, np.ndarray]]:
        """Return the folders that hold these rows (n,), each with its own row numbers and their places among the n."""
        return [(self, rows, np.arange(len(rows)))]

    def _only_synthetic(self) -> UserError:
        fix = "pass it to train with --extra, and the images that it was made from with --data"
        return UserError(f"{self.folder} holds synthetic training images only", fix=fix)

    def _fold_sides(self, split: str, fold: int | None) -> set[str]:
        num_folds = self.num_folds
        assert num_folds is not None
        if fold is None or fold >= num_folds:
            raise UserError(f"{self.folder} has folds 0 to {num_folds - 1}", fix="choose one with --fold")
        test, val = str(fold), str((fold + 1) % num_folds)
        named = {"test": {test}, "val": {val}, "train": {str(k) for k in range(num_folds)} - {test, val}}
        return named[split]


def open_array(path: Path) -> np.ndarray:
    """Map an array file into memory, read-only.

    Raises:
        UserError: it is damaged: an archive, or of anything but plain numbers, too.
    """
    try:
        if not path.is_file():
            raise OSError("it is no regular file")  # a pipe would be waited for
        with path.open("rb") as file:
            np.lib.format.read_magic(file)  # without it load() would go on to open other kinds of files
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # damaged headers make NumPy raise almost anything
        raise UserError(f"{path} is damaged ({first_line(error, 120)})", fix="make it again") from error


def _identity(file: Path) -> tuple[int, int, int] | None:
    """Return what tells a file from another of its name, or None where there is none."""
    try:
        known = file.stat()
    except FileNotFoundError:
        return None
    return known.st_ino, known.st_mtime_ns, known.st_size


def read_chunks(path: Path, num_images: int, size_px: int, chunk: int) -> Iterator[np.ndarray]:
    """Read an array file in chunks of images without mapping it, so that memory use stays flat."""
    with path.open("rb") as file:
        file.seek(len(npy_header(0, size_px)))
        for start in range(0, num_images, chunk):
            count = min(chunk, num_images - start)
            values = np.frombuffer(file.read(count * row_bytes(size_px)), dtype=np.uint8)
            yield values.reshape(count, size_px, size_px, 3)


def keep_images(path: Path, kept: Sequence[bool], size_px: int) -> Path:
    """Write the images of an array file that are to be kept into ``KEPT`` beside it; the file itself stays."""
    target = path.with_name(KEPT)
    with writing(target), target.open("wb") as file:
        write_header(file, sum(kept), size_px)
        for image, wanted in zip(read_chunks(path, len(kept), size_px, 1), kept, strict=True):
            if wanted:
                file.write(image.tobytes())
    return target


def remove_partial(folder: Path) -> None:
    """Remove the work in progress of ``prepare``; nothing else."""
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)


def embeddings_file(folder: Path, key: str, view: int) -> Path:
    """Return where the embeddings of one network in one of the eight positions of an image are kept."""
    return folder / EMBEDDINGS / f"{key}-{view}.npy"


def remove_embeddings(folder: Path) -> None:
    """Remove the embeddings of images that are no longer there; nothing else."""
    for file in (folder / EMBEDDINGS).glob("*.npy"):
        if re.fullmatch(r"[0-9a-f]{16}-[0-7]", file.stem):
            file.unlink()
