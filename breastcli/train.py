"""train: fit one network to the training images of a prepared folder and keep the best epoch."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import re
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from breastcli.config import TrainConfig
from breastcli.data.findings import read_findings
from breastcli.data.joined import JoinedData
from breastcli.data.store import PreparedData, difference
from breastcli.errors import UserError
from breastcli.files import write_csv
from breastcli.models import num_parameters
from breastcli.models.freezing import unfreeze
from breastcli.options import refuse_changes
from breastcli.parsing import parse_magnification
from breastcli.plan import Plan
from breastcli.progress import SILENT, Progress
from breastcli.records import stamp_of
from breastcli.reporting.plots import plot_curves
from breastcli.reporting.report import write_report
from breastcli.reporting.split_sheet import draw_extra
from breastcli.shapes import check_shape
from breastcli.system.checkpoint import RESUME_SHAPE, damaged_resume, load_resume, save_checkpoint, save_resume
from breastcli.system.distributed import Processes, joined_processes
from breastcli.system.feeding import EmbeddingFeed
from breastcli.system.planning import plan_training
from breastcli.system.runfolder import (
    BEST,
    EXTRA_SHEET,
    LAST,
    LOG,
    RESUME,
    RUNS,
    TIMING,
    TRAINED,
    claimed_run_folder,
    find_run,
    logging_to,
    read_config,
    recorded_run,
    remove_results,
    write_history,
)
from breastcli.system.runtime import clear_memory_errors, resolve_device, seed_everything, use_deterministic_kernels
from breastcli.system.session import start_session
from breastcli.system.training import Session, learning_rate_factor, train_epoch, validate

logger = logging.getLogger(__name__)

# What may differ when an interrupted run is resumed: everything else would change its history. So would the number of
# epochs where the learning rate depends on it.
FREE_ON_RESUME = frozenset({"resume", "overwrite", "out", "device", "workers", "dry_run"})


@dataclass(frozen=True)
class TrainResult:
    """What ``train`` made.

    Attributes:
        out: the run folder.
        history: one row per epoch.
        best: the row of the best epoch.
        num_images: training and validation images.
        num_synthetic: how many of the training images are synthetic.
        num_parameters: all and trainable parameters.
        seconds: time of this call.
        leaky: the stamp of an image-level split, or None.
        drawn: whether the images were drawn by a program.
    """

    out: Path
    history: list[dict[str, float]]
    best: dict[str, float]
    num_images: dict[str, int]
    num_synthetic: int
    num_parameters: dict[str, int]
    seconds: float
    leaky: str | None
    drawn: bool

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-safe dictionary."""
        values = dataclasses.asdict(self)
        del values["out"]
        return _without_nan(values)


def default_out(config: TrainConfig) -> Path:
    """Return the run folder of a configuration that names none: ``runs/ARCH-MAG``, fold, extra and smoke if any."""
    magnification = parse_magnification(config.mag)
    name = f"{re.sub('[/:]', '-', config.arch)}-{magnification.lower() if magnification else 'all'}"
    fold = "" if config.fold is None else f"-fold{config.fold}"
    extra = "-extra" if config.extra else ""
    return RUNS / f"{name}{fold}{extra}{'-smoke' if config.smoke else ''}"


def train(config: TrainConfig, progress: Progress = SILENT) -> TrainResult | Plan:
    """Train, keeping the best epoch by ``config.monitor``, every epoch's figures, and what ``--resume`` needs.

    The test split is not read. On the CPU the same configuration gives the same history bit for bit, also when the run
    was interrupted and resumed: every epoch draws its randomness from the seed and its own number. Several processes of
    torchrun share every batch and give the history of one up to rounding; dropout differs, each having its own masks.

    Raises:
        UsageError: an option that cannot be accepted.
        UserError: the data or weights cannot be used, memory ran out, the loss stopped being a number, or another
            process stopped.
        LeakError: synthetic images or the weights to start from come from another split of this data set.
    """
    started = time.monotonic()
    if config.smoke:
        config = dataclasses.replace(config, epochs=1)
    out = Path(config.out) if config.out else default_out(config)
    data = PreparedData.open(Path(config.data))
    if config.deterministic:
        use_deterministic_kernels()
    config = _name_start(out, config)
    with (
        joined_processes(resolve_device(config.device)) as (processes, device),
        clear_memory_errors(config.arch, config.batch_size),
        _claimed(out, config) if processes.writes else contextlib.nullcontext(),
    ):
        processes.wait()  # until the folder is claimed
        if config.dry_run:
            return plan_training(_start(config, data, out, processes, device, progress)[0], out)
        with logging_to(out / LOG) if processes.writes else contextlib.nullcontext():
            session, best = _run(config, data, out, processes, device, progress)
        processes.wait()  # until everything is written
    return TrainResult(
        out=out,
        history=session.history,
        best=best,
        num_images={name: len(rows) for name, rows in session.rows.items()},
        num_synthetic=sum(session.synthetic["num_images"].values()) if session.synthetic else 0,
        num_parameters=_count_parameters(session),
        seconds=time.monotonic() - started,
        leaky=data.card["split"]["leaky"],
        drawn=data.card["drawn"],
    )


