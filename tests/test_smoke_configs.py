"""One smoke configuration for each family of networks, through the real command line on the drawn data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from breastcli.config import PrepareConfig
from breastcli.configfile import read_section, resolve
from breastcli.prepare import prepare

CONFIGS = sorted((Path(__file__).parents[1] / "sample_configs").glob("smoke-*.yaml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the configurations' common ``prepare`` section makes."""
    sections = [read_section(path, "prepare") for path in CONFIGS]
    assert all(section == sections[0] for section in sections)
    folder = tmp_path_factory.mktemp("smoke")
    prepare(resolve(PrepareConfig, sections[0], {"raw": str(folder / "raw"), "out": str(folder / "data")}))
    return folder / "data"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_smoke(path: Path, data: Path, breastcli: Callable[..., object]) -> None:
    trained = breastcli("train", "--config", path, "--data", data, "--json", "--device", "cpu")
    assert trained.code == 0, trained.stderr
    assert len(trained.json["history"]) == 1
    words = ("--json", "--embedding", "--resamples", 100, "--device", "cpu")
    evaluated = breastcli("evaluate", f"runs/{path.stem}", *words)
    assert evaluated.code == 0, evaluated.stderr
    assert evaluated.json["image"]["n"] > 0
    assert set(evaluated.json["embedding"]) == {"within_deg", "between_deg", "auc"}


def test_every_family_has_one() -> None:
    assert len(CONFIGS) >= 6
