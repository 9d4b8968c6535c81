"""How a field of a configuration is declared and checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from breastcli.errors import UsageError, UserError
from breastcli.files import is_utf8

MAX_WHOLE = 2**63
MAX_SHOWN = 80  # signs of a value in a message


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a command can be told; every value is checked when the configuration is made."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check(field, getattr(self, field.name))


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    below: float | None = None,
    metavar: str | None = None,
    positional: bool = False,
) -> Any:
    """Declare a dataclass field that is also a YAML key and a flag.

    Args:
        default: the value when neither flag nor YAML gives one.
        help: one line shown by ``--help``.
        choices: the accepted values; empty where any value of the type is accepted.
        at_least: smallest accepted number.
        below: the number that an accepted value must stay under.
        metavar: what ``--help`` shows for the value.
        positional: an argument instead of a flag.
    """
    details = {"help": help, "choices": choices, "at_least": at_least, "below": below}
    details |= {"metavar": metavar or "|".join(choices) or None, "positional": positional}
    return dataclasses.field(default=default, metadata=details)


def flag_of(name: str) -> str:
    """Return the flag of a field: ``batch_size`` is ``--batch-size``."""
    return "--" + name.replace("_", "-")


def check(field: dataclasses.Field[Any], value: Any) -> None:
    """Check one value against its declared type, choices and range.

    Raises:
        UsageError: it is not accepted.
    """
    if value is None and field.default is None:
        return
    accepted = {"int": int, "float": (int, float), "bool": bool, "str": str, "tuple": tuple}
    kind = str(field.type).split("[")[0].split(" ")[0]
    wrong = not isinstance(value, accepted[kind]) or (isinstance(value, bool) and kind != "bool")
    if wrong:
        shown = f" {value[:MAX_SHOWN]!r}" if isinstance(value, str) else ""  # others may be of any size
        raise UsageError(f"{flag_of(field.name)}{shown}: expected {kind}, not {type(value).__name__}", fix="check it")
    for text in value if kind == "tuple" else (value,):
        _check_text(flag_of(field.name), text, in_list=kind == "tuple")
    rules = field.metadata
    name = field.name.upper() if rules["positional"] else flag_of(field.name)
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name} {value}: not a finite number", fix="give one")
    if isinstance(value, int) and abs(value) >= MAX_WHOLE:
        raise UsageError(f"{name}: out of range", fix=f"stay below {MAX_WHOLE:,}")
    if rules["choices"] and value not in rules["choices"]:
        shown = str(value)[:MAX_SHOWN]
        near = get_close_matches(shown, rules["choices"], n=1)
        fix = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(rules['choices'])}"
        raise UsageError(f"{name} {shown}: not accepted", fix=fix)
    if rules["at_least"] is not None and not value >= rules["at_least"]:
        raise UsageError(f"{flag_of(field.name)} {value}: too small", fix=f"use {rules['at_least']} or more")
    if rules["below"] is not None and not value < rules["below"]:
        raise UsageError(f"{flag_of(field.name)} {value}: too large", fix=f"stay below {rules['below']}")


def refuse_changes(begun: str, before: Options, now: Options, free: Container[str]) -> None:
    """Refuse to go on with a run under options that would change what it gives.

    Args:
        begun: what was done under which options, such as "runs/x was trained".
        before: the options that it was begun with.
        now: those to go on with.
        free: names of options that may differ.

    Raises:
        UserError: another one differs.
    """
    for field in dataclasses.fields(before):
        old, new = getattr(before, field.name), getattr(now, field.name)
        if old != new and field.name not in free:
            raise UserError(f"{begun} with {flag_of(field.name)} {old}, not {new}", fix="resume with the same options")


def refuse_given(config: Any, names: Container[str], why: str, fix: str) -> None:
    """Refuse options that do not go with another one.

    Raises:
        UsageError: one of ``names`` differs from its default; ``why`` and ``fix`` say the rest.
    """
    for field in dataclasses.fields(config):
        if field.name in names and getattr(config, field.name) != field.default:
            raise UsageError(f"{flag_of(field.name)}: {why}", fix=fix)


def _check_text(flag: str, text: Any, *, in_list: bool) -> None:
    """Refuse texts that can name no file and be written to no file, and list items that are no text."""
    if in_list and not isinstance(text, str):
        raise UsageError(f"{flag}: holds {type(text).__name__}, not text", fix="check the value's type")
    if isinstance(text, str) and ("\0" in text or not is_utf8(text)):
        raise UsageError(f"{flag} {text[:MAX_SHOWN]}: not UTF-8 text", fix="rename the file, or correct the value")
