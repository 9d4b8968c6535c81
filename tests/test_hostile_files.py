"""Files that somebody made to do harm: refused in one line, never run, never waited for, never written through."""

from __future__ import annotations

import csv
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Outcome
from PIL import Image
from safetensors.torch import load_file, save_file

from breastcli.config import EvaluateConfig, PredictConfig
from breastcli.configfile import read_section, resolve
from breastcli.data.images import RejectedImageError, decode, read_rgb
from breastcli.errors import UsageError, UserError
from breastcli.evaluate import evaluate
from breastcli.files import read_csv, replacing, write_csv
from breastcli.models import ModelOptions, build_model
from breastcli.records import Predictions, strings
from breastcli.system.checkpoint import load_checkpoint, load_initial_weights, load_resume
from breastcli.system.embeddings import _read
from breastcli.system.runfolder import remove_explanation

CPU = torch.device("cpu")
QUICK = ("--device", "cpu", "--precision", "fp32")
MAPS = ("--method", "gradcam")
TRAIN = ("train", "--arch", "timm/test_resnet", "--epochs", 1, "--batch-size", 16, *QUICK)
ESCAPES = "\x1b]0;owned\x07\x1b[31m"


class Malicious:
    """Unpickled, it leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (os.system, (f"touch {self.marker}",))


def refused(done: Outcome, code: int, *texts: str) -> None:
    """Assert that a command failed with one clear line."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.code == code, done.stderr
    assert done.stdout == ""
    assert len(errors) == 1, done.stderr
    assert done.stderr.splitlines()[-1] == errors[0]
    assert errors[0].isprintable()
    assert "defect of breastcli" not in errors[0]
    assert "Traceback" not in done.stderr
    for text in texts:
        assert text in errors[0]


def draw(path: Path, side_px: int = 40) -> Path:
    rows, columns = np.mgrid[:side_px, :side_px]
    pixels = np.stack([rows * 4, columns * 4, (rows + columns) * 2], axis=2).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, format="PNG")
    return path


# Code in files


@pytest.mark.parametrize("form", ["torch", "pickle", "nested"])
def test_code_in_weights_does_not_run(form: str, cli: Callable, prepared: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    if form == "pickle":
        (tmp_path / "w.pth").write_bytes(pickle.dumps(Malicious(marker)))
    else:
        torch.save({"state_dict": {"x": torch.zeros(1), "y": [Malicious(marker)]}}, tmp_path / "w.pth")
    done = cli(*TRAIN, "--data", prepared, "--weights", "w.pth", "--out", "run")
    refused(done, 1, "--weights w.pth", "could run code", "save it as safetensors")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Malicious(marker)))  # it is what it says
    assert marker.exists()


