"""Time that networks take to converge, each trained under one protocol in a process of its own."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from breastcli.benchmarks.children import run_command
from breastcli.benchmarks.models import NetworkFigures
from breastcli.config import SPLITS, BenchmarkConfig, JobConfig, TrainConfig
from breastcli.configfile import read_section, resolve, to_yaml
from breastcli.data.store import MANIFEST, PreparedData
from breastcli.errors import UsageError, UserError, first_line
from breastcli.files import read_csv, read_json, write_text
from breastcli.parsing import parse_magnification
from breastcli.progress import Progress
from breastcli.records import stamp_of
from breastcli.system.runfolder import HISTORY, INFO, METRICS, TIMING, find_run
from breastcli.system.runtime import describe_device, resolve_device, resolve_precision

logger = logging.getLogger(__name__)

FOLDER, PROTOCOL, SAMPLE = "convergence", "protocol.yaml", "sample"
TOLERANCE = 0.01
NOT_CONVERGED = "not within the budget"
SCORES = ("balanced_accuracy", "accuracy", "roc_auc")
OVERRIDES = ("data", "mag", "fold", "epochs", "batch_size")  # of the protocol, by flags of the benchmark
COMMON = ("device", "seed", "precision", "workers")  # likewise, where they are not at their default
# What is trained on where there are no data: enough for train, validation and test, and a minute for each network.
DRAWN_IMAGES, DRAWN_SIZE_PX = 240, 64
DRAWN_TRAINING = {"epochs": 8, "lr": 1e-3, "augment": "light", "imbalance": "weights"}
CONVENTIONS = (
    "seconds: wall-clock time of the epochs, training and validation; starting, saving and the test are not counted",
    "images/s: images shown, repeats included, over the time of the training passes",
    "a network that learns nothing converges at once: read its time beside its scores",
)


@dataclass(frozen=True)
class Protocol:
    """What every network is trained under.

    Attributes:
        train: options of ``train``; network and run folder are each run's own.
        folder: where the protocol and the run folders lie.
        data: the images.
        num_images: of each split.
        flags: what every ``train`` is told beside the protocol.
    """

    train: TrainConfig
    folder: Path
    data: PreparedData
    num_images: dict[str, int]
    flags: tuple[str, ...]

    @property
    def rule(self) -> str:
        """When a network counts as converged, in words."""
        bound = f"at most {1 + TOLERANCE:g}" if _is_loss(self.train.monitor) else f"at least {1 - TOLERANCE:g}"
        return (
            f"converged: the first epoch from which on {self.train.monitor} stays within {100 * TOLERANCE:g} % of the "
            f"run's best ({bound} times it)"
        )

    @property
    def stamp(self) -> str:
        """The warning that everything made from these images carries, or ""."""
        card = self.data.card
        return stamp_of(card["split"]["leaky"], card["drawn"], self.train.extra is not None)

    def facts(self) -> dict[str, Any]:
        """Return a JSON-safe dictionary."""
        card = self.data.card
        device = resolve_device(self.train.device)
        own = ("arch", "out", "resume", "overwrite", "dry_run")
        return {
            **{
                name: card[name] for name in ("title", "name", "classes", "size_px", "fingerprint", "split_fingerprint")
            },
            "split_level": card["split"]["level"],
            "magnification": parse_magnification(self.train.mag) or "all",
            "fold": self.train.fold,
            "num_images": self.num_images,
            "rule": self.rule,
            "device": describe_device(device),
            "precision": str(resolve_precision(self.train.precision, device)).removeprefix("torch."),
            "stamp": self.stamp,
            "train": {name: value for name, value in dataclasses.asdict(self.train).items() if name not in own},
            "conventions": list(CONVENTIONS),
        }


def no_scores() -> dict[str, Any]:
    """Return the shape of one level's scores, nothing being known."""
    return {"n": None, **{name: {"value": None, "low": None, "high": None} for name in SCORES}}


@dataclass(frozen=True)
class Convergence:
    """What the training and the test of one network gave; None where it is not known.

    Attributes:
        arch: as ``train --arch`` takes it.
        parameters: exact number, for the classes of the data set.
        epochs: number of epochs that it was trained for.
        convergence_epoch: the first epoch from which on the validation score stays near its best.
        convergence_s: time up to the end of that epoch.
        reason: why there is none, or "".
        total_s: time of all epochs.
        images_per_s: of the training passes.
        best_epoch: the epoch that was tested.
        image: n and scores of test images, each with its 95 % interval.
        patient: likewise of patients, by the mean probability of their images.
        stamp: warning that the figures carry, or "".
        run: the run folder.
        problem: why it could not be measured, or "".
    """

    arch: str
    parameters: int | None = None
    epochs: int | None = None
    convergence_epoch: int | None = None
    convergence_s: float | None = None
    reason: str = ""
    total_s: float | None = None
    images_per_s: float | None = None
    best_epoch: int | None = None
    image: dict[str, Any] = field(default_factory=no_scores)
    patient: dict[str, Any] = field(default_factory=no_scores)
    stamp: str = ""
    run: str = ""
    problem: str = ""


