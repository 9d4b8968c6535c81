"""prepare: from a raw data set to one array of images, a split that does not leak, and an audit."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from breastcli import __version__
from breastcli.config import PrepareConfig
from breastcli.data.audit import Audit, PreparedRecord
from breastcli.data.checking import AUDIT, REJECTED, check, refuse_rejected
from breastcli.data.choosing import Chosen, choose, order_classes, settle
from breastcli.data.counts import counts_by_side
from breastcli.data.datasets import DataSet, Rejection, Scan, find_dataset
from breastcli.data.imported_split import ImportedSplit, read_split
from breastcli.data.planning import plan_drawing, plan_preparation
from breastcli.data.shards import ShardResult, check_options, decode_shard, remove_shards
from breastcli.data.store import (
    CARD,
    EMBEDDINGS,
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
from breastcli.files import OVERWRITE, claimed_folder, read_csv, read_json, refuse_links, sync, write_json
from breastcli.locks import locked
from breastcli.options import flag_of
from breastcli.parsing import parse_magnification, parse_ratio
from breastcli.plan import Plan
from breastcli.progress import SILENT, Progress
from breastcli.reporting.pair_sheet import PAIR_SHEET, draw_pairs
from breastcli.reporting.split_sheet import draw_splits

logger = logging.getLogger(__name__)

CONTACT_SHEET = "contact_sheet.png"
# What folders that are older than an option were prepared with.
LATER_OPTIONS = {
    "classes": "all",
    "exact": False,
    "drop_duplicates": "none",
    "patients": None,
    "import_split": None,
    "import_fold": None,
}


@dataclass(frozen=True)
class PrepareResult:
    """What ``prepare`` made.

    Attributes:
        out: the prepared folder, or that of the audit.
        card: the contents of its ``dataset.json``, which an audit alone does not write.
        audit: the audit of its split.
        rejected: files left out.
        seconds: wall-clock time.
        failure: the leak that an audit alone found.
    """

    out: Path
    card: dict[str, Any]
    audit: Audit
    rejected: list[Rejection]
    seconds: float
    failure: LeakError | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-safe dictionary."""
        rejected = [dataclasses.asdict(rejection) for rejection in self.rejected]
        return {"dataset": self.card, "audit": self.audit.to_json(), "rejected": rejected, "seconds": self.seconds}


def prepare(config: PrepareConfig, progress: Progress = SILENT) -> PrepareResult | ShardResult | Plan:
    """Decode, check, split, stain-normalise and resize a raw data set into a prepared folder, or only audit it.

    Stain normalisation follows resizing, so that one small array is read twice instead of the files; the papers do not
    give an order. Statistics of the stain reference see training images only. Of a part (``shard``) the images are
    only decoded.

    Raises:
        UsageError: an option that cannot be accepted.
        UserError: the raw folder, the output folder or the requested split cannot be used.
        LeakError: the split that was asked for leaks; no manifest is written. An audit alone returns it instead.
    """
    started = time.monotonic()
    out = Path(config.out or ("runs/audit" if config.audit else "data/breakhis"))
    parse_ratio(config.split)
    parse_magnification(config.mag)
    shard = check_options(config.shard, config.merge, audit=config.audit, overwrite=config.overwrite)
    adapter, raw = _raw_folder(config, out, progress)
    imported = read_split(config)
    config = _settle(config, adapter, imported)
    if config.audit and (out / MANIFEST).exists():
        raise UserError(f"--audit: {out} is a prepared folder", fix="choose another --out")
    if finished := _find_finished(out, config, adapter):
        return finished
    if config.dry_run and _must_draw(adapter, raw):
        with _claimed(out, config):
            return plan_drawing(raw, out, config)
    root = raw.parent if raw.is_file() else raw
    scan = _scan(adapter, raw, root, out)
    adapter = settle(adapter, scan)
    chosen = choose(scan, adapter, raw, imported, config)
    if shard and not config.dry_run:
        return _decode_shard(chosen, shard, root, out, config, progress)
    with _claimed(out, config):
        if config.dry_run:
            return plan_preparation(chosen, adapter, parse_ratio(config.split), out, config)
        made = _prepare(chosen, adapter, imported, root, out, config, progress)
    return dataclasses.replace(made, seconds=time.monotonic() - started)


def _decode_shard(
    chosen: Chosen, shard: tuple[int, int], root: Path, out: Path, config: PrepareConfig, progress: Progress
) -> ShardResult:
    workers, again = config.workers or os.cpu_count() or 1, {"resume": config.resume, "overwrite": config.overwrite}
    return decode_shard(chosen.records, root, out, shard, config.size, workers, **again, progress=progress)


