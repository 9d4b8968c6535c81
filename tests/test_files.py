from __future__ import annotations

from pathlib import Path

import pytest

from breastcli.errors import UsageError, UserError
from breastcli.files import claimed_folder, read_csv, read_json, replacing, write_json, write_text
from breastcli.registry import Registry


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    def fail() -> None:
        with replacing(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise RuntimeError

    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_write_is_seen_only_when_it_is_whole(tmp_path: Path) -> None:
    with replacing(tmp_path / "deep" / "a.png") as temporary:
        temporary.write_text("new")
        assert temporary.suffix == ".png"
        assert not (tmp_path / "deep" / "a.png").exists()
    assert (tmp_path / "deep" / "a.png").read_text() == "new"


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
    for read, name in ((read_json, "a.json"), (read_csv, "a.csv"), (read_json, "none.json"), (read_csv, "none.csv")):
        with pytest.raises(UserError, match=name):
            read(tmp_path / name)


def test_claiming_a_folder(tmp_path: Path) -> None:
    def claim(folder: Path, allowed: bool) -> None:
        with claimed_folder(folder, allowed=allowed, hint="choose"):
            pass

    claim(tmp_path / "new" / "deep", False)
    claim(tmp_path / "new" / "deep", False)  # still empty
    (tmp_path / "new" / "deep" / ".lock").touch()  # which a killed job left behind, and which counts for nothing
    claim(tmp_path / "new" / "deep", False)
    with pytest.raises(UserError, match="not empty: choose"):
        claim(tmp_path / "new", False)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["deep"]  # nothing is put into a refused folder
    claim(tmp_path / "new", True)


def test_registry_finds_files_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "plugins_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from breastcli.registry import Registry\nREGISTRY = Registry('thing', 'plugins_of_a_test')\n"
    )
    (package / "first.py").write_text("from plugins_of_a_test import REGISTRY\nREGISTRY.register('first')(1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    from plugins_of_a_test import REGISTRY  # type: ignore[import-not-found]

    assert isinstance(REGISTRY, Registry)
    assert REGISTRY.names() == ["first"]
    assert REGISTRY.get("first") == 1
    with pytest.raises(UsageError, match="unknown thing 'fist': did you mean 'first'"):
        REGISTRY.get("fist")
    with pytest.raises(UsageError, match="known: first"):
        REGISTRY.get("zzz")
