"""prepare: from a raw data set to one array of images, a split that does not leak, and an audit."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from breastcli import __version__
from breastcli.config import SPLITS, PrepareConfig
from breastcli.data.audit import Audit, PreparedRecord, audit
from breastcli.data.datasets import DataSet, Rejection, find_dataset
from breastcli.data.images import RejectedImageError, read_rgb
from breastcli.data.journal import JournalEntry, decode_into
from breastcli.data.splits import fold_records, known_level, split_records
from breastcli.data.store import (
    CARD,
    FORMAT,
    IMAGES,
    MANIFEST,
    PARTIAL,
    STAINED,
    PreparedData,
    fingerprints,
    remove_embeddings,
    remove_partial,
    write_manifest,
)
from breastcli.errors import LeakError, UsageError, UserError
from breastcli.files import claim_folder, read_csv, write_csv, write_json
from breastcli.parsing import parse_classes, parse_magnification, parse_ratio
from breastcli.progress import SILENT, Progress
from breastcli.records import ImageRecord
from breastcli.reporting.contact_sheet import contact_sheet

logger = logging.getLogger(__name__)

REFERENCE_IMAGES = 64  # training images whose median stain is the reference
SHEET_COLUMNS = 8


@dataclass(frozen=True)
class PrepareResult:
    """What ``prepare`` made.

    Attributes:
        out: the prepared folder.
        card: the contents of its ``dataset.json``.
        audit: the audit of its split.
        rejected: files left out.
        seconds: wall-clock time.
    """

    out: Path
    card: dict[str, Any]
    audit: Audit
    rejected: list[Rejection]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-safe dictionary."""
        rejected = [dataclasses.asdict(rejection) for rejection in self.rejected]
        return {"dataset": self.card, "audit": self.audit.to_json(), "rejected": rejected, "seconds": self.seconds}


def prepare(config: PrepareConfig, progress: Progress = SILENT) -> PrepareResult:
    """Decode, check, split, stain-normalise and resize a raw data set into a prepared folder.

    Stain normalisation follows resizing, so that one small array is read twice instead of the files; the papers do not
    give an order. Statistics of the stain reference see training images only.

    Raises:
        UsageError: an option that cannot be accepted.
        UserError: the raw folder, the output folder or the requested split cannot be used.
        LeakError: the split that was asked for leaks; no manifest is written.
    """
    started = time.monotonic()
    out = Path(config.out)
    magnification, ratio = parse_magnification(config.mag), parse_ratio(config.split)
    adapter, raw = _raw_folder(config, progress)
    if config.exact and config.stain == "none":
        raise UsageError("--exact: there is no --stain to measure", fix="leave it out")
    if config.stain != "none" and not adapter.stained:
        raise UserError(f"--stain {config.stain}: {adapter.name} is not H&E-stained", fix="use --stain none")
    kept = parse_classes(config.classes, (*adapter.subtypes, *adapter.classes))
    if config.resume and (out / MANIFEST).is_file():
        return _already_finished(out, _options(config, adapter))
    claim_folder(out, allowed=config.resume or config.overwrite, hint="use --resume, --overwrite or another --out")
    scan = adapter.scan(raw)
    wanted, notes = _wanted(scan.records, raw, magnification, kept, adapter, config)
    level = known_level(wanted, config.group_by)
    if level != config.group_by:
        notes.append(f"{config.group_by}s are unknown: grouped by {level}")
    workers = config.workers or os.cpu_count() or 1
    journal = decode_into(out / PARTIAL, wanted, raw, config.size, workers, resume=config.resume, progress=progress)
    decoded = [(record, one) for record, one in zip(wanted, journal, strict=True) if not one.reason]
    rejected = scan.rejected + [Rejection(one.path, one.reason) for one in journal if one.reason]
    _report_rejected(out / PARTIAL, rejected, strict=config.strict)
    rows = _divide(decoded, ratio, level, config)
    findings = audit(rows, level)
    write_json(out / PARTIAL / "audit.json", findings.to_json())
    if findings.leaks:
        more = f" and {len(findings.leaks) - 1} more" if len(findings.leaks) > 1 else ""
        raise LeakError(f"the split leaks: {findings.leaks[0]}{more}", fix=f"see {out / PARTIAL / 'audit.json'}")
    rows, reference = _normalise_stain(rows, out, config, progress)
    card = _card(rows, len(rejected), scan.notes + notes + findings.warnings(), adapter, findings, reference, config)
    _finish(out, rows, card)
    return PrepareResult(out, card, findings, rejected, time.monotonic() - started)


