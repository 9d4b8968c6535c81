"""The folder of synthetic images: a prepared folder of training rows that says which split it came from."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from breastcli.config import SynthesizeConfig
from breastcli.data.audit import PreparedRecord
from breastcli.data.store import (
    CARD,
    EMBEDDINGS,
    IMAGES,
    MANIFEST,
    PreparedData,
    fingerprints,
    remove_embeddings,
    write_header,
    write_manifest,
)
from breastcli.errors import UserError
from breastcli.files import claimed_folder, read_json, refuse_links, remove_files, replacing, write_json
from breastcli.gan.checkpoint import TrainedGenerator
from breastcli.gan.runs import ASSESSED
from breastcli.gan.training import resize
from breastcli.parsing import parse_magnification
from breastcli.records import ImageRecord
from breastcli.shapes import check_shape
from breastcli.system.runfolder import INFO

SOURCE_KEYS = ("name", "title", "fingerprint", "split_fingerprint", "task", "stain", "size_px")
CHUNK = 64


def claimed_images(out: Path, *, overwrite: bool, dry_run: bool = False) -> AbstractContextManager[None]:
    """Take the folder for the images until the block ends; one that holds real images is never taken.

    Raises:
        UserError: it is not empty, or another job holds it.
    """
    if (out / INFO).is_file():
        raise UserError(f"{out} is a run folder", fix="choose another --out")
    if (out / MANIFEST).is_file():
        card = read_json(out / CARD)
        check_shape(card, {"synthetic?": (dict, None)}, out / CARD, "choose another --out")
        if not card.get("synthetic"):
            raise UserError(f"{out} holds real images", fix="choose another --out")
    refuse_links(out, "assess", EMBEDDINGS)
    return claimed_folder(out, allowed=overwrite, dry_run=dry_run)


def images_folder(config: SynthesizeConfig, facts: dict[str, Any]) -> Path:
    """Return the folder for the images: ``DATA-synthetic``, magnification, fold and smoke if any, or the named one."""
    if config.out:
        return Path(config.out)
    if not (Path(facts["data"]) / MANIFEST).is_file():  # the generator may be anybody's, and name any place
        problem = f"the generator learned from {facts['data']}, which is no prepared folder here"
        raise UserError(problem, fix="name the folder to write with --out")
    magnification, fold = parse_magnification(facts["mag"]), facts["fold"]
    suffix = f"-{magnification.lower()}" if magnification else ""
    suffix += ("" if fold is None else f"-fold{fold}") + ("-smoke" if facts["smoke"] else "")
    return Path(f"{facts['data'].rstrip('/')}-synthetic{suffix}")


def made_for(generator: TrainedGenerator, data: PreparedData) -> TrainedGenerator:
    """Return the generator as one of another copy of its data set, such as one of other pixels, but the same split.

    Raises:
        UserError: the copy has another split, or its images were stain-normalised in another way.
    """
    source = generator.facts["dataset"]
    for key, what in (("name", "another data set"), ("split_fingerprint", "another split"), ("stain", "another stain")):
        if data.card[key] != source[key]:
            fix = "prepare it with the same options but the size, and the same --stain-reference"
            raise UserError(f"{data.folder} has {what} than the generator learned from", fix)
    return dataclasses.replace(generator, facts={**generator.facts, "dataset": data.card, "data": str(data.folder)})


def write_synthetic(
    out: Path, generator: TrainedGenerator, drawn: Mapping[int, Tensor], made: Mapping[str, Any]
) -> dict[str, Any]:
    """Write images, manifest and card, the manifest last.

    Args:
        out: folder to write; it must exist.
        generator: what drew the images.
        drawn: condition to uint8 (n, 3, H, W).
        made: how they were made: run, seed, truncation.

    Returns:
        the card.
    """
    source = generator.facts["dataset"]
    size_px = source["size_px"]
    rows: list[PreparedRecord] = []
    remove_files(out, (MANIFEST, *ASSESSED))  # from here on the folder counts as unfinished
    with replacing(out / IMAGES, durable=True) as temporary, temporary.open("wb") as file:
        write_header(file, sum(map(len, drawn.values())), size_px)
        for number, images in drawn.items():
            for start in range(0, len(images), CHUNK):
                pixels = resize(images[start : start + CHUNK], size_px).permute(0, 2, 3, 1).contiguous().numpy()
                file.write(pixels.tobytes())
                rows += [_row(generator, number, start + place, one) for place, one in enumerate(pixels)]
    card = _card(generator, rows, made)
    write_json(out / CARD, card, durable=True)
    remove_embeddings(out)
    write_manifest(out, rows)
    return card


def _row(generator: TrainedGenerator, number: int, place: int, pixels: np.ndarray) -> PreparedRecord:
    condition, side = generator.conditions[number], generator.network.options.size_px
    name = f"synthetic-{condition.name.replace(' ', '-')}-{place:05d}"
    record = ImageRecord(
        image_id=name,
        path=name,
        label=condition.label,
        subtype=condition.subtype,
        magnification=condition.magnification or parse_magnification(generator.facts["mag"]),
    )
    return PreparedRecord(record, "train", None, side, side, hashlib.sha256(pixels.tobytes()).hexdigest())


def _card(generator: TrainedGenerator, rows: list[PreparedRecord], made: Mapping[str, Any]) -> dict[str, Any]:
    facts = generator.facts
    source = facts["dataset"]
    synthetic = {
        **made,
        "kimg": facts["kimg"],
        "collapse": facts["collapse"],
        "generated_px": generator.network.options.size_px,
        **{name: facts[name] for name in ("data", "mag", "classes", "turn")},
        "source": {name: source[name] for name in SOURCE_KEYS} | {"fold": facts["fold"]},
    }
    fingerprint, split_fingerprint = fingerprints(rows, synthetic)
    labels = [row.record.label for row in rows]
    counts = [
        {"side": "train", "class": name, "images": labels.count(name), "exams": None, "patients": None}
        for name in source["classes"]
        if name in labels
    ]
    return {
        **source,
        "title": f"{source['title']}, synthetic",
        "num_stain_fallbacks": 0,
        "split": {
            **source["split"],
            "ratio": None,
            "folds": None,
            "shared_with_training": None,
            "num_held_out": 0,
        },
        "num_images": len(rows),
        "num_rejected": 0,
        "num_exams": None,
        "num_patients": None,
        "counts": counts,
        "notes": [f"drawn by a generator after {facts['kimg']:g} kimg; for training only"],
        "fingerprint": fingerprint,
        "split_fingerprint": split_fingerprint,
        "synthetic": synthetic,
    }