def settle_protocol(config: BenchmarkConfig, out: Path) -> tuple[TrainConfig, bool]:
    """Return what every network is trained under, and whether its images must be drawn first.

    Flags of the benchmark (device, seed, precision and workers where they are not the default) win over the file of
    ``--protocol``, which wins over the defaults of ``train``.

    Raises:
        UsageError: the file cannot be used, or an option that cannot be accepted.
    """
    section = read_section(Path(config.protocol), "train", "--protocol") if config.protocol else {}
    if config.protocol and not section:
        raise UsageError(f"{config.protocol} has no section 'train'", fix="check --protocol")
    folder = out / FOLDER
    if section.get("cache_embeddings") == "on":
        fix = "leave cache_embeddings out: time spent on embeddings would not be counted"
        raise UsageError(f"{config.protocol}: embeddings are cached", fix=fix)
    drawn = config.what == "all" and config.data is None and "data" not in section
    if drawn:
        section = {**DRAWN_TRAINING, **section, "data": str(folder / SAMPLE)}
    defaults = {one.name: one.default for one in dataclasses.fields(JobConfig)}
    given = {name: getattr(config, name) for name in COMMON if getattr(config, name) != defaults[name]}
    given |= {name: getattr(config, name) for name in OVERRIDES}
    settled = {"out": None, "resume": False, "overwrite": False, "dry_run": False}
    train = dataclasses.replace(resolve(TrainConfig, section, given), **settled)
    train = dataclasses.replace(train, cache_embeddings="off")  # a frozen trunk's work is timed like all others'
    if train.init_from == "latest":
        raise UsageError("--init-from latest: may be another run for each network", fix="name the run")
    return train, drawn and not (config.resume and (folder / SAMPLE / MANIFEST).is_file())


def count_images(data: PreparedData, train: TrainConfig) -> dict[str, int]:
    """Return the number of images of each split that a protocol takes.

    Raises:
        UserError: there are none.
    """
    magnification = parse_magnification(train.mag)
    return {split: len(data.select(split, fold=train.fold, magnification=magnification)) for split in SPLITS}


def start_protocol(config: BenchmarkConfig, out: Path) -> Protocol:
    """Settle what every network is trained under and check it; draw the images where there are none.

    Raises:
        UsageError: the file cannot be used, or an option that cannot be accepted.
        UserError: the images cannot be used.
    """
    train, must_draw = settle_protocol(config, out)
    folder = out / FOLDER
    if must_draw:
        _draw(folder / SAMPLE, config.seed)
    data = PreparedData.open(Path(train.data))
    num_images = count_images(data, train)
    write_text(folder / PROTOCOL, to_yaml(train))
    flags = tuple(f"--{name}" for name in ("resume", "overwrite") if getattr(config, name))
    return Protocol(train, folder, data, num_images, flags)


def _draw(folder: Path, seed: int) -> None:
    """Draw the sample data set and prepare it; the folder keeps the prepared images only."""
    options = {"--draw": DRAWN_IMAGES, "--size": DRAWN_SIZE_PX, "--seed": seed, "--out": folder}
    words = [str(word) for option in options.items() for word in option]
    with tempfile.TemporaryDirectory() as raw:
        run_command(["prepare", raw, "--dataset", "sample", *words, "--overwrite"])


