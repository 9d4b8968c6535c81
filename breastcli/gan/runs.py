"""The run folder of a GAN: claimed, found again, emptied before it is overwritten."""

from __future__ import annotations

import dataclasses
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from breastcli.config import SynthesizeConfig
from breastcli.configfile import read_section, resolve
from breastcli.errors import UsageError, UserError
from breastcli.files import claim_folder, read_json
from breastcli.options import flag_of
from breastcli.parsing import parse_magnification
from breastcli.system.runfolder import CONFIG, HISTORY, INFO, LOG, RESUME, RUNS

logger = logging.getLogger(__name__)

DATA = "data/breakhis"  # what prepare writes by default
GENERATOR = "checkpoints/generator.safetensors"
SAMPLES = "samples"
FILM = "training.gif"
ASSESSMENT = "assessment.json"
ASSESSED = tuple(f"assess/{name}" for name in ("assessment.json", "samples.png", "neighbours.png", "distances.png"))
WRITTEN = (
    GENERATOR,
    GENERATOR.replace(".safetensors", ".json"),
    RESUME,
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
    fix = "give a folder that `breastcli synthesize fit` wrote"
    if not (folder / INFO).is_file() or not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is not a run folder", fix)
    info = read_json(folder / INFO)
    if info.get("command") != "synthesize":
        raise UserError(f"{folder} is a run of {info.get('command')}", fix)
    return GanRun(folder, info, resolve(SynthesizeConfig, read_section(folder / CONFIG, "synthesize"), {}))


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


def claim_run(out: Path, config: SynthesizeConfig, num_processes: int = 1) -> None:
    """Take the run folder: new, to be resumed under the same options, or to be overwritten.

    Raises:
        UserError: it is not empty, or was fitted with other options.
    """
    if (out / INFO).is_file() and read_json(out / INFO).get("command") != "synthesize":
        raise UserError(f"{out} is a run of {read_json(out / INFO).get('command')}", fix="choose another folder")
    only_log = out.is_dir() and {path.name for path in out.iterdir()} <= {LOG}  # left by a run that could not start
    allowed = config.resume or config.overwrite or only_log
    hint = "use --resume, --overwrite or another folder"
    claim_folder(out, allowed=allowed, hint=hint, dry_run=config.dry_run)
    if config.resume and (out / RESUME).is_file():
        run = find_gan_run(out)
        before = dataclasses.replace(run.config, data=str(Path(run.config.data or DATA)))
        config = dataclasses.replace(config, data=str(Path(config.data or DATA)))
        for field in dataclasses.fields(SynthesizeConfig):
            old, new = getattr(before, field.name), getattr(config, field.name)
            if old != new and field.name not in FREE_ON_RESUME:
                problem = f"{out} was fitted with {flag_of(field.name)} {old}, not {new}"
                raise UserError(problem, fix="resume with the same options")
        if run.info["processes"] != num_processes:
            problem = f"{out} was fitted by {run.info['processes']} processes, not {num_processes}"
            raise UserError(problem, fix="start as many")
    elif config.overwrite and not config.dry_run:
        (out / LOG).unlink(missing_ok=True)  # the other results go once the fit can start


def sample_files(folder: Path) -> list[Path]:
    """Return the grids of a run folder, the earliest first."""
    return sorted(path for path in (folder / SAMPLES).glob("*.png") if re.fullmatch(r"\d{8}", path.stem))


def remove_gan_results(folder: Path) -> None:
    """Remove what an earlier fit and its assessment wrote into a run folder; nothing else."""
    for path in [*(folder / name for name in WRITTEN), *sample_files(folder)]:
        path.unlink(missing_ok=True)