def test_code_in_a_resume_file_does_not_run(cli: Callable, own_run: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    torch.save({"history": Malicious(marker)}, own_run / "checkpoints/resume.pt")
    done = cli("train", "--config", own_run / "config.yaml", "--out", own_run, "--resume")
    refused(done, 1, "resume.pt is damaged", "--overwrite")
    assert not marker.exists()


def test_code_in_inception_weights_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch-fidelity itself would run it."""
    pytest.importorskip("torch_fidelity")
    from breastcli.gan.features import INCEPTION_FILE, load_features

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save({"x": Malicious(tmp_path / "marker")}, tmp_path / "checkpoints" / INCEPTION_FILE)
    with pytest.raises(UserError, match="is damaged"):
        load_features("inception", {}, None, CPU)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("content", [[1, 2], {"history": 3}, {"history": [{}], "model": {}}])
def test_a_resume_file_of_another_content(content: object, cli: Callable, own_run: Path) -> None:
    torch.save(content, own_run / "checkpoints/resume.pt")
    done = cli("train", "--config", own_run / "config.yaml", "--out", own_run, "--resume")
    refused(done, 1, "resume.pt", "start again with --overwrite")


@pytest.mark.parametrize("key", ["model", "optimizer", "history", "options"])
def test_a_resume_file_of_another_network(key: str, cli: Callable, own_run: Path) -> None:
    saved = load_resume(own_run / "checkpoints/resume.pt", CPU)
    torch.save({**saved, key: [{"epoch": 1}] if key == "history" else {"x": 1}}, own_run / "checkpoints/resume.pt")
    done = cli("train", "--config", own_run / "config.yaml", "--out", own_run, "--resume")
    refused(done, 1, "resume.pt is damaged", "start again with --overwrite")


def test_compressed_torch_files_are_not_unpacked(tmp_path: Path) -> None:
    """A hundred kilobytes would become a hundred megabytes, and a hundred megabytes a hundred gigabytes."""
    torch.save({"x": torch.zeros(25_000_000)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "w.pth", "w", 8) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert (tmp_path / "w.pth").stat().st_size < 200_000
    with pytest.raises(UserError, match="compressed"):
        load_initial_weights(build_model(ModelOptions("timm/test_resnet", 2, 64)), tmp_path / "w.pth")


# Arrays


def make_array(path: Path, kind: str) -> None:
    if kind == "objects":
        np.save(path, np.array([Malicious(path.with_name("marker"))] * 4, dtype=object), allow_pickle=True)
    elif kind == "archive":
        with path.open("wb") as file:
            np.savez(file, x=np.zeros(3))
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Malicious(path.with_name("marker"))))
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "promises":
        with path.open("wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (2**40, 16)}
            np.lib.format.write_array_header_1_0(file, header)
    else:
        path.write_bytes(b"\x93NUMPY\x01\x00v\x00" + (b"(" * 117 + b"\n"))


KINDS = ["objects", "archive", "pickle", "promises", "brackets"]


@pytest.mark.parametrize("kind", KINDS)
def test_images_that_are_no_plain_array(kind: str, cli: Callable, prepared: Path, tmp_path: Path) -> None:
    data = shutil.copytree(prepared, tmp_path / "data")
    size = (data / "images.npy").stat().st_size
    make_array(data / "images.npy", kind)
    os.truncate(data / "images.npy", size)  # the size alone would give it away
    refused(cli(*TRAIN, "--data", "data", "--out", "run"), 1, "images.npy is damaged")
    assert not (data / "marker").exists()


@pytest.mark.parametrize("kind", [*KINDS, "pipe"])
def test_embeddings_that_are_no_plain_array_are_computed_anew(kind: str, tmp_path: Path) -> None:
    make_array(tmp_path / "table.npy", kind)
    assert _read(tmp_path / "table.npy", 4) is None
    assert not (tmp_path / "marker").exists()


# Configuration files

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: !!python/object/apply:os.system ['touch marker']", "not valid YAML in line 1"),
        ("train: {data: !!python/name:os.system }", "not valid YAML in line 1"),
        (LAUGHS, "holds an alias"),
        (f"{LAUGHS}train: {{arch: *i}}", "holds an alias"),
        ("train: {data: " + "[" * 20_000, "not valid YAML"),
        ("# " + "x" * 200_000, "more than 100,000"),
        ("train: {epochs: !!bool maybe}", "not valid YAML"),
        ("train: {data: 2026-99-99}", "not valid YAML"),
        (f"train: {{epochs: {'9' * 5000}}}", "not valid YAML"),
        (f"train: {{epochs: 0x{'f' * 5000}}}", "--epochs: out of range"),
        ('train: {data: "a\\0b"}', "--data a\\x00b: not UTF-8"),
        ('train: {data: "\\ud800"}', "--data \\ud800: not UTF-8"),
        ("train: {data: 2026-01-01}", "--data: expected str, not date"),
        ("train: {lr: .nan}", "not a finite number"),
        ("train: {epochs: [1]}", "--epochs: expected int, not tuple"),
        ("train: {null: 1}", "unknown key 'None'"),
        ('train: {"\\e[31m": 1}', "unknown key"),
    ],
)
def test_hostile_configurations(text: str, message: str, cli: Callable, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    refused(cli("train", "--config", "c.yaml"), 2, message)
    assert not (tmp_path / "marker").exists()


def test_items_of_a_list_are_checked(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("predict: {images: [a.png, {b: 1}]}")
    with pytest.raises(UsageError, match="--images: holds dict, not text"):
        resolve(PredictConfig, read_section(tmp_path / "c.yaml", "predict"), {})


@pytest.mark.parametrize(
    "text",
    ["", "train: {}", "train: {epochs: many}", "train: [1]", "train: {epochs: *x}", "\0", "train: {fold: -1}", "- 1"],
)
def test_a_runs_own_configuration_of_wrong_types(text: str, cli: Callable, own_run: Path) -> None:
    """Of a run from before ``run.json`` held the configuration too."""
    info = json.loads((own_run / "run.json").read_text())
    del info["config"]
    (own_run / "run.json").write_text(json.dumps(info))
    (own_run / "config.yaml").write_text(text)
    refused(cli("evaluate", own_run, *QUICK), 1, "config.yaml", "start the run again")


@pytest.mark.parametrize("values", [7, [], {}, {"epochs": "many"}, {"fold": -1}, {"arch": {"a": 1}}, {"unheard_of": 1}])
def test_a_configuration_of_wrong_types_in_the_account_of_a_run(values: object, cli: Callable, own_run: Path) -> None:
    info = json.loads((own_run / "run.json").read_text())
    (own_run / "run.json").write_text(json.dumps(info | {"config": values}))
    refused(cli("evaluate", own_run, *QUICK), 1, "run.json", "start the run again")


# Weights


def tamper(path: Path, change: Callable[[dict], None]) -> None:
    """Rewrite the header of a safetensors file, the data being left."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def tamper_facts(path: Path, change: Callable[[dict], None]) -> None:
    """Change what a checkpoint of ours tells of itself."""

    def apply(header: dict) -> None:
        facts = json.loads(header["__metadata__"]["breastcli"])
        change(facts)
        header["__metadata__"]["breastcli"] = json.dumps(facts)

    tamper(path, apply)


def first_tensor(header: dict) -> dict:
    return next(value for name, value in header.items() if name != "__metadata__")


STRUCTURE: dict[str, Callable[[dict], None]] = {
    "offsets out of range": lambda header: first_tensor(header).update(data_offsets=[0, 2**50]),
    "negative offsets": lambda header: first_tensor(header).update(data_offsets=[-8, 8]),
    "overlapping": lambda header: [one.update(data_offsets=[0, 4]) for one in header.values() if "dtype" in one],
    "unknown type": lambda header: first_tensor(header).update(dtype="F1"),
    "huge shape": lambda header: first_tensor(header).update(shape=[2**40, 2**40]),
    "no metadata": lambda header: header.update(__metadata__=[1]),
}


@pytest.mark.parametrize("kind", [*STRUCTURE, "header too long", "header of nothing", "short"])
def test_safetensors_of_a_wrong_structure(kind: str, cli: Callable, own_run: Path, raw: Path, prepared: Path) -> None:
    best = own_run / "checkpoints/best.safetensors"
    if kind in STRUCTURE:
        tamper(best, STRUCTURE[kind])
    else:
        content = best.read_bytes()
        length = {"header too long": 2**62, "header of nothing": 0, "short": len(content)}[kind]
        best.write_bytes(struct.pack("<Q", length) + content[8:])
    refused(cli("predict", own_run, raw, "--out", "p.csv", *QUICK), 1, "best.safetensors is damaged")
    done = cli(*TRAIN, "--data", prepared, "--weights", best, "--out", "new")
    refused(done, 1, "best.safetensors")


def test_tensors_of_a_wrong_type_or_shape(own_run: Path) -> None:
    best = own_run / "checkpoints/best.safetensors"
    tensors = load_file(best)
    name = next(name for name, one in tensors.items() if one.is_floating_point())
    with best.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    save_file({**tensors, name: torch.zeros(3)}, best, header["__metadata__"])
    with pytest.raises(UserError, match="is damaged"):
        load_checkpoint(best, CPU)
    save_file({**tensors, name: tensors[name].to(torch.int8)}, best, header["__metadata__"])
    model, _ = load_checkpoint(best, CPU)  # torch converts it; the network's own type stays
    assert model.state_dict()[name].dtype == torch.float32


FACTS: dict[str, Callable[[dict], None]] = {
    "classes are a number": lambda facts: facts.update(classes=3),
    "classes too many": lambda facts: facts.update(classes=["a", "b", "c"]),
    "no data set": lambda facts: facts.pop("dataset"),
    "ancestors": lambda facts: facts.update(ancestors=[1]),
    "synthetic": lambda facts: facts.update(synthetic="yes"),
    "stain": lambda facts: facts.update(stain={"method": "macenko"}),
    "another network": lambda facts: facts["model"].update(arch="timm/none"),
    "an option too many": lambda facts: facts["model"].update(device="x"),
    "a billion classes": lambda facts: facts["model"].update(num_classes=10**9),
    "a billion pixels": lambda facts: facts["model"].update(size_px=10**9),
    "a network of the hub": lambda facts: facts["model"].update(arch="hf-hub:some/body"),
    "a file to load": lambda facts: facts["model"].update(settings={"checkpoint_path": "evil.pth"}),
    "a place to load from": lambda facts: facts["model"].update(settings={"pretrained_cfg": {"file": "evil.pth"}}),
    "NaN": lambda facts: facts.update(epoch=float("nan")),
}


@pytest.mark.parametrize("kind", FACTS)
def test_checkpoints_that_tell_nonsense(
    kind: str, cli: Callable, own_run: Path, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the network nor another file is asked for what a header names."""
    import socket

    def unreachable(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    torch.save({"x": Malicious(tmp_path / "marker")}, tmp_path / "evil.pth")
    tamper_facts(own_run / "checkpoints/best.safetensors", FACTS[kind])
    refused(cli("predict", own_run, raw, "--out", "p.csv", *QUICK), 1)
    assert not (tmp_path / "marker").exists()
    assert not (tmp_path / "p.csv").exists()


# Images


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width_px: int, height_px: int, *chunks: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0))
    rows = zlib.compress(b"\0" * min(height_px * (1 + 3 * width_px), 10_000_000))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@cache
def deflated_zeros(size: int) -> bytes:
    packer = zlib.compressobj(9)
    block = b"\0" * 2**20
    return b"".join(packer.compress(block) for _ in range(size // len(block))) + packer.flush()


def tiff(*tags: tuple[int, int, int, int]) -> bytes:
    """Return a little-endian TIFF of one directory: (tag, type, count, value)."""
    return (
        b"II*\0\x08\0\0\0"
        + struct.pack("<H", len(tags))
        + b"".join(struct.pack("<HHII", *tag) for tag in tags)
        + b"\0" * 64
    )


PLAIN_TIFF = ((258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8), (278, 4, 1, 40), (279, 4, 1, 1600))


def make_image(path: Path, kind: str) -> None:
    zeros = deflated_zeros(2**26)  # a sixty-fourth of a gigabyte a kilobyte
    many = [Image.new("RGB", (40, 40), (number, 0, 0)) for number in range(30)]
    contents = {
        "60000x60000": lambda: png(60_000, 60_000),
        "65535x1 million": lambda: png(2**31 - 1, 2**31 - 1),
        "64 MB of text": lambda: png(40, 40, chunk(b"zTXt", b"k\0\0" + zeros)),
        "64 MB of profile": lambda: png(40, 40, chunk(b"iCCP", b"p\0\0" + zeros)),
        "64 MB of international text": lambda: png(40, 40, chunk(b"iTXt", b"k\0\1\0\0\0" + zeros)),
        "a huge TIFF": lambda: tiff((256, 4, 1, 2**31), (257, 4, 1, 2**31), *PLAIN_TIFF),
        "a TIFF with tags of gigabytes": lambda: tiff((256, 12, 2**32 - 1, 8), (257, 4, 1, 40), *PLAIN_TIFF),
        "a TIFF that leads to itself": lambda: b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
        "an archive": lambda: b"PK\x03\x04" + b"\0" * 100,
        "postscript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n(x) print\n",
        "a script": lambda: b"#!/bin/sh\ntouch marker\n",
        "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    }
    if kind == "GIF":
        many[0].save(path, format="GIF", save_all=True, append_images=many[1:])
    elif kind == "frames":
        many[0].save(path, format="TIFF", save_all=True, append_images=many[1:])
    elif kind == "animated PNG":
        many[0].save(path, format="PNG", save_all=True, append_images=many[1:])
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(contents[kind]())


BOMBS = {
    "60000x60000": "pixels",
    "65535x1 million": "pixels",
    "64 MB of text": "cannot be decoded",
    "64 MB of profile": "",  # Pillow passes over it
    "64 MB of international text": "cannot be decoded",
    "a huge TIFF": "pixels",
    "a TIFF with tags of gigabytes": "",
    "a TIFF that leads to itself": "",
    "an archive": "not an image",
    "postscript": "not an image",
    "a script": "not an image",
    "SVG": "not an image",
    "GIF": "not an image",
    "frames": "holds 30 frames",
    "animated PNG": "holds 30 frames",
    "pipe": "not a regular file",
    "device": "not a regular file",
    "loop": "cannot be read (Too many levels",
    "folder": "not a regular file",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_images_that_are_traps(kind: str, tmp_path: Path) -> None:
    import resource
    import time

    make_image(tmp_path / "a.png", kind)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    if BOMBS[kind]:
        with pytest.raises(RejectedImageError) as caught:
            read_rgb(tmp_path / "a.png")
        assert BOMBS[kind] in str(caught.value)
    else:
        decode(tmp_path / "a.png", 32)  # an image or a reason
    assert time.monotonic() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


def test_predict_leaves_out_every_trap_and_reads_the_rest(cli: Callable, own_run: Path, tmp_path: Path) -> None:
    named = [draw(tmp_path / "in/good.png")]
    for number, kind in enumerate(kind for kind, reason in BOMBS.items() if reason):
        named.append(tmp_path / f"in/{number}.png")
        if kind != "folder":  # a folder would be searched
            make_image(named[-1], kind)
        else:
            named.pop()
    done = cli("predict", own_run, *named, "--json", *QUICK)
    assert done.code == 0, done.stderr
    assert [one["path"] for one in done.json["images"]] == [str(named[0])]
    assert len(done.json["rejected"]) == len(named) - 1
    assert "Traceback" not in done.stderr


def test_a_film_leaves_out_what_is_no_picture(tmp_path: Path) -> None:
    from breastcli.reporting.synthesis_plots import write_film

    files = [draw(tmp_path / "00000001.png"), tmp_path / "00000002.png", draw(tmp_path / "00000003.png")]
    make_image(files[1], "postscript")
    write_film(files, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        assert film.size == (40, 40)
    write_film(files[1:2], tmp_path / "none.gif")
    assert not (tmp_path / "none.gif").exists()


def test_masks_are_opened_as_carefully(tmp_path: Path) -> None:
    from breastcli.data.masks import MaskProblem, read_mask

    for number, kind in enumerate(kind for kind, reason in BOMBS.items() if reason):
        make_image(tmp_path / f"{number}.png", kind)
        with pytest.raises(MaskProblem) as caught:
            read_mask(tmp_path / f"{number}.png", (40, 40), 32)
        assert caught.value.kind == "unreadable", kind


# Paths that files name


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "a/../../b.png"])
def test_paths_of_a_manifest_stay_below(path: str, cli: Callable, prepared: Path, tmp_path: Path) -> None:
    data = shutil.copytree(prepared, tmp_path / "data")
    with (data / "manifest.csv").open(newline="") as file:
        head, first, *others = csv.reader(file)
    first[head.index("path")] = path
    with (data / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, first, *others])
    refused(cli(*TRAIN, "--data", "data", "--out", "run"), 1, "manifest.csv line 2", "leads out of the raw folder")


@pytest.mark.parametrize(
    "panel", ["../../../victim.png", "/victim.png", "panels/../../../../victim.png", "config.yaml"]
)
def test_panels_of_an_explanation_stay_below(panel: str, tmp_path: Path) -> None:
    """A document tells which panels to remove: it must not reach anything else, ours or not."""
    out = tmp_path / "run/explain/gradcam"
    panels = [draw(out / "panels/a.png"), draw(out / "gallery.png")]
    victims = [draw(tmp_path / "victim.png"), draw(tmp_path / "run/victim.png"), draw(out / "config.yaml")]
    named = f"{tmp_path}/victim.png" if panel.startswith("/") else panel
    (out / "explain.json").write_text(json.dumps({"images": [{"panel": named}, {"panel": "panels/a.png"}]}))
    remove_explanation(out)
    assert all(victim.is_file() for victim in victims)
    assert not any(panel.exists() for panel in panels)


def test_a_generator_does_not_choose_where_to_write(tmp_path: Path) -> None:
    from breastcli.config import SynthesizeConfig
    from breastcli.gan.folder import images_folder

    facts = {"data": str(tmp_path / "home"), "mag": "all", "fold": None, "smoke": False}
    with pytest.raises(UserError, match="no prepared folder here: name the folder to write with --out"):
        images_folder(SynthesizeConfig(), facts)


# Links


def test_links_in_a_raw_folder(cli: Callable, raw: Path, tmp_path: Path) -> None:
    """Links to files are read, links to folders are not entered, and both are told of."""
    copy = shutil.copytree(raw, tmp_path / "raw")
    file = next((copy / "BreaKHis_v1").rglob("*.png"))
    shutil.move(file, tmp_path / "elsewhere.png")
    file.symlink_to(tmp_path / "elsewhere.png")
    shutil.copytree(raw / "BreaKHis_v1", tmp_path / "outside")
    (copy / "loop").symlink_to(copy)
    (copy / "outside").symlink_to(tmp_path / "outside")
    (copy / "dangling.png").symlink_to("nowhere.png")
    os.mkfifo(copy / "pipe.png")
    done = cli("prepare", "raw", "--out", "data", "--size", 32, "--json")
    assert done.code == 0, done.stderr
    assert done.json["dataset"]["num_images"] == 96
    reasons = {one["path"]: one["reason"] for one in done.json["rejected"]}
    assert reasons == {
        "loop": "a link to a folder, which is not followed",
        "outside": "a link to a folder, which is not followed",
        "dangling.png": "neither a file nor a link to one",
        "pipe.png": "neither a file nor a link to one",
    }


@pytest.mark.parametrize("name", [".partial", "embeddings"])
def test_prepare_neither_writes_nor_removes_through_a_link(
    name: str, cli: Callable, raw: Path, prepared: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(prepared, tmp_path / "data")
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/0123456789abcdef-0.npy").write_text("precious")
    (data / name).symlink_to(tmp_path / "victim")
    done = cli("prepare", raw, "--out", "data", "--size", 32, "--overwrite")
    refused(done, 1, f"data/{name} is a link", "remove it")
    assert [path.name for path in (tmp_path / "victim").iterdir()] == ["0123456789abcdef-0.npy"]


@pytest.mark.parametrize("name", ["images.npy", "decoded.csv", "request.json"])
def test_prepare_resumes_through_no_link(name: str, cli: Callable, raw: Path, tmp_path: Path) -> None:
    (tmp_path / "data/.partial").mkdir(parents=True)
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "data/.partial" / name).symlink_to(tmp_path / "victim")
    refused(cli("prepare", raw, "--out", "data", "--size", 32, "--resume"), 1, f"{name} is a link")
    assert (tmp_path / "victim").read_text() == "precious"


def test_train_neither_writes_nor_removes_through_a_link(cli: Callable, own_run: Path, tmp_path: Path) -> None:
    victims = {
        name: tmp_path / "victim" / name for name in ("best.safetensors", "metrics.json", "explain.json", "gallery.png")
    }
    (tmp_path / "victim").mkdir()
    for victim in victims.values():
        victim.write_text('{"precious": 1}')
    (own_run / "evaluate").mkdir()
    (own_run / "explain").mkdir()
    (own_run / "evaluate/test").symlink_to(tmp_path / "victim")
    (own_run / "explain/gradcam").symlink_to(tmp_path / "victim")
    again = ("train", "--config", own_run / "config.yaml", "--out", own_run, "--epochs", 1, "--overwrite")
    assert cli(*again).code == 0
    refused(cli("evaluate", own_run, "--overwrite", *QUICK), 1, "evaluate/test is a link")
    refused(cli("explain", own_run, *MAPS, "--overwrite", *QUICK), 1, "explain/gradcam is a link")
    shutil.rmtree(own_run / "checkpoints")
    (own_run / "checkpoints").symlink_to(tmp_path / "victim")
    refused(cli(*again), 1, "checkpoints is a link")
    assert all(victim.read_text() == '{"precious": 1}' for victim in victims.values())


def test_output_files_replace_links(cli: Callable, own_run: Path, tmp_path: Path) -> None:
    """The link goes, what it leads to stays; a planted temporary name leads nowhere either."""
    precious = tmp_path / "precious.txt"
    precious.write_text("precious")
    draw(tmp_path / "field.png")
    (tmp_path / "dangling.csv").symlink_to(tmp_path / "new.txt")
    (tmp_path / ".dangling.partial.csv").symlink_to(precious)
    assert cli("predict", own_run, "field.png", "--out", "dangling.csv", *QUICK).code == 0
    assert not (tmp_path / "dangling.csv").is_symlink()
    assert not (tmp_path / "new.txt").exists()
    (tmp_path / "other.csv").symlink_to(tmp_path / "dangling.csv")
    before = (tmp_path / "dangling.csv").read_bytes()
    assert cli("predict", own_run, "field.png", "field.png", "--out", "other.csv", "--overwrite", *QUICK).code == 0
    assert not (tmp_path / "other.csv").is_symlink()
    assert (tmp_path / "dangling.csv").read_bytes() == before
    assert precious.read_text() == "precious"


def test_a_new_run_writes_through_none_of_its_links(cli: Callable, prepared: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("precious")
    (tmp_path / "run").mkdir()
    names = ("run.json", "config.yaml", "log.txt", "history.csv", "timing.csv", "report.html", "curves.png")
    for name in names:
        (tmp_path / "run" / name).symlink_to(precious)
    done = cli(*TRAIN, "--data", prepared, "--out", "run", "--overwrite")
    assert done.code == 0, done.stderr
    assert precious.read_text() == "precious"
    assert not any((tmp_path / "run" / name).is_symlink() for name in names)


def test_a_page_shows_nothing_that_a_link_leads_to(cli: Callable, own_run: Path, tmp_path: Path) -> None:
    import base64

    secret = b"a secret that nobody meant to publish"
    (tmp_path / "secret").write_bytes(secret)
    (own_run / "curves.png").unlink()
    (own_run / "curves.png").symlink_to(tmp_path / "secret")
    assert cli("evaluate", own_run, "--resamples", 100, *QUICK).code == 0
    assert base64.b64encode(secret).decode() not in (own_run / "report.html").read_text()


def test_embeddings_are_not_kept_behind_a_link(cli: Callable, prepared: Path, tmp_path: Path) -> None:
    data = shutil.copytree(prepared, tmp_path / "data")
    shutil.rmtree(data / "embeddings", ignore_errors=True)
    (tmp_path / "victim").mkdir()
    (data / "embeddings").symlink_to(tmp_path / "victim")
    done = cli(
        *TRAIN, "--data", "data", "--out", "run", "--freeze", "trunk", "--augment", "none", "--cache-embeddings", "on"
    )
    assert done.code == 0, done.stderr
    assert "embeddings is a link" in done.stderr
    assert not list((tmp_path / "victim").iterdir())


# Names

NAMES = {
    "formula": "=HYPERLINK(0)",
    "at": "@SUM(1)",
    "plus": "+1+cmd",
    "minus": "-2+3",
    "tab": "\t=1",
    "apostrophe": "'=1",
    "markup": "[red]x [bold",
    "smile": ":smile: x",
    "escape": f"{ESCAPES}x",
    "newline": "one\ntwo",
    "return": "one\rtwo",
    "html": "<img src=x onerror=alert(1)>",
    "formula of mathematics": "$\\frac{a$",
    "direction": "\u202egnp.x",
    "quotes": "a\"b'c,d;e",
    "backslash": "a\\",
    "emoji": "\N{MICROSCOPE}",
    "long": "x" * 251,
}


@pytest.mark.parametrize("quiet", [False, True])
def test_names_of_files_are_only_names(quiet: bool, cli: Callable, own_run: Path, tmp_path: Path) -> None:
    """They come back from the table as they were, and neither terminal nor spreadsheet obeys them."""
    files = [draw(tmp_path / "in" / f"{name}.png") for name in NAMES.values()]
    (tmp_path / "in/[").mkdir()
    (tmp_path / "in/[" / f"red]{ESCAPES}broken.png").write_text("x")
    done = cli("predict", own_run, "in", *QUICK, *(["--quiet"] if quiet else []))
    assert done.code == 0, done.stderr
    shown = (done.stdout + done.stderr).replace("\n", "")
    assert not [sign for sign in shown if ord(sign) < 32 or 127 <= ord(sign) < 160 or sign == "\u202e"]
    assert "[red]x [bold" in done.stdout
    assert ":smile: x" in done.stdout
    assert "left out in/[/red]\\x1b]0;owned\\x07\\x1b[31mbroken.png: not an image" in done.stderr
    assert "one\\ntwo" in done.stdout
    found = Predictions.from_csv(tmp_path / "predictions.csv")
    assert set(found.image_ids) == set(NAMES.values())
    assert set(found.column("path")) == {f"in/{file.name}" for file in files}
    with (tmp_path / "predictions.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [cell for cell in cells if cell[:1] in set("=+-@\t\r\n")]


def test_names_of_files_in_json_and_errors(cli: Callable, breastcli: Callable, own_run: Path, tmp_path: Path) -> None:
    name = f"{ESCAPES}\x9b31m.png"
    draw(tmp_path / "in" / name)
    done = breastcli("predict", own_run, "in", "--json", *QUICK)  # as a process of its own
    assert done.code == 0, done.stderr
    assert done.stdout.strip().isprintable()
    assert done.stdout.isascii()
    assert done.json["images"][0]["path"] == f"in/{name}"
    refused(
        breastcli("predict", own_run, f"none{ESCAPES}\nx", "--out", "p.csv"), 1, "none\\x1b]0;owned\\x07\\x1b[31m\\nx"
    )
    refused(cli("prepare", "[red]none[/red]"), 1, "[red]none[/red]")


def test_names_of_files_in_explanations(
    cli: Callable, raw: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    assert cli("prepare", raw, "--out", "data", "--size", 64).code == 0  # the tiny network makes 2 x 2 maps of it
    assert cli(*TRAIN, "--data", "data", "--out", "run").code == 0
    own_run = tmp_path / "run"
    for name in NAMES.values():
        draw(tmp_path / "in" / f"{name}.png")
    done = cli("explain", own_run, "--images", "in", *MAPS, "--num", "all", *QUICK)
    assert done.code == 0, done.stderr
    assert not [one for one in recwarn if "Glyph" in str(one.message)]
    panels = list((own_run / "explain/gradcam/panels").iterdir())
    assert len(panels) == len(NAMES)
    page = (own_run / "report.html").read_text()
    assert "<img src=x" not in page
    assert "alert(1)" not in page or "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "Traceback" not in done.stderr


def test_names_that_are_no_utf8(cli: Callable, own_run: Path, raw: Path, tmp_path: Path) -> None:
    draw(tmp_path / "in/good.png")
    shutil.copy(tmp_path / "in/good.png", os.fsencode(tmp_path / "in") + b"/b\xff.png")
    done = cli("predict", own_run, "in", *QUICK, "--json")
    assert done.code == 0, done.stderr
    assert done.json["num_images"] == 1
    assert done.json["rejected"] == [{"path": "in/b\\udcff.png", "reason": "its name is not UTF-8"}]
    refused(cli("predict", own_run, os.fsdecode(b"in/b\xff.png"), "--out", "p.csv"), 2, "not UTF-8")
    refused(cli("prepare", raw, "--out", os.fsdecode(b"\xff")), 2, "--out \\udcff: not UTF-8")


def test_deep_folders(cli: Callable, own_run: Path, tmp_path: Path) -> None:
    """Deeper than Python calls itself."""
    draw(tmp_path / "in/good.png")
    before, depth = Path.cwd(), 1300
    os.chdir(tmp_path / "in")
    for _ in range(depth):
        Path("d").mkdir()
        os.chdir("d")
    draw(Path("deep.png"))
    os.chdir(before)
    try:
        done = cli("predict", own_run, "in", *QUICK, "--json")
        assert done.code == 0, done.stderr
        assert done.json["num_images"] == 2
    finally:  # pytest could not remove it either
        os.chdir("in" + "/d" * depth)
        Path("deep.png").unlink()
        for _ in range(depth):
            os.chdir("..")
            Path("d").rmdir()
        os.chdir(before)


def test_files_and_folders_that_nobody_may_read(
    cli: Callable, own_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "in/good.png")
    locked, closed = draw(tmp_path / "in/locked.png"), tmp_path / "in/closed"
    closed.mkdir()
    locked.chmod(0)
    closed.chmod(0)
    if os.access(locked, os.R_OK):  # the superuser may read all
        scan, look = os.scandir, Image.open

        def refuse(real: Callable, name: str) -> Callable:
            def guarded(path: str | Path, **options: object) -> object:
                if Path(path).name == name:
                    raise PermissionError(13, "Permission denied", str(path))
                return real(path, **options)

            return guarded

        monkeypatch.setattr(os, "scandir", refuse(scan, "closed"))
        monkeypatch.setattr(Image, "open", refuse(look, "locked.png"))
    done = cli("predict", own_run, "in", *QUICK)
    monkeypatch.undo()
    closed.chmod(0o700)
    assert done.code == 0, done.stderr
    assert "left out in/closed: a folder that cannot be read (Permission denied)" in done.stderr
    assert "left out in/locked.png: cannot be read (Permission denied)" in done.stderr


# Tables and documents


@pytest.mark.parametrize(
    "text", ["=1+1", "'", "''=1", "'a", "-0.5", "-0.5x", "1e5", "\t", "\n", "＝1", "", "+", "-", " -1"]
)
def test_cells_come_back_as_they_were(text: str, tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", ("first", "second"), [(text, "x"), (-0.5, text)])
    rows = read_csv(tmp_path / "a.csv")
    assert [row["first"] for row in rows] == [text, "-0.5"]
    assert rows[1]["second"] == text
    with (tmp_path / "a.csv").open(newline="") as file:
        (_, (written, _), _) = csv.reader(file)
    assert written == text or written == f"'{text}"
    assert not written.startswith(("=", "@", "\t", "\n", "＝", "-0.5x"))


@pytest.mark.parametrize(
    "content",
    [
        b'{"x": NaN}',
        b'{"x": -Infinity}',
        b'{"x": 1e999}',
        b'{"x": ' + b"9" * 5000 + b"}",
        b'{"x": ' + b"9" * 400 + b"}",
        b"[" * 100_000,
        b"[" * 500 + b"]" * 500,
        b"\xff\xfe",
        b"",
        b"\0" * 100,
        b"{}{}",
    ],
)
@pytest.mark.parametrize("name", ["run.json", "dataset.json", "metrics.json"])
def test_documents_that_are_no_json(
    name: str, content: bytes, cli: Callable, own_run: Path, prepared: Path, tmp_path: Path
) -> None:
    if name == "dataset.json":
        (shutil.copytree(prepared, tmp_path / "data") / name).write_bytes(content)
        refused(cli(*TRAIN, "--data", "data", "--out", "new"), 1, "dataset.json is not valid JSON")
    elif name == "run.json":
        (own_run / name).write_bytes(content)
        refused(cli("evaluate", own_run, *QUICK), 1, "run.json is not valid JSON")
    else:
        for side in "ab":
            (tmp_path / side / "evaluate/test").mkdir(parents=True)
            (tmp_path / side / "evaluate/test" / name).write_bytes(content)
        refused(cli("evaluate", "--compare", "a", "b", *QUICK), 1, "metrics.json is not valid JSON")


WRONG = [[], 3, "text", None, {}, {"command": 3}, {"command": "train"}, {"command": "train", "dataset": []}]


@pytest.mark.parametrize("document", WRONG, ids=str)
def test_run_documents_of_another_shape(document: object, cli: Callable, own_run: Path) -> None:
    (own_run / "run.json").write_text(json.dumps(document))
    refused(cli("evaluate", own_run, *QUICK), 1, "run.json")


@pytest.mark.parametrize(
    "change",
    [
        {"classes": "ab"},
        {"classes": ["benign", "other"]},
        {"size_px": "32"},
        {"size_px": 10**12},
        {"size_px": -32},
        {"split": None},
        {"split": {"level": "exam", "folds": "3", "leaky": None}},
        {"fingerprint": 3},
        {"split_fingerprint": None},
        {"stain": []},
        {"synthetic": {"source": 3}},
        {"drawn": "no"},
        {"format": 10**18},
    ],
    ids=str,
)
def test_cards_of_another_shape(change: dict, cli: Callable, prepared: Path, tmp_path: Path) -> None:
    data = shutil.copytree(prepared, tmp_path / "data")
    card = json.loads((data / "dataset.json").read_text()) | change
    (data / "dataset.json").write_text(json.dumps(card))
    refused(cli(*TRAIN, "--data", "data", "--out", "run"), 1, "data/")


@pytest.fixture(scope="module")
def evaluated(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its evaluation; tests must not change it."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("evaluated") / "run")
    evaluate(EvaluateConfig(runs=(str(folder),), resamples=100, device="cpu", precision="fp32"))
    return Path(folder)


@pytest.mark.parametrize("document", [[], {"predictions": 3}, {"predictions": {"sha256": 3}}, {"predictions": {}}, {}])
def test_metrics_of_another_shape(document: object, cli: Callable, evaluated: Path, tmp_path: Path) -> None:
    shutil.copytree(evaluated, tmp_path / "other")
    (tmp_path / "other/evaluate/test/metrics.json").write_text(json.dumps(document))
    done = cli("evaluate", "--compare", evaluated, "other", "--resamples", 100, *QUICK)
    refused(done, 1, "other/evaluate/test/metrics.json")


def test_nothing_is_taken_from_damaged_metrics(cli: Callable, evaluated: Path, tmp_path: Path) -> None:
    shutil.copytree(evaluated, tmp_path / "other")
    metrics = tmp_path / "other/evaluate/test/metrics.json"
    document = json.loads(metrics.read_text())
    metrics.write_text('{"predictions": [1]}')
    done = cli("evaluate", "other", "--resamples", 100, "--overwrite", *QUICK)
    assert done.code == 0, done.stderr
    again = json.loads(metrics.read_text())
    assert again["image"] == document["image"]


@pytest.mark.parametrize(
    "content",
    [
        b"epoch,lr\n1,2,3\n",
        b"epoch,lr\n1\n",
        b"epoch,lr\n\0\0\0\n",
        b"\xff\xfe\0",
        b'epoch,lr\n1,"' + b"x" * 200_000,
    ],
)
def test_tables_of_garbage(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "history.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"history.csv.*: make it again"):
        read_csv(tmp_path / "history.csv")


@pytest.mark.parametrize("cell", ["nan", "-0.1", "1.5", "x", "inf"])
def test_probabilities_out_of_range(cell: str, tmp_path: Path) -> None:
    probs = np.array([[0.25, 0.75]])
    Predictions(strings(["a"]), ("b", "m"), probs, np.array([1])).to_csv(tmp_path / "p.csv")
    (tmp_path / "p.csv").write_text((tmp_path / "p.csv").read_text().replace("0.75", cell))
    with pytest.raises(UserError, match=r"p.csv: .* pass a predictions.csv"):
        Predictions.from_csv(tmp_path / "p.csv")


@pytest.mark.parametrize("line", ["a.png,x,1,h,,,,,,,,,", "b.png,1,1,h,why,,,,,,,,", f"{'0' * 20}"])
def test_a_damaged_journal(line: str, cli: Callable, raw: Path, tmp_path: Path) -> None:
    from breastcli.data.datasets import find_dataset
    from breastcli.data.journal import decode_into
    from breastcli.progress import SILENT

    records = find_dataset("auto", raw).scan(raw).records
    partial = tmp_path / "data/.partial"
    decode_into(partial, records, raw, 32, 1, resume=False, progress=SILENT)
    journal = (partial / "decoded.csv").read_text().splitlines()
    (partial / "decoded.csv").write_text("\n".join([*journal[:3], line, *journal[3:]]) + "\n")
    refused(cli("prepare", raw, "--out", "data", "--size", 32, "--resume"), 1, "decoded.csv")


def test_pipes_and_huge_files_are_not_read(cli: Callable, own_run: Path, prepared: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(cli("train", "--config", "pipe"), 2, "pipe: it is no regular file")
    refused(cli(*TRAIN, "--data", prepared, "--weights", "pipe", "--out", "x"), 1, "--weights pipe: no such file")
    refused(cli("predict", own_run, "pipe"), 1, "not a regular file")
    data = shutil.copytree(prepared, tmp_path / "data")
    (data / "dataset.json").unlink()
    os.mkfifo(data / "dataset.json")
    refused(cli(*TRAIN, "--data", "data", "--out", "y"), 1, "dataset.json: it is no regular file")
    (data / "dataset.json").unlink()
    (data / "dataset.json").touch()
    os.truncate(data / "dataset.json", 2**40)  # sparse: it takes no place
    refused(cli(*TRAIN, "--data", "data", "--out", "z"), 1, "more than 536,870,912")


# Permissions


@pytest.mark.parametrize(("umask", "files", "folders"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_what_is_written_has_the_mode_that_the_umask_gives(
    umask: int, files: int, folders: int, cli: Callable, raw: Path, tmp_path: Path
) -> None:
    commands = [
        ("prepare", raw, "--out", "data", "--size", 64, "--stain", "macenko"),
        (
            *TRAIN,
            "--data",
            "data",
            "--out",
            "run",
            "--freeze",
            "trunk",
            "--augment",
            "none",
            "--cache-embeddings",
            "on",
        ),
        ("evaluate", "run", "--resamples", 100, *QUICK),
        ("explain", "run", *MAPS, "--num", 2, *QUICK),
        ("predict", "run", raw, *QUICK),
    ]
    expected = {"images.npy", "manifest.csv", "resume.pt", "best.safetensors", "log.txt", "report.html", "embeddings"}
    expected |= {"predictions.csv", "saliency.npz", "curves.png"}
    if umask == 0o077:
        commands.append(("synthesize", "all", "gan", "--data", "data", "--smoke", "--on-collapse", "warn", *QUICK))
        expected |= {"generator.safetensors", "training.gif", "data-synthetic-smoke"}
    before = os.umask(umask)
    try:
        for words in commands:
            done = cli(*words)
            assert done.code == 0, done.stderr
    finally:
        os.umask(before)
    written = list(tmp_path.rglob("*"))
    assert expected <= {path.name for path in written}
    modes = {str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in written}
    odd = {
        name: oct(mode) for name, mode in modes.items() if mode != (folders if (tmp_path / name).is_dir() else files)
    }
    assert odd == {}


def test_a_long_name_of_an_output_file(tmp_path: Path) -> None:
    with replacing(tmp_path / f"{'ä' * 125}.csv") as temporary:
        temporary.write_text("x")
    assert (tmp_path / f"{'ä' * 125}.csv").read_text() == "x"
