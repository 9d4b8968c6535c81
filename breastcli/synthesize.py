"""synthesize: fit a conditional GAN to training images, draw images of rare classes, measure how good they are."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from breastcli.config import SynthesizeConfig
from breastcli.data.store import MANIFEST, PreparedData, row_bytes
from breastcli.errors import UsageError, UserError
from breastcli.files import claimed_folder, require_space, write_csv, write_json
from breastcli.gan.assessment import assess_images
from breastcli.gan.checkpoint import GENERATOR_SHAPE, TrainedGenerator, load_generator, save_generator
from breastcli.gan.conditions import choose_numbers
from breastcli.gan.features import FeatureNetwork, load_features
from breastcli.gan.folder import claimed_images, images_folder, made_for, write_synthetic
from breastcli.gan.planning import plan_assessment, plan_fit, plan_generation
from breastcli.gan.runs import (
    ASSESSMENT,
    DATA,
    FILM,
    GENERATOR,
    SAMPLES,
    check_given,
    claimed_run,
    default_run,
    reading_gan_run,
    remove_gan_results,
    sample_files,
)
from breastcli.gan.start import check_fit, resume_fit, start_fit, with_defaults
from breastcli.gan.subject import Subject, describe, draw_images, draw_subject, open_folder, open_source, real_set
from breastcli.gan.training import (
    COLLAPSE_LIMIT,
    GanSession,
    diversity_share,
    find_collapse,
    is_healthy,
    mean_figures,
    num_steps,
    take_step,
    to_arrays,
)
from breastcli.launch import num_processes
from breastcli.locks import locked
from breastcli.plan import Plan
from breastcli.progress import SILENT, Progress
from breastcli.records import stamp_of
from breastcli.reporting.contact_sheet import contact_sheet
from breastcli.reporting.report import write_report
from breastcli.reporting.synthesis_plots import draw_assessment, plot_gan_curves, sample_grid, write_film
from breastcli.shapes import check_shape
from breastcli.system.checkpoint import read_header, save_resume
from breastcli.system.distributed import Processes, joined_processes
from breastcli.system.runfolder import LOG, RESUME, logging_to, recorded_run, write_history
from breastcli.system.runtime import clear_memory_errors, resolve_device

logger = logging.getLogger(__name__)

SNAPSHOTS = 20
GRID_COLUMNS, GRID_ROWS, SHEET_IMAGES = 8, 2, 16
SECONDS_BETWEEN_FIGURES = 0.5
SMOKE = {"kimg": 0.256, "width": 4, "batch_size": 16, "snapshot": 0.128}


@dataclass(frozen=True)
class SynthesizeResult:
    """What ``synthesize`` made.

    Attributes:
        out: the folder written last: the GAN's run folder, that of the images, or that of the assessment.
        run: the GAN's run folder; None where a folder of images was assessed.
        history: one row per snapshot, where a GAN was fitted.
        generated: class to number of images drawn.
        assessment: the document of ``assess``.
        collapse: what was wrong with the training, or None.
        seconds: time of this call.
        leaky: the stamp of an image-level split, or None.
        drawn: whether the training images were drawn by a program.
    """

    out: Path
    run: Path | None
    history: list[dict[str, float]]
    generated: dict[str, int]
    assessment: dict[str, Any] | None
    collapse: str | None
    seconds: float
    leaky: str | None
    drawn: bool

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-safe dictionary."""
        values = dataclasses.asdict(self) | {"run": None if self.run is None else str(self.run)}
        values["history"] = [
            {name: value if math.isfinite(value) else None for name, value in row.items()} for row in self.history
        ]
        del values["out"]
        return values


