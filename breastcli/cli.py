"""The command line: one Typer command per job, made from the job's configuration class."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from breastcli import __version__
from breastcli.allocator import keep_freed_memory
from breastcli.completion import completer_of
from breastcli.config import JOBS, PlannedConfig, field_types
from breastcli.configfile import read_section, resolve, to_yaml
from breastcli.errors import Terminated, UserError, WriteError, first_line
from breastcli.launch import num_processes, process_rank
from breastcli.options import Options, flag_of
from breastcli.stopping import stopping_when_told

SUMMARIES = {
    "prepare": "Turn a raw data set into one array of images with a split that does not leak.",
    "synthesize": "Learn to draw training images of rare classes, and measure whether they are any good.",
    "train": "Train a network on a prepared data set.",
    "evaluate": "Score a run, or the folds of a cross-validation, on images it never saw.",
    "explain": "Show where a network looks, and measure whether that is so.",
    "predict": "Predict image files with a trained run.",
    "benchmark": "Measure size, speed and convergence of networks, and our code beside what one would otherwise run.",
    "report": "Make the page of a run again, or one page that sets several runs beside each other.",
    "doctor": "Look at the installation, the machine and the folders, and say what is missing.",
}
SHARED = ("synthesize", "train", "evaluate")  # jobs that several processes of torchrun can share
COMMON_PANEL = "Common options"
# Options of the command line itself, not of the job.
CLI_ONLY: dict[str, tuple[Any, Any, str]] = {
    "config": (Path | None, None, "YAML file with a section for this job; flags take precedence."),
    "print_config": (bool, False, "Print the resolved configuration and stop."),
    "json": (bool, False, "Print one JSON object on stdout and nothing else."),
    "quiet": (bool, False, "No progress bars, no information; only warnings and errors."),
    "debug": (bool, False, "Show the traceback of an error."),
}

app = typer.Typer(
    name="breastcli",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"breastcli {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Classify breast-cancer images reproducibly, and evaluate honestly."""


def _parameters(job: str, kind: type[Options]) -> Iterator[inspect.Parameter]:
    """Yield a Typer parameter for every field of a job's configuration, then those of the command line itself."""
    types = field_types(kind)
    common = {field.name for field in dataclasses.fields(PlannedConfig)} - {"out"}
    fields = dataclasses.fields(kind)
    for field in sorted(fields, key=lambda field: (not field.metadata["positional"], field.name in common)):
        rules = field.metadata
        several = types[field.name] == tuple[str, ...]
        value_type = list[str] if several else types[field.name]
        settings: dict[str, Any] = {"help": rules["help"] + _shown(field.default), "show_default": False}
        if completer := completer_of(job, field.name, rules["choices"]):
            settings["autocompletion"] = completer
        if rules["positional"]:
            metavar = {"runs": "RUN…", "images": "IMAGE_OR_FOLDER…"}.get(field.name, field.name.upper())
            declared = typer.Argument(metavar=metavar, **settings)
        else:
            flag = flag_of(field.name)
            names = f"{flag}/--no-{flag.removeprefix('--')}" if value_type is bool else flag
            panel = COMMON_PANEL if field.name in common else None
            declared = typer.Option(names, metavar=rules["metavar"], rich_help_panel=panel, **settings)
        annotation = Annotated[value_type | None, declared]
        yield inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
    for name, (value_type, default, text) in CLI_ONLY.items():
        declared = typer.Option(flag_of(name), help=text, rich_help_panel=COMMON_PANEL, show_default=False)
        yield inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[value_type, declared]
        )


def _shown(default: Any) -> str:
    """Return the default as part of a help text; the flags themselves default to "not given"."""
    return "" if default is None or default is False or default == () else f" (default: {default})"


