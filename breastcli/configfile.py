"""Configuration files: one YAML section per job, merged under the flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from breastcli.config import JOBS, field_types
from breastcli.errors import UsageError
from breastcli.options import Options

Config = TypeVar("Config", bound=Options)


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
            raise UsageError(f"unknown key {key!r}", fix=f"did you mean {near[0]!r}?" if near else "see --help")
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
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", fix=f"check {flag}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = f" in line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        raise UsageError(f"{path} is not valid YAML{line}", fix=f"check {flag}") from error
    sections = document or {}
    if not isinstance(sections, dict) or not all(isinstance(part, dict) for part in sections.values()):
        raise UsageError(f"{path} needs one section per job", fix=f"such as '{job}:' with its keys indented below")
    for name in sections:
        if name not in JOBS:
            near = get_close_matches(str(name), JOBS, n=1)
            raise UsageError(f"{path}: unknown section {name!r}", fix=f"did you mean {(near or list(JOBS))[0]!r}?")
    return sections.get(job, {})


def to_yaml(config: Options) -> str:
    """Return the configuration as YAML that ``--config`` reads back."""
    import yaml

    job = next(name for name, kind in JOBS.items() if kind is type(config))
    values = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(config).items()}
    return yaml.safe_dump({job: values}, sort_keys=False, allow_unicode=True)
