"""One file per data set: how to recognise it, find its images and read its file names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from breastcli.config import UsageError, UserError
from breastcli.records import ImageRecord
from breastcli.registry import Registry

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"})


@dataclass(frozen=True)
class Rejection:
    """A file that was left out, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Scan:
    """What an adapter found below a raw folder.

    Attributes:
        records: one per image, in a stable order; ``label`` is the binary class.
        rejected: image files that the adapter cannot place.
        notes: facts to print and keep with the data set ("111 of 7,909 images").
    """

    records: list[ImageRecord]
    rejected: list[Rejection]
    notes: list[str]


@dataclass(frozen=True)
class DataSet:
    """An adapter of one data set.

    Attributes:
        name: what ``--dataset`` takes.
        title: full name.
        licence: under which its images may be used.
        citation: what to cite.
        homepage: where to obtain it.
        recognises: whether a raw folder holds this data set.
        scan: find its images; raises UserError when there are none.
        describe: read one file name, or None where it says nothing.
        stained: whether haematoxylin-and-eosin normalisation makes sense.
        drawn: whether the images were drawn by a program.
        draw: draw the images into a folder that does not hold them yet (drawn data sets only).
    """

    name: str
    title: str
    licence: str
    citation: str
    homepage: str
    recognises: Callable[[Path], bool]
    scan: Callable[[Path], Scan]
    describe: Callable[[str], ImageRecord | None]
    stained: bool = True
    drawn: bool = False
    draw: Callable[..., None] | None = None


DATASETS: Registry[DataSet] = Registry("data set", "breastcli.data.datasets")


def find_dataset(name: str, raw: Path) -> DataSet:
    """Return the adapter called ``name``, or with "auto" the one that recognises ``raw``.

    Raises:
        UserError: the folder is missing, or no data set recognises it.
    """
    if name != "auto":
        return DATASETS.get(name)
    if not raw.is_dir():
        raise UserError(f"{raw}: no such folder", fix="give the folder of the raw data set")
    # A drawn set imitates a real one, so it is asked first.
    adapters = sorted((DATASETS.get(known) for known in DATASETS.names()), key=lambda one: not one.drawn)
    for adapter in adapters:
        if adapter.recognises(raw):
            return adapter
    known = ", ".join(DATASETS.names())
    raise UsageError(f"{raw} holds no data set that breastcli knows ({known})", fix="name it with --dataset")


def image_files(root: Path) -> list[Path]:
    """Return every visible file below ``root`` whose name ends like an image's, in path order.

    Raises:
        UserError: ``root`` is not a folder.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder", fix="give the folder of the raw data set")
    files = (path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    return sorted(path for path in files if not path.name.startswith("."))
