"""Mini-DDSM: 9,684 mammograms of cases of DDSM, four views each.

The images are grey. 8-bit files keep their values; 16-bit files are divided by 257, which takes the full range 0-65535
to 0-255 whatever an image's own darkest and brightest values are. The grey value is then written to all three channels.
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

FOLDERS = {"normal": "normal", "benign": "benign", "cancer": "malignant", "malignant": "malignant"}
LABELS = {"normal": "benign", "benign": "benign", "malignant": "malignant"}
# The DALAResNet50 paper used 2,000 of them and does not say which.
NUM_IMAGES = {"normal": 2728, "benign": 3360, "malignant": 3596}
NAME = re.compile(r"(?P<patient>[A-Z]_\d+)_\d+\.(?:LEFT|RIGHT)_(?:CC|MLO)")


def describe(path: str) -> ImageRecord | None:
    """Read a file name such as ``Cancer/0001/C_0001_1.LEFT_CC.png``; None where it is not one.

    The patient is the digitiser's letter and the case number (C_0001), so that all views of a case stay together. The
    class is that of the nearest folder called Normal, Benign, Cancer or Malignant; without one it is unsettled. It
    seems to be the case's (every published count is a multiple of four), so that a cancer case's healthy breast is
    under Cancer, too.
    """
    stem = Path(path).stem
    match = NAME.fullmatch(stem)
    if match is None:
        return None
    subtype = class_folder(path, FOLDERS)
    return ImageRecord(stem, path, label=LABELS.get(subtype, ""), subtype=subtype, patient=match["patient"])


def scan(root: Path) -> Scan:
    """Find the images anywhere below ``root``, leaving lesion masks aside.

    The release holds every image twice, as 8-bit JPEG and as 16-bit PNG: below both, the first of a name is kept.

    Raises:
        UserError: there is no image of Mini-DDSM.
    """
    files = image_files(root)
    images = [file for file in files if "_mask" not in file.stem.casefold()]
    fix = "give the folder that holds Normal, Benign and Cancer"
    records, rejected = sort_files(root, images, describe, "Mini-DDSM", fix)
    notes = [count_note("Mini-DDSM", records, NUM_IMAGES)]
    if len(images) < len(files):
        notes.append(f"lesion masks left aside: {len(files) - len(images):,}")
    return Scan(records, rejected, notes)


DATASETS.register("mini_ddsm")(
    DataSet(
        name="mini_ddsm",
        title="Mini-DDSM, mammograms",
        licence="see homepage",
        citation="Lekamlage, Afzal, Westerberg, Cheddad: Mini-DDSM: Mammography-based automatic age estimation. "
        "3rd International Conference on Digital Medicine and Image Processing (DMIP), 2020.",
        homepage="ardisdataset.github.io/MiniDDSM (kaggle.com/datasets/cheddad/miniddsm2)",
        recognises=partial(holds_images, describe=describe),
        scan=scan,
        describe=describe,
        classes=("benign", "malignant"),
        subtypes=tuple(LABELS),
        num_images=sum(NUM_IMAGES.values()),
        stained=False,
    )
)
