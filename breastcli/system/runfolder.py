"""Run folders: what a job was asked to do, on what, with what, and how it went."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from breastcli import __version__
from breastcli.config import JobConfig, SynthesizeConfig, TrainConfig
from breastcli.configfile import Config, job_of, read_section, resolve, to_yaml
from breastcli.data.store import PreparedData, difference
from breastcli.errors import UsageError, UserError, WriteError, visible
from breastcli.files import (
    claimed_folder,
    names_in,
    partial_of,
    read_json,
    refuse_links,
    remove_files,
    write_csv,
    write_json,
    write_text,
    writing,
)
from breastcli.locks import locked
from breastcli.shapes import check_shape
from breastcli.system.runtime import describe_device

RUNS = Path("runs")
INFO, CONFIG, HISTORY, TIMING = "run.json", "config.yaml", "history.csv", "timing.csv"
BEST, LAST, RESUME = "checkpoints/best.safetensors", "checkpoints/last.safetensors", "checkpoints/resume.pt"
LOG = "log.txt"
FACTS = tuple(name.replace(".safetensors", ".json") for name in (BEST, LAST))
EXTRA_SHEET = "synthetic.png"
PAGE, MODEL_CARD = "report.html", "model_card.md"
TRAINED = (BEST, LAST, *FACTS, RESUME, HISTORY, TIMING, "curves.png", EXTRA_SHEET, PAGE, MODEL_CARD)
METRICS, PREDICTIONS = "metrics.json", "predictions.csv"
EXPLANATION, MAPS, PANELS = "explain.json", "saliency.npz", "panels"
EXPLAINED = (EXPLANATION, MAPS, "localisation.csv", "faithfulness.csv", "gallery.png", "comparison.png")
ERRORS = "errors"  # thumbnails of the most confident ones, in the folder of an evaluation
EMBEDDING_PLOT = "embedding.png"
STRESS_TABLE, STRESS_PLOT = "stress.csv", "stress.png"
PLOTS = ("confusion.png", "roc.png", "precision_recall.png", "reliability.png", "patients.png", EMBEDDING_PLOT)
EVALUATED = (METRICS, PREDICTIONS, *PLOTS, STRESS_TABLE, STRESS_PLOT)
INFO_SHAPE = {
    **dict.fromkeys(("command", "status", "started", "device"), str),
    "dataset": {"name": str, "fingerprint": str, "split_fingerprint": str},
    "processes?": int,
}
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
    info = read_info(folder, "train")
    return Run(folder, info, read_config(folder, TrainConfig))


def read_info(folder: Path, command: str) -> dict[str, Any]:
    """Return the contents of ``run.json`` of a run of one command.

    Raises:
        UserError: there is no such run, or the file is damaged.
    """
    fix = f"give a folder that breastcli {command} wrote"
    if not (folder / INFO).is_file() or not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is not a run folder", fix=f"{fix}, or latest" if command == "train" else fix)
    info = read_json(folder / INFO)
    check_shape(info, {"command": str}, folder / INFO, fix)
    if info["command"] != command:
        raise UserError(f"{folder} is a run of {info['command']}", fix)
    check_shape(info, INFO_SHAPE, folder / INFO, fix)
    return info


@contextlib.contextmanager
def claimed_run_folder(
    out: Path,
    config: TrainConfig | SynthesizeConfig,
    written: Iterable[str],
    folders: Iterable[str],
    check_options: Callable[[], None],
    other: str,
) -> Iterator[None]:
    """Take a run folder until the block ends: new, to be resumed under the same options, or to be overwritten.

    Args:
        out: the folder.
        config: what is going to be done in it.
        written: files that a run writes, of which a killed one may have left halves.
        folders: those below it that the run writes into.
        check_options: refuses options under which the run there cannot be gone on with.
        other: what to choose instead.

    Raises:
        UserError: it is not empty, a link leads out of it, its options are others, or another job holds it.
    """
    only_log = names_in(out) <= {LOG}  # left by a run that could not start
    allowed, hint = config.resume or config.overwrite or only_log, f"use --resume, --overwrite or {other}"
    with claimed_folder(out, allowed=allowed, hint=hint, dry_run=config.dry_run):
        refuse_links(out, *folders)
        resuming = config.resume and (out / RESUME).is_file()
        if resuming:
            check_options()
        if not config.dry_run:
            if config.overwrite and not resuming:
                (out / LOG).unlink(missing_ok=True)  # the other results go once the run can start
            for name in written:
                partial_of(out / name).unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def reading_run(run: Run, *, dry_run: bool = False) -> Iterator[Run]:
    """Keep a run from being trained on or overwritten until the block ends; yield it as it is then.

    A dry run leaves no lock.

    Raises:
        UserError: it is being trained.
    """
    with locked(run.folder, shared=True, dry_run=dry_run):
        yield find_run(str(run.folder))


def read_config(folder: Path, kind: type[Config]) -> Config:
    """Return how a run was configured: what ``run.json`` says of it, in older runs ``config.yaml``.

    Raises:
        UserError: the file is damaged, or of another job.
    """
    info, job, fix = read_json(folder / INFO), job_of(kind), "put it right, or start the run again"
    known = info.get("config") if isinstance(info, dict) else None
    path = folder / (CONFIG if known is None else INFO)
    try:
        section = read_section(path, job) if known is None else known
        if not section or not isinstance(section, dict):
            raise UserError(f"{path} has no section {job!r}", fix)
        return resolve(kind, section, {})
    except UsageError as error:  # of the file, not of this command
        raise UserError(f"{path} is damaged ({error})", fix) from error


def remove_explanation(folder: Path) -> None:
    """Remove what ``explain`` wrote into a folder, finished or not; nothing where its ``explain.json`` is missing.

    That file goes last: without it, what is left would count as somebody else's.
    """
    if not (folder / EXPLANATION).is_file():
        return
    remove_files(folder, [*panels_of(folder), *reversed(EXPLAINED)])


def panels_of(folder: Path) -> list[str]:
    """Return the panels that a folder's ``explain.json`` names, and that lie below it; none where it is damaged."""
    try:
        names = [str(one["panel"]) for one in read_json(folder / EXPLANATION)["images"]]
    except (UserError, KeyError, TypeError):
        return []  # a damaged one
    return [name for name in names if re.fullmatch(rf"{PANELS}/[^/]+\.png", name)]  # the document may be anybody's


