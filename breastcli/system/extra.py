"""Synthetic images that join the training images, without carrying a leak along."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from breastcli.config import TrainConfig
from breastcli.data.joined import JoinedData
from breastcli.data.store import MANIFEST, PreparedData
from breastcli.errors import LeakError, UsageError, UserError
from breastcli.parsing import parse_magnification

logger = logging.getLogger(__name__)


def join_extra(config: TrainConfig, data: PreparedData, rows: np.ndarray) -> tuple[PreparedData, np.ndarray]:
    """Put the synthetic images of ``--extra`` behind the real ones.

    Only minority classes take any: those that have training images, but fewer than the largest class.

    Args:
        config: the run's configuration.
        data: prepared folder of the real images.
        rows: (n,) real training rows.

    Returns:
        the data, and the training rows with those of the synthetic images behind them; both as they were given where
        there is no ``--extra``.

    Raises:
        UsageError: there is a ratio and nothing that it is a ratio of.
        LeakError: the images were made from another split, so perhaps from images that are held out here.
        UserError: the folder cannot be used, or none of its images joins.
    """
    if config.extra is None:
        if config.extra_ratio is not None:
            raise UsageError(f"--extra-ratio {config.extra_ratio:g}: there is no --extra", fix="add --extra FOLDER")
        return data, rows
    extra = _open(Path(config.extra))
    _check_origin(extra, data, config.fold)
    _check_form(extra, data)
    counts = np.bincount(data.labels[rows], minlength=len(data.classes))
    chosen = _draw(config, extra, _minority(config, extra, counts), counts)
    added = np.bincount(extra.labels[chosen], minlength=len(counts))
    logger.info("--extra: %d synthetic images join the training images (%s)", len(chosen), _listed(data, added))
    return JoinedData.join(data, extra), np.concatenate([rows, len(data.rows) + chosen])


def describe_extra(data: PreparedData, rows: np.ndarray) -> dict[str, Any] | None:
    """Return where the synthetic images among training rows come from and how many there are, or None for none."""
    if not isinstance(data, JoinedData):
        return None
    counts = np.bincount(data.labels[rows[data.is_extra(rows)]], minlength=len(data.classes))
    if not counts.any():  # a trial run may have drawn none
        return None
    return {
        "folder": str(data.extra.folder),
        "run": data.extra.card["synthetic"]["run"],
        "fingerprint": data.extra.card["fingerprint"],
        "num_images": {name: int(n) for name, n in zip(data.classes, counts, strict=True) if n},
    }


def _open(folder: Path) -> PreparedData:
    if not (folder / MANIFEST).is_file():
        fix = "give a folder that breastcli synthesize generate finished"
        raise UserError(f"--extra {folder} is no folder of synthetic images", fix=fix)
    extra = PreparedData.open(folder)
    if not extra.card.get("synthetic"):
        raise UserError(f"--extra {folder} holds no synthetic images", fix="give a folder of breastcli synthesize")
    return extra


def _check_origin(extra: PreparedData, data: PreparedData, fold: int | None) -> None:
    """Refuse images of a generator that may have seen what is held out here."""
    source, name = extra.card["synthetic"]["source"], data.card["name"]
    if source["name"] != name:
        origin = f"{source['name']}, not from {name}"
    elif source["split_fingerprint"] != data.card["split_fingerprint"]:
        origin = f"another split of {name}, so perhaps from images that are held out here"
    elif source["fold"] != fold:
        origin = f"another fold of {name} (made for {_fold(source['fold'])}, not {_fold(fold)})"
    else:
        return
    raise LeakError(f"--extra {extra.folder} was made from {origin}", fix="synthesize from this split and fold")


def _fold(fold: int | None) -> str:
    return "no fold" if fold is None else f"fold {fold}"


def _check_form(extra: PreparedData, data: PreparedData) -> None:
    """Refuse images that differ from the real ones in what a network could tell them apart by."""
    source = extra.card["synthetic"]["source"]
    fix = f"synthesize from {data.folder} as it is now"
    if extra.classes != data.classes:
        known = ", ".join(extra.classes)
        raise UserError(f"--extra {extra.folder} has other classes ({known}) than {data.folder}", fix=fix)
    for size_px in (extra.size_px, source["size_px"]):
        if size_px != data.size_px:
            sizes = f"{size_px} px, not {data.size_px}"
            raise UserError(f"--extra {extra.folder} was made from images of another size ({sizes})", fix=fix)
    if source["fingerprint"] != data.card["fingerprint"]:
        what = "another stain" if source["stain"] != data.card["stain"] else "other images"
        raise UserError(f"--extra {extra.folder} was made from {what} than {data.folder} has", fix=fix)


def _minority(config: TrainConfig, extra: PreparedData, counts: np.ndarray) -> np.ndarray:
    """Return the rows of the magnification and of the classes that lack images, telling what is left out."""
    magnification = parse_magnification(config.mag)
    known = [row.record.magnification for row in extra.rows]
    fitting = np.array([magnification is None or one in (None, magnification) for one in known])
    if not fitting.all():
        logger.info("--extra: %d images of another magnification are left out", (~fitting).sum())
    lacking = (counts > 0) & (counts < counts.max())
    joining = fitting & lacking[extra.labels]
    if joining.sum() < fitting.sum():
        left_out = np.bincount(extra.labels[fitting & ~joining], minlength=len(counts))
        logger.info(
            "--extra: %d images are left out, which show no minority class (%s)",
            left_out.sum(),
            _listed(extra, left_out),
        )
    if not joining.any():
        wanted = ", ".join(name for name, one in zip(extra.classes, lacking, strict=True) if one) or "there is none"
        where = f" at {magnification}" if magnification else ""
        raise UserError(
            f"--extra {extra.folder} has no image of a minority class{where} ({wanted})",
            fix="leave --extra out, or synthesize images of these classes",
        )
    return np.flatnonzero(joining)


def _draw(config: TrainConfig, extra: PreparedData, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return at most ``--extra-ratio`` images for each real one of a class, drawn with the run's seed."""
    if config.extra_ratio is None:
        return rows
    generator = np.random.default_rng(config.seed)
    drawn = []
    for label, count in enumerate(counts):
        members = rows[extra.labels[rows] == label]
        drawn.append(generator.permutation(members)[: round(config.extra_ratio * int(count))])
    chosen = np.sort(np.concatenate(drawn))
    if not len(chosen):
        raise UserError(f"--extra-ratio {config.extra_ratio:g} leaves no synthetic image", fix="leave --extra out")
    return chosen


def _listed(data: PreparedData, counts: np.ndarray) -> str:
    return ", ".join(f"{name} {count}" for name, count in zip(data.classes, counts, strict=True) if count)