def synthesize(config: SynthesizeConfig, progress: Progress = SILENT) -> SynthesizeResult | Plan:
    """Fit a GAN, generate with it, or assess it; "all" fits and generates.

    Only training rows of one split are learned from; the folder of images says which split that was.

    Raises:
        UsageError: an option that cannot be accepted.
        UserError: data, run or output folder cannot be used, the training failed or collapsed.
        LeakError: the features to compare were learned on another split of this data set.
    """
    started = time.monotonic()
    if config.step in ("generate", "assess") and num_processes() > 1:
        raise UsageError(f"{config.step} runs in one process", fix="start it without torchrun")
    if config.smoke:
        config = dataclasses.replace(config, **SMOKE)
    if config.step == "assess":
        return _assess(config, progress, started)
    if config.step == "fit" and config.run and config.out:
        raise UsageError(f"the run folder is named twice: {config.run} and --out {config.out}", fix="leave one out")
    run = Path(config.run or (config.out if config.step == "fit" else None) or default_run(config))
    history, made = [], (run, {})
    with contextlib.ExitStack() as held:
        if config.step in ("fit", "all"):
            with joined_processes(resolve_device(config.device)) as (processes, device):
                history = _fit(config, run, processes, device, progress, held)
            if isinstance(history, Plan):
                return history
            if not processes.writes:
                config = dataclasses.replace(config, step="fit")
        if config.step in ("generate", "all"):
            made = _generate(config, run, progress)
            if isinstance(made, Plan):
                return made
    out, generated = made
    facts = read_header(run / GENERATOR)
    check_shape(facts, GENERATOR_SHAPE, f"the header of {run / GENERATOR}", "fit again")
    card = facts["dataset"]
    return SynthesizeResult(
        out=out,
        run=run,
        history=history,
        generated=generated,
        assessment=None,
        collapse=facts["collapse"],
        seconds=time.monotonic() - started,
        leaky=card["split"]["leaky"],
        drawn=card["drawn"],
    )


def _fit(
    config: SynthesizeConfig,
    out: Path,
    processes: Processes,
    device: torch.device,
    progress: Progress,
    held: contextlib.ExitStack,
) -> list[dict[str, float]] | Plan:
    """Train and keep what ``--resume``, generating and looking need; return the history.

    The folder that "all" will generate into is claimed at once, rather than found taken after the fit, and stays in
    ``held``.
    """
    check_fit(config, processes)
    config = with_defaults(config)
    data = PreparedData.open(Path(config.data or DATA))
    if data.card.get("synthetic"):
        raise UserError(f"{data.folder} holds synthetic images", fix="give the folder that they were made from")
    with contextlib.ExitStack() as stack:
        if processes.writes:
            stack.enter_context(claimed_run(out, config, processes.count))
            if not config.dry_run:
                stack.enter_context(logging_to(out / LOG))
        session, facts = start_fit(config, data, processes, device)
        images = None
        if config.step == "all" and processes.writes:
            numbers = choose_numbers(config.label, config.num, session.conditions, facts["class_counts"])
            images = images_folder(config, facts), sum(numbers.values())
            held.enter_context(claimed_images(images[0], overwrite=config.overwrite, dry_run=config.dry_run))
        processes.wait()  # until the folder is claimed
        resuming = config.resume and (out / RESUME).is_file()
        if not resuming and processes.writes and not config.dry_run:
            remove_gan_results(out)  # of the fit to overwrite, or of one that --resume finds removed in part
        if resuming:
            resume_fit(session, out / RESUME, facts)
            if processes.writes and not config.dry_run:
                _write_tables(session, out)  # which may be a snapshot ahead
        if config.dry_run:
            return plan_fit(session, facts, images, out)
        clear = clear_memory_errors(f"--size {config.size}", config.batch_size)
        with _recorded(out, session, facts, data) as info, clear:
            _learn(session, out, facts, progress)
            info |= {"kimg": session.images_seen / 1000, "history_rows": len(session.history)}
        if processes.writes:
            write_report(out)
        processes.wait()  # until everything is written
    return session.history


@contextlib.contextmanager
def _recorded(out: Path, session: GanSession, facts: dict[str, Any], data: PreparedData) -> Iterator[dict[str, Any]]:
    """Keep ``run.json`` true in the process that writes."""
    if not session.processes.writes:
        yield {}
        return
    known = {
        "data": facts["data"],
        "precision": str(session.dtype).removeprefix("torch."),
        "num_images": {"train": len(session.images)},
        "conditions": [dataclasses.asdict(one) for one in session.conditions],
        "processes": session.processes.count,
    }
    config = dataclasses.replace(session.config, step="fit", run=None, out=str(out))
    with recorded_run(out, config, session.device, data.card, known) as info:
        yield info