def _add_command(job: str, kind: type[Options]) -> None:
    """Add the command of one job; its module is imported only when it runs."""

    def command(**values: Any) -> None:
        settings = {name: values.pop(name) for name in CLI_ONLY}
        raise typer.Exit(_run(job, kind, values, **settings))

    parameters = list(_parameters(job, kind))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = SUMMARIES[job]
    app.command(job)(command)


def _speaks(job: str) -> bool:
    """Return whether this process is the one that prints, of those that torchrun started."""
    if job not in SHARED and num_processes() > 1:
        raise UserError(f"{job} runs in one process", fix="start it without torchrun")
    return process_rank() == 0


def _run(
    job: str,
    kind: type[Options],
    flags: dict[str, Any],
    *,
    config: Path | None,
    print_config: bool,
    json: bool,
    quiet: bool,
    debug: bool,
) -> int:
    """Run one job and return the exit code."""
    from breastcli import console

    try:
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
        section = read_section(config, job) if config else {}
        resolved = resolve(kind, section, given)
        speaks = _speaks(job)
        if print_config or "help" in (getattr(resolved, "arch", ""), getattr(resolved, "dataset", "")):
            listing = console.show_architectures if hasattr(resolved, "arch") else console.show_datasets
            if speaks:
                typer.echo(to_yaml(resolved), nl=False) if print_config else listing(as_json=json)
            return 0
        if job != "benchmark":  # where others' code runs too, which must not gain by it
            keep_freed_memory()
        with stopping_when_told(), _plain_plots(), console.watching(quiet=quiet or not speaks) as progress:
            module = importlib.import_module(f"breastcli.{job}")
            result = getattr(module, job)(resolved, progress)
        if speaks:
            _tell(job, resolved, result, json=json, quiet=quiet)
    except BrokenPipeError:
        raise
    except (KeyboardInterrupt, Exception) as error:
        if debug and not isinstance(error, KeyboardInterrupt):
            raise
        return _report_failure(error, job, kind)
    return 0


def _report_failure(error: BaseException, job: str, kind: type[Options]) -> int:
    """Say in one line why a job ended; return the exit code."""
    from breastcli import console

    text, code = f"{type(error).__name__}: {first_line(error)} (a defect of breastcli; --debug shows where)", 1
    if isinstance(error, UserError):
        text, code = str(error), error.exit_code
    elif isinstance(error, KeyboardInterrupt):
        ended, code = ("terminated", error.exit_code) if isinstance(error, Terminated) else ("interrupted", 130)
        text = ended + ("; continue with the same command and --resume" if hasattr(kind, "resume") else "")
    elif isinstance(error, OSError):
        text = f"{error.filename or job}: {error.strerror or first_line(error)}"
    console.show_error(text)
    return code


def _tell(job: str, config: Options, result: Any, *, json: bool, quiet: bool) -> None:
    """Print a result and what to do next, or raise what is wrong with it."""
    from breastcli import console, show
    from breastcli.hints import hints_after

    with _telling():
        console.show_json(result) if json else show.show(job, result)
        sys.stdout.flush()
    if failure := getattr(result, "failure", None):
        raise failure
    if not (quiet or json):  # scripts do not ask what is next
        console.show_hints(hints_after(job, config, result, sys.argv[1:]))


for _job, _kind in JOBS.items():
    _add_command(_job, _kind)


@contextlib.contextmanager
def _telling() -> Iterator[None]:
    """Turn a result that cannot be printed into one line.

    Raises:
        WriteError: stdout leads to a file that cannot be written.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        # What is left would be tried again at exit, with a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise WriteError(f"cannot write the result to stdout: {error.strerror}") from error


@contextlib.contextmanager
def _plain_plots() -> Iterator[None]:
    """Keep matplotlib from complaining of signs in names that its font lacks: it draws a box in their place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ ", category=UserWarning)
        yield


def main() -> None:
    """Run the command line."""
    try:
        app()
    except BrokenPipeError:
        # The reader of our output went away (``| head``): nothing is left to say.
        sys.stderr.close()
        sys.exit(1)