def _run(
    config: TrainConfig, data: PreparedData, out: Path, processes: Processes, device: torch.device, progress: Progress
) -> tuple[Session, dict[str, float]]:
    """Start or go on, and finish; return the session and the row of the best epoch."""
    session, resumed = _start(config, data, out, processes, device, progress)
    if not resumed and processes.writes:
        remove_results(out)  # of the run to overwrite, or of one that --resume finds removed in part
    if not processes.agree(len(session.history)):
        raise UserError(f"the processes do not see the same {out}", fix="choose an --out that all of them share")
    if not processes.writes:
        _fit(session, out)
        return session, _best(session.history, config.monitor)
    if isinstance(session.data, JoinedData) and session.synthetic:
        draw_extra(session.data, session.rows["train"], out / EXTRA_SHEET)
    with recorded_run(out, config, device, data.card, _run_facts(session)) as info:
        _fit(session, out)
        best = _best(session.history, config.monitor)
        info |= {"best": _without_nan(best), "history_rows": len(session.history)}
        info["num_parameters"] = _count_parameters(session)
        save_checkpoint(out / LAST, session.model, session.options, _facts(session, session.history[-1]))
    write_report(out)
    return session, best


def _start(
    config: TrainConfig, data: PreparedData, out: Path, processes: Processes, device: torch.device, progress: Progress
) -> tuple[Session, bool]:
    """Return what the run starts or goes on with, and whether it goes on."""
    resuming = config.resume and (out / RESUME).is_file()
    saved = load_resume(out / RESUME, device) if resuming else None
    if saved is not None:
        check_shape(saved, RESUME_SHAPE, out / RESUME, "start again with --overwrite")
    session = start_session(config, data, device, progress, saved, processes)
    processes.wait()  # until all have read what the run starts or goes on from
    if saved is not None:
        _restore(session, saved, out)
    return session, resuming


def _run_facts(session: Session) -> dict[str, Any]:
    """Return what ``run.json`` says beside what every job's says."""
    return {
        "data": str(session.data.folder),
        "precision": str(session.dtype).removeprefix("torch."),
        "num_images": {name: len(rows) for name, rows in session.rows.items()},
        "synthetic": session.synthetic,
        "ancestors": session.ancestors,
        "processes": session.processes.count,
        "audit": read_findings(session.data.folder),
    }


def _count_parameters(session: Session) -> dict[str, int]:
    """Return the number of parameters, and of those that learn in the last epoch."""
    return {"all": num_parameters(session.model), "trainable": num_parameters(session.model, trainable=True)}


def _name_start(out: Path, config: TrainConfig) -> TrainConfig:
    """Return the configuration with the run that ``--init-from latest`` means named, as it was when the run began."""
    if config.init_from != "latest":
        return config
    if config.resume and (out / RESUME).is_file():
        return dataclasses.replace(config, init_from=read_config(out, TrainConfig).init_from)
    return dataclasses.replace(config, init_from=str(find_run("latest").folder))


def _claimed(out: Path, config: TrainConfig) -> contextlib.AbstractContextManager[None]:
    """Take the run folder: new, to be resumed under the same options, or to be overwritten."""
    check_options = partial(_check_options, out, config)
    return claimed_run_folder(out, config, TRAINED, ("checkpoints",), check_options, "another --out")


def _check_options(out: Path, config: TrainConfig) -> None:
    """Refuse to go on with a run under options that would change its history."""
    free = FREE_ON_RESUME if _depends_on_length(config) else FREE_ON_RESUME | {"epochs"}
    refuse_changes(f"{out} was trained", read_config(out, TrainConfig), config, free)


def _depends_on_length(config: TrainConfig) -> bool:
    """Return whether an epoch's result depends on how many epochs there will be."""
    return config.schedule != "none" or config.loss == "a_softmax"


