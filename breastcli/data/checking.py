"""From the list of a raw folder's images to rows that are decoded, compared, divided and audited."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from breastcli.config import PrepareConfig
from breastcli.data.audit import Audit, Inspection, PreparedRecord, audit
from breastcli.data.choosing import Chosen
from breastcli.data.datasets import Rejection
from breastcli.data.duplicates import IDENTICAL, NEAR, Duplicate, choose_dropped, find_duplicates
from breastcli.data.images import MIN_SIDE_PX
from breastcli.data.imported_split import fill_validation
from breastcli.data.journal import JournalEntry, decode_into
from breastcli.data.shards import merge_shards
from breastcli.data.siblings import describe_groups, find_siblings, join_duplicates
from breastcli.data.splits import fold_records, split_records
from breastcli.data.store import IMAGES, keep_images, npy_header, row_bytes
from breastcli.errors import UserError
from breastcli.files import require_space, write_csv, write_json
from breastcli.progress import Progress
from breastcli.records import ImageRecord

logger = logging.getLogger(__name__)

AUDIT, REJECTED = "audit.json", "rejected.csv"


@dataclass(frozen=True)
class Checked:
    """What became of the images.

    Attributes:
        rows: those that stay, with their places in the split.
        audit: the audit of their split.
        duplicates: identical and nearly identical pairs, those that were dropped included.
        rejected: files left out.
        array: .npy file of the images of ``rows``.
        notes: facts about groups that were found, to keep with the data set.
    """

    rows: list[PreparedRecord]
    audit: Audit
    duplicates: list[Duplicate]
    rejected: list[Rejection]
    array: Path
    notes: list[str]


def check(
    chosen: Chosen,
    ratio: tuple[int, int, int],
    raw: Path,
    partial: Path,
    config: PrepareConfig,
    progress: Progress,
) -> Checked:
    """Decode all images, leave duplicates out where asked to, divide the rest and audit that.

    Args:
        chosen: the images.
        ratio: train, val and test, where there are no folds.
        raw: folder that the images' paths start from.
        partial: folder for work in progress; the findings are written there too.
        config: the job's options.
        progress: told how far the work is.

    Raises:
        UserError: the disk is too full, the work to resume is another, or the images cannot be divided as asked.
    """
    workers = config.workers or os.cpu_count() or 1
    size_px = MIN_SIDE_PX if config.audit else config.size  # an audit keeps no images; its array serves --resume alone
    _require_space(partial, len(chosen.records), size_px, config)
    resume = config.resume or config.merge is not None
    if config.merge is not None:
        merge_shards(chosen.records, raw, partial.parent, config.merge, size_px, progress)
    journal = decode_into(partial, chosen.records, raw, size_px, workers, resume=resume, progress=progress)
    decoded = [(record, one) for record, one in zip(chosen.records, journal, strict=True) if not one.reason]
    rejected = chosen.rejected + [Rejection(one.path, one.reason) for one in journal if one.reason]
    _report_rejected(partial, rejected, strict=config.strict)
    duplicates = _find_duplicates(decoded, raw, progress)
    decoded, notes = _with_siblings(decoded, duplicates, chosen, raw, workers, progress)
    dropped = choose_dropped(duplicates, config.drop_duplicates)
    gone = {one.path for one in dropped}
    kept = [one for one in decoded if one[0].path not in gone]
    if gone:
        logger.warning("left out %d images as duplicates: see %s", len(gone), REJECTED)
        _write_rejected(partial, rejected + dropped)
    rows = _divide(kept, ratio, chosen, partial, config)
    findings = audit(
        rows, chosen.level, Inspection([one.measures for _, one in kept if one.measures], duplicates, len(gone))
    )
    write_json(partial / AUDIT, findings.to_json())
    array = partial / IMAGES
    if gone and not config.audit:
        array = keep_images(array, [record.path not in gone for record, _ in decoded], size_px)
    return Checked(rows, findings, duplicates, rejected + dropped, array, notes)


def _require_space(partial: Path, num_images: int, size_px: int, config: PrepareConfig) -> None:
    """Refuse to begin where the disk does not hold the arrays that will lie side by side."""
    begun = sum(file.stat().st_size for file in partial.glob("*.npy"))  # gone on with, or replaced
    fix = "or choose another --out" + ("" if config.audit else " or a smaller --size")
    num_bytes = num_arrays(config) * (len(npy_header(0, size_px)) + num_images * row_bytes(size_px)) - begun
    require_space(partial.parent, num_bytes, fix)


def num_arrays(config: PrepareConfig) -> int:
    """Return how many arrays of all images lie side by side before everything is in place."""
    return 1 if config.audit else 1 + (config.drop_duplicates != "none") + (config.stain != "none")


def _find_duplicates(decoded: list[tuple[ImageRecord, JournalEntry]], raw: Path, progress: Progress) -> list[Duplicate]:
    records = [record for record, _ in decoded]
    looks = [one.measures.perceptual_hash if one.measures else "" for _, one in decoded]
    return find_duplicates(records, [one.pixel_hash for _, one in decoded], looks, raw, progress)


def _with_siblings(
    decoded: list[tuple[ImageRecord, JournalEntry]],
    duplicates: list[Duplicate],
    chosen: Chosen,
    raw: Path,
    workers: int,
    progress: Progress,
) -> tuple[list[tuple[ImageRecord, JournalEntry]], list[str]]:
    """Return the images with their siblings as exams, where those are to be found, and what to say of them."""
    if chosen.recipe is None or not decoded:
        return decoded, []
    records, entries = zip(*decoded, strict=True)
    records = join_duplicates(find_siblings(records, chosen.recipe, raw, workers, progress), duplicates)
    return list(zip(records, entries, strict=True)), [describe_groups(records)]


def _write_rejected(partial: Path, rejected: list[Rejection]) -> None:
    write_csv(partial / REJECTED, ("path", "reason"), [(one.path, one.reason) for one in rejected])


def _report_rejected(partial: Path, rejected: list[Rejection], *, strict: bool) -> None:
    _write_rejected(partial, rejected)
    for one in rejected[:3]:
        logger.warning("left out %s: %s", one.path, one.reason)
    if len(rejected) > 3:
        logger.warning("left out %d files in all: see %s", len(rejected), REJECTED)
    if strict:
        refuse_rejected(rejected, partial / REJECTED)


def refuse_rejected(rejected: list[Rejection], listed: Path) -> None:
    """Refuse files that could not be used, as ``--strict`` asks; dropped duplicates could have been.

    Raises:
        UserError: there are such files; ``listed`` is where to look.
    """
    unusable = [one for one in rejected if not one.reason.startswith((IDENTICAL, NEAR))]
    if unusable:
        raise UserError(f"--strict: {len(unusable)} files were rejected", fix=f"see {listed}")


def _divide(
    decoded: list[tuple[ImageRecord, JournalEntry]],
    ratio: tuple[int, int, int],
    chosen: Chosen,
    partial: Path,
    config: PrepareConfig,
) -> list[PreparedRecord]:
    if not decoded:
        raise UserError("no file could be used", fix=f"see {partial / REJECTED}")
    splits, folds = place_images([record for record, _ in decoded], ratio, chosen, config)
    return [
        PreparedRecord(record, split, fold, one.width_px, one.height_px, one.pixel_hash)
        for (record, one), split, fold in zip(decoded, splits, folds, strict=True)
    ]


def place_images(
    records: list[ImageRecord], ratio: tuple[int, int, int], chosen: Chosen, config: PrepareConfig
) -> tuple[list[str], list[int | None]]:
    """Return the split of each image ("" where there are folds), and its fold (None where there is one split).

    Raises:
        UserError: the images cannot be divided as asked.
    """
    folds: list[int | None] = [None] * len(records)
    splits = [""] * len(records)
    if chosen.sides is not None:
        sides = [chosen.sides[record.path] for record in records]
        if config.folds is not None:
            folds = list(map(int, sides))
        else:
            splits = fill_validation(records, sides, ratio, chosen.level, config.seed)
    elif config.folds is not None:
        folds = list(fold_records(records, config.folds, chosen.level, config.seed))
    else:
        splits = split_records(records, ratio, chosen.level, config.seed)
    return splits, folds
