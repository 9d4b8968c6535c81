"""Who an image belongs to, where the user knows more than the file names tell."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from breastcli.data.lists import LISTS, read_list
from breastcli.errors import UsageError, UserError
from breastcli.records import ImageRecord

HEADINGS = {
    "patient": ("patient", "patient_id", "patientid", "case", "subject"),
    "exam": ("exam", "exam_id", "group", "cluster", "original", "slide"),
}
HEADLESS = (("image", "patient"),)


def find_in_names(pattern: str, names: Iterable[str]) -> list[str]:
    """Return what a regular expression finds in each name: its first group, or all that it matches.

    Raises:
        UsageError: it is no regular expression, or finds nothing in a name.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--patients {pattern}: not a regular expression ({error})") from error
    found = []
    for name in names:
        match = expression.search(name)
        text = match and (match.group(1) if expression.groups else match.group(0))
        if not text:
            raise UsageError(f"--patients {pattern}: finds nothing in {name}", fix="make it fit every image")
        found.append(text)
    return found


def assign_patients(records: Sequence[ImageRecord], given: str) -> list[ImageRecord]:
    """Return the images with the patients that ``--patients`` gives, in place of what the names tell.

    Args:
        records: images.
        given: a regular expression for the path below the raw folder, or a list with a column of images and one of
            patients, of exams (or whatever else must stay together, such as clusters of siblings), or both.

    Raises:
        UsageError: neither a file nor a regular expression that fits every image.
        UserError: the list cannot be read, or an image is not in it.
    """
    path = Path(given)
    if not path.is_file():
        if path.suffix.lower() in LISTS:
            raise UsageError(f"--patients {given}: no such file", fix="give a CSV file, or a regular expression")
        names = find_in_names(given, (record.path for record in records))
        return [dataclasses.replace(one, patient=name, exam="") for one, name in zip(records, names, strict=True)]
    listed = read_list(path, HEADINGS, HEADLESS)
    if not {"patient", "exam"} & set(listed.columns):
        raise UserError(f"{path} has no column of patients", fix="head it patient, or exam or group")
    rows = listed.match(records)
    missing = [record.path for record, row in zip(records, rows, strict=True) if row is None]
    if missing:
        raise UserError(f"{path} does not name {missing[0]} and {len(missing) - 1} other images", fix="add them")
    return [
        dataclasses.replace(record, patient=row.get("patient", ""), exam=row.get("exam", ""))
        for record, row in zip(records, rows, strict=True)
        if row is not None
    ]