def _fit(session: Session, out: Path) -> None:
    """Train the epochs that are not done yet."""
    config = session.config
    session.progress.begin("epochs", config.epochs, "epochs")
    session.progress.advance("epochs", len(session.history))
    stepped = torch.compile(session.model) if config.compile else session.model
    for epoch in range(len(session.history) + 1, config.epochs + 1):
        if _exhausted(session.history, config):
            logger.info("stopped: no better %s for %d epochs", config.monitor, config.patience)
            return
        rank = session.processes.rank
        seed_everything(config.seed, epoch, *((3, rank) if rank else ()))  # other masks of dropout in each process
        if config.unfreeze_at and epoch >= config.unfreeze_at:
            unfreeze(session.model)
        factor = learning_rate_factor(config, epoch)
        for group in session.optimizer.param_groups:
            group["lr"] = factor * group["initial_lr"]
        began = time.monotonic()
        train_loss, num_shown = train_epoch(session, stepped, epoch)
        seconds = time.monotonic() - began
        row = {"epoch": epoch, "lr": factor * config.lr, "train_loss": train_loss, **validate(session, epoch)}
        session.history.append(row)
        speed, with_validation = num_shown / seconds, time.monotonic() - began
        session.timing.append((epoch, seconds, speed, with_validation))
        if session.processes.writes:
            _save_epoch(session, out)
        logger.info("epoch %d: %s", epoch, ", ".join(f"{name} {value:.4f}" for name, value in list(row.items())[2:]))
        session.progress.advance("epochs", 1, **{config.monitor: row[config.monitor]})


def _best(history: list[dict[str, float]], monitor: str) -> dict[str, float]:
    """Return the row of the best epoch, the earliest of equals."""
    sign = -1 if monitor == "val_loss" else 1
    return max(history, key=lambda row: -math.inf if math.isnan(row[monitor]) else sign * row[monitor])


def _exhausted(history: list[dict[str, float]], config: TrainConfig) -> bool:
    if config.patience is None or not history:
        return False
    return len(history) - int(_best(history, config.monitor)["epoch"]) >= config.patience


def _save_epoch(session: Session, out: Path) -> None:
    """Save an epoch; ``resume.pt`` comes last, so that a kill before it repeats the epoch and nothing else."""
    row = session.history[-1]
    if _best(session.history, session.config.monitor) is row:
        save_checkpoint(out / BEST, session.model, session.options, _facts(session, row))
    _write_tables(session, out)
    card = session.data.card
    best_epoch = int(_best(session.history, session.config.monitor)["epoch"])
    stamp = stamp_of(card["split"]["leaky"], card["drawn"], session.synthetic is not None)
    plot_curves(session.history, out / "curves.png", best_epoch, stamp=stamp)
    save_resume(
        out / RESUME,
        {
            "history": session.history,
            "timing": session.timing,
            "model": session.model.state_dict(),
            "optimizer": session.optimizer.state_dict(),
            "scaler": session.scaler.state_dict(),
            "split_fingerprint": session.data.card["split_fingerprint"],
            "fingerprint": session.data.card["fingerprint"],
            "options": dataclasses.asdict(session.options),
            "synthetic": session.synthetic,
            "ancestors": session.ancestors,
            "cached": isinstance(session.feed, EmbeddingFeed),
        },
    )


def _write_tables(session: Session, out: Path) -> None:
    write_history(out, session.history)
    write_csv(out / TIMING, ("epoch", "seconds", "images_per_second", "seconds_with_validation"), session.timing)


def _restore(session: Session, saved: dict[str, Any], out: Path) -> None:
    """Take over what an interrupted run finished; its weights are there already."""
    known = {"fingerprint": session.data.card["fingerprint"], **saved}  # older runs do not say which images they saw
    if what := difference(known, session.data.card):
        raise UserError(f"{out} was trained on {what} than {session.data.folder} has", fix="use --overwrite")
    before, now = saved.get("synthetic"), session.synthetic  # runs older than --extra do not have it
    if before and now and before["fingerprint"] != now["fingerprint"]:
        raise UserError(
            f"{out} was trained with other synthetic images than {now['folder']} has", fix="use --overwrite"
        )
    try:
        session.optimizer.load_state_dict(saved["optimizer"])
        session.scaler.load_state_dict(saved["scaler"])
        _best(saved["history"], session.config.monitor)  # of every epoch the figure that decides is there
    except Exception as error:  # what is in a damaged file makes torch raise almost anything
        raise damaged_resume(out / RESUME, error) from error
    session.history.extend(saved["history"])
    session.timing.extend((*row, None)[:4] for row in saved["timing"])  # older runs have no time with validation
    if session.processes.writes and not session.config.dry_run:
        _write_tables(session, out)  # which may be an epoch ahead
    logger.info("resuming after epoch %d", len(session.history))


def _facts(session: Session, row: dict[str, float]) -> dict[str, Any]:
    """Return what a checkpoint must know about itself."""
    card = session.data.card
    return {
        "classes": list(session.data.classes),
        "epoch": row["epoch"],
        "scores": _without_nan(row),
        "monitor": session.config.monitor,
        "stain": card["stain"],
        "dataset": {name: card[name] for name in ("name", "fingerprint", "split_fingerprint", "task")},
        "leaky": card["split"]["leaky"],
        "fold": session.config.fold,
        "synthetic": session.synthetic,
        "ancestors": session.ancestors,
    }


def _without_nan(value: Any) -> Any:
    """Return a JSON-safe copy: NaN becomes None."""
    if isinstance(value, dict):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