def remove_errors(folder: Path) -> None:
    """Remove the thumbnails of an evaluation; nothing else."""
    names = (path.name for path in (folder / ERRORS).glob("*.png") if re.fullmatch(r".*-[0-9a-f]{8}", path.stem))
    remove_files(folder, [f"{ERRORS}/{name}" for name in names])
    with contextlib.suppress(OSError):  # there is none, or it holds something else, or is a link
        (folder / ERRORS).rmdir()


def remove_results(folder: Path) -> None:
    """Remove what an earlier training, its evaluations and explanations wrote into a run folder; nothing else.

    First goes what --resume goes on from, so that a run that was removed in part is never gone on with.
    """
    remove_files(folder, [RESUME])
    for explanation in folder.glob(f"explain/*/{EXPLANATION}"):
        if explanation.resolve().is_relative_to(folder.resolve()):
            remove_explanation(explanation.parent)
    evaluations = list(folder.glob("evaluate/*"))
    for evaluation in evaluations:
        remove_errors(evaluation)
    evaluated = [str(one.relative_to(folder) / name) for one in evaluations for name in EVALUATED]
    remove_files(folder, [*TRAINED, *evaluated])


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


class _OneLine(logging.Formatter):
    """Writes file names as escapes where they would break the line or the encoding."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Append what breastcli logs to a file, a line for each record whatever is in it.

    Raises:
        WriteError: it cannot be written.
    """
    if path.is_symlink():
        path.unlink()  # what it leads to is somebody's
    with writing(path):
        handler = _FileLog(path, encoding="utf-8")
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))
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
