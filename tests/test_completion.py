"""What the shell offers after Tab, asked for as a shell asks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from breastcli.cams import CAMS
from breastcli.completion import registered_names
from breastcli.data.datasets import DATASETS
from breastcli.losses import LOSSES
from breastcli.models import ARCHITECTURES

PROGRAM = Path(sys.executable).parent / "breastcli"


def complete(words: str, folder: Path) -> list[str]:
    environment = os.environ | {
        "_BREASTCLI_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    done = subprocess.run([PROGRAM], env=environment, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("folder", "registry"),
    [("models", ARCHITECTURES), ("losses", LOSSES), ("cams", CAMS), ("data/datasets", DATASETS)],
    ids=["models", "losses", "cams", "datasets"],
)
def test_names_read_from_files_are_those_of_the_registry(folder: str, registry: object) -> None:
    assert registered_names(folder) == registry.names()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("breastcli train --arch dala", ["dalaresnet50"]),
        ("breastcli train --arch tim", ["timm/"]),
        ("breastcli train --loss li_", ["li_arcface"]),
        ("breastcli prepare --dataset br", ["breakhis"]),
        ("breastcli explain --method gradcam,lay", ["gradcam,layercam"]),
        ("breastcli explain --method gradcam,gradcam", ["gradcam,gradcampp"]),
        ("breastcli benchmark --archs vit,swi", ["vit,swin"]),
        ("breastcli benchmark conv", ["convergence"]),
        ("breastcli doc", ["doctor"]),
        ("breastcli train --dry", ["--dry-run"]),
    ],
)
def test_names_are_completed(words: str, offered: list[str], tmp_path: Path) -> None:
    assert complete(words, tmp_path) == offered


def test_runs_are_completed_by_what_wrote_them(tmp_path: Path) -> None:
    for name, command in {"a": "train", "demo/b": "train", "gan": "synthesize", "pooled": "evaluate"}.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text(json.dumps({"command": command}))
    (tmp_path / "runs" / "damaged").mkdir()
    (tmp_path / "runs" / "damaged" / "run.json").write_text("{")
    assert complete("breastcli evaluate ", tmp_path) == ["latest", "runs/a", "runs/demo/b"]
    assert complete("breastcli evaluate --run la", tmp_path) == ["latest"]
    assert complete("breastcli explain runs/d", tmp_path) == ["runs/demo/b"]
    assert complete("breastcli synthesize generate ", tmp_path) == ["runs/gan"]
    assert complete("breastcli synthesize assess runs/gan --features ", tmp_path)[:2] == ["latest", "inception"]
    assert complete("breastcli train --init-from runs/a", tmp_path) == ["runs/a"]


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.argv = ['breastcli']\n"
        "from breastcli.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        "print(sorted({'torch', 'numpy', 'timm', 'PIL'} & set(sys.modules)), file=sys.stderr)"
    )
    words = "breastcli train --arch res"
    environment = os.environ | {"_BREASTCLI_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "3"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "resnet50" in done.stdout.splitlines()
    assert done.stderr.strip() == "[]"


def test_completion_is_installed_for_the_shell(tmp_path: Path) -> None:
    environment = os.environ | {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [PROGRAM, "--install-completion", "bash"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "_BREASTCLI_COMPLETE" in (tmp_path / ".bash_completions" / "breastcli.sh").read_text()
    assert "breastcli.sh" in (tmp_path / ".bashrc").read_text()
