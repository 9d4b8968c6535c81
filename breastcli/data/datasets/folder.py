"""Images of any origin: a folder for each class, or a list with a line for each image.

The classes are those of the folders or of the list, whatever ``--task`` says. Patients are those of the list or of
``--patients``; without them only a split by image is possible, whose stamp says that leakage cannot be excluded.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from breastcli.data.datasets import DATASETS, IMAGE_SUFFIXES, DataSet, Rejection, Scan, escaped, image_files
from breastcli.data.lists import IMAGE, LISTS, read_list
from breastcli.data.patients import HEADINGS as PATIENT_HEADINGS
from breastcli.errors import UserError
from breastcli.files import is_utf8
from breastcli.records import ImageRecord

HEADINGS = {
    "label": ("label", "class", "diagnosis", "target"),
    "magnification": ("magnification", "mag"),
    **PATIENT_HEADINGS,
}
PARTS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})
HARMLESS = ("normal", "benign", "healthy", "control", "negative", "no", "non", "not")
FIX = "give a folder that holds a folder of images for each class, or a CSV file with columns path and label"


def recognises(raw: Path) -> bool:
    """Whether ``raw`` is a list of labelled images, or a folder in which two folders or more hold images."""
    if raw.is_file():
        return raw.suffix.lower() in LISTS
    return len(_class_folders(raw, image_files(raw))[1]) > 1


def describe(path: str) -> ImageRecord | None:
    """Return None: a name alone says nothing of an image whose data set is unknown."""
    return None


def scan(raw: Path) -> Scan:
    """Find the images of a folder or of a list, whose paths start from the list's own folder.

    Raises:
        UserError: there is no image, or what is there are parts of a split instead of classes.
    """
    records, rejected = _from_list(raw) if raw.is_file() else _from_folders(raw)
    if not records:
        raise UserError(f"no labelled image in {raw}", fix=FIX)
    classes = order_classes({record.label for record in records})
    source = "the list's" if raw.is_file() else "those of the folders"
    note = f"{len(records):,} images of {len(classes)} classes, which are {source}"
    positive = [f"positive class: {classes[-1]} (of two classes --classes A,B makes B the positive one)"]
    return Scan(records, rejected, [note, *(positive if len(classes) == 2 else [])], classes)


def order_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Return class names with those that are called harmless (normal, benign, non-…) first, then by the alphabet."""

    def key(name: str) -> tuple[bool, str]:
        words = name.casefold().replace("-", " ").replace("_", " ").split()
        return not (words and words[0] in HARMLESS), name

    return tuple(sorted(names, key=key))


def _class_folders(raw: Path, files: list[Path]) -> tuple[Path, dict[str, list[Path]]]:
    """Return the folder that holds the classes, below folders that hold nothing else, and the files of each class."""
    root = raw
    while True:
        found: dict[str, list[Path]] = {}
        for file in files:
            parts = file.relative_to(root).parts
            found.setdefault(parts[0] if len(parts) > 1 else "", []).append(file)
        if len(found) != 1 or "" in found:
            return root, {name: members for name, members in found.items() if name}
        root /= next(iter(found))


def _from_folders(raw: Path) -> tuple[list[ImageRecord], list[Rejection]]:
    files = image_files(raw)
    _, classes = _class_folders(raw, files)
    parts = [name for name in classes if name.casefold() in PARTS]
    if parts:
        fix = "give the folder of one part, or a CSV file with columns path, label and split, and --import-split"
        raise UserError(f"{raw}: {', '.join(sorted(parts))} are parts of a split, not classes", fix=fix)
    label_of = {file: name for name, members in classes.items() for file in members}
    return _sort(raw, [(file.relative_to(raw).as_posix(), {"label": label_of.get(file, "")}) for file in files])


def _from_list(path: Path) -> tuple[list[ImageRecord], list[Rejection]]:
    listed = read_list(path, HEADINGS, ())
    if "label" not in listed.columns:
        raise UserError(f"{path} has no column of labels", fix="head it label or class")
    return _sort(path.parent, [(row[IMAGE].replace("\\", "/"), row) for row in listed.rows], listed=True)


def _sort(
    root: Path, found: Iterable[tuple[str, dict[str, str]]], *, listed: bool = False
) -> tuple[list[ImageRecord], list[Rejection]]:
    """Tell images that can be used from others, and say why not."""
    records: dict[str, ImageRecord] = {}
    rejected: list[Rejection] = []
    for path, row in found:
        if reason := _reason(root, path, row, records, listed=listed):
            rejected.append(Rejection(escaped(path), reason))
            continue
        magnification = row.get("magnification", "").upper().removesuffix("X")
        records[path] = ImageRecord(
            image_id=path,
            path=path,
            label=row["label"],
            subtype=row["label"],
            patient=row.get("patient", ""),
            exam=row.get("exam", ""),
            magnification=f"{magnification}X" if magnification else None,
        )
    return list(records.values()), rejected


def _reason(root: Path, path: str, row: dict[str, str], records: dict[str, ImageRecord], *, listed: bool) -> str:
    """Return why an image is left out, or ""."""
    pure = PurePosixPath(path)
    if not is_utf8(path):
        return "its name is not UTF-8"
    if not row["label"]:
        return "no label" if listed else "not in the folder of a class"
    if path in records:
        return "listed twice"
    if not listed:
        return ""
    if pure.is_absolute() or ".." in pure.parts:
        return "lies outside of the list's folder"
    if pure.suffix.lower() not in IMAGE_SUFFIXES:
        return f"is no image: {', '.join(sorted(IMAGE_SUFFIXES))}"
    return "" if (root / path).is_file() else "no such file"


DATASETS.register("folder")(
    DataSet(
        name="folder",
        title="Images of one's own",
        licence="see their source",
        citation="none: not a published data set",
        homepage="none: any folder with a folder for each class, or a CSV file",
        recognises=recognises,
        scan=scan,
        describe=describe,
        classes=(),
        subtypes=(),
        generic=True,
    )
)
