"""What ``prepare --dry-run`` says: the images that were found, divided as if every file could be read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from breastcli.config import SPLITS, PrepareConfig
from breastcli.data.audit import PreparedRecord, audit
from breastcli.data.checking import num_arrays, place_images
from breastcli.data.choosing import Chosen
from breastcli.data.datasets import DataSet
from breastcli.data.images import MIN_SIDE_PX
from breastcli.data.store import row_bytes
from breastcli.errors import LeakError
from breastcli.plan import Plan
from breastcli.records import DRAWN, stamp_of


def plan_drawing(raw: Path, out: Path, config: PrepareConfig) -> Plan:
    """Plan what needs images that would have to be drawn first."""
    facts = {"dataset": "sample", "raw": f"{raw} (would be drawn)", "images": config.draw, "size_px": config.size}
    notes = ("the images are divided once they are drawn",)
    return Plan("prepare", out, facts, notes, DRAWN, config.draw * row_bytes(config.size))


def plan_preparation(
    chosen: Chosen,
    adapter: DataSet,
    ratio: tuple[int, int, int],
    out: Path,
    config: PrepareConfig,
) -> Plan:
    """Divide the images that were found as if every file could be read, and say what leaks by its groups alone.

    Where images are grouped by what they look like, nothing is divided.
    """
    size_px = MIN_SIDE_PX if config.audit else config.size
    if chosen.recipe is not None:
        facts = {"dataset": adapter.title, "raw": config.raw, "images": len(chosen.records), "size_px": size_px}
        notes = (*chosen.notes, "groups are found by what the images look like: the split is known after preparing")
        return Plan("prepare", out, facts, notes, "", len(chosen.records) * row_bytes(size_px), config.resume)
    return _plan_division(chosen, adapter, ratio, size_px, out, config)


def _plan_division(
    chosen: Chosen, adapter: DataSet, ratio: tuple[int, int, int], size_px: int, out: Path, config: PrepareConfig
) -> Plan:
    splits, folds = place_images(chosen.records, ratio, chosen, config)
    rows = [
        # Nobody looked at the pixels: a path, unlike that of any other file, stands for them.
        PreparedRecord(record, split, fold, 0, 0, record.path)
        for record, split, fold in zip(chosen.records, splits, folds, strict=True)
    ]
    found = audit(rows, chosen.level)
    sides: dict[str, Counter[str]] = {}
    for row in sorted(rows, key=lambda row: SPLITS.index(row.split) if row.split else row.fold or 0):
        sides.setdefault(row.split or f"fold {row.fold}", Counter())[row.record.label] += 1
    facts = {
        "dataset": adapter.title,
        "raw": config.raw,
        "images": len(rows),
        "left_out": len(chosen.rejected),
        "grouped_by": chosen.level,
        "groups": None if chosen.level == "image" else len({getattr(row.record, chosen.level) for row in rows}),
        **{side: dict(sorted(counts.items())) for side, counts in sides.items()},
        "size_px": size_px,
        "stain": config.stain,
        "writes": "only the audit" if config.audit else "images, manifest, audit",
    }
    failure = None
    if found.leaks:
        fix = "a coarser --group-by takes a published split as it is, and says what it leaks"
        failure = LeakError(f"the split would leak: {found.first_leak}", fix)
    return Plan(
        "prepare",
        out,
        facts,
        (*chosen.notes, *found.warnings(), "files were not opened: damaged ones and copies are found by preparing"),
        stamp_of(found.stamp, adapter.drawn),
        num_arrays(config) * len(rows) * row_bytes(size_px),
        config.resume,
        failure,
    )
