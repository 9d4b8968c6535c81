"""What ``breastcli explain`` left in a run folder: its documents, and the pictures that they name.

The files may come from elsewhere: whatever in them is not as expected counts as absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from breastcli.errors import UserError
from breastcli.files import read_json
from breastcli.reporting.parts import part


def find_explanations(run_folder: Path) -> list[Path]:
    """Return every ``explain.json`` of a run, by name."""
    return sorted(run_folder.glob("explain/*/explain.json"))


def read_explanation(file: Path) -> Mapping[str, Any]:
    """Return the contents of an ``explain.json``, empty where it is damaged."""
    try:
        return part(read_json(file))
    except (UserError, RecursionError):
        return {}


def is_outdated(file: Path, document: Mapping[str, Any]) -> bool:
    """Return whether the run has another best checkpoint now than when it was explained."""
    made, run = part(document, "checkpoint"), file.parents[2]
    try:
        now = {
            "epoch": read_json(run / "checkpoints/best.json").get("epoch"),
            "started": read_json(run / "run.json").get("started"),
        }
    except (UserError, AttributeError):
        return False
    return bool(made) and dict(made) != now


def images_of(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what is said of each explained image."""
    images = document.get("images")
    return [image for image in images if isinstance(image, Mapping)] if isinstance(images, list) else []


def panel_of(folder: Path, image: Mapping[str, Any]) -> Path | None:
    """Return where the picture of an image's explanation should be; nothing from outside the folder."""
    path = PurePath(str(image.get("panel") or ""))
    return None if path.is_absolute() or ".." in path.parts or path.suffix != ".png" else folder / path


def find_panels(run_folder: Path, split: str) -> dict[str, Path]:
    """Return image id to the picture of its explanation, of a split's images that the best checkpoint explains."""
    found: dict[str, Path] = {}
    for file in find_explanations(run_folder):
        document = read_explanation(file)
        if document.get("split") == split and not is_outdated(file, document):
            for image in images_of(document):
                path = panel_of(file.parent, image)
                if path and path.is_file():
                    found.setdefault(str(image.get("image_id")), path)
    return found