def _raw_folder(config: PrepareConfig, progress: Progress) -> tuple[DataSet, Path]:
    """Return the adapter and the raw folder, drawing the sample data set where it is not there yet."""
    if config.raw is None and config.dataset != "sample":
        raise UsageError("prepare needs the raw data set", fix="breastcli prepare RAW, or --dataset sample")
    raw = Path(config.raw if config.raw is not None else f"{config.out}-raw")
    adapter = find_dataset(config.dataset, raw)
    if adapter.draw is not None and not adapter.recognises(raw):
        claim_folder(raw, allowed=config.resume or config.overwrite, hint="choose another folder, or --overwrite")
        progress.begin("drawing", config.draw, "images")
        adapter.draw(raw, num_images=config.draw, seed=config.seed, on_drawn=lambda: progress.advance("drawing"))
    return adapter, raw


def _wanted(
    records: list[ImageRecord],
    raw: Path,
    magnification: str | None,
    kept: tuple[str, ...],
    adapter: DataSet,
    config: PrepareConfig,
) -> tuple[list[ImageRecord], list[str]]:
    """Return the images of the magnification and classes asked for, labelled for the task, and a note on the choice."""
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


def _options(config: PrepareConfig, adapter: DataSet) -> dict[str, Any]:
    """Return the options that decide what the prepared folder holds."""
    names = (
        "size",
        "stain",
        "stain_reference",
        "exact",
        "split",
        "group_by",
        "folds",
        "task",
        "classes",
        "mag",
        "seed",
    )
    return {"dataset": adapter.name, **{name: getattr(config, name) for name in names}}


def _already_finished(out: Path, options: dict[str, Any]) -> PrepareResult:
    data = PreparedData.open(out)
    if data.card.get("synthetic"):
        raise UserError(f"{out} holds synthetic images, which prepare did not make", fix="use another --out")
    finished = {"classes": "all", "exact": False, **data.card["options"]}  # folders older than these options
    if finished != options:
        changed = next(name for name, value in options.items() if finished.get(name) != value)
        raise UserError(f"{out} was prepared with another --{changed}", fix="use --overwrite or another --out")
    logger.warning("%s is already finished", out)
    rejected = [Rejection(row["path"], row["reason"]) for row in read_csv(out / "rejected.csv")]
    return PrepareResult(out, data.card, audit(data.rows, data.card["split"]["level"]), rejected, 0.0)


def _report_rejected(partial: Path, rejected: list[Rejection], *, strict: bool) -> None:
    write_csv(partial / "rejected.csv", ("path", "reason"), [(one.path, one.reason) for one in rejected])
    for one in rejected[:3]:
        logger.warning("left out %s: %s", one.path, one.reason)
    if len(rejected) > 3:
        logger.warning("left out %d files in all: see %s", len(rejected), "rejected.csv")
    if rejected and strict:
        raise UserError(f"--strict: {len(rejected)} files were rejected", fix=f"see {partial / 'rejected.csv'}")


def _divide(
    decoded: list[tuple[ImageRecord, JournalEntry]], ratio: tuple[int, int, int], level: str, config: PrepareConfig
) -> list[PreparedRecord]:
    if not decoded:
        raise UserError("no file could be decoded", fix=f"see {Path(config.out) / PARTIAL / 'rejected.csv'}")
    records = [record for record, _ in decoded]
    folds: list[int | None] = [None] * len(records)
    splits = [""] * len(records)
    if config.folds is not None:
        folds = list(fold_records(records, config.folds, level, config.seed))
    else:
        splits = split_records(records, ratio, level, config.seed)
    return [
        PreparedRecord(record, split, fold, one.width_px, one.height_px, one.pixel_hash)
        for (record, one), split, fold in zip(decoded, splits, folds, strict=True)
    ]


def _normalise_stain(
    rows: list[PreparedRecord], out: Path, config: PrepareConfig, progress: Progress
) -> tuple[list[PreparedRecord], dict[str, Any] | None]:
    """Write ``.partial/stained.npy``; return the rows with their fallbacks marked and the reference."""
    if config.stain == "none":
        return rows, None
    from breastcli.data.stain import normalise_file
    from breastcli.system.runtime import resolve_device

    device = resolve_device(config.device)
    reference = _stain_reference(rows, out, config)
    if config.exact:
        reference = dataclasses.replace(reference, max_pixels=None)
    progress.begin("stain", len(rows), "images")
    fell_back = normalise_file(
        out / PARTIAL / IMAGES,
        out / PARTIAL / STAINED,
        len(rows),
        config.size,
        reference,
        device,
        on_chunk=lambda count: progress.advance("stain", count),
    )
    if any(fell_back):
        logger.warning("%d of %d images show too little tissue to normalise", sum(fell_back), len(rows))
    marked = [dataclasses.replace(row, stain_fallback=bad) for row, bad in zip(rows, fell_back, strict=True)]
    return marked, reference.to_json()


