"""Values of options that are more than a word or a number."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from breastcli.config import MAGNIFICATIONS
from breastcli.errors import UsageError


def parse_magnification(text: str) -> str | None:
    """Return "100X" for "100x", "100X" or "100", and None for "all".

    Raises:
        UsageError: not a magnification of BreakHis.
    """
    plain = str(text).strip().upper().removesuffix("X")
    if plain == "ALL":
        return None
    if f"{plain}X" not in MAGNIFICATIONS:
        raise UsageError(f"--mag {text}: no such magnification", fix="use all, 40x, 100x, 200x or 400x")
    return f"{plain}X"


def parse_classes(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Return ("lung_n", "lung_aca") for "lung_n,lung_aca", and an empty tuple for "all".

    Raises:
        UsageError: a name is not among the ``known`` ones.
    """
    names = tuple(part.strip() for part in text.split(","))
    if names == ("all",):
        return ()
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            fix = f"did you mean {near[0]!r}?" if near else f"use {', '.join(dict.fromkeys(known))}"
            raise UsageError(f"--classes {text}: no such class {name!r}", fix=fix)
    return names


def parse_ratio(text: str) -> tuple[int, int, int]:
    """Return (6, 1, 3) for "6:1:3".

    Raises:
        UsageError: not three positive whole numbers.
    """
    parts = str(text).split(":")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"--split {text}: not a ratio", fix="give train:val:test as in 6:1:3")
    train, val, test = map(int, parts)
    return train, val, test
