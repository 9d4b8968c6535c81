"""What ``synthesize assess`` compares: images of a generator or of a folder, and the real ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from breastcli.config import SynthesizeConfig, UserError
from breastcli.data.store import PreparedData
from breastcli.gan.assessment import ImageSet
from breastcli.gan.checkpoint import load_generator
from breastcli.gan.conditions import choose_numbers
from breastcli.gan.runs import GENERATOR, find_gan_run
from breastcli.gan.training import RealImages
from breastcli.parsing import parse_magnification
from breastcli.progress import Progress


@dataclass(frozen=True)
class Subject:
    """Generated images and what is known of their generator.

    Attributes:
        images: the generated images.
        facts: what the generator's checkpoint knows about itself.
        truncation: psi they were drawn with.
    """

    images: ImageSet
    facts: dict[str, Any]
    truncation: float


def draw_subject(run: Path, config: SynthesizeConfig, device: torch.device, progress: Progress) -> Subject:
    """Draw images with a run's generator: as many of each condition as it learned from, or ``--num`` of each class."""
    find_gan_run(run)
    generator = load_generator(run / GENERATOR, device)
    numbers = {place: one.num_images for place, one in enumerate(generator.conditions)}
    if config.num is not None:
        numbers = choose_numbers("all", config.num, generator.conditions, generator.facts["class_counts"])
    settings = {"seed": config.seed, "truncation": config.truncation, "batch_size": config.batch_size}
    progress.begin("generating", sum(numbers.values()), "images")
    drawn = generator.draw(numbers, **settings, on_batch=lambda count: progress.advance("generating", count))
    classes = generator.facts["dataset"]["classes"]
    labels = [classes.index(generator.conditions[place].label) for place in drawn for _ in drawn[place]]
    names = [f"{generator.conditions[place].name} {number}" for place in drawn for number in range(len(drawn[place]))]
    images = ImageSet(torch.cat(list(drawn.values())), np.array(labels), names)
    return Subject(images, generator.facts, config.truncation)


def open_folder(folder: Path) -> Subject:
    """Open a folder of synthetic images."""
    data = PreparedData.open(folder)
    made = data.card.get("synthetic")
    if not made:
        raise UserError(f"{folder} holds real images", fix="give a run of `synthesize fit` or a folder of `generate`")
    images = torch.from_numpy(np.array(data.images)).permute(0, 3, 1, 2)
    names = [row.record.image_id for row in data.rows]
    facts = {**made, "dataset": {**data.card, **made["source"]}, "fold": made["source"]["fold"]}
    return Subject(ImageSet(images, data.labels, names), facts, made["truncation"])


def open_source(config: SynthesizeConfig, facts: dict[str, Any]) -> PreparedData:
    """Open the prepared folder that a generator learned from.

    Raises:
        UserError: it is gone, or holds other images or another split now.
    """
    data = PreparedData.open(Path(config.data or facts["data"]))
    for key, what in (("split_fingerprint", "another split"), ("fingerprint", "other images")):
        if data.card[key] != facts["dataset"][key]:
            raise UserError(f"{data.folder} has {what} than the generator learned from", fix="pass --data")
    return data


def real_set(data: PreparedData, split: str, subject: Subject) -> ImageSet:
    """Return the real images of a split of the classes that were generated, at the generated images' size."""
    facts = subject.facts
    rows = data.select(split, fold=facts["fold"], magnification=parse_magnification(facts["mag"]))
    kept = facts["classes"]
    records = [data.rows[row].record for row in rows]
    wanted = np.isin(data.labels[rows], np.unique(subject.images.labels))
    if kept:
        wanted &= np.array([one.subtype in kept or one.label in kept for one in records])
    rows = rows[wanted]
    images = RealImages(data, rows, subject.images.images.shape[-1]).take(np.arange(len(rows)))
    return ImageSet(images, data.labels[rows], [data.rows[row].record.image_id for row in rows])