def train_network(network: NetworkFigures, protocol: Protocol, progress: Progress) -> Convergence:
    """Train and test one network, each in a process of its own.

    What fails, for lack of memory above all, leaves its reason in ``problem``.
    """
    if network.problem:
        return Convergence(network.arch, problem=network.problem)
    run = protocol.folder / re.sub("[/:]", "-", network.arch)
    train = protocol.train
    common = ["--config", str(protocol.folder / PROTOCOL)]
    watched = _Watch(run / HISTORY, network.arch, train.epochs, progress)
    try:
        _check_begun(run, protocol)
        trained = run_command(
            ["train", *common, "--arch", network.arch, "--out", str(run), *protocol.flags], watched.look
        )
        settings = ["--device", train.device, "--precision", train.precision, "--seed", str(train.seed)]
        settings += ["--workers", str(train.workers)] if train.workers else []
        run_command(["evaluate", str(run), *settings, "--overwrite"])
        try:
            return _read_run(network.arch, run, trained)
        except (LookupError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(f"{run} holds damaged figures ({error})", fix="use --overwrite") from error
    except UserError as error:
        return Convergence(network.arch, run=str(run), problem=first_line(error, 160))
    finally:
        watched.finish()


def _check_begun(folder: Path, protocol: Protocol) -> None:
    """Refuse to go on with a run whose epochs so far were timed elsewhere, or whose number was another.

    Raises:
        UserError: it was trained on another device or for more epochs.
    """
    if "--resume" not in protocol.flags or not (folder / INFO).is_file():
        return
    run, device = find_run(str(folder)), describe_device(resolve_device(protocol.train.device))
    before, now = run.config.epochs, protocol.train.epochs
    if run.info["device"] != device:
        raise UserError(f"{folder} was trained on {run.info['device']}, not {device}", fix="use --overwrite")
    if before > now:
        raise UserError(f"{folder} was trained with --epochs {before}, not {now}", fix="use --overwrite")


def _read_run(arch: str, folder: Path, trained: dict[str, Any]) -> Convergence:
    """Return the figures of a finished and tested run.

    Args:
        arch: the network.
        folder: its run folder.
        trained: what ``train`` printed.
    """
    run = find_run(str(folder))
    monitor = run.config.monitor
    history, timing = read_csv(folder / HISTORY), read_csv(folder / TIMING)
    if len(timing) != len(history) or any(not row.get("seconds_with_validation") for row in timing):
        raise UserError(f"{folder / TIMING} has epochs without a time", fix="use --overwrite")
    seconds = [float(row["seconds_with_validation"]) for row in timing]
    epoch = find_convergence([float(row[monitor]) for row in history], smaller_is_better=_is_loss(monitor))
    training_s = sum(float(row["seconds"]) for row in timing)
    num_shown = sum(float(row["seconds"]) * float(row["images_per_second"]) for row in timing)
    tested = read_json(folder / "evaluate/test" / METRICS)
    dataset = tested["dataset"]
    return Convergence(
        arch,
        parameters=trained["num_parameters"]["all"],
        epochs=len(history),
        convergence_epoch=epoch,
        convergence_s=sum(seconds[:epoch]) if epoch else None,
        reason="" if epoch else NOT_CONVERGED,
        total_s=sum(seconds),
        images_per_s=num_shown / training_s,
        best_epoch=int(trained["best"]["epoch"]),
        image=_scores(tested["image"]),
        patient=_scores(tested["patient"]["mean"]) if tested["patient"] else no_scores(),
        stamp=stamp_of(dataset["leaky"], dataset["drawn"], dataset["synthetic"]),
        run=str(folder),
    )


def find_convergence(scores: Sequence[float], *, smaller_is_better: bool) -> int | None:
    """Return the first epoch (from 1) from which on the score stays within 1 % of its best, or None.

    Args:
        scores: one per epoch, not negative; NaN counts as far from the best.
        smaller_is_better: as of a loss.
    """
    known = [score for score in scores if not math.isnan(score)]
    if not known:
        return None
    if smaller_is_better:
        within = [score <= (1 + TOLERANCE) * min(known) for score in scores]
    else:
        within = [score >= (1 - TOLERANCE) * max(known) for score in scores]
    outside = [epoch for epoch, near in enumerate(within, start=1) if not near]
    last = max(outside, default=0)
    return last + 1 if last < len(scores) else None


def _is_loss(monitor: str) -> bool:
    return monitor == "val_loss"


def _scores(level: dict[str, Any]) -> dict[str, Any]:
    return {"n": level["n"], **{name: level["overall"][name] for name in SCORES}}


class _Watch:
    """Reports the epochs that a process finishes by looking at what it writes."""

    def __init__(self, history: Path, task: str, epochs: int, progress: Progress) -> None:
        self.history, self.task, self.left, self.progress = history, task, epochs, progress
        self.seen, self.began = 0, time.time()
        progress.begin(task, epochs, "epochs")

    def look(self) -> None:
        """Count the epochs that are new."""
        try:
            if self.history.stat().st_mtime < self.began:
                return  # an earlier run's
            done = len(read_csv(self.history))
        except (OSError, UserError):
            return  # not begun yet
        self._advance(done - self.seen)
        self.seen = done

    def finish(self) -> None:
        """Complete the task: a run may be finished before, or stop early."""
        self._advance(self.left)

    def _advance(self, epochs: int) -> None:
        if epochs > 0:
            self.left -= epochs
            self.progress.advance(self.task, epochs)
