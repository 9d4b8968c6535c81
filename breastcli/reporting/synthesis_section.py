"""A report's section about generated images, read from what ``breastcli synthesize`` left in a folder.

The files may come from elsewhere: whatever in them is not as expected counts as absent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from breastcli.errors import UserError
from breastcli.files import read_csv, read_json
from breastcli.reporting.explanation_section import REPORTED
from breastcli.reporting.parts import (
    NOTHING,
    Cell,
    Picture,
    Table,
    figure_cell,
    is_finite,
    is_known,
    leak_stamp,
    number,
    part,
    read_picture,
    whole_number,
)

PAPER = "deebani-2025"
OVERLAPS = {
    "training": "Training images, by generated ones",
    "held_out": "Held-out images, by generated ones",
    "baseline": "Held-out images, by training ones (real)",
}
COVERAGE = {"precision": "Precision", "recall": "Recall", "density": "Density", "coverage": "Coverage"}
MAX_NEIGHBOURS = 10
ABOUT_DISTANCES = (
    "FID and KID are distances between the features of two sets of images, lower being nearer. FID is the higher the "
    "fewer images there are, so only figures with the same number of images and the same features can be compared; KID "
    "has no such bias. The rows of real images say how far apart sets of real images lie that way; images that come "
    "nearer than they do should be looked at for copies."
)
ABOUT_COVERAGE = (
    "Precision is the share of generated images that lie among real ones, recall the share of real images that lie "
    "among generated ones (Kynkäänniemi et al., 2019). Density counts how many real images' neighbourhoods a generated "
    "image lies in, and can exceed 1; coverage is the share of real images with a generated one in their neighbourhood "
    "(Naeem et al., 2020)."
)
ABOUT_CLASSES = (
    "Diversity is the mean distance between two images of a class; a share well below 1 means that the generator "
    "repeats itself."
)
PICTURES = {
    "samples.png": ("Generated images", "a band of images for each condition"),
    "neighbours.png": (
        "Nearest neighbours, the closest first",
        "generated images, each beside the training image that is nearest to it",
    ),
    "distances.png": (
        "Distances to the nearest training image",
        "the share of images up to each distance, with the threshold below which an image may be a copy",
    ),
}


@dataclass(frozen=True)
class SynthesisPart:
    """Generated images as the page shows them.

    Attributes:
        stamp: warning that belongs to every table, or "".
        drawn: whether the data set was drawn by a program.
        facts: what was assessed and how, name to value.
        tables: distances, overlap, classes and nearest neighbours, as far as there are any.
        warnings: what a reader must know before using the images.
        notes: how to read the tables.
        pictures: the last grid of the training, and the pictures of the assessment.
        assessed: whether there is an assessment, damaged or not.
    """

    stamp: str = ""
    drawn: bool = False
    facts: dict[str, str] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    assessed: bool = False


def read_synthesis(folder: Path) -> SynthesisPart | None:
    """Return what the page shows of a folder with ``assess`` or ``samples``, None for any other.

    An assessment that cannot be used gives a warning, and the pictures that are there.
    """
    if not any((folder / name).is_dir() for name in ("assess", "samples")):
        return None
    file = folder / "assess" / "assessment.json"
    pictures = list(_pictures(folder))
    if not file.exists():
        return SynthesisPart(pictures=pictures)
    try:
        document = read_json(file)
    except (UserError, RecursionError):
        document = None
    if not _rows(document, "comparisons"):
        problem = "assess/assessment.json is damaged, or was not written by breastcli synthesize: it is left out."
        return SynthesisPart(warnings=[problem], pictures=pictures, assessed=True)
    tables = [_distance_table(document), _coverage_table(document), _class_table(document), _neighbour_table(document)]
    return SynthesisPart(
        stamp=leak_stamp(part(document, "dataset")) or "",
        drawn=bool(part(document, "dataset").get("drawn")),
        facts=_facts(document),
        tables=[table for table in tables if table.rows],
        warnings=list(_warnings(document)),
        notes=_notes(document),
        pictures=pictures,
        assessed=True,
    )


def _facts(document: Mapping[str, Any]) -> dict[str, str]:
    """Return what was assessed and how."""
    generated, dataset = part(document, "generated"), part(document, "dataset")
    features = part(document, "features")
    dimensions = f", {features['dimensions']} dimensions" if is_finite(features.get("dimensions")) else ""
    side = f"{generated['size_px']} × {generated['size_px']} pixels" if generated.get("size_px") else ""
    facts = {
        "Images": f"{whole_number(generated.get('n'))} of {generated.get('source') or 'an unknown source'}",
        "Size": side,
        "Trained for": _plain(generated.get("kimg"), " thousand images"),
        "Truncation": _plain(generated.get("truncation")),
        "Features": f"{features['name']}{dimensions}" if features.get("name") else None,
        "Data set": dataset.get("name"),
        "Held-out split": dataset.get("split"),
        "Fold": dataset.get("fold"),
        "Data fingerprint": dataset.get("fingerprint"),
        "Split fingerprint": dataset.get("split_fingerprint"),
        "Possible copies": _copies(document),
    }
    return {name: str(value) for name, value in facts.items() if value not in (None, "")}


def _distance_table(document: Mapping[str, Any]) -> Table:
    rows = [
        (
            f"{row.get('name') or NOTHING}{' (real images)' if row.get('kind') == 'real' else ''}",
            [_spread(part(row, "fid"), 2), _spread(part(row, "kid"), 4)],
        )
        for row in _rows(document, "comparisons")
    ]
    draws, images, subset = (whole_number(document.get(key)) for key in ("draws", "n_per_draw", "kid_subset"))
    caption = f"FID and KID, mean ± standard deviation over {draws} draws of {images} images from each side"
    return Table(f"{caption} (KID: subsets of {subset})", ["Compared", "FID", "KID"], rows)


def _coverage_table(document: Mapping[str, Any]) -> Table:
    rows = [
        (
            OVERLAPS.get(side, side),
            [Cell(whole_number(figures.get("n"))), *(_spread(part(figures, key), 3) for key in COVERAGE)],
        )
        for side, figures in part(document, "coverage").items()
        if isinstance(figures, Mapping)
    ]
    return Table("How generated and real images overlap", ["Real images", "n", *COVERAGE.values()], rows)


def _class_table(document: Mapping[str, Any]) -> Table:
    """Return each class's diversity and KID, and how often the features' network recognises its images."""
    classes = _rows(document, "classes")
    recognised = any(is_known(row.get("agreement")) for row in classes)
    rows = [
        (
            str(row.get("class") or NOTHING),
            [
                Cell(whole_number(row.get("n"))),
                *(Cell(_decimals(row.get(key), 2)) for key in ("diversity", "real_diversity")),
                Cell(_decimals(_ratio(row.get("diversity"), row.get("real_diversity")), 2)),
                _spread(part(row, "kid"), 4),
                *[figure_cell(row.get("agreement"))] * recognised,
            ],
        )
        for row in classes
    ]
    columns = ["Class", "n", "Diversity", "Diversity of real images", "Share", "KID to training images"]
    caption = "By class" + (" (recognised: share that the features' network puts into its class)" if recognised else "")
    return Table(caption, columns + ["Recognised"] * recognised, rows)


def _neighbour_table(document: Mapping[str, Any]) -> Table:
    closest = _rows(part(document, "neighbours"), "closest")
    rows = [
        (
            str(row.get("image_id") or NOTHING),
            [
                *(Cell(str(row.get(key) or NOTHING)) for key in ("class", "training_id")),
                Cell(number(row.get("distance"))),
            ],
        )
        for row in closest[:MAX_NEIGHBOURS]
    ]
    caption = f"Nearest neighbours, the closest {len(rows)}"
    return Table(caption, ["Generated image", "Class", "Nearest training image", "Distance"], rows)


def _copies(document: Mapping[str, Any]) -> str:
    """Return how many images are suspiciously near to a training image, "" where nobody looked."""
    found = part(document, "neighbours")
    below, n = found.get("num_below"), found.get("n")
    if not is_finite(below):
        return ""
    expected = found.get("expected_share")
    return (
        f"{whole_number(below)} of {whole_number(n)} images{_percent(_ratio(below, n), ' ({})')} are nearer to a "
        f"training image than {number(found.get('threshold'))}"
        f"{_percent(expected, '; {} would be expected without copies')}"
    )


def _warnings(document: Mapping[str, Any]) -> Iterator[str]:
    if part(document, "neighbours").get("copies") is True:
        yield (
            f"Some images may be copies of training images: {_copies(document) or 'their number is not known'}. "
            "Compare the nearest neighbours below before the images are used or passed on."
        )
    if document.get("collapse"):
        yield f"The training collapsed: {document['collapse']}"


def _notes(document: Mapping[str, Any]) -> list[str]:
    own = document.get("notes")
    notes = [str(note) for note in own] if isinstance(own, list) else []
    notes.append(ABOUT_DISTANCES)
    notes += [ABOUT_COVERAGE] if part(document, "coverage") else []
    notes += [ABOUT_CLASSES] if _rows(document, "classes") else []
    dataset = part(document, "dataset")
    if dataset.get("name") == "breakhis" and not dataset.get("drawn") and _paper():
        best = [
            f"FID {_decimals(figures['fid'], 2)} and KID {_decimals(figures['kid'], 4)} ({setting}, Table {table})"
            for table, (setting, figures) in _paper().items()
        ]
        notes.append(
            f"Where FID is lowest, Deebani et al. (2025) print {', and '.join(best)}, for images of 512 pixels. These "
            "are not comparable: other features, other n."
        )
    return list(dict.fromkeys(notes))


@cache
def _paper() -> dict[str, tuple[str, dict[str, float]]]:
    """Return table to the setting with the lowest FID that the paper has there, and its figures."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in read_csv(REPORTED):
        if row["source"] == PAPER and row["arch"].startswith("cwgan ") and row["metric"] in ("fid", "kid"):
            setting = row["arch"].removeprefix("cwgan ").replace("=", " ")
            found.setdefault(row["table"], {}).setdefault(setting, {})[row["metric"]] = float(row["value"])
    return {table: min(rows.items(), key=lambda row: row[1]["fid"]) for table, rows in found.items()}


