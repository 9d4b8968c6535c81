"""What the shell offers after Tab, found without importing what it names: a shell does not wait for torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

PACKAGE = Path(__file__).parent
RUNS = Path("runs")
# How a plug-in makes itself known: a call of its registry, or a row of the table of the papers' networks.
REGISTERED = re.compile(r"\.register\(\s*[\"']([^\"']+)[\"']|^    \"([^\"]+)\": Row\(", re.MULTILINE)
LIBRARIES = ("timm/", "torchvision/", "hf-hub:")

Completer = Callable[[str], list[str]]


def registered_names(folder: str) -> list[str]:
    """Return the names that the plug-ins of a folder of the package register, in alphabetical order."""
    texts = (path.read_text(encoding="utf-8") for path in (PACKAGE / folder).glob("*.py"))
    return sorted(first or second for text in texts for first, second in REGISTERED.findall(text))


def run_names(command: str) -> list[str]:
    """Return the run folders below ``runs/`` that a command wrote, at most two levels down."""
    found = (info for pattern in ("*/run.json", "*/*/run.json") for info in RUNS.glob(pattern))
    return sorted(info.parent.as_posix() for info in found if _command_of(info) == command)


def _command_of(info: Path) -> str | None:
    try:
        return json.loads(info.read_text(encoding="utf-8")).get("command")
    except (OSError, ValueError, AttributeError):
        return None  # a damaged one is offered to nobody


def completer_of(job: str, field: str, choices: tuple[str, ...]) -> Completer | None:
    """Return what completes an option or argument; None where the shell's own file names must do."""
    if choices:
        return _one_of(lambda: choices)
    if field in ("run", "runs", "init_from", "features"):
        return _one_of(lambda: _runs(job, field))
    offered = {
        "arch": _one_of(lambda: [*registered_names("models"), *LIBRARIES, "help"]),
        "archs": _last_of(lambda: [*registered_names("models"), *LIBRARIES, "all"]),
        "loss": _one_of(lambda: registered_names("losses")),
        "dataset": _one_of(lambda: [*registered_names("data/datasets"), "auto", "help"]),
        "method": _last_of(lambda: [*registered_names("cams"), "all"]),
    }
    return offered.get(field)


def _runs(job: str, field: str) -> list[str]:
    if field == "run" and job == "synthesize":  # the one job whose runs are generators
        return run_names("synthesize")
    return ["latest", *(["inception"] if field == "features" else []), *run_names("train")]


def _one_of(names: Callable[[], Iterable[str]]) -> Completer:
    return lambda incomplete: [name for name in names() if name.startswith(incomplete)]


def _last_of(names: Callable[[], Iterable[str]]) -> Completer:
    """Complete the last of several names that are separated by commas."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        chosen = before.split(",")
        return [f"{before}{comma}{name}" for name in names() if name.startswith(last) and name not in chosen]

    return complete
