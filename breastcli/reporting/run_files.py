"""What a run folder says of itself: how it was made, on what, and how it was evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from breastcli.config import SPLITS
from breastcli.configfile import read_section
from breastcli.errors import UserError
from breastcli.files import read_json
from breastcli.reporting.parts import leak_stamp, part
from breastcli.system.runfolder import CONFIG, INFO, METRICS


@dataclass(frozen=True)
class RunFiles:
    """The documents of a run folder; everything in it may be missing.

    Attributes:
        folder: where it is.
        info: the contents of ``run.json``.
        evaluations: split to the contents of its ``metrics.json``, the test split first.
    """

    folder: Path
    info: dict[str, Any]
    evaluations: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> RunFiles:
        """Read the documents that are there.

        Raises:
            UserError: the folder is missing, or a document is damaged.
        """
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder", fix="pass a run folder")
        info = _read_object(folder / INFO)
        found = {path.parent.name: path for path in (folder / "evaluate").glob(f"*/{METRICS}")}
        order = [*reversed(SPLITS), *sorted(found.keys() - set(SPLITS))]
        evaluations = {split: _read_object(found[split]) for split in order if split in found}
        return cls(folder, info, evaluations)

    @property
    def name(self) -> str:
        """What the folder is called."""
        return self.folder.resolve().name

    @property
    def card(self) -> Mapping[str, Any]:
        """The data set's card, empty where it is not known."""
        return part(self.info, "dataset")

    @property
    def is_generator(self) -> bool:
        """Whether the run is that of a GAN."""
        return self.info.get("command") == "synthesize"

    @property
    def is_pooled(self) -> bool:
        """Whether the folder holds the evaluation of several runs, and no run of its own."""
        return self.info.get("command") == "evaluate"

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """The options of ``train``, those of the first run where several are pooled; empty where they are not known."""
        if self.is_pooled:
            return part(self.info, "train")
        try:
            return read_section(self.folder / CONFIG, "train")
        except UserError:
            return {}  # none is there, or it was edited

    @property
    def arch(self) -> str | None:
        """The network as ``train --arch`` takes it, or None where it is not known."""
        return str(self.settings["arch"]) if self.settings.get("arch") else None

    @property
    def magnification(self) -> str:
        """The one magnification that the run, or its data set as it was prepared, is confined to ("200X"), or "all"."""
        asked = (self.settings.get("mag"), part(self.card, "options").get("mag"))
        plain = (str(one or "all").upper().removesuffix("X") for one in asked)
        return next((f"{one}X" for one in plain if one != "ALL"), "all")

    @property
    def leaks(self) -> list[str]:
        """What is said of leaky splits by the data set's card and by the evaluations."""
        cards = [self.card, *(part(document, "dataset") for document in self.evaluations.values())]
        return list(dict.fromkeys(filter(None, map(leak_stamp, cards))))

    @property
    def drawn(self) -> bool:
        """Whether a program drew the images."""
        evaluated = (part(document, "dataset").get("drawn") for document in self.evaluations.values())
        return bool(self.card.get("drawn")) or any(evaluated)

    @property
    def synthetic(self) -> bool:
        """Whether the network was trained with synthetic images."""
        evaluated = (part(document, "dataset").get("synthetic") for document in self.evaluations.values())
        return bool(self.info.get("synthetic")) or any(evaluated)


def _read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file, empty where there is no such file."""
    values = read_json(path) if path.exists() else {}
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold a JSON object", fix="make it again")
    return values
