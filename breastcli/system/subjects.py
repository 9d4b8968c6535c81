"""The images that ``explain`` looks at: rows of a split, or loose files."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from breastcli.config import ExplainConfig
from breastcli.data.datasets import DATASETS, Rejection
from breastcli.data.masks import MASK_ENDING, MaskSet, load_masks
from breastcli.data.patients import find_in_names
from breastcli.data.reading import FileReader, find_files
from breastcli.data.store import PreparedData
from breastcli.errors import UsageError, UserError
from breastcli.parsing import parse_magnification
from breastcli.system.runfolder import Run


@dataclass(frozen=True)
class Subjects:
    """Images to explain and what is known about them.

    Attributes:
        images: (n, S, S, 3) uint8, as the network sees them before scaling.
        image_ids: (n,) unique.
        paths: (n,) where each came from.
        sizes_px: (n,) width and height before resizing.
        groups: (n,) coarsest known group: exam, else patient, else the image itself.
        patients: (n,) patient, or "".
        magnifications: (n,) or None where unknown.
        labels: (n,) class numbers, or None for loose files.
        root: folder that masks' relative paths are compared below, or None where names must do.
        rejected: files that could not be read.
        pixel_hashes: of the files of a split, whose raw folder is not known.
    """

    images: np.ndarray
    image_ids: list[str]
    paths: list[Path]
    sizes_px: list[tuple[int, int]]
    groups: np.ndarray
    patients: list[str]
    magnifications: list[str | None]
    labels: np.ndarray | None
    root: Path | None
    rejected: list[Rejection] = dataclasses.field(default_factory=list)
    pixel_hashes: dict[Path, str] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.image_ids)

    def masks(self, folder: Path, dataset: str) -> MaskSet:
        """Find and read the masks of these images.

        Raises:
            UserError: no mask fits.
        """
        try:
            size_px = self.images.shape[1]
            return load_masks(self.paths, self.sizes_px, self.root, folder, size_px, self.pixel_hashes)
        except UserError as error:
            if dataset in WITHOUT_MASKS and self.labels is not None and error.problem.startswith("no mask"):
                raise UserError(
                    f"{error.problem} ({WITHOUT_MASKS[dataset]})",
                    fix="explain images that have masks with --images, or measure --faithfulness, which needs none",
                ) from error
            raise


WITHOUT_MASKS = {"breakhis": "BreakHis was published without masks"}


def from_split(run: Run, data: PreparedData, split: str, num: int | None, seed: int) -> Subjects:
    """Return images of one split, drawn evenly from the classes.

    Args:
        run: whose fold and magnification decide which rows there are.
        data: prepared folder.
        split: "test" or "val".
        num: how many; None for all.
        seed: of the draw.
    """
    rows = data.select(split, fold=run.config.fold, magnification=parse_magnification(run.config.mag))
    if num is not None:
        rows = _draw_evenly(rows, data.labels[rows], num, seed)
    known = [data.rows[row] for row in rows]
    records = [row.record for row in known]
    return Subjects(
        images=np.array(data.images[rows]),
        image_ids=[record.image_id for record in records],
        paths=[Path(record.path) for record in records],
        sizes_px=[(row.width_px, row.height_px) for row in known],
        groups=np.array([record.exam or record.patient or record.image_id for record in records]),
        patients=[record.patient for record in records],
        magnifications=[record.magnification for record in records],
        labels=data.labels[rows],
        root=Path(),
        pixel_hashes={Path(row.record.path): row.pixel_hash for row in known},
    )


def from_files(config: ExplainConfig, facts: dict[str, Any], num: int | None) -> Subjects:
    """Return loose image files, resized and stain-normalised as the run's data set was.

    Raises:
        UsageError: ``--patients`` is no regular expression, or does not fit a name.
        UserError: no file can be read.
    """
    files = find_files(config.images)
    if config.masks:
        files = _without_masks(files, Path(config.masks))
    if num is not None and num < len(files):
        chosen = np.random.default_rng(config.seed).permutation(len(files))[:num]
        files = [files[place] for place in sorted(chosen)]
    reader = FileReader(files, facts["model"]["size_px"], facts["stain"], config.workers)
    batches = reader.batches(config.batch_size, torch.device("cpu"))
    images = np.concatenate([batch.permute(0, 2, 3, 1).numpy() for batch in batches])
    records = [DATASETS.get(facts["dataset"]["name"]).describe(str(file)) for file in reader.kept]
    named = find_in_names(config.patients, (file.name for file in reader.kept)) if config.patients else []
    patients = named or [one.patient if one else "" for one in records]
    ids = unique_names([file.stem for file in reader.kept])
    exams = [one.exam if one and not config.patients else "" for one in records]
    folders = [Path(name) for name in config.images if Path(name).is_dir()]
    return Subjects(
        images=images,
        image_ids=ids,
        paths=reader.kept,
        sizes_px=reader.sizes,
        groups=np.array([exam or patient or name for exam, patient, name in zip(exams, patients, ids, strict=True)]),
        patients=patients,
        magnifications=[one.magnification if one else None for one in records],
        labels=None,
        root=folders[0] if len(folders) == 1 else None,
        rejected=reader.rejected,
    )


def parse_num(text: str) -> int | None:
    """Return 24 for "24" and None for "all".

    Raises:
        UsageError: neither.
    """
    if text == "all":
        return None
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"--num {text}: not a number of images", fix="give 1 or more, or all")
    return int(text)


def _draw_evenly(rows: np.ndarray, labels: np.ndarray, num: int, seed: int) -> np.ndarray:
    """Return ``num`` rows, the classes taking turns as long as they have any; in increasing order."""
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    turn = np.zeros(len(rows), dtype=int)
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        turn[members] = np.arange(len(members))
    return np.sort(rows[np.lexsort((labels, turn))[:num]])


def unique_names(names: list[str]) -> list[str]:
    """Return the names, numbered where one has been taken before."""
    taken: dict[str, None] = {}
    for name in names:
        number, candidate = 1, name
        while candidate in taken:
            number += 1
            candidate = f"{name}~{number}"
        taken[candidate] = None
    return list(taken)


def _without_masks(files: list[Path], masks: Path) -> list[Path]:
    """Leave out files that are masks themselves: that end like one of another file, or lie in the masks' own folder."""
    stems = {file.stem for file in files}
    images = [file for file in files if MASK_ENDING.sub("", file.stem) == file.stem or not _has_image(file, stems)]
    outside = [file for file in images if masks not in file.parents]
    return outside or images


def _has_image(file: Path, stems: set[str]) -> bool:
    return MASK_ENDING.sub("", file.stem) in stems
