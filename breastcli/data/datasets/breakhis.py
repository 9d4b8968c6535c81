"""BreakHis: 7,909 breast tumour fields of 81 slides at four magnifications."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from breastcli.config import MAGNIFICATIONS
from breastcli.data.datasets import DATASETS, DataSet, Scan, holds_images, image_files, sort_files
from breastcli.records import ImageRecord

# Images per subtype at 40X, 100X, 200X and 400X: the data set's own counts.
SUBTYPES = {
    "A": ("adenosis", (114, 113, 111, 106)),
    "F": ("fibroadenoma", (253, 260, 264, 237)),
    "PT": ("phyllodes_tumor", (109, 121, 108, 115)),
    "TA": ("tubular_adenoma", (149, 150, 140, 130)),
    "DC": ("ductal_carcinoma", (864, 903, 896, 788)),
    "LC": ("lobular_carcinoma", (156, 170, 163, 137)),
    "MC": ("mucinous_carcinoma", (205, 222, 196, 169)),
    "PC": ("papillary_carcinoma", (145, 142, 135, 138)),
}
CLASSES, SUBTYPE_NAMES = ("benign", "malignant"), tuple(name for name, _ in SUBTYPES.values())
NUM_IMAGES = sum(sum(counts) for _, counts in SUBTYPES.values())
NAME = re.compile(
    r"SOB_(?P<tumour>B(?=_(?:A|F|PT|TA)-)|M(?=_(?:DC|LC|MC|PC)-))_(?P<subtype>[A-Z]{1,2})"
    r"-(?P<year>\d{2})-(?P<slide>(?P<exam>\d+)[A-Z]*)-(?P<magnification>40|100|200|400)-(?P<sequence>\d+)"
)


def describe(path: str) -> ImageRecord | None:
    """Read a BreakHis file name such as ``SOB_B_A-14-22549AB-40-001.png``; None where it is not one.

    The patient is the slide id (22549AB). The exam is its digits (22549): that letters name slides of one
    examination is inferred from the names, not documented by the data set's authors.
    """
    stem = Path(path).stem
    match = NAME.fullmatch(stem)
    if match is None:
        return None
    return ImageRecord(
        image_id=stem,
        path=path,
        label="benign" if match["tumour"] == "B" else "malignant",
        subtype=SUBTYPES[match["subtype"]][0],
        patient=match["slide"],
        exam=match["exam"],
        magnification=f"{match['magnification']}X",
    )


def scan(root: Path) -> Scan:
    """Find BreakHis images anywhere below ``root``, be it above or below ``BreaKHis_v1`` or a flat folder.

    Raises:
        UserError: there is no BreakHis image.
    """
    return place(root, image_files(root))


def place(root: Path, files: Iterable[Path]) -> Scan:
    """Read the names of ``files``; the first of several files with one name is kept."""
    records, rejected = sort_files(
        root, files, describe, "BreakHis", "give the folder that holds BreaKHis_v1, or files with its names"
    )
    return Scan(records, rejected, count_notes(records))


def count_notes(records: list[ImageRecord]) -> list[str]:
    """Compare the number of images per subtype and magnification with the published counts."""
    if len(records) != NUM_IMAGES:
        return [f"{len(records):,} of {NUM_IMAGES:,} images of BreakHis"]
    found = Counter((record.subtype, record.magnification) for record in records)
    expected = {
        (name, magnification): count
        for name, counts in SUBTYPES.values()
        for magnification, count in zip(MAGNIFICATIONS, counts, strict=True)
    }
    wrong = [
        f"{subtype} {magnification}: {found[subtype, magnification]} images, expected {count}"
        for (subtype, magnification), count in expected.items()
        if found[subtype, magnification] != count
    ]
    return wrong or [f"all {NUM_IMAGES:,} images of BreakHis; every count is as published"]


DATASETS.register("breakhis")(
    DataSet(
        name="breakhis",
        title="BreakHis, Breast Cancer Histopathological Database",
        licence="CC BY 4.0",
        citation="Spanhol, Oliveira, Petitjean, Heutte: A dataset for breast cancer histopathological image "
        "classification. IEEE Transactions on Biomedical Engineering 63(7), 2016.",
        homepage="web.inf.ufpr.br/vri/databases/breast-cancer-histopathological-database-breakhis",
        recognises=partial(holds_images, describe=describe),
        scan=scan,
        describe=describe,
        classes=CLASSES,
        subtypes=SUBTYPE_NAMES,
        num_images=NUM_IMAGES,
    )
)
