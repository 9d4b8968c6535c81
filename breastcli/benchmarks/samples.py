"""The image files that measurements read: the user's, or drawn ones of BreakHis' size."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from breastcli.data.datasets import DataSet, find_dataset
from breastcli.data.sample_tree import draw_sample
from breastcli.progress import Progress
from breastcli.records import ImageRecord

NUM_DRAWN = 128
WIDTH_PX, HEIGHT_PX = 700, 460  # of BreakHis' files


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
    return adapter, records[:: -(-len(records) // limit)]
