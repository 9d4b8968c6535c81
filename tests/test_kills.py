"""Jobs killed at random moments: nothing half-written is taken for whole, and what goes on ends where it would have."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest
from cases import CASES, Case, World, check_wreck, complete, differing, run_undisturbed
from injecting import COUNTS, files_of

FEW, MANY = 2, 20
SHORT = ("prepare", "train", "synthesize fit", "explain")


def kill_at_random(name: str, number: int, world: World, folder: Path) -> None:
    """Kill a job ``number`` times at moments drawn evenly over its time, and check what it left each time."""
    case, draw = CASES[name], random.Random(zlib.crc32(name.encode()))
    whole = run_undisturbed(case, world, folder)
    killed = 0
    for attempt in range(4 * number):
        if killed == number:
            break
        moment = draw.uniform(0, whole.seconds)
        cwd = case.start(world, folder / f"attempt{attempt}")
        ended = world.do(cwd, case.words, after=moment)
        assert ended.code in (0, -signal.SIGKILL), ended.stderr
        killed += ended.code != 0
        COUNTS[f"{name}: killed" if ended.code else f"{name}: done before the kill"] += 1
        check_wreck(case, world, cwd)
        if ended.code:
            complete(case, world, cwd)
        check_whole(case, world, cwd, whole.files)
        shutil.rmtree(cwd)
    assert killed == number


def check_whole(case: Case, world: World, cwd: Path, expected: dict[str, bytes]) -> None:
    """Check that a completed job left what an undisturbed one does, and nothing else."""
    before = files_of(getattr(world, case.source)) if case.stays else {}
    stayed = {name: content for name, content in before.items() if name.startswith(case.stays)}
    if stayed.keys() & files_of(cwd / "out").keys():
        expected = expected | stayed
    assert differing(files_of(cwd / "out"), expected) == []
    assert not list((cwd / "out").rglob(".*"))
    if case.status:
        assert json.loads((cwd / "out/run.json").read_text())["status"] == "finished"


def kill_between_names(name: str, world: World, folder: Path, steps: Iterable[int]) -> None:
    """Kill a job before each of several renamings and removals, until it has no more, and check what it left."""
    case = CASES[name]
    whole = run_undisturbed(case, world, folder)
    for step in steps:
        cwd = case.start(world, folder / f"step{step}")
        ended = world.do(cwd, case.words, dies_before=step)
        assert ended.code in (0, -signal.SIGKILL), ended.stderr
        check_wreck(case, world, cwd)
        if ended.code:
            COUNTS[f"{name}: killed before a renaming or removal"] += 1
            complete(case, world, cwd)
        check_whole(case, world, cwd, whole.files)
        shutil.rmtree(cwd)
        if not ended.code:
            return


@pytest.mark.parametrize(("name", "step"), [("explain", 10), ("train --overwrite", 7)])
def test_a_kill_while_results_are_removed(name: str, step: int, world: World, tmp_path: Path) -> None:
    kill_between_names(name, world, tmp_path, [step])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_kills_between_all_names(name: str, world: World, tmp_path: Path) -> None:
    kill_between_names(name, world, tmp_path, itertools.count(1))


@pytest.mark.parametrize("name", SHORT)
def test_a_few_kills(name: str, world: World, tmp_path: Path) -> None:
    kill_at_random(name, FEW, world, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_many_kills(name: str, world: World, tmp_path: Path) -> None:
    kill_at_random(name, MANY, world, tmp_path)
