"""How a field of a configuration is declared and checked."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from breastcli.errors import UsageError


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
        raise UsageError(f"{flag_of(field.name)} {value!r}: expected {kind}", fix="check the value's type")
    rules = field.metadata
    name = field.name.upper() if rules["positional"] else flag_of(field.name)
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name} {value}: not a finite number", fix="give one")
    if rules["choices"] and value not in rules["choices"]:
        near = get_close_matches(str(value), rules["choices"], n=1)
        fix = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(rules['choices'])}"
        raise UsageError(f"{name} {value}: not accepted", fix=fix)
    if rules["at_least"] is not None and not value >= rules["at_least"]:
        raise UsageError(f"{flag_of(field.name)} {value}: too small", fix=f"use {rules['at_least']} or more")
    if rules["below"] is not None and not value < rules["below"]:
        raise UsageError(f"{flag_of(field.name)} {value}: too large", fix=f"stay below {rules['below']}")
