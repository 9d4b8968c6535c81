"""Run folders: what a job was asked to do, on what, with what, and how it went."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from breastcli import __version__
from breastcli.config import JobConfig, TrainConfig
from breastcli.configfile import Config, job_of, read_section, resolve, to_yaml
from breastcli.data.store import PreparedData, difference
from breastcli.errors import UserError, WriteError
from breastcli.files import read_json, remove_written, write_csv, write_json, write_text, writing
from breastcli.locks import locked
from breastcli.system.runtime import describe_device

RUNS = Path("runs")
INFO, CONFIG, HISTORY, TIMING = "run.json", "config.yaml", "history.csv", "timing.csv"
BEST, LAST, RESUME = "checkpoints/best.safetensors", "checkpoints/last.safetensors", "checkpoints/resume.pt"
LOG = "log.txt"
FACTS = tuple(name.replace(".safetensors", ".json") for name in (BEST, LAST))
TRAINED = (BEST, LAST, *FACTS, RESUME, HISTORY, TIMING, "curves.png", "report.html")
METRICS, PREDICTIONS = "metrics.json", "predictions.csv"
EXPLANATION, MAPS = "explain.json", "saliency.npz"
EXPLAINED = (EXPLANATION, MAPS, "localisation.csv", "faithfulness.csv", "gallery.png", "comparison.png")
EMBEDDING_PLOT = "embedding.png"
PLOTS = ("confusion.png", "roc.png", "precision_recall.png", "reliability.png", "patients.png", EMBEDDING_PLOT)
LIBRARIES = ("torch", "torchvision", "timm", "numpy", "scikit-learn", "pillow", "safetensors")


@dataclass(frozen=True)
class Run:
    """A run folder that ``train`` began.

    Attributes:
        folder: where it is.
        info: the contents of ``run.json``.
        config: how it was trained.
    """

    folder: Path
    info: dict[str, Any]
    config: TrainConfig

    @property
    def best(self) -> Path:
        """The checkpoint of the best epoch."""
        return self.folder / BEST

    def open_data(self, folder: str | None = None) -> PreparedData:
        """Open the prepared folder that the run was trained on, or another copy of it.

        Raises:
            UserError: the folder cannot be used, or holds other images or another split.
        """
        data = PreparedData.open(Path(folder or self.config.data))
        what = difference(data.card, self.info["dataset"])
        if what:
            raise UserError(
                f"{data.folder} has {what} than {self.folder} was trained on",
                fix="pass the right folder with --data, or train again",
            )
        return data


def find_run(name: str) -> Run:
    """Open a run folder; "latest" is the one below ``runs/`` that was written last.

    Raises:
        UserError: there is no such run.
    """
    folder = _latest() if name == "latest" else Path(name)
    if not (folder / INFO).is_file() or not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is not a run folder", fix="give a folder that breastcli train wrote, or latest")
    info = read_json(folder / INFO)
    if info.get("command") != "train":
        raise UserError(f"{folder} is a run of {info.get('command')}", fix="give a folder that breastcli train wrote")
    return Run(folder, info, read_config(folder, TrainConfig))


@contextlib.contextmanager
def reading_run(run: Run) -> Iterator[Run]:
    """Keep a run from being trained on or overwritten until the block ends; yield it as it is then.

    Raises:
        UserError: it is being trained.
    """
    with locked(run.folder, shared=True):
        yield find_run(str(run.folder))


def read_config(folder: Path, kind: type[Config]) -> Config:
    """Return how a run was configured: what ``run.json`` says of it, in older runs ``config.yaml``.

    Raises:
        UserError: the file is missing, damaged or of another job.
    """
    info = read_json(folder / INFO)
    known = info.get("config") if isinstance(info, dict) else None
    return resolve(kind, read_section(folder / CONFIG, job_of(kind)) if known is None else known, {})


def remove_explanation(folder: Path) -> None:
    """Remove what ``explain`` wrote into a folder, finished or not; nothing where its ``explain.json`` is missing.

    That file goes last: without it, what is left would count as somebody else's.
    """
    if not (folder / EXPLANATION).is_file():
        return
    for name in [*panels_of(folder), *reversed(EXPLAINED)]:
        remove_written(folder / name)


def panels_of(folder: Path) -> list[str]:
    """Return the panels that a folder's ``explain.json`` names, and that lie below it; none where it is damaged."""
    try:
        names = [str(one["panel"]) for one in read_json(folder / EXPLANATION)["images"]]
    except (UserError, KeyError, TypeError):
        return []
    return [name for name in names if ".." not in Path(name).parts and not Path(name).is_absolute()]


