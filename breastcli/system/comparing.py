"""The two sides of a comparison: folders whose evaluations are set beside each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from breastcli.config import EvaluateConfig
from breastcli.errors import UsageError, UserError
from breastcli.files import read_json
from breastcli.metrics.comparison import Comparison, compare_predictions
from breastcli.options import refuse_given
from breastcli.records import Predictions, stamp_of
from breastcli.system.reuse import refuse_stale
from breastcli.system.runfolder import METRICS, PREDICTIONS, find_run, git_state, versions

DECIDED_BEFORE = ("data", "threshold", "tta", "calibrate", "embedding", "stress")  # by each side's own evaluation


@dataclass(frozen=True)
class ComparisonResult:
    """What ``evaluate --compare`` found.

    Attributes:
        out: folder of ``comparison.json``, ``comparison.csv`` and ``comparison.png``.
        document: the contents of ``comparison.json``.
        comparison: every figure of both sides, and their differences.
        seconds: wall-clock time.
    """

    out: Path
    document: dict[str, Any]
    comparison: Comparison
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-safe dictionary."""
        return {**self.document, "seconds": self.seconds}


@dataclass(frozen=True)
class Side:
    """One evaluated folder: a run's own, or that of pooled runs.

    Attributes:
        folder: where it is.
        document: its evaluation's ``metrics.json``.
        predictions: its evaluation's ``predictions.csv``.
    """

    folder: Path
    document: dict[str, Any]
    predictions: Predictions

    @property
    def stamp(self) -> str:
        """The warning that belongs to what its figures enter, or ""."""
        dataset = self.document["dataset"]
        return stamp_of(dataset["leaky"], dataset["drawn"], dataset["synthetic"])

    def to_json(self) -> dict[str, Any]:
        """Return where the side comes from and how it was evaluated."""
        known = {name: self.document[name] for name in ("runs", "threshold", "tta", "dataset")}
        temperatures = (self.document.get("calibration") or {}).get("temperatures")
        return {"folder": str(self.folder), "stamp": self.stamp, "temperatures": temperatures, **known}


def find_sides(config: EvaluateConfig) -> tuple[Path, Path]:
    """Return the folders to compare.

    Raises:
        UsageError: there are not two, or an option is given that belongs to the evaluation of either.
        UserError: a folder is neither evaluated nor a run that could be.
    """
    if len(config.runs) != 2 or config.run:
        raise UsageError("--compare takes two folders", fix="breastcli evaluate --compare A B")
    why, fix = "--compare takes what each side's evaluation predicted", "evaluate each side with it first, then compare"
    refuse_given(config, DECIDED_BEFORE, why, fix)
    first, second = (_find_side(name, config.split) for name in config.runs)
    return first, second


def _find_side(name: str, split: str) -> Path:
    """Return a folder that is evaluated (pooled runs' too), or a run that can be."""
    return Path(name) if is_evaluated(Path(name), split) else find_run(name).folder


def is_evaluated(folder: Path, split: str) -> bool:
    """Return whether a folder holds a finished evaluation of a split."""
    return (folder / "evaluate" / split / METRICS).is_file()


def compare_folders(folders: tuple[Path, Path], config: EvaluateConfig) -> tuple[dict[str, Any], Comparison]:
    """Compare two finished evaluations; return the contents of ``comparison.json``, and what was found.

    Raises:
        UserError: a file is missing or damaged, or the classes differ.
    """
    a, b = (_read_side(folder, config.split) for folder in folders)
    settings = {"resamples": config.resamples, "seed": config.seed}
    # Data sets number their images alike, so that equal names mean nothing across them.
    same_data = a.document["dataset"]["name"] == b.document["dataset"]["name"]
    found = compare_predictions(a.predictions, b.predictions, same_data=same_data, **settings)
    stamps = (f"{name}: {side.stamp}" for name, side in (("A", a), ("B", b)) if side.stamp)
    document = {
        "a": a.to_json(),
        "b": b.to_json(),
        "split": config.split,
        "stamp": "; ".join(stamps),
        **settings,
        **found.to_json(),
        "apart": _apart(a, b),
        "versions": versions(),
        "git": git_state(),
    }
    return document, found


def _read_side(folder: Path, split: str) -> Side:
    where = folder / "evaluate" / split
    side = Side(folder, read_json(where / METRICS), Predictions.from_csv(where / PREDICTIONS))
    refuse_stale(where, side.document)
    try:
        side.to_json()
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where / METRICS} is not an evaluation of this version", fix="evaluate again") from error
    return side


def _apart(a: Side, b: Side) -> list[str]:
    """Return what differs between two evaluations beside the networks."""
    facts = {
        "data set": [side.document["dataset"]["fingerprint"][:12] for side in (a, b)],
        "split": [f"by {side.document['dataset']['split_level']}" for side in (a, b)],
        "decision threshold": [side.document["threshold"]["rule"] for side in (a, b)],
        "test-time augmentation": [side.document["tta"] for side in (a, b)],
        "calibrated": ["yes" if side.to_json()["temperatures"] else "no" for side in (a, b)],
    }
    return [f"{name}: {one} (A), {other} (B)" for name, (one, other) in facts.items() if one != other]
