"""Checking what a document holds that may come from elsewhere, before anything is done with it."""

from __future__ import annotations

from typing import Any

from breastcli.errors import UserError


def check_shape(value: Any, shape: Any, where: object, fix: str, name: str = "") -> None:
    """Check a document against a drawing of it.

    Args:
        value: what was read.
        shape: a type, where float takes whole numbers too; a tuple of types and None, any of which will do; a list of
            one shape, which all items have; or a dictionary of names to shapes, those ending in "?" not being needed.
        where: the file, for messages.
        fix: what the user can do.
        name: of the value within the document.

    Raises:
        UserError: something is missing, or of another kind.
    """
    if isinstance(shape, dict):
        _check_kind(value, (dict,), where, fix, name)
        for key, inner in shape.items():
            plain = key.removesuffix("?")
            if plain in value:
                check_shape(value[plain], inner, where, fix, f"{name}.{plain}" if name else plain)
            elif plain == key:
                raise UserError(f"{where} lacks {f'{name}.{key}' if name else key}", fix)
    elif isinstance(shape, list):
        _check_kind(value, (list,), where, fix, name)
        for number, item in enumerate(value):
            check_shape(item, shape[0], where, fix, f"{name}[{number}]")
    else:
        _check_kind(value, shape if isinstance(shape, tuple) else (shape,), where, fix, name)


def _check_kind(value: Any, kinds: tuple[type | None, ...], where: object, fix: str, name: str) -> None:
    for kind in kinds:
        wanted = (int, float) if kind is float else kind or type(None)
        if isinstance(value, wanted) and (kind is bool or not isinstance(value, bool)):
            return
    expected = " or ".join("null" if kind is None else kind.__name__ for kind in kinds)
    what = f"{name} is" if name else "holds"
    raise UserError(f"{where}: {what} {type(value).__name__}, not {expected}", fix)
