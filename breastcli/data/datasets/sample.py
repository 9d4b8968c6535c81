"""The sample data set: fields drawn by a program in the folder tree and naming of BreakHis."""

from __future__ import annotations

from pathlib import Path

from breastcli.data.datasets import DATASETS, DataSet, Scan, breakhis, image_files
from breastcli.data.sample_tree import draw_sample

NOTE = "drawn by a program; it is not real tissue and says nothing about patients"


def recognises(root: Path) -> bool:
    """Whether ``root`` is a folder that ``draw_sample`` finished."""
    return (root / "sample.json").is_file()


def scan(root: Path) -> Scan:
    """Find the drawn images below ``root``, leaving their nuclei masks aside.

    Raises:
        UserError: there is no image.
    """
    files = [file for file in image_files(root) if file.relative_to(root).parts[0] != "masks"]
    found = breakhis.place(root, files)
    return Scan(found.records, found.rejected, [f"{len(found.records):,} images, {NOTE}"])


DATASETS.register("sample")(
    DataSet(
        name="sample",
        title="Sample data set (procedurally drawn)",
        licence="MIT, as breastcli",
        citation="none: drawn by breastcli",
        homepage="breastcli prepare --dataset sample",
        recognises=recognises,
        scan=scan,
        describe=breakhis.describe,
        classes=breakhis.CLASSES,
        subtypes=breakhis.SUBTYPE_NAMES,
        drawn=True,
        draw=draw_sample,
    )
)
