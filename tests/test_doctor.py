from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from email.message import Message
from importlib import metadata
from pathlib import Path
from urllib.error import HTTPError, URLError

import pytest
import torch

from breastcli import doctor as job
from breastcli.config import DoctorConfig
from breastcli.doctor import Check, doctor
from breastcli.errors import UsageError


def found(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


@pytest.fixture
def nothing_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the libraries out, which take seconds; tests of them do not ask for this."""
    monkeypatch.setattr(job, "_libraries", lambda: iter(()))


def test_the_command_says_what_works_and_writes_nothing(breastcli: Callable, tmp_path: Path) -> None:
    done = breastcli("doctor", "--json")
    assert done.code == 0, done.stderr
    checks = {check["name"]: check for check in done.json["checks"]}
    assert done.json["ok"] is True
    assert checks["torch"]["found"] == metadata.version("torch")
    assert checks["torch"]["state"] == "ok"
    needed = {name.split(">")[0] for name in metadata.requires("breastcli") if "extra" not in name}
    assert needed <= set(checks)
    assert "GB free" in checks["data"]["found"]
    assert "no terminal" in checks["stdout"]["found"]
    assert checks["servers"]["found"].startswith("not asked")
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_cannot_be_imported_ends_with_one(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch is gone')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "breastcli", "doctor"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "cannot be imported (libtorch is gone)" in " ".join(done.stdout.split())
    assert done.stderr.startswith("error: not usable as it is: torch")
    assert len(done.stderr.splitlines()) == 1  # no hint after a failure


@pytest.mark.parametrize(
    ("version", "needed", "state"),
    [
        ("2.5.1", ">=2.6", "failed"),
        ("2.6", ">=2.6.0", "ok"),
        ("2.6.0+cpu", ">=2.6", "ok"),
        ("2.10.0", ">=2.6", "ok"),
        ("3.9.18", ">=3.10", "failed"),
        ("0.1", "", "ok"),
    ],
)
def test_versions_are_compared_with_the_lower_bound(version: str, needed: str, state: str) -> None:
    assert job._version("libraries", "x", version, needed).state == state


def test_a_library_that_is_missing_or_too_old_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: ["numpy>=999", "nowhere>=1", "pytest>=8; extra == 'dev'"])
    checks = list(job._libraries())
    assert [(check.name, check.state) for check in checks] == [("numpy", "failed"), ("nowhere", "failed")]
    assert "older than 999" in checks[0].found


def test_a_missing_optional_package_says_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    checks = list(job._optional())
    assert {check.state for check in checks} == {"note"}
    assert "--features inception" in found(checks, "torch-fidelity").cost
    assert all(check.cost for check in checks)


@pytest.mark.usefixtures("nothing_imported")
def test_a_folder_that_cannot_be_written_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").write_text("a file")
    result = doctor(DoctorConfig())
    assert found(result.checks, "data").state == "failed"
    assert found(result.checks, "runs").state == "ok"
    assert "data" in str(result.failure)
    assert not result.to_json()["ok"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
@pytest.mark.usefixtures("nothing_imported")
def test_the_device_that_is_asked_for_must_work() -> None:
    result = doctor(DoctorConfig(device="cuda"))
    assert found(result.checks, "--device cuda").state == "failed"
    assert "not usable" in str(result.failure)
    assert found(result.checks, "cpu").state == "ok"
    with pytest.raises(UsageError, match="--device tpu"):
        doctor(DoctorConfig(device="tpu"))


def test_a_device_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(torch.nn.functional, "conv2d", fail)
    cpu = found(list(job._devices("cpu")), "cpu")
    assert cpu.state == "failed"
    assert "no kernel image" in cpu.found


def test_servers_are_asked_only_when_the_user_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(request: object, timeout: float) -> None:
        asked.append(request.host)
        if "pytorch" in request.host:
            raise HTTPError(request.full_url, 403, "Forbidden", Message(), None)
        raise URLError("no route to host")

    monkeypatch.setattr(job, "urlopen", answer)
    list(job._weights(network=False))
    assert asked == []
    checks = list(job._weights(network=True))
    assert asked == list(job.SERVERS.values())
    states = {check.name: check.state for check in checks if check.name in job.SERVERS}
    assert states == {"torchvision's weights": "ok", "timm's and the hub's weights": "note"}


def test_weights_in_the_caches_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert found(list(job._weights(network=False)), "PyTorch's cache").state == "note"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "resnet18.pth").touch()
    check = found(list(job._weights(network=False)), "PyTorch's cache")
    assert (check.state, check.cost) == ("ok", "")
    assert check.found.startswith("1 in ")


def test_memory_is_that_of_the_machine() -> None:
    total, available = job._total_memory(), job._available_memory()
    assert total is None or total > 1e8
    assert None in (total, available) or available < 2**50
