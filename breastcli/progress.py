"""How core code reports progress without knowing who watches."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives progress; the command line draws bars, a notebook may ignore it."""

    def begin(self, task: str, total: int, unit: str) -> None:
        """Start (or restart) the task called ``task`` with ``total`` steps of ``unit``."""

    def advance(self, task: str, amount: int = 1, **figures: float) -> None:
        """Count ``amount`` steps of a task and show current figures such as a loss."""


class _Silent:
    def begin(self, task: str, total: int, unit: str) -> None:
        pass

    def advance(self, task: str, amount: int = 1, **figures: float) -> None:
        pass


SILENT: Progress = _Silent()