def _stain_reference(rows: list[PreparedRecord], out: Path, config: PrepareConfig) -> Any:
    """Return the reference of a given image or of training images; with folds, which leave none, a published one."""
    import torch

    from breastcli.data.stain import PUBLISHED_MACENKO, fit_reference

    if config.stain_reference != "auto":
        path = Path(config.stain_reference)
        if not path.is_file():
            raise UserError(f"--stain-reference {path}: no such file", fix="give an image file, or auto")
        try:
            pixels = np.asarray(read_rgb(path))
        except RejectedImageError as rejection:
            raise UserError(f"--stain-reference {path}: {rejection}", fix="give another image") from rejection
        images = torch.tensor(pixels).permute(2, 0, 1)[None]
        return fit_reference(images, config.stain, source=path.name)
    if config.folds is not None:
        if config.stain == "macenko":
            return PUBLISHED_MACENKO
        raise UserError(
            f"--stain {config.stain} with --folds has no training images of its own: every image is tested once",
            fix="give --stain-reference FILE, or use macenko (its published reference)",
        )
    training = [number for number, row in enumerate(rows) if row.split == "train"]
    chosen = np.random.default_rng(config.seed).permutation(training)[:REFERENCE_IMAGES]
    array = np.load(out / PARTIAL / IMAGES, mmap_mode="r", allow_pickle=False)
    images = torch.tensor(array[np.sort(chosen)]).permute(0, 3, 1, 2)
    return fit_reference(images, config.stain, source=f"median of {len(chosen)} training images")


def _card(
    rows: list[PreparedRecord],
    num_rejected: int,
    notes: list[str],
    adapter: DataSet,
    findings: Audit,
    reference: dict[str, Any] | None,
    config: PrepareConfig,
) -> dict[str, Any]:
    """Return the contents of ``dataset.json``."""
    options = _options(config, adapter)
    pixels = {"size": config.size, "task": config.task, "stain": reference}
    fingerprint, split_fingerprint = fingerprints(rows, pixels)
    return {
        "format": FORMAT,
        "name": adapter.name,
        "title": adapter.title,
        "drawn": adapter.drawn,
        "licence": adapter.licence,
        "citation": adapter.citation,
        "homepage": adapter.homepage,
        "task": config.task,
        "classes": _class_order({row.record.label for row in rows}, adapter),
        "size_px": config.size,
        "resize": "bicubic to a square; the aspect ratio is not kept",
        "stain": reference,
        "num_stain_fallbacks": sum(row.stain_fallback for row in rows),
        "split": {
            "level": findings.level,
            "ratio": None if config.folds else config.split,
            "folds": config.folds,
            "seed": config.seed,
            "leaky": findings.stamp,
            "shared_with_training": findings.shared_with_training,
            "num_held_out": findings.num_held_out,
        },
        "num_images": len(rows),
        "num_rejected": num_rejected,
        "num_exams": len({row.record.exam for row in rows if row.record.exam}) or None,
        "num_patients": len({row.record.patient for row in rows if row.record.patient}) or None,
        "counts": _counts(rows),
        "notes": notes,
        "fingerprint": fingerprint,
        "split_fingerprint": split_fingerprint,
        "options": options,
        "breastcli": __version__,
    }


def _class_order(names: set[str], adapter: DataSet) -> list[str]:
    """Return class names in index order: of two the positive one last, more in alphabetical order."""
    order = (*adapter.subtypes, *adapter.classes)
    return sorted(names, key=order.index if len(names) == 2 else None)


def _counts(rows: list[PreparedRecord]) -> list[dict[str, Any]]:
    """Return the number of images, exams and patients of every class on every side; None where a group is unknown."""
    images = Counter((row.side, row.record.label) for row in rows)

    def groups(level: str) -> Counter[tuple[str, str]]:
        found = {(row.side, row.record.label, getattr(row.record, level)) for row in rows}
        return Counter((side, label) for side, label, name in found if name)

    exams, patients = groups("exam"), groups("patient")
    counts = []
    for (side, label), count in sorted(images.items()):
        known = {"exams": exams[side, label] or None, "patients": patients[side, label] or None}
        counts.append({"side": side, "class": label, "images": count, **known})
    return counts


def _finish(out: Path, rows: list[PreparedRecord], card: dict[str, Any]) -> None:
    """Move everything into place, the manifest last."""
    partial = out / PARTIAL
    finished = partial / (STAINED if card["stain"] else IMAGES)
    _draw_contact_sheet(out, finished, rows, card)
    # From here until the manifest is written the folder counts as unfinished, whatever it held before.
    (out / MANIFEST).unlink(missing_ok=True)
    write_json(out / CARD, card)
    for name in ("audit.json", "rejected.csv"):
        (partial / name).replace(out / name)
    finished.replace(out / IMAGES)
    write_manifest(out, rows)
    remove_partial(out)
    remove_embeddings(out)


def _draw_contact_sheet(out: Path, array_file: Path, rows: list[PreparedRecord], card: dict[str, Any]) -> None:
    array = np.load(array_file, mmap_mode="r", allow_pickle=False)
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
    contact_sheet(cells, out / "contact_sheet.png", title=title, captions=captions)