def _prepare(
    chosen: Chosen,
    adapter: DataSet,
    imported: ImportedSplit | None,
    root: Path,
    out: Path,
    config: PrepareConfig,
    progress: Progress,
) -> PrepareResult:
    """Do the work in a claimed folder; the images' paths start from ``root``."""
    checked = check(chosen, parse_ratio(config.split), root, out / PARTIAL, config, progress)
    sides = {row.record.image_id: row.side for row in checked.rows}
    draw_pairs(checked.duplicates, sides, root, out / PARTIAL / PAIR_SHEET)
    leak = _leak(checked.audit, out if config.audit else out / PARTIAL, imported)
    if leak and not config.audit:
        raise leak
    rows, reference = checked.rows, None
    if config.stain != "none" and not config.audit:
        from breastcli.system.staining import normalise_rows  # which needs torch

        rows, reference = normalise_rows(rows, checked.array, config, progress)
    notes = chosen.notes + checked.notes + checked.audit.warnings()
    card = _card(rows, len(checked.rejected), notes, adapter, checked.audit, reference, imported, config)
    if config.audit:
        _move_audit(out)
        remove_partial(out)
    else:
        _finish(out, checked.array, rows, card)
        _tidy(out, config)
    return PrepareResult(out, card, checked.audit, checked.rejected, 0.0, leak)


def _raw_folder(config: PrepareConfig, out: Path, progress: Progress) -> tuple[DataSet, Path]:
    """Return the adapter and the raw folder, drawing the sample data set where it is not there yet."""
    if config.raw is None and config.dataset != "sample":
        raise UsageError("prepare needs the raw data set", fix="breastcli prepare RAW, or --dataset sample")
    raw = Path(config.raw if config.raw is not None else f"{out}-raw")
    adapter = find_dataset(config.dataset, raw)
    if _must_draw(adapter, raw):
        allowed, hint = config.resume or config.overwrite, "choose another folder, or --overwrite"
        with claimed_folder(raw, allowed=allowed, hint=hint, dry_run=config.dry_run):
            if config.dry_run:
                return adapter, raw
            progress.begin("drawing", config.draw, "images")
            adapter.draw(raw, num_images=config.draw, seed=config.seed, on_drawn=lambda: progress.advance("drawing"))
    return adapter, raw


def _must_draw(adapter: DataSet, raw: Path) -> bool:
    """Whether the raw folder is one of images that a program draws, and does not hold them yet."""
    return adapter.draw is not None and not adapter.recognises(raw)


def _settle(config: PrepareConfig, adapter: DataSet, imported: ImportedSplit | None) -> PrepareConfig:
    """Refuse options that do not suit the data set, and fill in those that it or an imported split decides."""
    if config.exact and config.stain == "none":
        raise UsageError("--exact: there is no --stain to measure", fix="leave it out")
    if config.stain != "none" and not adapter.stained:
        raise UserError(f"--stain {config.stain}: {adapter.name} is not H&E-stained", fix="use --stain none")
    if not adapter.classes:  # the classes are those of the raw folder, of which no binary ones are known
        config = dataclasses.replace(config, task="subtype")
    return dataclasses.replace(config, folds=imported.num_folds) if imported else config


def _claimed(out: Path, config: PrepareConfig) -> AbstractContextManager[None]:
    """Take the output folder, or refuse one that holds something; an audit resumes only in a folder of its own."""
    ours = not config.audit or (out / PARTIAL).is_dir() or _holds_audit(out)
    hint = "use --resume, --overwrite or another --out" if ours else OVERWRITE
    refuse_links(out, PARTIAL, EMBEDDINGS)
    allowed = config.overwrite or (config.resume and ours)
    return claimed_folder(out, allowed=allowed, hint=hint, dry_run=config.dry_run)


def _holds_audit(folder: Path) -> bool:
    """Whether a folder's audit.json was written by breastcli."""
    if not (folder / AUDIT).is_file():
        return False
    try:
        found = read_json(folder / AUDIT)
    except UserError:
        return False
    return isinstance(found, dict) and {"verdict", "near_duplicates"} <= set(found)


def _scan(adapter: DataSet, raw: Path, root: Path, out: Path) -> Scan:
    """Find the images, whose paths start from ``root``, passing over our own sheets where ``out`` lies in it."""
    scan = adapter.scan(raw)
    own = {(out / name).resolve() for name in (CONTACT_SHEET, PAIR_SHEET)}
    rejected = [one for one in scan.rejected if (root / one.path).resolve() not in own]
    return dataclasses.replace(scan, rejected=rejected)


def _options(config: PrepareConfig, adapter: DataSet) -> dict[str, Any]:
    """Return the options that decide what the prepared folder holds."""
    names = (
        "size",
        "stain",
        "stain_reference",
        "split",
        "group_by",
        "folds",
        "task",
        "mag",
        "seed",
    )
    names += tuple(LATER_OPTIONS)
    return {"dataset": adapter.name, **{name: getattr(config, name) for name in names}}


