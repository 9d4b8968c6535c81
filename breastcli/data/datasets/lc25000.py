"""LC25000: 25,000 lung and colon fields, made from 1,250 originals by augmentation."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path

from breastcli.data.datasets import (
    DATASETS,
    DataSet,
    Recipe,
    Scan,
    class_folder,
    count_note,
    holds_images,
    image_files,
    sort_files,
)
from breastcli.records import ImageRecord

CODES = {
    "lungn": "lung_n",
    "lungaca": "lung_aca",
    "lungscc": "lung_scc",
    "colonn": "colon_n",
    "colonca": "colon_aca",
}
LABELS = {
    "lung_n": "benign",
    "colon_n": "benign",
    "lung_aca": "malignant",
    "lung_scc": "malignant",
    "colon_aca": "malignant",
}
NUM_IMAGES = dict.fromkeys(LABELS, 5000)
NAME = re.compile(rf"(?P<code>{'|'.join(CODES)})\d+")
SIBLINGS = "made from 1,250 originals by turning and mirroring; names do not tell which images are siblings"
MAX_DEGREES = 25


def describe(path: str) -> ImageRecord | None:
    """Read a file name such as ``lungaca1.jpeg``; None where it is not one.

    The name tells the class; a class folder (``lung_aca``) that says otherwise leaves it unsettled.
    """
    stem = Path(path).stem
    match = NAME.fullmatch(stem)
    if match is None:
        return None
    subtype = CODES[match["code"]]
    agrees = class_folder(path, {name: name for name in LABELS}) in ("", subtype)
    return ImageRecord(image_id=stem, path=path, label=LABELS[subtype] if agrees else "", subtype=subtype)


def kept_by_turn(degrees: float) -> tuple[float, float]:
    """Return the width and height of what a turn leaves of a square original, as shares of its side.

    Source: Augmentor (Bloice, Roth, Holzinger, Bioinformatics 2019), with which the data set was made, in its releases
    0.1.9 to 0.2.12. Differs from its documentation, which promises the largest upright square: the code divides by 1
    where the formula has 1 - tan², and keeps less, of the height less than of the width.
    """
    angle = math.radians(abs(degrees))
    slope, canvas = math.tan(angle), math.sin(angle) + math.cos(angle)
    margin = slope * canvas * (1 - slope)
    return canvas - 2 * margin, canvas - 2 * slope * (canvas - margin)


def scan(root: Path) -> Scan:
    """Find the images anywhere below ``root``, in class folders or flat.

    Raises:
        UserError: there is no image of LC25000.
    """
    fix = "give the folder lung_colon_image_set, or files with its names (lungn1.jpeg, colonca1.jpeg)"
    records, rejected = sort_files(root, image_files(root), describe, "LC25000", fix)
    return Scan(records, rejected, [count_note("LC25000", records, NUM_IMAGES), SIBLINGS])


DATASETS.register("lc25000")(
    DataSet(
        name="lc25000",
        title="LC25000, lung and colon",
        licence="see homepage",
        citation="Borkowski, Bui, Thomas, Wilson, DeLand, Mastorides: Lung and colon cancer histopathological image "
        "dataset (LC25000). arXiv:1912.12142, 2019.",
        homepage="github.com/tampapath/lung_colon_image_set",
        recognises=partial(holds_images, describe=describe),
        scan=scan,
        describe=describe,
        classes=("benign", "malignant"),
        subtypes=tuple(LABELS),
        num_images=sum(NUM_IMAGES.values()),
        recipe=Recipe(MAX_DEGREES, kept_by_turn),
    )
)
