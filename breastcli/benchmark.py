"""benchmark: size and speed of networks, and our code beside what a user would otherwise run."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from breastcli.benchmarks import COMPARISONS, Setting
from breastcli.benchmarks.models import CONVENTIONS, NetworkFigures, describe_network, parse_archs, time_network
from breastcli.benchmarks.samples import raw_folder
from breastcli.benchmarks.startup import time_help
from breastcli.benchmarks.timing import Pair
from breastcli.config import BenchmarkConfig
from breastcli.errors import UsageError, UserError, first_line
from breastcli.files import claim_folder, write_csv, write_json
from breastcli.progress import SILENT, Progress
from breastcli.system.runfolder import git_state, versions
from breastcli.system.runtime import describe_device, resolve_device, resolve_precision

logger = logging.getLogger(__name__)

NETWORKS, PAIRS, DOCUMENT = "benchmark.csv", "pairs.csv", "benchmark.json"  # the last is written last
TASK = "benchmark"


@dataclass(frozen=True)
class BenchmarkResult:
    """What ``benchmark`` measured.

    Attributes:
        out: folder of ``benchmark.json``, ``benchmark.csv`` and ``pairs.csv``.
        document: the contents of ``benchmark.json``.
        seconds: wall-clock time.
    """

    out: Path
    document: dict[str, Any]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-safe dictionary."""
        return {**self.document, "seconds": self.seconds}


def benchmark(config: BenchmarkConfig, progress: Progress = SILENT) -> BenchmarkResult:
    """Measure networks, our code beside that of others, or both.

    A network or a comparison that fails, for lack of memory above all, is listed with the reason.

    Raises:
        UsageError: an option that cannot be accepted.
        UserError: the output or the raw folder cannot be used, or nothing could be measured.
    """
    started = time.monotonic()
    out = Path(config.out or "runs/benchmark")
    device = resolve_device(config.device)
    compared = [name for name in COMPARISONS.names() if config.what in ("all", name)]
    archs = parse_archs(config.archs) if config.what in ("all", "models") else []
    setting = Setting(
        device=device,
        dtype=resolve_precision(config.precision, device),
        size_px=config.size,
        batch_size=config.batch_size,
        rounds=config.rounds,
        workers=config.workers,
        seed=config.seed,
    )
    claim_folder(out, allowed=config.overwrite, hint="use --overwrite or another --out")
    networks = [describe_network(arch, setting) for arch in archs]  # first, because it finds misspelt names
    progress.begin(TASK, len(archs) + len(compared), "measurements")
    pairs, problems = _compare(compared, config, setting, progress)
    networks = [_time(one, setting, progress) for one in networks]
    if not pairs and all(one.problem for one in networks):
        reasons = [*problems.values(), *(f"{one.arch}: {one.problem}" for one in networks)]
        raise UserError(f"nothing could be measured ({reasons[0]})", fix="choose other options")
    document = {
        **_provenance(config, setting),
        "networks": [dataclasses.asdict(one) for one in networks],
        "pairs": [pair.to_json() for pair in pairs],
        "help": time_help(config.rounds).to_json() if config.what == "all" else None,
        "problems": problems,
        "conventions": list(CONVENTIONS) if networks else [],
    }
    _write(out, document)
    return BenchmarkResult(out, document, time.monotonic() - started)


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
            raise UsageError(f"--raw {config.raw}: {config.what} reads no images", fix="leave it out")
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


def _provenance(config: BenchmarkConfig, setting: Setting) -> dict[str, Any]:
    """Return how and where the figures were measured."""
    return {
        "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "argv": sys.argv,
        "device": describe_device(setting.device),
        "processor": _processor(),
        "num_cores": os.cpu_count(),
        "precision": setting.arithmetic,
        "batch_size": config.batch_size,
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
    """Write the document, and a table of each kind that it holds; tables of an earlier benchmark go."""
    for name in (DOCUMENT, NETWORKS, PAIRS):
        (out / name).unlink(missing_ok=True)
    for name, rows in ((NETWORKS, document["networks"]), (PAIRS, document["pairs"])):
        if rows:
            write_csv(out / name, list(rows[0]), ([_cell(value) for value in row.values()] for row in rows))
    write_json(out / DOCUMENT, document)


def _cell(value: Any) -> Any:
    return "" if value is None else value
