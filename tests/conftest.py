"""Fixtures made from the procedural sample data set; nothing binary lies in the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import torch
from cases import World, make_world
from injecting import COUNTS, Injector, Outcome

from breastcli.config import PrepareConfig, TrainConfig
from breastcli.data.sample_tree import draw_sample
from breastcli.prepare import prepare
from breastcli.train import train

REPOSITORY = Path(__file__).parents[1]
TINY = "timm/test_resnet"  # half a million parameters, made by timm for tests
SIZE_PX = 32
SUMMARY = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep file names that are no UTF-8 from what is captured, which could not be handed to another process."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def _tell_counts(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> Iterator[None]:
    """Hand what a test counted over with its report, which also reaches the end of a session of several processes."""
    counts, lines = Counter(COUNTS), len(pytestconfig.stash.get(SUMMARY, ()))
    yield
    told = request.node.user_properties
    told += [("injected", (name, number)) for name, number in (COUNTS - counts).items()]
    told += [("summary", line) for line in pytestconfig.stash.get(SUMMARY, [])[lines:]]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [one for several in terminalreporter.stats.values() for one in several if hasattr(one, "when")]
    told = [pair for report in reports if report.when == "teardown" for pair in report.user_properties]
    for line in (value for name, value in told if name == "summary"):
        terminalreporter.write_line(line)
    counts: Counter[str] = Counter()
    for name, number in (value for kind, value in told if kind == "injected"):
        counts[name] += number
    if counts:
        terminalreporter.section("injected faults")
        for name, number in sorted(counts.items()):
            terminalreporter.line(f"{number:5}  {name}")
        terminalreporter.line(f"{sum(counts.values()):5}  in all")


@pytest.fixture(scope="session")
def summary(pytestconfig: pytest.Config) -> list[str]:
    """Lines that are printed at the end of the session, where a log shows them."""
    return pytestconfig.stash.setdefault(SUMMARY, [])


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real images; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("BREASTCLI_REAL_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "breakhis_original").is_dir():
        pytest.skip("no real images here (BREASTCLI_REAL_DATA)")
    return folder


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn data set of 96 images; tests must not change it."""
    folder = tmp_path_factory.mktemp("raw")
    draw_sample(folder, num_images=96, height_px=46, width_px=70, seed=0)
    return folder


@pytest.fixture(scope="session")
def prepared(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn data set prepared with the default split by exam; tests must not change it."""
    out = tmp_path_factory.mktemp("prepared")
    prepare(PrepareConfig(raw=str(raw), out=str(out), size=SIZE_PX))
    return out


@pytest.fixture(scope="session")
def folds(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn data set prepared with three folds by exam; tests must not change it."""
    out = tmp_path_factory.mktemp("folds")
    prepare(PrepareConfig(raw=str(raw), out=str(out), size=SIZE_PX, folds=3))
    return out


@pytest.fixture(scope="session")
def tiny_config(prepared: Path) -> TrainConfig:
    """Training that takes a second."""
    return TrainConfig(arch=TINY, data=str(prepared), epochs=2, lr=1e-3, batch_size=16, device="cpu", precision="fp32")


@pytest.fixture(scope="session")
def trained(tiny_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on ``prepared``; tests must not change it."""
    import dataclasses

    out = tmp_path_factory.mktemp("runs") / "tiny"
    train(dataclasses.replace(tiny_config, out=str(out)))
    return out


@pytest.fixture
def own_run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run to write into."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="session")
def world(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """What commands with faults work on; tests must not change it."""
    injector = Injector(tmp_path_factory.mktemp("injector"))
    try:
        yield make_world(injector, raw, tmp_path_factory.mktemp("world"))
    finally:
        injector.close()


@pytest.fixture
def breastcli(tmp_path: Path) -> Callable[..., Outcome]:
    """Run the real command line in ``tmp_path``, as a user's shell would."""

    def run(*words: object) -> Outcome:
        command = [sys.executable, "-m", "breastcli", *map(str, words)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run the command line in ``tmp_path`` within this process, which has imported everything already."""
    from typer.testing import CliRunner

    from breastcli.cli import app

    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> Outcome:
        done = CliRunner().invoke(app, [*map(str, words)])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return Outcome(done.exit_code, done.stdout, done.stderr)

    return run
