"""Ctrl-C and SIGTERM stop a job alike, and neither gets lost."""

from __future__ import annotations

import _thread
import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from breastcli.errors import Terminated

PATIENCE_S = 5.0  # in which a job that was told to stop is not told again
AGAIN_S = 0.05  # after which one that did not hear it is


@contextlib.contextmanager
def stopping_when_told() -> Iterator[None]:
    """Let SIGTERM stop a job as Ctrl-C does, and let both stop it for sure.

    Who is told again while stopping, by the group of processes and by a parent, shall finish that. Before and after a
    job there is nothing to tidy up, and the signal ends the process by itself.

    A signal raises its exception wherever Python is at that moment. If that is a finaliser or the callback of a weak
    reference, of which plotting has thousands, Python reports the exception as ignored and goes on: so it comes again.
    """
    told_at = -math.inf

    def stop(*_: Any) -> None:
        nonlocal told_at
        if time.monotonic() - told_at > PATIENCE_S:
            told_at = time.monotonic()
            raise Terminated

    def ignored(report: Any) -> None:
        nonlocal told_at
        if not isinstance(report.exc_value, KeyboardInterrupt):
            usual(report)
            return
        told_at = -math.inf
        number = signal.SIGTERM if isinstance(report.exc_value, Terminated) else signal.SIGINT
        _thread.start_new_thread(_tell_again, (number,))  # threading's own locks may be held just now

    usual, before = sys.unraisablehook, signal.signal(signal.SIGTERM, stop)
    sys.unraisablehook = ignored
    try:
        yield
    finally:
        sys.unraisablehook = usual
        signal.signal(signal.SIGTERM, before)


def _tell_again(number: int) -> None:
    time.sleep(AGAIN_S)
    if hasattr(signal, "pthread_kill"):
        main = threading.main_thread().ident
        assert main is not None  # it runs
        signal.pthread_kill(main, number)
    else:  # Windows, where what the main thread waits for is not interrupted
        _thread.interrupt_main(number)
