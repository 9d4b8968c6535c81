"""Signals that stop a job, also where Python would ignore what they raise."""

from __future__ import annotations

import signal
import sys
import time
import weakref

import pytest

from breastcli.errors import Terminated
from breastcli.stopping import stopping_when_told

BOTH = pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])


class Thing:
    """What weak references can point to."""


def tell(number: int) -> None:
    signal.raise_signal(number)
    for _ in range(1000):  # Python looks for signals between two rounds at the latest
        pass


def work(things: list[Thing]) -> None:
    things.clear()  # which calls back
    time.sleep(10)


@BOTH
def test_a_signal_stops_a_job(number: int, error: type[BaseException]) -> None:
    with pytest.raises(error), stopping_when_told():
        tell(number)


@BOTH
def test_a_signal_that_python_ignores_comes_again(number: int, error: type[BaseException]) -> None:
    heard = []

    def callback(_: object) -> None:
        try:
            tell(number)
        except KeyboardInterrupt:
            heard.append(number)
            raise

    things = [Thing()]
    reference = weakref.ref(things[0], callback)
    began = time.monotonic()
    with pytest.raises(error), stopping_when_told():
        work(things)
    assert time.monotonic() - began < 8
    assert heard == [number]
    assert reference() is None


def test_other_ignored_errors_are_reported_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    with stopping_when_told():
        thing = Thing()
        reference = weakref.ref(thing, lambda _: 1 / 0)
        del thing
        assert reference() is None
    assert len(reported) == 1
    assert sys.unraisablehook == reported.append
