"""Thousands of damaged files and odd values: each is read or refused in one line, and none takes long.

The counts are printed at the end of the session.
"""

from __future__ import annotations

import io
import itertools
import random
import shutil
import signal
import string
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from breastcli.config import JOBS, TrainConfig, field_types
from breastcli.configfile import read_section, resolve, to_yaml
from breastcli.data.drawing import draw_field
from breastcli.data.images import RejectedImageError, read_rgb
from breastcli.data.sample_tree import _look, _plans
from breastcli.data.store import PreparedData, open_array
from breastcli.errors import UserError
from breastcli.files import read_csv, read_json, write_csv
from breastcli.models import ModelOptions, build_model
from breastcli.options import flag_of
from breastcli.records import Predictions
from breastcli.system.checkpoint import load_checkpoint, load_initial_weights, load_resume
from breastcli.system.runfolder import find_run

SEED = 20_261_128
NUM_IMAGES, NUM_CONFIGURATIONS, NUM_COMMANDS, NUM_OWN = 2_000, 600, 60, 600
LIMIT_S = 10.0  # for one case, of which the slowest takes a fraction of a second
CPU = torch.device("cpu")


class TookTooLong(BaseException):
    """Not an ``Exception``, so that no reader takes it for damage."""


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(call: Callable[[], Any], refusal: type[Exception]) -> str:
    """Return "read" or "refused"; anything else that happens is a failure of the test."""
    text = None
    try:
        with time_limit():
            call()
    except refusal as error:
        text = str(error)
    if text is None:
        return "read"
    assert len(text.splitlines()) == 1, repr(text)
    assert len(text) < 2000
    return "refused"


def damage(content: bytes, rng: random.Random) -> bytes:
    """Return a file cut off, with bits turned, bytes overwritten, a stretch lost or doubled, or several of these."""
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        kind, place = rng.randrange(6), rng.randrange(len(damaged) or 1)
        near_start = rng.randrange(min(len(damaged) or 1, 128))  # where the headers are
        if kind == 0:
            del damaged[place:]
        elif kind == 1:
            for _ in range(rng.choice((1, 3, 20))):
                if damaged:
                    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        elif kind == 2 and damaged:
            damaged[near_start] ^= 1 << rng.randrange(8)
        elif kind == 3:
            stretch = bytes(rng.choice((0, 255, rng.randrange(256))) for _ in range(rng.choice((1, 2, 4, 8))))
            damaged[near_start : near_start + len(stretch)] = stretch
        elif kind == 4:
            del damaged[place : place + rng.randrange(64)]
        else:
            damaged[place:place] = damaged[place : place + rng.randrange(64)]
    return bytes(damaged)


def originals() -> dict[str, bytes]:
    """Return one drawn field in every format that is read, and some of the variants that each has."""
    plan = next(_plans(64))
    pixels, _ = draw_field(_look(plan, 0), plan.subtype, plan.magnification, 32, 48, np.random.default_rng(0))
    image = Image.fromarray(pixels)
    variants: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "PNG": (image, {}),
        "PNG palette": (image.convert("P"), {}),
        "PNG 16 bit": (Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), {}),
        "PNG RGBA": (image.convert("RGBA"), {}),
        "JPEG": (image, {"quality": 90}),
        "JPEG progressive": (image, {"progressive": True}),
        "TIFF": (image, {}),
        "TIFF tiff_lzw": (image, {"compression": "tiff_lzw"}),
        "TIFF tiff_deflate": (image, {"compression": "tiff_deflate"}),
        "TIFF jpeg": (image, {"compression": "jpeg"}),
        "BMP": (image, {}),
        "BMP palette": (image.convert("P"), {}),
    }
    contents = {}
    for name, (variant, options) in variants.items():
        buffer = io.BytesIO()
        variant.save(buffer, format=name.split()[0], **options)
        contents[name] = buffer.getvalue()
    return contents


