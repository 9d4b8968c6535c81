"""The run folder of a GAN: claimed, found again, emptied before it is overwritten."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from breastcli.config import SynthesizeConfig
from breastcli.errors import UsageError, UserError
from breastcli.files import read_json, remove_files
from breastcli.locks import locked
from breastcli.options import flag_of, refuse_changes
from breastcli.parsing import parse_magnification
from breastcli.shapes import check_shape
from breastcli.system.runfolder import HISTORY, INFO, RESUME, RUNS, claimed_run_folder, read_config, read_info

logger = logging.getLogger(__name__)

DATA = "data/breakhis"  # what prepare writes by default
GENERATOR = "checkpoints/generator.safetensors"
SAMPLES = "samples"
FILM = "training.gif"
ASSESSMENT = "assessment.json"
ASSESSED = tuple(f"assess/{name}" for name in ("assessment.json", "samples.png", "neighbours.png", "distances.png"))
WRITTEN = (  # first what --resume goes on from
    RESUME,
    GENERATOR,
    GENERATOR.replace(".safetensors", ".json"),
    HISTORY,
    "timing.csv",
    "curves.png",
    FILM,
    "report.html",
    *ASSESSED,
)
# What may differ when an interrupted fit is resumed: everything else would change its history.
OF_THE_FIT = ("mag", "fold", "classes", "condition", "size", "width", "objective", "kimg")
FREE_ON_RESUME = {"dry_run", "step", "run", "out", "device", "workers", "overwrite", "resume", "kimg", "on_collapse"}
FREE_ON_RESUME |= {"label", "num", "truncation", "features", "draws"}  # of the other steps


@dataclass(frozen=True)
class GanRun:
    """A run folder that ``synthesize fit`` began.

    Attributes:
        folder: where it is.
        info: the contents of ``run.json``.
        config: how it was fitted.
    """

    folder: Path
    info: dict[str, Any]
    config: SynthesizeConfig


def default_run(config: SynthesizeConfig) -> Path:
    """Return the run folder of a configuration that names none: ``runs/cwgan-MAG``, with fold and ``smoke`` if any."""
    magnification = parse_magnification(config.mag)
    fold = "" if config.fold is None else f"-fold{config.fold}"
    return RUNS / f"cwgan-{magnification.lower() if magnification else 'all'}{fold}{'-smoke' if config.smoke else ''}"


def find_gan_run(folder: Path) -> GanRun:
    """Open the run folder of a GAN.

    Raises:
        UserError: there is none.
    """
    info = read_info(folder, "synthesize")
    return GanRun(folder, info, read_config(folder, SynthesizeConfig))


@contextlib.contextmanager
def reading_gan_run(folder: Path, *, dry_run: bool = False) -> Iterator[GanRun]:
    """Keep the run folder of a GAN from being fitted on or overwritten until the block ends; not in a dry run.

    Raises:
        UserError: there is none, or it is being fitted.
    """
    find_gan_run(folder)
    with locked(folder, shared=True, dry_run=dry_run):
        yield find_gan_run(folder)


def check_given(config: SynthesizeConfig, run: GanRun) -> None:
    """Refuse options of a fit that a finished one contradicts, and warn of a fit that did not finish.

    Raises:
        UsageError: such an option.
    """
    defaults = SynthesizeConfig()
    for name in OF_THE_FIT:
        given, fitted = getattr(config, name), getattr(run.config, name)
        if given not in (fitted, getattr(defaults, name)):
            problem = f"{flag_of(name)} {given}: {run.folder} was fitted with {fitted}"
            raise UsageError(problem, fix="leave it out, or fit another run")
    if run.info["status"] != "finished":
        logger.warning("%s did not finish: its last healthy snapshot is used", run.folder)


def claimed_run(out: Path, config: SynthesizeConfig, num_processes: int = 1) -> contextlib.AbstractContextManager[None]:
    """Take the run folder until the block ends: new, to be resumed under the same options, or to be overwritten.

    Raises:
        UserError: it is not empty, was fitted with other options, or another job holds it.
    """
    if (out / INFO).is_file():
        info = read_json(out / INFO)
        check_shape(info, {"command": str}, out / INFO, "choose another folder")
        if info["command"] != "synthesize":
            raise UserError(f"{out} is a run of {info['command']}", fix="choose another folder")
    check_options = partial(_check_options, out, config, num_processes)
    return claimed_run_folder(out, config, WRITTEN, ("checkpoints", SAMPLES, "assess"), check_options, "another folder")


def _check_options(out: Path, config: SynthesizeConfig, num_processes: int) -> None:
    """Refuse to go on with a fit under options that would change its history."""
    run = find_gan_run(out)
    before = dataclasses.replace(run.config, data=str(Path(run.config.data or DATA)))
    config = dataclasses.replace(config, data=str(Path(config.data or DATA)))
    refuse_changes(f"{run.folder} was fitted", before, config, FREE_ON_RESUME)
    if run.info.get("processes") != num_processes:
        problem = f"{run.folder} was fitted by {run.info.get('processes')} processes, not {num_processes}"
        raise UserError(problem, fix="start as many")


def sample_files(folder: Path) -> list[Path]:
    """Return the grids of a run folder, the earliest first."""
    return sorted(path for path in (folder / SAMPLES).glob("*.png") if re.fullmatch(r"\d{8}", path.stem))


def remove_gan_results(folder: Path) -> None:
    """Remove what an earlier fit and its assessment wrote into a run folder; nothing else."""
    remove_files(folder, [*WRITTEN, *(f"{SAMPLES}/{path.name}" for path in sample_files(folder))])
