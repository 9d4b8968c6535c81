from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageColor

from breastcli.data.duplicates import Duplicate
from breastcli.records import ImageRecord
from breastcli.reporting.contact_sheet import VERMILION
from breastcli.reporting.pair_sheet import CELL_PX, COLUMNS, MAX_PAIRS, draw_pairs


def pairs(folder: Path, count: int) -> list[Duplicate]:
    found = []
    for number in range(count):
        records = []
        for side in "ab":
            name = f"{number:02d}{side}"
            Image.new("RGB", (90, 60), (0, 9 * number, 200)).save(folder / f"{name}.png")
            records.append(ImageRecord(name, f"{name}.png", "benign", "benign"))
        found.append(Duplicate(*records, number, 0, 0.9))
    return found


def sheet(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def count(pixels: np.ndarray, colour: str) -> int:
    return int((pixels == ImageColor.getrgb(colour)).all(axis=2).sum())


def test_without_pairs_there_is_no_file_any_more(tmp_path: Path) -> None:
    draw_pairs(pairs(tmp_path, 1), {}, tmp_path, tmp_path / "out.png")
    assert (tmp_path / "out.png").exists()
    draw_pairs([], {}, tmp_path, tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_at_most_as_many_pairs_as_fit_are_drawn_and_those_on_two_sides_come_first(tmp_path: Path) -> None:
    found = pairs(tmp_path, MAX_PAIRS + 2)
    last = found[-1]
    sides = {one.image_id: "train" for pair in found for one in (pair.first, pair.second)}
    draw_pairs(found, sides, tmp_path, tmp_path / "calm.png")
    calm = sheet(tmp_path / "calm.png")
    assert count(calm, VERMILION) == 0
    assert count(calm, f"#{0:02x}{9 * (MAX_PAIRS - 1):02x}c8") > 0
    assert count(calm, f"#{0:02x}{9 * (MAX_PAIRS + 1):02x}c8") == 0
    assert calm.shape[0] // CELL_PX[1] == MAX_PAIRS // COLUMNS
    draw_pairs(found, sides | {last.second.image_id: "test"}, tmp_path, tmp_path / "alarm.png")
    alarm = sheet(tmp_path / "alarm.png")
    assert count(alarm, VERMILION) > 0
    assert count(alarm, f"#{0:02x}{9 * (MAX_PAIRS + 1):02x}c8") > 0


def test_a_dropped_image_is_no_alarm_and_a_lost_file_no_error(tmp_path: Path) -> None:
    found = pairs(tmp_path, 1)
    (tmp_path / "00b.png").unlink()
    draw_pairs(found, {"00a": "train"}, tmp_path, tmp_path / "out.png")
    assert count(sheet(tmp_path / "out.png"), VERMILION) == 0
