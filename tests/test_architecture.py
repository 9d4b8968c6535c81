"""The rules that keep the code base what it is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "breastcli"
MODULES = sorted(PACKAGE.rglob("*.py"))
COMMAND_LINE = {"cli", "completion", "console", "hints", "show", "show_benchmark", "show_checks", "__main__"}
# Imports point down: a module may import its own layer's package and lower layers only.
LAYERS = {
    **dict.fromkeys(
        (
            "config",
            "configfile",
            "errors",
            "options",
            "parsing",
            "records",
            "registry",
            "files",
            "progress",
            "shapes",
            "plan",
            "launch",
            "locks",
            "stopping",
            "__init__",
        ),
        0,
    ),
    **dict.fromkeys(("data", "models", "losses"), 1),
    **dict.fromkeys(("system", "metrics", "cams", "gan"), 2),
    **dict.fromkeys(("reporting", "benchmarks"), 3),
    **dict.fromkeys(
        ("prepare", "synthesize", "train", "evaluate", "explain", "benchmark", "predict", "report", "doctor"), 4
    ),
    **dict.fromkeys(COMMAND_LINE, 5),
}
JOBS = {name for name, layer in LAYERS.items() if layer == 4}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_parts(path: Path) -> set[str]:
    inner = {name.split(".")[1] for name in imported(path) if name.startswith("breastcli.")}
    return inner & set(LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    own = part_of(path)
    typing_only = JOBS if own in ("hints", "show", "show_benchmark", "show_checks") else set()
    for other in imported_parts(path) - {own} - typing_only:
        assert LAYERS[other] < LAYERS[own] or (LAYERS[own] in (0, 1, 2, 5) and LAYERS[other] == LAYERS[own])
        assert not (own in JOBS and other in JOBS), f"job {own} imports job {other}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_command_line_knows_typer_and_rich(path: Path) -> None:
    if part_of(path) not in COMMAND_LINE:
        assert not {name.split(".")[0] for name in imported(path)} & {"typer", "rich", "click"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 50, f"{node.name} has {length} lines"


def test_core_never_prints() -> None:
    for path in MODULES:
        calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        prints = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert not prints or part_of(path) == "console", path


def test_no_file_can_run_code() -> None:
    """Whatever opens a format that may hold code says that it must not; no such format is read in another way."""
    safe = {
        ("np", "load"): {"allow_pickle": False},
        ("torch", "load"): {"weights_only": True},
        ("hub", "load_state_dict_from_url"): {"weights_only": True},
    }
    allowed = {
        "yaml": {"safe_load", "safe_dump", "scan", "AliasToken", "SafeLoader"},
        "pickle": {"UnpicklingError"},
        "json": {"dumps", "loads"},
    }
    banned = {"marshal", "shelve", "dill", "joblib", "cloudpickle", "runpy", "code"}
    seen = set()
    for path in MODULES:
        assert not {name.split(".")[0] for name in imported(path)} & banned, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                renamed = {one.name: one.asname for one in node.names if one.asname}
                assert not renamed.keys() & {*allowed, "torch"}, path
                assert renamed.get("numpy", "np") == "np", path
            if isinstance(node, ast.ImportFrom):
                assert node.module not in (*allowed, "torch", "numpy") or not {one.name for one in node.names} & {
                    "load", "loads", "Unpickler", "hub", "jit", "package", "save"
                }, f"{path}: loaders are called by their module's name"  # fmt: skip
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in allowed:
                assert node.attr in allowed[node.value.id], f"{path}: {node.value.id}.{node.attr}"
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile", "__import__"), path
            keywords = {one.arg: getattr(one.value, "value", None) for one in node.keywords}
            assert keywords.get("shell") is None, path
            if isinstance(node.func, ast.Attribute):
                base = node.func.value
                owner = base.id if isinstance(base, ast.Name) else getattr(base, "attr", "")
                assert (owner, node.func.attr) not in (("os", "system"), ("jit", "load"), ("hub", "load")), path
                wanted = safe.get((owner, node.func.attr))
                if wanted:
                    seen.add((owner, node.func.attr))
                    assert wanted.items() <= keywords.items(), f"{path}: {owner}.{node.func.attr}"
    assert seen == set(safe)


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["train", "--help"],
        ["synthesize", "--help"],
        ["doctor", "--help"],
        ["--version"],
        ["train", "--print-config"],
    ],
)
def test_help_imports_no_torch(words: list[str]) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['breastcli', *{words!r}]\n"
        "from breastcli.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "print(sorted({'torch', 'numpy', 'matplotlib', 'sklearn'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    heavy = done.stderr.strip().splitlines()[-1]
    assert "torch" not in heavy
    assert heavy == "[]" or words == ["train", "--print-config"]
