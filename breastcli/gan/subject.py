"""What ``synthesize assess`` compares: images of a generator or of a folder, and the real ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from breastcli.config import SynthesizeConfig
from breastcli.data.store import CARD, PreparedData, difference
from breastcli.errors import UserError
from breastcli.gan.assessment import Assessment, ImageSet
from breastcli.gan.checkpoint import TrainedGenerator
from breastcli.gan.conditions import choose_numbers, keep_rows
from breastcli.gan.features import FeatureNetwork
from breastcli.gan.training import RealImages
from breastcli.parsing import parse_magnification
from breastcli.progress import Progress
from breastcli.records import ImageRecord
from breastcli.shapes import check_shape

MADE_SHAPE = {
    **dict.fromkeys(("data", "mag"), str),
    **dict.fromkeys(("kimg", "truncation"), float),
    "generated_px": int,
    "classes": [str],
    "turn": bool,
    "collapse": (str, None),
}


@dataclass(frozen=True)
class Subject:
    """Generated images and what is known of their generator.

    Attributes:
        images: the generated images.
        facts: what the generator's checkpoint knows about itself.
        truncation: psi they were drawn with.
        kinds: the classes, subtypes ("" for any) and magnifications (None for any) that they show.
    """

    images: ImageSet
    facts: dict[str, Any]
    truncation: float
    kinds: set[tuple[str, str, str | None]]


def draw_images(
    generator: TrainedGenerator, numbers: dict[int, int], config: SynthesizeConfig, progress: Progress
) -> dict[int, Tensor]:
    """Draw images as a configuration asks for; see ``TrainedGenerator.draw``."""
    progress.begin("generating", sum(numbers.values()), "images")
    return generator.draw(
        numbers,
        seed=config.seed,
        truncation=config.truncation,
        batch_size=config.batch_size,
        on_batch=lambda count: progress.advance("generating", count),
    )


def draw_subject(generator: TrainedGenerator, config: SynthesizeConfig, progress: Progress) -> Subject:
    """Draw images with a generator: as many of each condition as it learned from, or ``--num`` of each class."""
    numbers = {place: one.num_images for place, one in enumerate(generator.conditions)}
    if config.num is not None:
        numbers = choose_numbers("all", config.num, generator.conditions, generator.facts["class_counts"])
    drawn = draw_images(generator, numbers, config, progress)
    classes = generator.facts["dataset"]["classes"]
    labels = [classes.index(generator.conditions[place].label) for place in drawn for _ in drawn[place]]
    names = [f"{generator.conditions[place].name} {number}" for place in drawn for number in range(len(drawn[place]))]
    images = ImageSet(torch.cat(list(drawn.values())), np.array(labels), names)
    chosen = [generator.conditions[place] for place in drawn]
    kinds = {(one.label, one.subtype, one.magnification) for one in chosen}
    facts = {**generator.facts, "generated_px": generator.network.options.size_px}
    return Subject(images, facts, config.truncation, kinds)


def open_folder(folder: Path) -> Subject:
    """Open a folder of synthetic images."""
    data = PreparedData.open(folder)
    made = data.card.get("synthetic")
    if not made:
        raise UserError(f"{folder} holds real images", fix="give a run of `synthesize fit` or a folder of `generate`")
    check_shape(made, MADE_SHAPE, folder / CARD, "make the images again")
    images = torch.from_numpy(np.array(data.images)).permute(0, 3, 1, 2)
    names = [row.record.image_id for row in data.rows]
    facts = {**made, "dataset": {**data.card, **made["source"]}, "fold": made["source"]["fold"]}
    kinds = {(row.record.label, row.record.subtype, row.record.magnification) for row in data.rows}
    return Subject(ImageSet(images, data.labels, names), facts, made["truncation"], kinds)


def open_source(config: SynthesizeConfig, facts: dict[str, Any]) -> PreparedData:
    """Open the prepared folder that a generator learned from.

    Raises:
        UserError: it is gone, or holds other images or another split now.
    """
    data = PreparedData.open(Path(config.data or facts["data"]))
    what = difference(data.card, facts["dataset"])
    if what:
        raise UserError(f"{data.folder} has {what} than the generator learned from", fix="pass --data")
    return data


def real_set(data: PreparedData, split: str, subject: Subject) -> ImageSet:
    """Return the real images of a split that are of a kind that was generated, at the generated images' size."""
    facts = subject.facts
    rows = data.select(split, fold=facts["fold"], magnification=parse_magnification(facts["mag"]))
    rows = keep_rows(data, rows, facts["classes"])
    rows = rows[[_is_generated(data.rows[row].record, subject.kinds) for row in rows]]
    images = RealImages(data, rows, subject.images.images.shape[-1]).take(np.arange(len(rows)))
    return ImageSet(images, data.labels[rows], [data.rows[row].record.image_id for row in rows])


def describe(
    source: Path, subject: Subject, network: FeatureNetwork, card: Mapping[str, Any], found: Assessment, seed: int
) -> dict[str, Any]:
    """Return the contents of ``assessment.json``.

    Args:
        source: the run or folder that was assessed.
        subject: its images.
        network: what the features came from.
        card: of the real images.
        found: what was found.
        seed: of images and draws.
    """
    facts = subject.facts
    side, made_px = subject.images.images.shape[-1], facts["generated_px"]
    notes = ["draws overlap: the deviations say how much a draw matters, not how sure the figure is"]
    if made_px != side:
        notes.append(f"the images were generated at {made_px} px and are compared at the {side} px of the folder")
    elif side != card["size_px"]:
        notes.append(f"real images were reduced or enlarged to the generator's {side} px")
    notes += [f"features of {network.name}: compare figures of the same features only", network.note]
    return {
        "generated": {
            "source": str(source),
            "n": len(subject.images),
            "kimg": facts["kimg"],
            "truncation": subject.truncation,
            "size_px": side,
            "generated_px": made_px,
            "seed": seed,
        },
        "features": {"name": network.name, "kind": network.kind, "dimensions": found.figures["dimensions"]},
        "dataset": {
            **{name: card[name] for name in ("name", "fingerprint", "split_fingerprint", "drawn")},
            "fold": facts["fold"],
            "leaky": card["split"]["leaky"],
            "split": "val",
        },
        "collapse": facts["collapse"],
        "notes": list(filter(None, notes)),
        **found.figures,
    }


def _is_generated(record: ImageRecord, kinds: set[tuple[str, str, str | None]]) -> bool:
    return any(
        record.label == label and subtype in ("", record.subtype) and magnification in (None, record.magnification)
        for label, subtype, magnification in kinds
    )