def remove_results(folder: Path) -> None:
    """Remove what an earlier training, its evaluations and explanations wrote into a run folder; nothing else.

    First goes what --resume goes on from, so that a run that was removed in part is never gone on with.
    """
    remove_written(folder / RESUME)
    for explanation in folder.glob(f"explain/*/{EXPLANATION}"):
        remove_explanation(explanation.parent)
    evaluations = [path / name for path in folder.glob("evaluate/*") for name in (METRICS, PREDICTIONS, *PLOTS)]
    for path in [*(folder / name for name in TRAINED), *evaluations]:
        remove_written(path)


def _is_of_train(info: Path) -> bool:
    try:
        return read_json(info)["command"] == "train"
    except (UserError, KeyError, TypeError):
        return False  # a damaged one


def _latest() -> Path:
    # Folders of pooled evaluations have no configuration, and those of generators are no classifiers.
    begun = (path for path in RUNS.rglob(INFO) if path.with_name(CONFIG).is_file())
    trained = (path for path in begun if _is_of_train(path))
    written = sorted(trained, key=lambda path: path.stat().st_mtime)
    if not written:
        raise UserError(f"no run below {RUNS}/", fix="run breastcli train first, or give a run folder")
    return written[-1].parent


@contextlib.contextmanager
def recorded_run(
    folder: Path, config: JobConfig, device: torch.device, card: Mapping[str, Any], facts: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Keep ``run.json`` true while a job works: running, then finished, interrupted or failed.

    Args:
        folder: the run folder; it must exist.
        config: written as ``config.yaml``.
        device: where the job computes.
        card: the data set's card.
        facts: further values for ``run.json``; the yielded dictionary may be added to until the block ends.
    """
    started = time.monotonic()
    info: dict[str, Any] = {
        "command": type(config).__name__.removesuffix("Config").lower(),
        "argv": sys.argv,
        "status": "running",
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": None,
        "device": describe_device(device),
        "seed": config.seed,
        "versions": versions(),
        "git": git_state(),
        **facts,
        "config": dataclasses.asdict(config),  # here too, because the two files could come to differ
        "dataset": dict(card),
    }

    def end(status: str) -> None:
        info.update(status=status, seconds=round(time.monotonic() - started, 1))
        write_json(folder / INFO, info, durable=True)

    write_text(folder / CONFIG, to_yaml(config))
    write_json(folder / INFO, info, durable=True)
    try:
        yield info
    except BaseException as error:
        with contextlib.suppress(WriteError):  # what stopped the job says more
            end("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    end("finished")


class _FileLog(logging.FileHandler):
    """A log whose failure is the job's, instead of a traceback beside it."""

    def handleError(self, record: logging.LogRecord) -> None:
        with writing(Path(self.baseFilename)):
            raise  # what is being handled


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Append what breastcli logs to a file.

    Raises:
        WriteError: it cannot be written.
    """
    with writing(path):
        handler = _FileLog(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("breastcli")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        with contextlib.suppress(OSError):  # of a line that could not be written before
            handler.close()


def describe_pool(folder: Path, runs: Sequence[Run], device: torch.device, seed: int, seconds: float) -> None:
    """Write ``run.json`` for a folder of pooled runs, which nothing trained."""
    values = {
        "command": "evaluate",
        "argv": sys.argv,
        "status": "finished",
        "device": describe_device(device),
        "seed": seed,
        "seconds": round(seconds, 1),
        "versions": versions(),
        "git": git_state(),
        "dataset": runs[0].info["dataset"],
        "runs": [str(run.folder) for run in runs],
        "train": dataclasses.asdict(runs[0].config),
    }
    write_json(folder / INFO, values, durable=True)


def write_history(folder: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Write ``history.csv``: one row per epoch with every digit, and no times, so that two runs can be compared."""
    if history:
        write_csv(folder / HISTORY, list(history[0]), ([_plain(v) for v in row.values()] for row in history))


def versions() -> dict[str, str]:
    """Return the versions of breastcli, Python and the libraries that decide results."""
    found = {"breastcli": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in LIBRARIES:
        found[name] = metadata.version(name)
    return found


def git_state() -> str | None:
    """Return the commit of breastcli's source ("-dirty" where it was changed), or None where it has none."""
    source = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=source,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None


def _plain(value: float) -> str:
    return str(value) if isinstance(value, int) else repr(float(value))
