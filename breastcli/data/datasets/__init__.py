"""One file per data set: how to recognise it, find its images and read its file names."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

from breastcli.errors import UsageError, UserError
from breastcli.files import is_utf8
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
        classes: the classes that were found, harmless ones first, where the data set does not settle them beforehand.
    """

    records: list[ImageRecord]
    rejected: list[Rejection]
    notes: list[str]
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """How the images of a data set were made from fewer originals: turned, cut out about the centre, stretched back to
    the full size, and mirrored.

    Attributes:
        max_degrees: the largest turn, to either side.
        kept: tells, for a turn in degrees, the width and height that were cut out, as shares of the original's.
    """

    max_degrees: int
    kept: Callable[[float], tuple[float, float]]


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
        describe: read one file name and its folders, or None where the name says nothing; ``label`` is "" where they do
            not settle the class.
        classes: the two classes of ``--task binary``, the positive one last; none where the raw folder decides.
        subtypes: the classes of ``--task subtype``, harmless ones first; of two that are kept the later is positive.
        num_images: how many images the full data set has, or None where that is open.
        generic: whether it takes any images, so that it is asked only where no other data set recognises them.
        recipe: how its images were made from originals that their names do not tell; ``prepare`` then looks for the
            siblings, and where nobody gives other groups they stand for examinations.
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
    classes: tuple[str, str] | tuple[()]
    subtypes: tuple[str, ...]
    num_images: int | None = None
    generic: bool = False
    recipe: Recipe | None = None
    stained: bool = True
    drawn: bool = False
    draw: Callable[..., None] | None = None


DATASETS: Registry[DataSet] = Registry("data set", "breastcli.data.datasets")


def find_dataset(name: str, raw: Path) -> DataSet:
    """Return the adapter called ``name``, or with "auto" the one that recognises ``raw``.

    Raises:
        UserError: the folder is missing, or no data set or several recognise it.
    """
    if name != "auto":
        return DATASETS.get(name)
    if not raw.exists():
        raise UserError(f"{raw}: no such folder", fix="give the folder of the raw data set")
    # A drawn set imitates a real one, so it is asked first.
    adapters = sorted((DATASETS.get(known) for known in DATASETS.names()), key=lambda one: not one.drawn)
    found = [adapter for adapter in adapters if not adapter.generic and raw.is_dir() and adapter.recognises(raw)]
    found = found or [adapter for adapter in adapters if adapter.generic and adapter.recognises(raw)]
    if not found:
        known = ", ".join(DATASETS.names())
        raise UsageError(f"{raw} holds no data set that breastcli knows ({known})", fix="name it with --dataset")
    if len(found) > 1 and not found[0].drawn:
        names = ", ".join(adapter.name for adapter in found)
        raise UsageError(f"{raw} holds files named like those of {names}", fix="name one with --dataset")
    return found[0]


def image_files(root: Path) -> list[Path]:
    """Return every file below ``root``, none of it hidden, whose name ends like an image's, in path order.

    Links to files are followed wherever they lead; links to folders are not, so that no loop can be entered.

    Raises:
        UserError: ``root`` is not a folder.
    """
    return survey(root)[0]


def survey(root: Path) -> tuple[list[Path], list[Rejection]]:
    """Return ``image_files`` and what lies among them that cannot be read as a file or is not entered as a folder.

    Raises:
        UserError: ``root`` is not a folder.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder", fix="give the folder of the raw data set")
    files: list[Path] = []
    obstacles: list[Rejection] = []
    folders = [root]
    while folders:  # not by recursion, which nesting could exhaust
        folder = folders.pop()
        try:
            inside = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
        except OSError as error:
            if folder == root:
                raise UserError(f"cannot read {root}: {error.strerror}", fix="check who may read it") from error
            obstacles.append(Rejection(shown_below(root, folder), f"a folder that cannot be read ({error.strerror})"))
            continue
        for entry in inside:
            path = Path(entry.path)
            is_image, reason = _look_at(entry, path)
            if is_image:
                files.append(path)
            elif reason:
                obstacles.append(Rejection(shown_below(root, path), reason))
            elif entry.is_dir(follow_symlinks=False):
                folders.append(path)
    return sorted(files), sorted(obstacles, key=lambda one: one.path)


def _look_at(entry: os.DirEntry[str], path: Path) -> tuple[bool, str]:
    """Return whether a folder's entry is a file named like an image, and what keeps it from being used, or ""."""
    try:
        if entry.is_symlink() and entry.is_dir():
            return False, "a link to a folder, which is not followed"
        if path.suffix.lower() not in IMAGE_SUFFIXES or entry.is_dir():
            return False, ""
        return (True, "") if entry.is_file() else (False, "neither a file nor a link to one")
    except OSError as error:
        return False, f"cannot be read ({error.strerror})"


def shown_below(root: Path, path: Path) -> str:
    """Return a path below ``root`` as a table can hold it."""
    return escaped(path.relative_to(root).as_posix())


def escaped(path: str) -> str:
    """Return a path with escapes for bytes that are no UTF-8, which Python keeps as surrogates."""
    return path.encode(errors="backslashreplace").decode()


def sort_files(
    root: Path, files: Iterable[Path], describe: Callable[[str], ImageRecord | None], title: str, fix: str
) -> tuple[list[ImageRecord], list[Rejection]]:
    """Tell images of a data set from other files below ``root``; the first of several with one name is kept.

    Raises:
        UserError: none is an image of the data set; ``fix`` says what to do.
    """
    records: dict[str, ImageRecord] = {}
    rejected = survey(root)[1]
    for file in files:
        path = file.relative_to(root).as_posix()
        record = describe(path)
        if not is_utf8(path):  # it could be written to no manifest
            rejected.append(Rejection(escaped(path), "its name is not UTF-8"))
        elif record is None:
            rejected.append(Rejection(path, f"not a {title} file name"))
        elif not record.label:
            rejected.append(Rejection(path, "its name and folders do not tell one class"))
        elif record.image_id in records:
            rejected.append(Rejection(path, f"same name as {records[record.image_id].path}"))
        else:
            records[record.image_id] = record
    if not records:
        raise UserError(f"no {title} image below {root}", fix=fix)
    return list(records.values()), rejected


def holds_images(root: Path, describe: Callable[[str], ImageRecord | None]) -> bool:
    """Whether any file below ``root`` is an image of the data set that ``describe`` reads."""
    found = (describe(file.relative_to(root).as_posix()) for file in image_files(root))
    return any(record is not None and record.label for record in found)


def class_folder(path: str, folders: Mapping[str, str]) -> str:
    """Return the class of the nearest folder of ``path`` among ``folders`` (small letters), or "" where none is."""
    names = (name.casefold() for name in reversed(PurePath(path).parts[:-1]))
    return next((folders[name] for name in names if name in folders), "")


def count_note(title: str, records: Iterable[ImageRecord], expected: Mapping[str, int]) -> str:
    """Compare the number of images per subtype with the published ones, naming every difference."""
    found = Counter(record.subtype for record in records)
    total = sum(expected.values())
    wrong = [f"{name} {found[name]:,} of {count:,}" for name, count in expected.items() if found[name] != count]
    if wrong:
        return f"{found.total():,} of {total:,} images of {title} ({', '.join(wrong)})"
    return f"all {total:,} images of {title}; every count is as published"
