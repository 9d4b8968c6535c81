"""The commands that faults are put into, what they work on, and what must come out of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from injecting import Ended, Injector, files_of

CPU = ("--device", "cpu")
TINY = ("--arch", "timm/test_resnet", "--lr", "1e-3", "--batch-size", "16", *CPU, "--precision", "fp32")
FROZEN = ("train", "--data", "{data}", *TINY, "--epochs", "2", "--freeze", "trunk", "--augment", "none")
FIT = ("--size", "64", "--width", "4", "--batch-size", "8", "--kimg", "0.064", "--snapshot", "0.032")
# What tells when and how a job ran; it differs between two runs that gave the same. What else resume.pt holds is
# compared as the weights that come of it.
ACCOUNTS = {"run.json", "config.yaml", "log.txt", "timing.csv", "report.html", "model_card.md", "resume.pt"}


@dataclass(frozen=True)
class World:
    """What the commands work on; none of it may be changed.

    Attributes:
        injector: runs commands.
        raw: a raw data set.
        data: it prepared.
        run: a network trained on that, evaluated and explained.
        gan: a generator fitted to it, and assessed.
        image: an image file.
    """

    injector: Injector
    raw: Path
    data: Path
    run: Path
    gan: Path
    image: Path

    def do(self, cwd: Path, words: tuple[str, ...], **faults: object) -> Ended:
        """Run a command in whose words the world's parts are named in braces."""
        parts = {name: getattr(self, name) for name in ("raw", "data", "run", "gan", "image")}
        return self.injector.run(cwd, *(word.format(**parts) for word in words), **faults)  # type: ignore[arg-type]


def make_world(injector: Injector, raw: Path, folder: Path) -> World:
    """Let the commands themselves make what others work on."""
    folder.chmod(0o755)
    world = World(injector, raw, folder / "data", folder / "run", folder / "gan", next(raw.rglob("*.png")))
    for words in (
        ("prepare", "{raw}", "--out", "data", "--size", "64"),
        (*FROZEN, "--out", "run"),
        ("evaluate", "run", "--resamples", "100", *CPU),
        ("explain", "run", "--method", "gradcam", "--num", "3", "--faithfulness", *CPU),
        ("synthesize", "fit", "--data", "{data}", "--out", "gan", *FIT, "--on-collapse", "warn", *CPU),
        ("synthesize", "assess", "gan", "--features", "{run}", "--draws", "2", *CPU),
    ):
        ended = world.do(folder, words)
        assert ended.code == 0, ended.stderr
    return world


@dataclass(frozen=True)
class Case:
    """A command that makes ``out`` in the folder where it runs.

    Attributes:
        words: the command.
        again: what completes it after a fault: the first of these that is not refused.
        users: commands that take what it left, whole or not.
        source: the part of the world that ``out`` is a copy of at first, or "".
        status: whether ``out/run.json`` must say in the end that it is finished.
        stays: beginnings of names of what the source holds and ``--resume`` keeps, if the kill came before its removal.
    """

    words: tuple[str, ...]
    again: tuple[tuple[str, ...], ...]
    users: tuple[tuple[str, ...], ...]
    source: str = ""
    status: bool = False
    stays: tuple[str, ...] = ()

    def start(self, world: World, cwd: Path) -> Path:
        """Make the folder to run in, and what ``out`` holds before."""
        cwd.mkdir(parents=True)
        if self.source:
            shutil.copytree(getattr(world, self.source), cwd / "out")
        return cwd


