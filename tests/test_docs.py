"""The pages that a newcomer reads: their commands are run, and their files are used."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import breastcli

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"


@dataclass
class Step:
    """A command of a page, and the lines shown below it."""

    command: str
    shown: list[str] = field(default_factory=list)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def steps(page: Path) -> list[Step]:
    found: list[Step] = []
    for block in blocks(page, "console"):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append(Step(line.removeprefix("$ ")))
            elif found[-1].command.endswith("\\"):
                found[-1].command += f"\n{line}"
            elif line != "…":
                found[-1].shown.append(" ".join(line.split()))
    return found


def follow(page: Path, folder: Path, package: Path) -> None:
    """Run the commands of a page one after another in ``folder``, as somebody who copies them would."""
    program = folder / "bin" / "breastcli"  # this package, whichever is installed
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m breastcli "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(package)}
    for step in steps(page):
        done = subprocess.run(
            ["bash", "-c", step.command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{step.command}\n{done.stderr}"
        printed = [" ".join(line.split()) for line in (done.stdout + done.stderr).splitlines()]
        for line in step.shown:
            assert any(one.startswith(line) for one in printed), f"{step.command} no longer prints {line!r}"


def test_the_tutorial_does_what_it_says(tmp_path: Path) -> None:
    follow(DOCS / "tutorial.md", tmp_path, REPOSITORY)
    assert (tmp_path / "runs/first/report.html").is_file()
    assert (tmp_path / "data/sample/contact_sheet.png").is_file()


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    """A folder with a copy of the package, and in it the files of the page on adding things."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "breastcli", tmp_path / "breastcli", ignore=ignored)
    for block in blocks(DOCS / "adding.md", "python"):
        first, _, text = block.partition("\n")
        path = tmp_path / first.removeprefix("# ")
        assert not path.exists(), f"{path} is one of our own"
        path.write_text(text, encoding="utf-8")
    return tmp_path


def test_files_of_the_page_on_adding_are_found(extended: Path) -> None:
    """Four kinds of plug-in, each by its file alone, through the real command line."""
    generator = np.random.default_rng(0)
    (extended / "cases").mkdir()
    for case in range(12):
        label = ("benign", "malignant")[case % 2]
        for number in range(6):
            pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(extended / "cases" / f"case{case:02d}_{label}_{number:02d}.png")
    follow(DOCS / "adding.md", extended, extended)
    panels = list((extended / "runs/smallnet/explain/gradtimesmap-gradcam/panels").glob("*.png"))
    assert len(panels) == 4


def test_files_of_the_page_on_adding_are_written_as_ours_are(extended: Path) -> None:
    shutil.copy(REPOSITORY / "pyproject.toml", extended)
    written = [block.partition("\n")[0].removeprefix("# ") for block in blocks(DOCS / "adding.md", "python")]
    assert len(written) == 4
    ruff = Path(sys.executable).with_name("ruff")
    if not ruff.is_file():
        pytest.skip("ruff is not installed")
    for words in (["check"], ["format", "--check"]):
        done = subprocess.run([ruff, *words, *written], cwd=extended, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout


def test_the_citation_file_says_what_it_must() -> None:
    cited = yaml.safe_load((DOCS / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert (cited["cff-version"], cited["type"]) == ("1.2.0", "software")
    assert cited["version"] == breastcli.__version__
    for one in cited["references"]:
        assert {"type", "title", "authors", "year"} <= set(one)
        assert all("family-names" in author or "name" in author for author in one["authors"])


def test_every_data_set_that_has_a_citation_is_in_the_citation_file() -> None:
    from breastcli.data.datasets import DATASETS

    titles = [
        re.sub(r"\W+", " ", one["title"]).casefold()
        for one in yaml.safe_load((DOCS / "CITATION.cff").read_text(encoding="utf-8"))["references"]
    ]
    for name in DATASETS.names():
        citation = re.sub(r"\W+", " ", DATASETS.get(name).citation).casefold()
        if not citation.startswith("none"):
            assert any(title in citation for title in titles), f"{name} is not cited"


@pytest.mark.parametrize("picture", sorted(DOCS.glob("*.svg")), ids=lambda path: path.stem)
def test_pictures_of_the_terminal_are_text(picture: Path) -> None:
    text = picture.read_text(encoding="utf-8")
    assert len(text) < 200_000
    assert "<image" not in text
    assert not re.search(r"url\([\"']?https?:|@import", text)  # a viewer fetches nothing
    assert "drawn by a program" in text.replace("&#160;", " ")
    pages = [REPOSITORY / "README.md", *DOCS.glob("*.md")]
    assert any(picture.name in page.read_text(encoding="utf-8") for page in pages)


def test_the_changelog_knows_this_version() -> None:
    text = (DOCS / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[(.+?)\]", text, re.MULTILINE)[:2] == ["Unreleased", breastcli.__version__]


@pytest.mark.parametrize("page", [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
