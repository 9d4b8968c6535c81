"""The image files that measurements read: the user's, or drawn ones of BreakHis' size."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from breastcli.benchmarks import SIZE_PX, Setting
from breastcli.data.audit import PreparedRecord
from breastcli.data.datasets import DataSet, find_dataset
from breastcli.data.journal import decode_into
from breastcli.data.sample_tree import draw_sample
from breastcli.data.store import PARTIAL, PreparedData
from breastcli.errors import UserError
from breastcli.progress import SILENT, Progress
from breastcli.records import ImageRecord

NUM_DRAWN = 128
WIDTH_PX, HEIGHT_PX = 700, 460  # of BreakHis' files
VALIDATION_EVERY = 9  # images; training asks for a validation split


@contextlib.contextmanager
def raw_folder(raw: str | None, seed: int, progress: Progress) -> Iterator[Path]:
    """Yield the folder of a raw data set: ``raw``, or a temporary one with drawn images.

    Raises:
        UserError: ``raw`` holds no data set that is known.
    """
    if raw is not None:
        find_dataset("auto", Path(raw))
        yield Path(raw)
        return
    with tempfile.TemporaryDirectory() as folder:
        progress.begin("drawing", NUM_DRAWN, "images")
        draw_sample(
            Path(folder),
            num_images=NUM_DRAWN,
            height_px=HEIGHT_PX,
            width_px=WIDTH_PX,
            seed=seed,
            on_drawn=lambda: progress.advance("drawing"),
        )
        yield Path(folder)


def choose_records(raw: Path, limit: int) -> tuple[DataSet, list[ImageRecord]]:
    """Return the adapter of a raw folder and at most ``limit`` of its images, evenly spaced.

    Raises:
        UserError: it holds no data set that is known, or no image.
    """
    adapter = find_dataset("auto", raw)
    records = adapter.scan(raw).records
    count = min(limit, len(records))
    return adapter, [records[number * len(records) // count] for number in range(count)]


def prepare_sample(folder: Path, setting: Setting, limit: int) -> tuple[PreparedData, list[Path]]:
    """Decode at most ``limit`` images of ``setting.raw`` into an array as ``prepare`` does.

    Args:
        folder: where the array is put.
        setting: says where the images are, their size, and how many threads decode.
        limit: number of images.

    Returns:
        The images that could be read, most for training and a few for validation, and their files.

    Raises:
        UserError: no file can be read.
    """
    assert setting.raw is not None
    adapter, records = choose_records(setting.raw, limit)
    size_px, partial = setting.size_px or SIZE_PX, folder / PARTIAL
    entries = decode_into(partial, records, setting.raw, size_px, setting.num_workers, resume=False, progress=SILENT)
    readable = [(record, entry) for record, entry in zip(records, entries, strict=True) if not entry.reason]
    if not readable:
        raise UserError(f"{setting.raw}: no readable image", fix="choose another --raw")
    rows = [
        PreparedRecord(
            record=record,
            split="train" if number % VALIDATION_EVERY else "val",
            fold=None,
            width_px=entry.width_px,
            height_px=entry.height_px,
            pixel_hash=entry.pixel_hash,
        )
        for number, (record, entry) in enumerate(readable)
    ]
    card = {"classes": list(adapter.classes), "size_px": size_px, "split": {"folds": None}}
    return PreparedData(partial, card, rows), [setting.raw / row.record.path for row in rows]
