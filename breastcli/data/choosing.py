"""Which images of a raw folder are prepared, under which label, and what must stay together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from breastcli.config import PrepareConfig
from breastcli.data.datasets import DataSet, Recipe, Rejection, Scan
from breastcli.data.imported_split import ImportedSplit
from breastcli.data.patients import assign_patients
from breastcli.data.splits import known_level
from breastcli.errors import UserError
from breastcli.parsing import parse_classes, parse_magnification
from breastcli.records import ImageRecord


@dataclass(frozen=True)
class Chosen:
    """The images to prepare.

    Attributes:
        records: labelled for the task.
        rejected: files that cannot be placed.
        notes: facts about the images and the choice, to keep with the data set.
        level: what never crosses a split ("exam", "patient" or "image").
        sides: path to side, where the split is imported.
        recipe: how siblings were made that are still to be found and stand for examinations; None where there are none.
    """

    records: list[ImageRecord]
    rejected: list[Rejection]
    notes: list[str]
    level: str
    sides: dict[str, str] | None
    recipe: Recipe | None = None


def settle(adapter: DataSet, scan: Scan) -> DataSet:
    """Return the adapter with the classes that were found, where the data set leaves them open."""
    return dataclasses.replace(adapter, subtypes=scan.classes) if scan.classes else adapter


def choose(scan: Scan, adapter: DataSet, raw: Path, imported: ImportedSplit | None, config: PrepareConfig) -> Chosen:
    """Choose among the images that were found.

    Args:
        scan: what the adapter found.
        adapter: with its classes settled.
        raw: the raw folder or list, for messages.
        imported: a published split, which also says what is left out.
        config: the job's options.

    Raises:
        UsageError: an option that cannot be accepted.
        UserError: no image is left, or patients are not known as far as the split needs them.
    """
    kept = parse_classes(config.classes, (*adapter.subtypes, *adapter.classes))
    records, choice = _of_magnification_and_classes(scan.records, adapter, raw, kept, config)
    notes = scan.notes + choice
    rejected, sides = scan.rejected, None
    if imported:
        sides, others = imported.place(records)
        records, rejected = [one for one in records if one.path in sides], rejected + others
        notes.append(imported.describe(sides))
    if config.patients:
        records = assign_patients(records, config.patients)
        notes.append("patients are those of --patients, not of the data set's names")
    unknown = not any(record.exam or record.patient for record in records)
    recipe = adapter.recipe if unknown and config.group_by != "patient" else None
    level = config.group_by if recipe else known_level(records, config.group_by)
    if level != config.group_by:
        notes.append(f"{config.group_by}s are unknown: grouped by {level}")
    return Chosen(records, rejected, notes, level, sides, recipe)


def _of_magnification_and_classes(
    records: list[ImageRecord], adapter: DataSet, raw: Path, kept: tuple[str, ...], config: PrepareConfig
) -> tuple[list[ImageRecord], list[str]]:
    """Return the images asked for, labelled for the task, and a note on the choice."""
    magnification = parse_magnification(config.mag)
    if magnification and not any(record.magnification for record in records):
        raise UserError(f"--mag {config.mag}: {adapter.name} has no magnifications", fix="leave --mag out")
    classes = set(kept) - set(adapter.subtypes)  # a name that both have means the subtype
    wanted = [
        record
        for record in records
        if magnification in (None, record.magnification)
        and (not kept or record.subtype in kept or record.label in classes)
    ]
    choice = " ".join([f"at {magnification}"] * bool(magnification) + [f"of {', '.join(kept)}"] * bool(kept))
    if not wanted:
        raise UserError(f"{raw} has no images {choice}", fix="choose another --mag or --classes")
    if config.task == "subtype":
        wanted = [dataclasses.replace(record, label=record.subtype) for record in wanted]
    return wanted, [f"{len(wanted):,} of them {choice}"] if choice else []


def order_classes(names: Iterable[str], adapter: DataSet, classes: str) -> list[str]:
    """Return class names in index order: of two the positive one last, more in alphabetical order.

    Args:
        names: those of the prepared images.
        adapter: knows which of two is the harmless one; where it leaves that open, the user may say so.
        classes: the value of ``--classes``, whose order decides where the adapter leaves the classes open.
    """
    order: tuple[str, ...] = (*adapter.subtypes, *adapter.classes)
    if adapter.generic and classes != "all":
        order = parse_classes(classes, order)
    return sorted(names, key=order.index if len(set(names)) == 2 else None)
