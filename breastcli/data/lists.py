"""Lists of images that a user or a publication wrote: split lists, lists of patients, lists of labels."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from breastcli.data.datasets import IMAGE_SUFFIXES
from breastcli.errors import UserError
from breastcli.files import read_text
from breastcli.records import ImageRecord

IMAGE = "image"
LISTS = frozenset({".csv", ".tsv", ".txt"})  # how their names end
# Where a list has several of them, the first of these counts.
IMAGE_HEADINGS = ("path", "filepath", "image_path", "file", "filename", "file_name", "image", "image_id", "name")
DELIMITERS = "|;\t,"


@dataclass(frozen=True)
class ImageList:
    """A table with a row per image.

    Attributes:
        path: the file.
        columns: the columns that were found, under the names that were asked for.
        rows: column to value, stripped of spaces.
    """

    path: Path
    columns: tuple[str, ...]
    rows: list[dict[str, str]]

    def match(self, records: Sequence[ImageRecord]) -> list[dict[str, str] | None]:
        """Return the row of each image, None where the list does not name it.

        A row names an image whose path it gives, from whatever folder on, or whose bare file name; the suffix does not
        count, because data sets are handed on as PNG and as JPEG.

        Raises:
            UserError: two rows say different things of one image.
        """
        rows: dict[str, list[tuple[tuple[str, ...], dict[str, str]]]] = defaultdict(list)
        for row in self.rows:
            parts = _parts(row[IMAGE])
            rows[parts[-1]].append((parts, row))
        return [self._row_of(record, rows) for record in records]

    def _row_of(
        self, record: ImageRecord, rows: Mapping[str, list[tuple[tuple[str, ...], dict[str, str]]]]
    ) -> dict[str, str] | None:
        own = _parts(record.path)
        found: list[dict[str, str]] = []
        for parts, row in rows.get(own[-1], []):
            shared = min(len(parts), len(own))
            if parts[-shared:] == own[-shared:]:
                found.append(row)
        said = {tuple(value for name, value in row.items() if name != IMAGE) for row in found}
        if len(said) > 1:
            raise UserError(f"{self.path} says two things of {record.path}", fix="leave one line for each image")
        return found[0] if found else None


def read_list(path: Path, headings: Mapping[str, tuple[str, ...]], headless: Sequence[tuple[str, ...]]) -> ImageList:
    """Read a list whose values are parted by commas, semicolons, tabs or bars.

    Args:
        path: a text file.
        headings: column to what its heading may be, in small letters, the first of several in a list counting; "image"
            is always looked for.
        headless: the columns of a list without a heading, one tuple for each number of columns that is understood.

    Raises:
        UserError: the file cannot be read, has no column of images, or a line has too many or too few values.
    """
    try:
        lines = read_text(path).removeprefix("\ufeff").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file", fix="give a CSV file in UTF-8") from error
    delimiter = max(DELIMITERS, key=lines[0].count) if lines else ","
    try:
        table = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter, strict=True) if row]
    except csv.Error as error:
        raise UserError(f"{path} is not a CSV file ({error})") from error
    if not table:
        raise UserError(f"{path} is empty")
    columns, body = _columns(path, table, {IMAGE: IMAGE_HEADINGS, **headings}, headless)
    width = len(table[0])
    rows = []
    for number, row in enumerate(body, start=len(table) - len(body) + 1):
        if len(row) != width:
            raise UserError(f"{path} line {number} has {len(row)} values, the first line {width}", fix="mend it")
        values = {name: row[place] for name, place in columns.items()}
        if not _parts(values[IMAGE]):
            raise UserError(f"{path} line {number} names no image", fix="mend or remove it")
        rows.append(values)
    if not rows:
        raise UserError(f"{path} lists no image")
    return ImageList(path, tuple(columns), rows)


def _columns(
    path: Path,
    table: list[list[str]],
    headings: Mapping[str, tuple[str, ...]],
    headless: Sequence[tuple[str, ...]],
) -> tuple[dict[str, int], list[list[str]]]:
    """Return the place of each column, and the lines below the heading."""
    first = [cell.casefold() for cell in table[0]]
    if any(cell in IMAGE_HEADINGS for cell in first):
        found = {name: next((one for one in accepted if one in first), None) for name, accepted in headings.items()}
        return {name: first.index(heading) for name, heading in found.items() if heading}, table[1:]
    for names in headless:
        # Without a heading the first value must look like an image, lest a heading be taken for one.
        if len(names) == len(first) and PurePosixPath(first[0]).suffix in IMAGE_SUFFIXES:
            return {name: place for place, name in enumerate(names)}, table
    raise UserError(f"{path} has no column of images", fix=f"head it {IMAGE}, path or filename")


def _parts(path: str) -> tuple[str, ...]:
    """Return the folders and the name of a path, without an image's suffix."""
    pure = PurePosixPath(path.replace("\\", "/"))
    named = pure.with_suffix("") if pure.suffix.lower() in IMAGE_SUFFIXES else pure
    return tuple(part for part in named.parts if part not in ("/", "."))
