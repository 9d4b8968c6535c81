"""Timing of one piece of code, and of two in turn."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from breastcli.errors import first_line

Run = Callable[[], object]
Item = TypeVar("Item")

CPU = torch.device("cpu")
MAX_REPEATS = 1000
SHORTEST_S = 1e-6  # stands for a warm-up that took no measurable time
BUDGET_S = 30.0  # a comparison whose rounds have taken this long gets no more of them, ...
MIN_ROUNDS = 2  # ... unless it has had fewer than these


@dataclass(frozen=True)
class Timing:
    """How long one call took.

    Attributes:
        seconds: of a call, one figure per round.
    """

    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.seconds)

    @property
    def low_s(self) -> float:
        """The fastest round."""
        return min(self.seconds)

    @property
    def high_s(self) -> float:
        """The slowest round."""
        return max(self.seconds)

    @property
    def p50_ms(self) -> float:
        """Median in milliseconds."""
        return 1e3 * self.median_s

    @property
    def p95_ms(self) -> float:
        """95th percentile in milliseconds, linear between rounds."""
        return 1e3 * float(np.percentile(self.seconds, 95))

    def to_json(self) -> dict[str, float]:
        """Return a JSON-safe dictionary."""
        spread = {"median_s": self.median_s, "low_s": self.low_s, "high_s": self.high_s}
        return {"rounds": len(self.seconds), **spread}


@dataclass(frozen=True)
class Pair:
    """Our code beside a rival's, both having done the same work in turn.

    Attributes:
        title: what was done, "ours / rival".
        unit: of the speeds, such as "images/s".
        count: how much work one call does, so that speed = count / seconds.
        ours: our time.
        theirs: the rival's, or None where it could not run.
        missing: why the rival could not run, or "".
        remark: what else was found, or "".
    """

    title: str
    unit: str
    count: float
    ours: Timing
    theirs: Timing | None
    missing: str = ""
    remark: str = ""

    @property
    def ratio(self) -> float | None:
        """The rival's median time over ours: how many times faster we are."""
        return None if self.theirs is None else self.theirs.median_s / self.ours.median_s

    @property
    def ratio_range(self) -> tuple[float, float] | None:
        """The smallest and the largest ratio of a round; ``ratio`` lies between them."""
        if self.theirs is None:
            return None
        ratios = [other / own for own, other in zip(self.ours.seconds, self.theirs.seconds, strict=True)]
        return min(ratios), max(ratios)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-safe dictionary; speeds in ``unit``, low and high those of the slowest and fastest round."""
        values: dict[str, Any] = {"title": self.title, "unit": self.unit, "rounds": len(self.ours.seconds)}
        for name, timing in (("ours", self.ours), ("theirs", self.theirs)):
            values |= speeds(name, self.count, timing)
        low, high = self.ratio_range or (None, None)
        values |= {"ratio": self.ratio, "ratio_low": low, "ratio_high": high}
        return {**values, "missing": self.missing, "remark": self.remark}


@dataclass(frozen=True)
class Tried:
    """A rival's code that has run once, and so needs no warm-up."""

    run: Run

    def __call__(self) -> object:
        """Run it once more."""
        return self.run()


@dataclass
class Waiting:
    """How long loops wait for their items.

    Attributes:
        seconds: of each loop that came to its end, all its waiting taken together.
    """

    seconds: list[float] = field(default_factory=list)

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, adding up the time until each is there; what they queued on a device is not waited for."""
        waited, began = 0.0, time.perf_counter()
        for item in items:
            waited += time.perf_counter() - began
            yield item
            began = time.perf_counter()
        self.seconds.append(waited + time.perf_counter() - began)

    def share(self, timing: Timing) -> float:
        """Return the share of the measured rounds, of one loop each, that was waiting; in [0, 1]."""
        return sum(self.seconds[-len(timing.seconds) :]) / sum(timing.seconds)


def speeds(name: str, count: float, timing: Timing | None) -> dict[str, float | None]:
    """Return ``name``, ``name_low`` and ``name_high``: ``count`` per second at median, slowest and fastest round."""
    if timing is None:
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    values = (timing.median_s, timing.high_s, timing.low_s)
    return {f"{name}{end}": count / seconds for end, seconds in zip(("", "_low", "_high"), values, strict=True)}


def measure(run: Run, device: torch.device, rounds: int, *, warmup: int = 1, round_s: float = 0.0) -> Timing:
    """Time one piece of code.

    Args:
        run: the code.
        device: where it computes; every round ends when the device has finished.
        rounds: number of figures.
        warmup: calls before the first round, one or more.
        round_s: seconds that a round should last; the code is called as often as that takes, judging by the last
            warm-up.

    Returns:
        Seconds of one call, a figure per round.
    """
    assert warmup >= 1, warmup
    for _ in range(warmup):
        last_s = _time(run, device)
    repeats = min(max(math.ceil(round_s / max(last_s, SHORTEST_S)), 1), MAX_REPEATS)
    return Timing(tuple(_time(run, device, repeats) / repeats for _ in range(rounds)))


def compare(
    title: str, unit: str, count: float, ours: Run, theirs: Run | str, rounds: int, device: torch.device = CPU
) -> Pair:
    """Time two pieces of code in turn, each after a warm-up (which ``find_rival`` has given the rival).

    In turn, because a machine that others use slows down both then. Slow code gets fewer rounds, see ``BUDGET_S``.

    Args:
        title: what is done, "ours / rival".
        unit: of the speeds.
        count: how much work one call does.
        ours: our code.
        theirs: the rival's, or why it cannot run.
        rounds: figures of each, at most.
        device: where both compute.
    """
    sides: list[Run] = [ours] if isinstance(theirs, str) else [ours, theirs]
    for run in sides:
        if not isinstance(run, Tried):
            _time(run, device)
    figures: list[tuple[float, ...]] = []  # a tuple per round
    while len(figures) < min(rounds, MIN_ROUNDS) or (len(figures) < rounds and sum(map(sum, figures)) < BUDGET_S):
        figures.append(tuple(_time(run, device) for run in sides))
    own, *others = map(Timing, zip(*figures, strict=True))
    return Pair(title, unit, count, own, *(others or [None]), missing=theirs if isinstance(theirs, str) else "")


def find_rival(package: str, make: Callable[[], Run]) -> Tried | str:
    """Return a rival's code after trying it once, or why it cannot run.

    Args:
        package: what is installed to have it.
        make: imports the rival and returns its code.
    """
    try:
        run = make()
        run()
    except ModuleNotFoundError:
        return f"{package} is not installed"
    except (ImportError, RuntimeError, ValueError) as error:
        return f"{package} fails here ({first_line(error, 120)})"
    return Tried(run)


def synchronise(device: torch.device) -> None:
    """Wait until a device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _time(run: Run, device: torch.device, repeats: int = 1) -> float:
    synchronise(device)
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronise(device)
    return time.perf_counter() - began
