"""The contact sheets of a prepared data set, and of the synthetic images among a run's training images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from breastcli.config import SPLITS
from breastcli.data.audit import PreparedRecord
from breastcli.data.joined import JoinedData
from breastcli.data.store import open_array
from breastcli.records import DRAWN
from breastcli.reporting.contact_sheet import contact_sheet

SHEET_COLUMNS = 8


def draw_splits(array_file: Path, rows: Sequence[PreparedRecord], card: Mapping[str, Any], path: Path) -> None:
    """Draw a few images of every class on every side.

    Args:
        array_file: .npy of (N, H, W, 3) uint8.
        rows: N.
        card: what ``dataset.json`` will hold.
        path: PNG file to write.
    """
    array = open_array(array_file)
    generator = np.random.default_rng(0)
    cells, captions = {}, {}
    unit = "exam" if card["num_exams"] else "patient" if card["num_patients"] else ""
    present = {row.side for row in rows}
    sides = [side for side in SPLITS if side in present] or sorted(present, key=int)
    for side in sides:
        for label in card["classes"]:
            members = [number for number, row in enumerate(rows) if (row.side, row.record.label) == (side, label)]
            chosen = np.sort(generator.permutation(members)[:SHEET_COLUMNS]).astype(int)
            title = side if card["split"]["folds"] is None else f"fold {side}"
            groups = len({getattr(rows[number].record, unit) for number in members}) if unit else 0
            cells[title, label] = np.array(array[chosen])
            captions[title, label] = f"{len(members)} images" + (f", {groups} {unit}s" if unit else "")
    stain = f", {card['stain']['method']}" if card["stain"] else ""
    stamp = f" - {card['split']['leaky']}" if card["split"]["leaky"] else ""
    drawn = " - drawn, not real" if card["drawn"] else ""
    title = f"{card['title']}{drawn}{stamp}\n{card['num_images']:,} images, {card['size_px']} px{stain}"
    contact_sheet(cells, path, title=title, captions=captions)


def draw_extra(data: JoinedData, rows: np.ndarray, path: Path) -> None:
    """Draw a few of the synthetic images that joined the training images, of every class that has any.

    Args:
        data: real images, and synthetic ones behind them.
        rows: (n,) training rows.
        path: PNG file to write.
    """
    generator = np.random.default_rng(0)
    extra = rows[data.is_extra(rows)]
    cells, captions = {}, {}
    for index, label in enumerate(data.classes):
        members = extra[data.labels[extra] == index]
        if len(members):
            cells["synthetic", label] = data.images[np.sort(generator.permutation(members)[:SHEET_COLUMNS])]
            captions["synthetic", label] = f"{len(members):,} images"
    stamps = [data.card["split"]["leaky"], DRAWN if data.card["drawn"] else ""]
    title = " - ".join(["Synthetic training images", *filter(None, stamps)])
    contact_sheet(cells, path, title=f"{title}\nmade by a generative network; {len(extra):,} images", captions=captions)
