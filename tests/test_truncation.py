"""Every file of every folder cut short: what needs it refuses in one line, everything else does not notice."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cases import CPU, FIT, TINY, World
from injecting import COUNTS, files_of

from breastcli.config import PrepareConfig
from breastcli.data.store import PARTIAL
from breastcli.errors import UserError
from breastcli.prepare import prepare

SHARES = (0.0, 0.5, 0.97)
FEW = 1  # files of each folder in the short form
TRAIN = ("train", "--data", "{data}", "--out", "f", *TINY, "--epochs", "2", "--freeze", "trunk", "--augment", "none")
# What a command is told, and the files by which its result is known, of each folder "f".
USERS: dict[str, tuple[tuple[tuple[str, ...], str], ...]] = {
    "data": (
        (("train", "--data", "f", "--out", "next", *TINY, "--epochs", "1"), "next/history.csv"),
        ((*TRAIN[:2], "f", "--out", "next", *TRAIN[5:]), "next/history.csv"),
        (("prepare", "{raw}", "--out", "f", "--size", "64", "--resume"), "f/manifest.csv"),
        (("evaluate", "{run}", "--data", "f", "--out", "e", "--resamples", "100", *CPU), "e/predictions.csv"),
    ),
    "run": (
        (("evaluate", "f", "--overwrite", "--resamples", "100", *CPU), "f/evaluate/test/predictions.csv"),
        (("evaluate", "--compare", "f", "{run}", "--out", "c", "--resamples", "100", *CPU), "c/comparison.csv"),
        (("predict", "f", "{image}", *CPU), "predictions.csv"),
        (("explain", "f", "--method", "gradcam", "--num", "2", "--overwrite", *CPU), "f/explain/gradcam/saliency.npz"),
        ((*TRAIN, "--resume"), "f/history.csv"),
        (
            ("train", "--data", "{data}", "--init-from", "f", "--out", "next", *TINY, "--epochs", "1"),
            "next/history.csv",
        ),
    ),
    "gan": (
        (
            ("synthesize", "generate", "f", "--out", "next", "--label", "all", "--num", "4", *CPU),
            "next/images.npy",
        ),
        (("synthesize", "assess", "f", "--features", "{run}", "--draws", "2", "--overwrite", *CPU), ""),
        (
            ("synthesize", "fit", "--data", "{data}", "--out", "f", *FIT, "--on-collapse", "warn", "--resume", *CPU),
            "f/history.csv",
        ),
    ),
}


@dataclass(frozen=True)
class Figures:
    """What a command found, without times: its result, and the cells and warnings of the report's tables."""

    result: bytes
    cells: list[str]
    warns: bool

    def agree(self, whole: Figures) -> bool:
        """Return whether they are those of the whole folder; what the report says is damaged may be missing there."""
        if self.warns:
            return self.result == whole.result and not Counter(self.cells) - Counter(whole.cells)
        return self == whole


def figures_of(cwd: Path, result: str) -> Figures:
    if result and not (cwd / result).is_file():
        return Figures(b"", [], False)
    report = cwd / "f" / "report.html"
    page = report.read_text() if report.is_file() else ""
    cells = [
        cell for cell in re.findall(r"<td[^>]*>.*?</td>", page, re.S) if not re.search(r"\d{4}-\d\d-\d\d|sec", cell)
    ]
    return Figures((cwd / result).read_bytes() if result else b"", cells, "damaged" in page)


def truncate_each(name: str, world: World, folder: Path, files: list[tuple[str, float]]) -> None:
    """Cut files of a folder short, one at a time, and let every command use what is left."""
    source: Path = getattr(world, name)
    expected = {}
    for number, (words, result) in enumerate(USERS[name]):
        cwd = folder / f"whole{number}"
        shutil.copytree(source, cwd / "f")
        ended = world.do(cwd, words)
        assert ended.code == 0, ended.stderr
        expected[words] = figures_of(cwd, result)
    for file, share in files:
        for words, result in USERS[name]:
            cwd = folder / "cut"
            shutil.copytree(source, cwd / "f")
            cut = cwd / "f" / file
            with cut.open("r+b") as stream:
                stream.truncate(int(share * cut.stat().st_size))
            ended = world.do(cwd, words)
            where = (file, share, words, ended.code, ended.stderr)
            assert ended.refused_in_one_line or (ended.code == 0 and ended.is_plain), where
            found = figures_of(cwd, result)
            if file == "report.html":  # which not every command writes again, and none reads
                found = dataclasses.replace(expected[words], result=found.result)
            assert ended.code or found.agree(expected[words]), where
            COUNTS[f"{name}: files cut short, {'refused' if ended.code else 'not needed'}"] += 1
            shutil.rmtree(cwd)


def files_to_cut(folder: Path) -> Iterator[tuple[str, float]]:
    for name, content in sorted(files_of(folder).items()):
        for share in SHARES:
            if int(share * len(content)) < len(content):
                yield name, share


@pytest.mark.parametrize("name", USERS)
def test_a_few_files_cut_short(name: str, world: World, tmp_path: Path) -> None:
    files = list(files_to_cut(getattr(world, name)))
    truncate_each(name, world, tmp_path, random.Random(name).sample(files, FEW))


@pytest.mark.slow
@pytest.mark.parametrize("name", USERS)
def test_every_file_cut_short(name: str, world: World, tmp_path: Path) -> None:
    truncate_each(name, world, tmp_path, list(files_to_cut(getattr(world, name))))


def test_work_in_progress_cut_short(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``prepare --resume`` goes on from."""
    config = PrepareConfig(raw=str(raw), out=str(tmp_path / "out"), size=16)
    prepare(config)
    expected = files_of(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr("breastcli.prepare._finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    wreck = (tmp_path / "out").rename(tmp_path / "wreck")
    for file in sorted(path for path in (wreck / PARTIAL).iterdir()):
        for share in (0.001, 0.5):
            shutil.copytree(wreck, tmp_path / "out")
            with (tmp_path / "out" / PARTIAL / file.name).open("r+b") as stream:
                stream.truncate(int(share * file.stat().st_size))
            try:
                prepare(dataclasses.replace(config, resume=True))
            except UserError:
                assert file.name == "request.json"
                prepare(dataclasses.replace(config, overwrite=True))
            assert files_of(tmp_path / "out") == expected, (file.name, share)
            COUNTS["prepare: work in progress cut short"] += 1
            shutil.rmtree(tmp_path / "out")


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_configuration_cut_short_is_not_read_as_defaults(world: World, tmp_path: Path) -> None:
    """``config.yaml`` is for people and for ``--config``; a run knows its configuration from ``run.json``."""
    run = Path(shutil.copytree(world.run, tmp_path / "f"))
    (run / "config.yaml").write_text("train:\n  arch: timm/test_resnet\n")
    ended = world.do(tmp_path, (*TRAIN, "--resume"))
    assert ended.code == 0, ended.stderr
    assert json.loads((run / "run.json").read_text())["config"]["freeze"] == "trunk"