def _find_finished(out: Path, config: PrepareConfig, adapter: DataSet) -> PrepareResult | None:
    """Return what ``--resume`` finds finished; None where there is work to do."""
    if not config.resume or not (out / MANIFEST).is_file():
        return None
    remains = (out / PARTIAL).is_dir()
    with locked(out, shared=not remains, dry_run=config.dry_run):
        # With work in progress a finished folder is what an interrupted --overwrite was about to replace.
        if (out / PARTIAL / IMAGES).is_file():
            return None
        try:
            found = _already_finished(out, _options(config, adapter), strict=config.strict)
        except UserError:
            if config.overwrite:
                return None  # likewise, interrupted before it had any
            raise
        if remains and not config.dry_run:
            _tidy(out, config)
        return found


def _already_finished(out: Path, options: dict[str, Any], *, strict: bool) -> PrepareResult:
    data = PreparedData.open(out)
    if data.card.get("synthetic"):
        raise UserError(f"{out} holds synthetic images, which prepare did not make", fix="use another --out")
    finished = {**LATER_OPTIONS, **data.card["options"]}
    if finished != options:
        changed = next(name for name, value in options.items() if finished.get(name) != value)
        raise UserError(f"{out} was prepared with another {flag_of(changed)}", fix="use --overwrite or another --out")
    logger.warning("%s is already finished", out)
    rejected, audit = _read_findings(out)
    if len(rejected) != data.card["num_rejected"]:
        raise UserError(f"{out / REJECTED} was changed after prepare", fix="run prepare again")
    if strict:
        refuse_rejected(rejected, out / REJECTED)
    return PrepareResult(out, data.card, audit, rejected, 0.0)


def _read_findings(out: Path) -> tuple[list[Rejection], Audit]:
    """Return the files left out of a finished folder, and its audit."""
    try:
        rejected = [Rejection(row["path"], row["reason"]) for row in read_csv(out / REJECTED)]
        audit = Audit.from_json(read_json(out / AUDIT))
        audit.warnings()  # reads all that is shown of it
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{out / AUDIT} or {REJECTED} is damaged ({error!r})", fix="use --overwrite") from error
    return rejected, audit


def _leak(findings: Audit, folder: Path, imported: ImportedSplit | None) -> LeakError | None:
    """Return what is wrong with a split that leaks, and what to do about it."""
    if not findings.leaks:
        return None
    copies = findings.identical_across_splits or findings.near_across_splits
    ways = "; --drop-duplicates keep-first or drop-all leaves copies out" if copies else ""
    if imported and findings.level != "image" and findings.crossing[findings.level]:
        ways += "; a coarser --group-by takes the published split as it is, and says what it leaks"
    return LeakError(f"the split leaks: {findings.first_leak}", fix=f"see {folder / AUDIT}{ways}")


def _card(
    rows: list[PreparedRecord],
    num_rejected: int,
    notes: list[str],
    adapter: DataSet,
    findings: Audit,
    reference: dict[str, Any] | None,
    imported: ImportedSplit | None,
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
        "classes": order_classes({row.record.label for row in rows}, adapter, config.classes),
        "size_px": config.size,
        "resize": "bicubic to a square; the aspect ratio is not kept",
        "stain": reference,
        "num_stain_fallbacks": sum(row.stain_fallback for row in rows),
        "split": {
            "level": findings.level,
            "ratio": None if config.folds or imported else config.split,
            "folds": config.folds,
            "seed": config.seed,
            "imported": imported.to_json() if imported else None,
            "leaky": findings.stamp,
            "shared_with_training": findings.shared_with_training,
            "num_held_out": findings.num_held_out,
        },
        "num_images": len(rows),
        "num_rejected": num_rejected,
        "num_exams": len({row.record.exam for row in rows if row.record.exam}) or None,
        "num_patients": len({row.record.patient for row in rows if row.record.patient}) or None,
        "counts": counts_by_side(rows),
        "notes": notes,
        "fingerprint": fingerprint,
        "split_fingerprint": split_fingerprint,
        "options": options,
        "breastcli": __version__,
    }


def _finish(out: Path, array: Path, rows: list[PreparedRecord], card: dict[str, Any]) -> None:
    """Move everything into place, the manifest last."""
    finished = array.with_name(STAINED) if card["stain"] else array
    draw_splits(finished, rows, card, out / CONTACT_SHEET)
    # From here until the manifest is written the folder counts as unfinished, whatever it held before.
    sync(finished)
    (out / MANIFEST).unlink(missing_ok=True)
    write_json(out / CARD, card, durable=True)
    _move_audit(out)
    finished.replace(out / IMAGES)
    remove_embeddings(out)
    write_manifest(out, rows)


def _tidy(out: Path, config: PrepareConfig) -> None:
    """Remove what a finished folder was made of."""
    if config.merge is not None:
        remove_shards(out, config.merge)
    remove_partial(out)


def _move_audit(out: Path) -> None:
    """Move the findings into place; a sheet of breastcli's own of pairs that no longer are there goes."""
    if _holds_audit(out):
        (out / PAIR_SHEET).unlink(missing_ok=True)
    for name in (PAIR_SHEET, REJECTED, AUDIT):
        if (found := out / PARTIAL / name).is_file():
            found.replace(out / name)