def _pictures(folder: Path) -> Iterator[Picture]:
    grids = sorted(folder.glob("samples/[0-9]*.png"))
    last = grids[-1:]
    film = "; training.gif in the run folder shows them all" if (folder / "training.gif").is_file() else ""
    found = [(path, f"The same noise at the last snapshot{film}", "a grid of images") for path in last]
    found += [(folder / "assess" / name, *words) for name, words in PICTURES.items()]
    yield from filter(None, (read_picture(*words, wide=True) for words in found))


def _rows(document: Any, key: str) -> list[Mapping[str, Any]]:
    """Return the mappings in the list under ``key``, none where there is no such list."""
    rows = document.get(key) if isinstance(document, Mapping) else None
    return [row for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []


def _spread(figure: Mapping[str, Any], digits: int) -> Cell:
    """Return "31.20" and "± 0.90"; a dash stands for what is not known."""
    if not is_finite(figure.get("mean")):
        return Cell(NOTHING)
    return Cell(_decimals(figure["mean"], digits), f"± {_decimals(figure.get('sd'), digits)}")


def _decimals(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}".replace("-", "−") if is_finite(value) else NOTHING


def _ratio(part_of: Any, whole: Any) -> float | None:
    return part_of / whole if is_finite(part_of) and is_finite(whole) and whole else None


def _percent(share: Any, words: str) -> str:
    """Return the words with the percentage in them, "" where it is not known."""
    return words.format(f"{100 * share:.1f} %") if is_finite(share) else ""


def _plain(value: Any, unit: str = "") -> str:
    return f"{value:g}{unit}" if is_finite(value) else ""