def test_damaged_images_are_images_or_rejected(tmp_path: Path, summary: list[str]) -> None:
    rng, contents, found = random.Random(SEED), originals(), Counter()
    file = tmp_path / "a.png"
    for name, content in contents.items():
        file.write_bytes(content)
        assert read_rgb(file).size == (48, 32), name
    for name, _ in zip(itertools.cycle(contents), range(NUM_IMAGES), strict=False):
        file.write_bytes(damage(contents[name], rng))
        found[name.split()[0], outcome(lambda: read_rgb(file), RejectedImageError)] += 1
    kinds = sorted({kind for kind, _ in found})
    counts = ", ".join(f"{kind} {found[kind, 'read']} read, {found[kind, 'refused']} refused" for kind in kinds)
    summary.append(f"fuzz: {found.total():,} damaged images: {counts}")
    assert found.total() == NUM_IMAGES
    assert all(found[kind, how] for kind in kinds for how in ("read", "refused")), "the damage is too mild or too hard"


ODD = [
    *(None, True, False, 0, 1, -1, 2, 16, 64, 2**31, 2**63, 2**64, -(2**70), 10**4000, 0.0, 0.5, -0.5, 1e308, 1e-320),
    *(float("nan"), float("inf"), float("-inf"), "", " ", "0", "-1", "auto", "all", "none", "100x", "6:1:3", "0:0:0"),
    *("1e-4", "nan", "9" * 5000, "a" * 5000, "\0", "\ud800", "\x1b[31m", "[red]", "[/red]", "a\nb", "../..", "/", "~"),
    *("cuda:99", "cpu", "help", "timm/none", "hf-hub:x", "fixed=2", "val", "*", "&x", "!!x", "🔬", "{", "'", '"', "%s"),
    *([], [1], ["a", None], [[]], {}, {"a": 1}, [{}] * 3),
]


def random_value(rng: random.Random) -> Any:
    if rng.random() < 0.7:
        return rng.choice(ODD)
    if rng.random() < 0.5:
        return "".join(rng.choice(string.printable) for _ in range(rng.randrange(12)))
    return rng.choice((rng.randrange(-100, 10_000), rng.uniform(-2, 2)))


def as_yaml(document: dict) -> bytes:
    """Return a document as YAML, also where it holds more than that can say."""
    try:
        text = yaml.safe_dump(document)
    except ValueError:  # a number of more digits than Python writes
        text = f"{next(iter(document))}: {{seed: 0x{'f' * 4000}}}"
    return text.encode(errors="surrogatepass")


def random_section(rng: random.Random, job: str) -> dict[str, Any]:
    """Return a few values for keys of a job, now and then for one that it does not have."""
    keys = [*field_types(JOBS[job]), "epoch", "", "\x1b"]
    return {rng.choice(keys): random_value(rng) for _ in range(rng.choice((1, 1, 2, 4)))}


def test_odd_configurations_are_valid_or_refused(tmp_path: Path, summary: list[str]) -> None:
    rng, found = random.Random(SEED), Counter()
    for number in range(NUM_CONFIGURATIONS):
        job = rng.choice(list(JOBS))
        section = random_section(rng, job)

        def settle(job: str = job, section: dict = section, number: int = number) -> None:
            given = section
            if number % 2:  # through a file, where it can be written to one
                (tmp_path / "c.yaml").write_bytes(as_yaml({job: section}))
                given = read_section(tmp_path / "c.yaml", job)
            config = resolve(JOBS[job], given, {})
            (tmp_path / "again.yaml").write_text(to_yaml(config))
            assert resolve(JOBS[job], read_section(tmp_path / "again.yaml", job), {}) == config

        found[outcome(settle, UserError)] += 1
    summary.append(f"fuzz: {found.total():,} configurations: {found['read']} valid, {found['refused']} refused")
    assert found["read"] > 20
    assert found["refused"] > 200


