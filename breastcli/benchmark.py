"""benchmark: size, speed and convergence of networks, and our code beside what a user would otherwise run."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from breastcli.benchmarks import COMPARISONS, Setting
from breastcli.benchmarks.convergence import (
    FOLDER,
    Convergence,
    Protocol,
    count_images,
    settle_protocol,
    start_protocol,
    train_network,
)
from breastcli.benchmarks.models import CONVENTIONS, NetworkFigures, describe_network, parse_archs, time_network
from breastcli.benchmarks.samples import raw_folder
from breastcli.benchmarks.startup import time_help
from breastcli.benchmarks.timing import Pair
from breastcli.config import BenchmarkConfig
from breastcli.data.datasets import find_dataset
from breastcli.data.store import PreparedData
from breastcli.errors import UsageError, UserError, first_line
from breastcli.files import OVERWRITE, claimed_folder, refuse_links, write_csv, write_json
from breastcli.options import refuse_given
from breastcli.parsing import parse_magnification
from breastcli.plan import Plan
from breastcli.progress import SILENT, Progress
from breastcli.reporting.convergence_plots import plot_size_accuracy, plot_time_accuracy
from breastcli.reporting.reported_convergence import paper_figures, paper_notes
from breastcli.system.planning import plan_benchmark
from breastcli.system.runfolder import git_state, versions
from breastcli.system.runtime import describe_device, resolve_device, resolve_precision

logger = logging.getLogger(__name__)

NETWORKS, PAIRS, CONVERGENCE = "benchmark.csv", "pairs.csv", "convergence.csv"
DOCUMENT = "benchmark.json"  # written last
PLOTS = {"time_accuracy.png": plot_time_accuracy, "size_accuracy.png": plot_size_accuracy}
TASK = "benchmark"
BATCH_SIZE = 32  # where neither the user nor a protocol says otherwise
ONLY_CONVERGENCE = ("protocol", "data", "mag", "fold", "epochs", "resume")
TYPICAL = "dalaresnet50,resnet50,torchvision/mobilenet_v2"  # measured where every network would take too long


@dataclass(frozen=True)
class BenchmarkResult:
    """What ``benchmark`` measured.

    Attributes:
        out: folder of ``benchmark.json``, of a table for each kind of measurement, and of the runs.
        document: the contents of ``benchmark.json``.
        seconds: wall-clock time.
    """

    out: Path
    document: dict[str, Any]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-safe dictionary."""
        return {**self.document, "seconds": self.seconds}


def benchmark(config: BenchmarkConfig, progress: Progress = SILENT) -> BenchmarkResult | Plan:
    """Measure networks, how fast they converge, our code beside that of others, or all of it.

    A network or a comparison that fails, for lack of memory above all, is listed with the reason.

    Raises:
        UsageError: an option that cannot be accepted.
        UserError: the output, the raw or the prepared folder cannot be used, or nothing could be measured.
    """
    started = time.monotonic()
    out = Path(config.out or "runs/benchmark")
    trains = config.what in ("all", "convergence")
    compared = [name for name in COMPARISONS.names() if config.what in ("all", name)]
    if not trains:
        refuse_given(config, ONLY_CONVERGENCE, f"{config.what} trains nothing", "leave it out")
    setting = _setting(config)
    hint = "use --resume, --overwrite or another --out" if trains else OVERWRITE
    with claimed_folder(out, allowed=config.overwrite or (trains and config.resume), hint=hint, dry_run=config.dry_run):
        refuse_links(out, FOLDER)
        archs = _archs(config)
        described = [describe_network(arch, setting) for arch in archs]  # first, because it finds misspelt names
        if config.dry_run:
            return _plan(described, compared, trains, config, out)
        document = _measure(config, setting, archs, described, compared, out, trains, progress)
    return BenchmarkResult(out, document, time.monotonic() - started)


