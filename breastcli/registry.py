"""Plug-in registries: a file dropped into a plug-in folder is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from difflib import get_close_matches
from typing import Generic, TypeVar

from breastcli.errors import UsageError

T = TypeVar("T")


class Registry(Generic[T]):
    """Named plug-ins of one kind, filled by importing every module of one package.

    Args:
        kind: what an entry is called in messages ("architecture", "loss", …).
        package: the package whose modules register themselves when imported.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that files its argument under ``name``."""

        def file_under_name(entry: T) -> T:
            assert name not in self._entries, f"{self.kind} {name!r} is registered twice"
            self._entries[name] = entry
            return entry

        return file_under_name

    def names(self) -> list[str]:
        """Return every registered name in alphabetical order."""
        self._load()
        return sorted(self._entries)

    def get(self, name: str) -> T:
        """Return the entry called ``name``.

        Raises:
            UsageError: no such entry; the message names the nearest one.
        """
        self._load()
        if name in self._entries:
            return self._entries[name]
        near = get_close_matches(name, self._entries, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(self.names())}"
        raise UsageError(f"unknown {self.kind} {name!r}", fix=hint)

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
