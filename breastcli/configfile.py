"""Configuration files: one YAML section per job, merged under the flags."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from breastcli.config import JOBS, field_types
from breastcli.errors import UsageError, UserError
from breastcli.files import read_text
from breastcli.options import Options, flag_of

Config = TypeVar("Config", bound=Options)
MAX_SIGNS = 100_000  # of a configuration file; one with every option has 5,000


def resolve(kind: type[Config], section: Mapping[str, Any], flags: Mapping[str, Any]) -> Config:
    """Merge flags over a YAML section over the defaults.

    Raises:
        UsageError: an unknown key (the nearest one is named) or a value of the wrong kind.
    """
    known = {field.name for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in section.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise UsageError(f"unknown key {_shown(key)}", fix=f"did you mean {near[0]!r}?" if near else "see --help")
        values[name] = _from_yaml(kind, name, value)
    values |= {name: value for name, value in flags.items() if value is not None and value != ()}
    return kind(**values)


def _from_yaml(kind: type[Options], name: str, value: Any) -> Any:
    """Undo YAML's own ideas: lists for tuples, and "1e-4" (no dot) read as text."""
    if isinstance(value, list):
        return tuple(value)
    kind_of = field_types(kind)[name]
    if kind_of in (str, str | None) and isinstance(value, (bool, int)):  # freeze: 50, mag: 100, cache_embeddings: on
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
    if isinstance(value, str) and field_types(kind)[name] is float:
        try:
            return float(value)
        except ValueError:
            return value
    return value


def read_section(path: Path, job: str, flag: str = "--config") -> dict[str, Any]:
    """Read one job's section of a YAML file, which ``flag`` named; an absent section is empty.

    Raises:
        UsageError: the file is missing, is not YAML, or has a section that belongs to no job.
    """
    sections = _read_yaml(path, flag) or {}
    if not isinstance(sections, dict) or not all(isinstance(part, dict) for part in sections.values()):
        raise UsageError(f"{path} needs one section per job", fix=f"such as '{job}:' with its keys indented below")
    for name in sections:
        if name not in JOBS:
            near = get_close_matches(str(name), JOBS, n=1)
            raise UsageError(
                f"{path}: unknown section {_shown(name)}", fix=f"did you mean {(near or list(JOBS))[0]!r}?"
            )
    return sections.get(job, {})


def _read_yaml(path: Path, flag: str) -> Any:
    """Return what a YAML file holds: plain values, written out.

    Aliases are refused, since a few lines of them can stand for billions of values.
    """
    import yaml

    fix = f"check {flag}"
    try:
        text = read_text(path)
        if len(text) > MAX_SIGNS:
            raise UserError(f"{path} has {len(text):,} signs, more than {MAX_SIGNS:,}")
        if "*" in text and any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, yaml.SafeLoader)):
            raise UserError(f"{path} holds an alias (*)", "write the value out")
        return yaml.safe_load(text)
    except UserError as error:
        raise UsageError(error.problem, error.fix or fix) from error
    except Exception as error:  # beside its own errors PyYAML raises those of the types that tags name
        line = f" in line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        raise UsageError(f"{path} is not valid YAML{line}", fix) from error


def _shown(key: Any) -> str:
    return repr(str(key)[:40])


def to_document(config: Options) -> dict[str, Any]:
    """Return the options as JSON holds them, without those that only say how to treat files that are there already."""
    values = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(config).items()}
    return {name: value for name, value in values.items() if name not in ("overwrite", "resume", "dry_run")}


def to_command(kind: type[Options], values: Mapping[str, Any]) -> str:
    """Return the command line that gives a job these values, quoted for a shell; defaults are left out.

    Args:
        kind: the job's configuration.
        values: name of a field to its value, as ``to_document`` has it; other names are passed over.
    """
    words, flags = ["breastcli", job_of(kind)], []
    for field in dataclasses.fields(kind):
        value = values.get(field.name, field.default)
        value = tuple(value) if isinstance(value, list) else value
        several = value if isinstance(value, tuple) else (value,)
        if field.metadata["positional"]:  # also as by default, since others may follow
            words += (str(one) for one in several if one is not None)
        elif value == field.default:
            continue
        elif isinstance(value, bool):
            flags.append(flag_of(field.name) if value else flag_of(f"no_{field.name}"))
        else:
            flags += [word for one in several for word in (flag_of(field.name), str(one))]
    return shlex.join([*words, *flags])


def to_yaml(config: Options) -> str:
    """Return the configuration as YAML that ``--config`` reads back."""
    import yaml

    values = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(config).items()}
    return yaml.safe_dump({job_of(type(config)): values}, sort_keys=False, allow_unicode=True)


def job_of(kind: type[Options]) -> str:
    """Return the job that a class of configurations belongs to."""
    return next(name for name, known in JOBS.items() if known is kind)
