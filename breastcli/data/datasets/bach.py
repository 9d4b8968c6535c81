"""BACH (ICIAR 2018, part A): 400 breast fields of four classes at one magnification."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from breastcli.data.datasets import (
    DATASETS,
    DataSet,
    Scan,
    class_folder,
    count_note,
    holds_images,
    image_files,
    sort_files,
)
from breastcli.records import ImageRecord

CODES = {"n": "normal", "b": "benign", "is": "in_situ", "iv": "invasive"}
FOLDERS = {"normal": "normal", "benign": "benign", "insitu": "in_situ", "invasive": "invasive"}
LABELS = {"normal": "benign", "benign": "benign", "in_situ": "malignant", "invasive": "malignant"}
NUM_IMAGES = dict.fromkeys(LABELS, 100)
NAME = re.compile(r"(?P<code>n|b|is|iv)\d{3}")


def describe(path: str) -> ImageRecord | None:
    """Read a challenge file name such as ``is001.tif``; None where it is not one.

    The name tells the class; a class folder (``Photos/InSitu``) that says otherwise leaves it unsettled. The release
    names no patients.
    """
    stem = Path(path).stem
    match = NAME.fullmatch(stem)
    if match is None:
        return None
    subtype = CODES[match["code"]]
    agrees = class_folder(path, FOLDERS) in ("", subtype)
    return ImageRecord(image_id=stem, path=path, label=LABELS[subtype] if agrees else "", subtype=subtype)


def scan(root: Path) -> Scan:
    """Find the images anywhere below ``root``, in class folders or flat.

    Raises:
        UserError: there is no image of BACH.
    """
    fix = "give the folder Photos, or files with the challenge's names (n001.tif, b001.tif, is001.tif, iv001.tif)"
    records, rejected = sort_files(root, image_files(root), describe, "BACH", fix)
    return Scan(records, rejected, [count_note("BACH", records, NUM_IMAGES)])


DATASETS.register("bach")(
    DataSet(
        name="bach",
        title="BACH, ICIAR 2018 part A",
        licence="CC BY-NC-ND 4.0",
        citation="Aresta, Araújo, Kwok, et al.: BACH: Grand challenge on breast cancer histology images. "
        "Medical Image Analysis 56, 2019.",
        homepage="iciar2018-challenge.grand-challenge.org (doi.org/10.5281/zenodo.3632035)",
        recognises=partial(holds_images, describe=describe),
        scan=scan,
        describe=describe,
        classes=("benign", "malignant"),
        subtypes=tuple(LABELS),
        num_images=sum(NUM_IMAGES.values()),
    )
)
