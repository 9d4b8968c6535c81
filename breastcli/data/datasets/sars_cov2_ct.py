"""SARS-CoV-2 CT: 2,482 computed-tomography slices of patients with and without COVID-19.

The files are grey slices of many sizes saved as RGB or RGBA; transparency is laid on white.
"""

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

CLASSES = ("non_covid", "covid")
FOLDERS = {"non-covid": "non_covid", "covid": "covid"}
NUM_IMAGES = {"non_covid": 1230, "covid": 1252}
NAME = re.compile(r"(?P<negative>Non-)?Covid ?\(\d+\)", re.IGNORECASE)


def describe(path: str) -> ImageRecord | None:
    """Read a file name such as ``Non-Covid (1).png``; None where it is not one.

    The name tells the class; a class folder (``COVID``) that says otherwise leaves it unsettled. No patient is named,
    though a patient can have several slices.
    """
    stem = Path(path).stem
    match = NAME.fullmatch(stem)
    if match is None:
        return None
    name = "non_covid" if match["negative"] else "covid"
    agrees = class_folder(path, FOLDERS) in ("", name)
    return ImageRecord(image_id=stem, path=path, label=name if agrees else "", subtype=name)


def scan(root: Path) -> Scan:
    """Find the images anywhere below ``root``, in class folders or flat.

    Raises:
        UserError: there is no image of the data set.
    """
    fix = "give the folder that holds COVID and non-COVID"
    records, rejected = sort_files(root, image_files(root), describe, "SARS-CoV-2 CT", fix)
    return Scan(records, rejected, [count_note("SARS-CoV-2 CT", records, NUM_IMAGES)])


DATASETS.register("sars_cov2_ct")(
    DataSet(
        name="sars_cov2_ct",
        title="SARS-CoV-2 CT-scan dataset",
        licence="see homepage",
        citation="Soares, Angelov, Biaso, Higa Froes, Kanda Abe: SARS-CoV-2 CT-scan dataset: A large dataset of real "
        "patients CT scans for SARS-CoV-2 identification. medRxiv 2020.04.24.20078584, 2020.",
        homepage="kaggle.com/datasets/plameneduardo/sarscov2-ctscan-dataset",
        recognises=partial(holds_images, describe=describe),
        scan=scan,
        describe=describe,
        classes=CLASSES,
        subtypes=CLASSES,
        num_images=sum(NUM_IMAGES.values()),
        stained=False,
    )
)