def _measure(
    config: BenchmarkConfig,
    setting: Setting,
    archs: list[str],
    described: list[NetworkFigures],
    compared: list[str],
    out: Path,
    trains: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Do the work in a claimed folder; return ``benchmark.json``."""
    (out / DOCUMENT).unlink(missing_ok=True)  # it would speak of runs that are trained anew
    protocol = start_protocol(config, out) if trains else None
    networks = described if config.what in ("all", "models") else []
    progress.begin(TASK, len(compared) + len(networks) + (len(archs) if trains else 0), "measurements")
    pairs, problems = _compare(compared, config, setting, progress)
    networks = [_time(one, setting, progress) for one in networks]
    runs = list(_converge(archs, protocol, setting, progress)) if protocol else []
    measured = [*networks, *runs]
    if not pairs and all(one.problem for one in measured):
        reasons = [*problems.values(), *(f"{one.arch}: {one.problem}" for one in measured)]
        raise UserError(f"nothing could be measured ({reasons[0]})", fix="choose other options")
    document = {
        **_provenance(config, setting),
        "networks": [dataclasses.asdict(one) for one in networks],
        "pairs": [pair.to_json() for pair in pairs],
        **(_beside_papers(runs, protocol) if protocol else {"convergence": [], "protocol": None}),
        "help": time_help(config.rounds).to_json() if config.what == "all" else None,
        "problems": problems,
        "conventions": list(CONVENTIONS) if networks else [],
    }
    _write(out, document)
    return document


def _plan(
    described: list[NetworkFigures], compared: list[str], trains: bool, config: BenchmarkConfig, out: Path
) -> Plan:
    """Return what would be measured; what the measurements check first is checked."""
    training = None
    if trains:
        train, must_draw = settle_protocol(config, out)
        training = train, None if must_draw else count_images(PreparedData.open(Path(train.data)), train)
    if config.raw is not None and any(COMPARISONS.get(name).needs_images for name in compared):
        find_dataset("auto", Path(config.raw))
    elif config.raw is not None:
        raise _no_raw(config)
    networks = {one.arch: one.parameters for one in described if one.parameters is not None}
    notes = [f"{one.arch} cannot be measured: {one.problem}" for one in described if one.problem]
    return plan_benchmark(networks, compared, training, notes, config, out)


def _no_raw(config: BenchmarkConfig) -> UsageError:
    return UsageError(f"--raw {config.raw}: {config.what} reads no raw images", fix="leave it out")


def _setting(config: BenchmarkConfig) -> Setting:
    device = resolve_device(config.device)
    return Setting(
        device=device,
        dtype=resolve_precision(config.precision, device),
        size_px=config.size,
        batch_size=config.batch_size or BATCH_SIZE,
        rounds=config.rounds,
        workers=config.workers,
        seed=config.seed,
    )


def _archs(config: BenchmarkConfig) -> list[str]:
    """Return the networks to measure."""
    if config.what not in ("all", "models", "convergence"):
        return []
    return parse_archs(config.archs or ("all" if config.what == "models" else TYPICAL))


def _compare(
    names: Iterable[str], config: BenchmarkConfig, setting: Setting, progress: Progress
) -> tuple[list[Pair], dict[str, str]]:
    """Return the pairs of all comparisons, and the reasons of those that failed."""
    pairs: list[Pair] = []
    problems: dict[str, str] = {}
    comparisons = {name: COMPARISONS.get(name) for name in names}
    with contextlib.ExitStack() as stack:
        if any(one.needs_images for one in comparisons.values()):
            raw = stack.enter_context(raw_folder(config.raw, config.seed, progress))
            setting = dataclasses.replace(setting, raw=raw)
        elif config.raw is not None:
            raise _no_raw(config)
        for name, comparison in comparisons.items():
            try:
                found = comparison.run(setting)
            except (UserError, RuntimeError, MemoryError) as error:
                problems[name] = first_line(error, 160)
                logger.warning("%s could not be measured: %s", name, problems[name])
            else:
                pairs += found
                for pair in found:
                    logger.info("%s: %s", pair.title, pair.missing or f"{pair.ratio:.1f} times as fast")
            progress.advance(TASK)
    return pairs, problems


def _time(figures: NetworkFigures, setting: Setting, progress: Progress) -> NetworkFigures:
    timed = time_network(figures, setting)
    if timed.problem:
        logger.warning("%s could not be measured: %s", timed.arch, timed.problem)
    else:
        speeds = timed.training_images_per_s, timed.inference_images_per_s
        logger.info("%s: training %.1f, inference %.1f images/s", timed.arch, *speeds)
    progress.advance(TASK)
    return timed


def _converge(archs: list[str], protocol: Protocol, setting: Setting, progress: Progress) -> Iterator[Convergence]:
    """Yield what the training of each network gave."""
    setting = dataclasses.replace(setting, size_px=protocol.data.size_px)
    for arch in archs:
        trained = train_network(describe_network(arch, setting), protocol, progress)
        if trained.problem:
            logger.warning("%s could not be trained: %s", arch, trained.problem)
        else:
            reached = trained.reason or f"converged in {trained.convergence_s:.1f} s"
            logger.info("%s: %s, %.1f s in all", arch, reached, trained.total_s)
        progress.advance(TASK)
        yield trained


def _beside_papers(runs: list[Convergence], protocol: Protocol) -> dict[str, Any]:
    """Return the runs, each with what a paper reports of its network, and what all were trained under."""
    card, train = protocol.data.card, protocol.train
    subject = {
        "dataset": card["name"],
        "num_classes": len(card["classes"]),
        "magnification": parse_magnification(train.mag),
        "two_stages": train.init_from is not None,
    }
    papers = [paper_figures(one.arch, **subject) for one in runs]
    rows = [dataclasses.asdict(one) | {"paper": paper} for one, paper in zip(runs, papers, strict=True)]
    return {"convergence": rows, "protocol": protocol.facts() | {"papers": paper_notes(papers)}}


def _provenance(config: BenchmarkConfig, setting: Setting) -> dict[str, Any]:
    """Return how and where the figures were measured."""
    return {
        "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "argv": sys.argv,
        "device": describe_device(setting.device),
        "processor": _processor(),
        "num_cores": os.cpu_count(),
        "precision": setting.arithmetic,
        "batch_size": setting.batch_size,
        "rounds": config.rounds,
        "raw": config.raw,
        "versions": versions(),
        "git": git_state(),
    }


def _processor() -> str:
    """Return the processor's name, as far as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _write(out: Path, document: dict[str, Any]) -> None:
    """Write the document, and tables and plots of what it holds; those of an earlier benchmark go."""
    for name in (DOCUMENT, NETWORKS, PAIRS, CONVERGENCE, *PLOTS):
        (out / name).unlink(missing_ok=True)
    tables = {NETWORKS: document["networks"], PAIRS: document["pairs"], CONVERGENCE: document["convergence"]}
    for name, rows in tables.items():
        if rows:
            flat = [_flat(row) for row in rows]
            write_csv(out / name, list(flat[0]), (row.values() for row in flat))
    if document["convergence"]:
        for name, plot in PLOTS.items():
            plot(document["convergence"], out / name, stamp=document["protocol"]["stamp"])
    write_json(out / DOCUMENT, document, durable=True)


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the cells of a row: ``image`` with ``accuracy`` is ``image_accuracy``, an interval's ends follow it."""
    cells: dict[str, Any] = {}
    for name, value in row.items():
        column = prefix.removesuffix("_") if name == "value" else prefix + name
        if isinstance(value, Mapping):
            cells |= _flat(value, f"{column}_")
        else:
            cells[column] = "" if value is None else value
    return cells