def _learn(session: GanSession, out: Path, facts: dict[str, Any], progress: Progress) -> None:
    """Take the steps that are not done yet, with snapshots between them."""
    config = session.config
    total = num_steps(config)
    every = max(1, round((config.snapshot or config.kimg / SNAPSHOTS) * 1000 / config.batch_size))
    progress.begin("fitting", total * config.batch_size, "images")
    progress.advance("fitting", session.images_seen)
    began, before, shown = time.monotonic(), session.images_seen, time.monotonic()
    while session.steps < total:
        take_step(session)
        figures = {}
        if time.monotonic() - shown > SECONDS_BETWEEN_FIGURES:
            shown, figures = time.monotonic(), {"kimg": session.images_seen / 1000}
        progress.advance("fitting", config.batch_size, **figures)
        left = total - session.steps
        if left == 0 or (session.steps % every == 0 and left > every // 2):  # none just before the last
            seconds = time.monotonic() - began
            speed = (session.images_seen - before) / seconds
            session.timing.append((session.images_seen / 1000, round(seconds, 1), round(speed, 2)))
            _snapshot(session, out, facts)
            began, before = time.monotonic(), session.images_seen


def _snapshot(session: GanSession, out: Path, facts: dict[str, Any]) -> None:
    """Measure, look for a collapse, and save; ``resume.pt`` comes last.

    A snapshot that shows signs of a collapse is not saved, unless the user wants to go on regardless.

    Raises:
        UserError: the training failed or collapsed; the last healthy generator is kept.
    """
    config, kimg = session.config, session.images_seen / 1000
    row = {"kimg": kimg, **mean_figures(session), "diversity": diversity_share(session)}
    session.history.append(row)
    finished = session.steps >= num_steps(config)
    found = find_collapse(session.history, config.kimg, config.size, finished=finished)
    if session.processes.writes:
        _show_progress(session, out, facts)
    if found and config.on_collapse == "stop":
        fix = "fit into another folder with a higher --gp-weight or --gamma, a lower --lr, or --on-collapse warn"
        fix += "; the last healthy generator is kept" if (out / GENERATOR).is_file() else ""
        raise UserError(f"stopped at {kimg:.1f} kimg: {found}", fix)
    if found:
        logger.warning("at %.1f kimg: %s", kimg, found)
        facts["collapse"] = f"at {kimg:.1f} kimg: {found}"
    wanted = config.on_collapse == "warn" or is_healthy(row, config.kimg, config.size)
    if session.processes.writes and wanted:
        save_generator(out / GENERATOR, session.average, session.conditions, {**facts, "kimg": kimg})
        known = {key: facts["dataset"][key] for key in ("fingerprint", "split_fingerprint")}
        known |= {"collapse": facts["collapse"], "precision": str(session.dtype)}
        save_resume(out / RESUME, {**session.state(), **known})


def _write_tables(session: GanSession, out: Path) -> None:
    write_history(out, session.history)
    write_csv(out / "timing.csv", ("kimg", "seconds", "images_per_second"), session.timing)


def _show_progress(session: GanSession, out: Path, facts: dict[str, Any]) -> None:
    """Write history, curves, the grid of fixed noise and the film of all grids."""
    card, kimg = facts["dataset"], session.images_seen / 1000
    stamp = stamp_of(card["split"]["leaky"], card["drawn"])
    _write_tables(session, out)
    plot_gan_curves(session.history, out / "curves.png", stamp=stamp, collapse_limit=COLLAPSE_LIMIT)
    numbers = dict.fromkeys(range(len(session.conditions)), GRID_COLUMNS * GRID_ROWS)
    average = TrainedGenerator(session.average.eval(), session.conditions, facts)
    drawn = average.draw(numbers, seed=session.config.seed)
    title = f"{card['title']}, synthetic, {kimg:.1f} kimg" + (f"\n{stamp}" if stamp else "")
    images = {session.conditions[number].name: to_arrays(one) for number, one in drawn.items()}
    sample_grid(images, out / SAMPLES / f"{session.images_seen:08d}.png", title=title, columns=GRID_COLUMNS)
    write_film(sample_files(out), out / FILM)


def _generate(config: SynthesizeConfig, run: Path, progress: Progress) -> tuple[Path, dict[str, int]] | Plan:
    """Draw images into a prepared folder of training rows; return it and the number of images of each class."""
    with contextlib.ExitStack() as stack:
        check_given(config, stack.enter_context(reading_gan_run(run, dry_run=config.dry_run)))
        generator = load_generator(run / GENERATOR, resolve_device(config.device))
        if config.data:
            generator = made_for(generator, PreparedData.open(Path(config.data)))
        facts = generator.facts
        out = images_folder(config, facts)
        numbers = choose_numbers(config.label, config.num, generator.conditions, facts["class_counts"])
        if config.step != "all":  # which has claimed it before the fit
            stack.enter_context(claimed_images(out, overwrite=config.overwrite, dry_run=config.dry_run))
        if config.dry_run:
            return plan_generation(generator, numbers, run, out)
        require_space(out, sum(numbers.values()) * row_bytes(facts["dataset"]["size_px"]), "or choose another --out")
        if facts["collapse"]:
            logger.warning("%s collapsed in training: %s", run, facts["collapse"])
        drawn = draw_images(generator, numbers, config, progress)
        card = _write_images(generator, numbers, drawn, config, run, out)
    return out, {row["class"]: row["images"] for row in card["counts"]}


def _write_images(
    generator: TrainedGenerator,
    numbers: dict[int, int],
    drawn: dict[int, torch.Tensor],
    config: SynthesizeConfig,
    run: Path,
    out: Path,
) -> dict[str, Any]:
    """Write the folder of images, a sheet of some of them first; return its card."""
    facts = generator.facts
    cells = {("synthetic", generator.conditions[n].name): to_arrays(one[:SHEET_IMAGES]) for n, one in drawn.items()}
    source = facts["dataset"]
    stamp = stamp_of(source["split"]["leaky"], source["drawn"])
    title = f"{source['title']}, synthetic\n{sum(numbers.values()):,} images, {facts['kimg']:g} kimg {stamp}"
    contact_sheet(cells, out / "contact_sheet.png", title=title)
    made = {"run": str(run), "seed": config.seed, "truncation": config.truncation}
    return write_synthetic(out, generator, drawn, made)


def _assess(config: SynthesizeConfig, progress: Progress, started: float) -> SynthesizeResult | Plan:
    """Compare a generator's images, or a folder of them, with real ones."""
    given = Path(config.run or default_run(config))
    is_folder = (given / MANIFEST).is_file()
    out = Path(config.out or given / "assess")
    device = resolve_device(config.device)
    with contextlib.ExitStack() as stack:
        if is_folder:
            stack.enter_context(locked(given, shared=True, dry_run=config.dry_run))
            source: Subject | TrainedGenerator = open_folder(given)
        else:
            check_given(config, stack.enter_context(reading_gan_run(given, dry_run=config.dry_run)))
            source = load_generator(given / GENERATOR, device)
        data = open_source(config, source.facts)
        network = load_features(config.features, source.facts["dataset"], source.facts["fold"], device)
        stack.enter_context(claimed_folder(out, allowed=config.overwrite, dry_run=config.dry_run))
        if config.dry_run:
            return plan_assessment(given, data, network.name, config, out)
        document = _measure(given, source, data, network, out, config, progress)
        if not is_folder:
            write_report(given)
    run, card = None if is_folder else given, document["dataset"]
    found = {"collapse": document["collapse"], "leaky": card["leaky"], "drawn": card["drawn"]}
    return SynthesizeResult(out, run, [], {}, document, seconds=time.monotonic() - started, **found)


def _measure(
    given: Path,
    source: Subject | TrainedGenerator,
    data: PreparedData,
    network: FeatureNetwork,
    out: Path,
    config: SynthesizeConfig,
    progress: Progress,
) -> dict[str, Any]:
    """Draw what a generator has to show, compare it with real images, and write what was found."""
    (out / ASSESSMENT).unlink(missing_ok=True)  # until the new one is written the folder counts as unfinished
    subject = source if isinstance(source, Subject) else draw_subject(source, config, progress)
    sets = [real_set(data, split, subject) for split in ("train", "val")]
    turn = bool(source.facts["turn"])
    progress.begin("features", len(subject.images) + len(sets[1]) + len(sets[0]) * (8 if turn else 1), "images")
    found = assess_images(
        subject.images,
        *sets,
        data.classes,
        network,
        draws=config.draws,
        seed=config.seed,
        batch_size=config.batch_size,
        turn=turn,
        on_batch=lambda count: progress.advance("features", count),
    )
    document = describe(given, subject, network, data.card, found, config.seed)
    draw_assessment(out, subject, sets[0], found, document)
    write_json(out / ASSESSMENT, document, durable=True)
    return document
