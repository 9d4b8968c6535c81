"""The commands that make a run and its results again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from breastcli.config import JOBS, EvaluateConfig, ExplainConfig, PrepareConfig
from breastcli.configfile import to_command
from breastcli.reporting.explanation_files import find_explanations, read_explanation
from breastcli.reporting.parts import part
from breastcli.reporting.run_files import RunFiles

RAW = "RAW"  # where the raw images are, which no file of ours tells


def commands(files: RunFiles) -> list[tuple[str, str]]:
    """Return what each step is for and its command line, quoted for a shell, in the order in which to type them."""
    return [(purpose, command) for purpose, command in _steps(files) if command]


def _steps(files: RunFiles) -> Iterator[tuple[str, str]]:
    yield f"Prepare the images ({RAW} is the folder of the raw data set)", _prepare(files)
    yield f"Run {files.info.get('command', '')}".strip(), "" if files.is_pooled else command_line(files.info)
    for split, document in files.evaluations.items():
        yield f"Evaluate the {split} split", _evaluate(document)
    for file in find_explanations(files.folder):
        yield f"Explain ({file.parent.name})", _explain(read_explanation(file))


def command_line(run: Mapping[str, Any]) -> str:
    """Return a command that makes the run again, without the place of the interpreter.

    A run started from Python (a notebook, a script) has no command of its own; its settings are in ``config.yaml``.
    """
    program, *rest = map(str, run.get("argv") or [""])
    if program in JOBS:
        return shlex.join(["breastcli", program, *rest])
    starts = {"breastcli": ["breastcli"], "__main__.py": ["python", "-m", "breastcli"]}
    name = Path(program).name
    if name in starts:
        return shlex.join([*starts[name], *rest])
    return f"breastcli {run['command']} --config config.yaml" if run.get("command") in JOBS else ""


def _prepare(files: RunFiles) -> str:
    options = part(files.card, "options")
    if not options:
        return ""
    folder = files.info.get("data") or files.settings.get("data")
    return to_command(PrepareConfig, {**options, "raw": RAW, "out": folder})


def _evaluate(document: Mapping[str, Any]) -> str:
    """Return the command of an evaluation; older ones do not say how they were made."""
    config = part(document, "config")
    return to_command(EvaluateConfig, {**config, "runs": document.get("runs"), "run": None}) if config else ""


def _explain(document: Mapping[str, Any]) -> str:
    config = part(document, "config")
    return to_command(ExplainConfig, {**config, "run": document.get("run")}) if config else ""