def test_odd_flags_end_in_one_line(cli: Callable, summary: list[str]) -> None:
    """``--print-config`` settles the configuration and stops."""
    rng, found = random.Random(SEED), Counter()
    texts = [value for value in ODD if isinstance(value, str) and "\0" not in value]
    for _ in range(NUM_COMMANDS):
        job = rng.choice(list(JOBS))
        words = [job, "--print-config"]
        for name in rng.sample(list(field_types(JOBS[job])), 2):
            words += [flag_of(name), rng.choice((rng.choice(texts), str(rng.randrange(-3, 300))))]
        done = cli(*words)
        found[done.code] += 1
        assert done.code in (0, 1, 2), words
        assert "Traceback" not in done.stderr
        assert "defect of breastcli" not in done.stderr, (words, done.stderr)
        if done.stderr.startswith("error:"):
            assert len(done.stderr.splitlines()) == 1
            assert done.stderr.strip().isprintable()
    summary.append(f"fuzz: {found.total()} command lines: {found[0]} valid, {found[1] + found[2]} refused")
    assert found[0]
    assert found[2]


def test_our_own_files_damaged(prepared: Path, trained: Path, tmp_path: Path, summary: list[str]) -> None:
    """Safetensors, arrays, JSON, YAML, CSV and torch files, each through the reader that the jobs use."""
    rng = random.Random(SEED)
    data, run = shutil.copytree(prepared, tmp_path / "data"), shutil.copytree(trained, tmp_path / "run")
    write_csv(tmp_path / "p.csv", ("image_id", "predicted", "prob_b", "prob_m"), [("=a", "b", 0.75, 0.25)] * 5)
    network = build_model(ModelOptions("timm/test_resnet", 2, 32))
    best, resume = run / "checkpoints/best.safetensors", run / "checkpoints/resume.pt"
    readers: dict[Path, Callable[[], Any]] = {
        best: lambda: (load_checkpoint(best, CPU), load_initial_weights(network, best)),
        resume: lambda: (load_resume(resume, CPU), load_initial_weights(network, resume)),
        run / "run.json": lambda: find_run(str(run)),
        run / "config.yaml": lambda: resolve(TrainConfig, read_section(run / "config.yaml", "train"), {}),
        run / "history.csv": lambda: read_csv(run / "history.csv"),
        run / "checkpoints/best.json": lambda: read_json(run / "checkpoints/best.json"),
        data / "dataset.json": lambda: PreparedData.open(data),
        data / "manifest.csv": lambda: PreparedData.open(data),
        data / "images.npy": lambda: (PreparedData.open(data), open_array(data / "images.npy")),
        tmp_path / "p.csv": lambda: Predictions.from_csv(tmp_path / "p.csv"),
    }
    contents = {path: path.read_bytes() for path in readers}
    found: Counter[tuple[str, str]] = Counter()
    for path, _ in zip(itertools.cycle(readers), range(NUM_OWN), strict=False):
        path.write_bytes(damage(contents[path], rng))
        found[path.name, outcome(readers[path], UserError)] += 1
        path.write_bytes(contents[path])
    for path, read in readers.items():
        assert path == resume or outcome(read, UserError) == "read", path
        assert found[path.name, "refused"], path
    refused = sum(count for (_, how), count in found.items() if how == "refused")
    summary.append(f"fuzz: {found.total()} damaged files of our own: {found.total() - refused} read, {refused} refused")


@pytest.mark.parametrize("kind", ["read", "refused"])
def test_the_limit_and_the_outcomes_are_real(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise UserError("no")

    assert outcome(refuse if kind == "refused" else lambda: None, UserError) == kind
    monkeypatch.setattr("test_fuzz.LIMIT_S", 0.05)
    with pytest.raises(TookTooLong):
        outcome(lambda: [None for _ in iter(int, 1)], UserError)  # never ends, and leaves room for the signal