TRAIN_ON_IT = ("train", "--data", "out", "--out", "next", *TINY, "--epochs", "1")
EVALUATE_IT = ("evaluate", "out", "--resamples", "100", "--overwrite", *CPU)
PREDICT_IT = ("predict", "out", "{image}", *CPU)
PREPARE = ("prepare", "{raw}", "--out", "out", "--size", "64")
CASES = {
    "prepare": Case((*PREPARE, "--stain", "macenko"), (("--resume",),), (TRAIN_ON_IT, (*PREPARE, "--audit"))),
    "prepare --overwrite": Case(
        (*PREPARE, "--seed", "1", "--drop-duplicates", "keep-first", "--overwrite"),
        (("--resume",),),
        (TRAIN_ON_IT,),
        source="data",
    ),
    "train": Case(
        ("train", "--data", "{data}", "--out", "out", *TINY, "--epochs", "3"),
        (("--resume",),),
        (EVALUATE_IT, PREDICT_IT),
        status=True,
    ),
    "train --overwrite": Case(
        ("train", "--data", "{data}", "--out", "out", *TINY, "--epochs", "2", "--seed", "1", "--overwrite"),
        (("--resume",), ()),
        (EVALUATE_IT, PREDICT_IT),
        source="run",
        status=True,
    ),
    "train --overwrite of the same": Case(
        (*FROZEN, "--out", "out", "--overwrite"),
        (("--resume",),),
        (EVALUATE_IT, PREDICT_IT),
        source="run",
        status=True,
        stays=("evaluate/", "explain/"),
    ),
    "synthesize fit": Case(
        ("synthesize", "fit", "--data", "{data}", "--out", "out", *FIT, "--on-collapse", "warn", *CPU),
        (("--resume",),),
        (("synthesize", "generate", "out", "--out", "next", "--label", "all", "--num", "8", *CPU),),
        status=True,
    ),
    "synthesize generate": Case(
        ("synthesize", "generate", "{gan}", "--out", "out", "--label", "all", "--num", "200", *CPU),
        (("--overwrite",),),
        (("train", "--data", "{data}", "--extra", "out", "--out", "next", *TINY, "--epochs", "1"),),
    ),
    "synthesize assess": Case(
        ("synthesize", "assess", "out", "--features", "{run}", "--draws", "2", "--overwrite", *CPU),
        ((),),
        (("synthesize", "generate", "out", "--out", "next", "--label", "all", "--num", "8", *CPU),),
        source="gan",
        status=True,
    ),
    "evaluate": Case(
        ("evaluate", "out", "--resamples", "100", "--tta", "d4", "--embedding", "--overwrite", *CPU),
        ((),),
        (("evaluate", "--compare", "out", "{run}", "--resamples", "100", *CPU),),
        source="run",
        status=True,
    ),
    "explain": Case(
        (
            "explain",
            "out",
            "--method",
            "gradcam",
            "--num",
            "4",
            "--overwrite",
            *CPU,
        ),
        ((),),
        (EVALUATE_IT,),
        source="run",
        status=True,
    ),
}


@dataclass(frozen=True)
class Undisturbed:
    """What a command gives when nothing happens.

    Attributes:
        files: contents by name.
        seconds: how long it takes.
    """

    files: dict[str, bytes]
    seconds: float


def run_undisturbed(case: Case, world: World, folder: Path) -> Undisturbed:
    """Run a command with nothing happening."""
    cwd = case.start(world, folder / "undisturbed")
    ended = world.do(cwd, case.words)
    assert ended.code == 0, ended.stderr
    return Undisturbed(files_of(cwd / "out"), ended.seconds)


def differing(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """Return the files that only one side has, or that differ although they should not."""
    names = found.keys() | expected.keys()
    return sorted(
        name
        for name in names
        if name not in found
        or name not in expected
        or (name.rpartition("/")[2] not in ACCOUNTS and found[name] != expected[name])
    )


def complete(case: Case, world: World, cwd: Path) -> None:
    """Complete a command after a fault as its own advice says."""
    for more in case.again:
        ended = world.do(cwd, (*case.words, *more))
        if ended.code == 0:
            return
        assert ended.refused_in_one_line, ended.stderr
    raise AssertionError(ended.stderr)


def check_wreck(case: Case, world: World, cwd: Path, make: Callable[[Path, Path], object] = shutil.copytree) -> None:
    """Check that every command either works on what a fault left or refuses it in one line."""
    if not (cwd / "out").is_dir():
        return
    for number, words in enumerate(case.users):
        place = cwd / f"user{number}"
        place.mkdir()
        make(cwd / "out", place / "out")
        ended = world.do(place, words)
        assert (ended.code == 0 and ended.is_plain) or ended.refused_in_one_line, (words, ended.code, ended.stderr)
        shutil.rmtree(place)
