from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY, Outcome
from rich.console import Console

from breastcli import console, show
from breastcli.benchmark import BenchmarkResult, benchmark
from breastcli.benchmarks import children, convergence
from breastcli.benchmarks.children import run_command
from breastcli.benchmarks.convergence import find_convergence, start_protocol
from breastcli.config import BenchmarkConfig, TrainConfig
from breastcli.configfile import read_section, resolve
from breastcli.data.store import MANIFEST
from breastcli.errors import UsageError, UserError
from breastcli.files import read_csv, read_json
from breastcli.reporting import convergence_plots
from breastcli.reporting.convergence_plots import plot_size_accuracy, plot_time_accuracy
from breastcli.reporting.reported_convergence import NOTHING, paper_figures, paper_notes
from breastcli.system.runfolder import RESUME
from breastcli.train import train

NAN = float("nan")
BLOCKED = "timm/test_vit"  # as small as TINY
FOLDERS = {arch: arch.replace("/", "-") for arch in (TINY, BLOCKED)}
BREAKHIS_100X = {"dataset": "breakhis", "num_classes": 2, "magnification": "100X"}


@pytest.mark.parametrize(
    ("scores", "epoch"),
    [
        ([0.5, 0.8, 0.90, 0.895], 3),  # 0.895 is above 0.891
        ([0.9, 0.5, 0.90], 3),  # a dip after reaching it
        ([0.5, 0.9, 0.88], None),  # lost again at the end
        ([0.5, 0.6, 0.7], 3),
        ([0.99, 1.0], 1),  # the bound itself is within
        ([0.5, 0.5, 0.5], 1),
        ([NAN, 0.9], 2),
        ([0.9, NAN, 0.9], 3),
        ([0.9, NAN], None),
        ([NAN, NAN], None),
        ([], None),
    ],
)
def test_convergence_of_a_score(scores: list[float], epoch: int | None) -> None:
    assert find_convergence(scores, smaller_is_better=False) == epoch


@pytest.mark.parametrize(
    ("losses", "epoch"),
    [([1.0, 0.506, 0.5, 0.505], 3), ([1.0, 0.504, 0.5], 2), ([0.5, 0.9, 0.506], None), ([0.5, NAN], None)],
)
def test_convergence_of_a_loss(losses: list[float], epoch: int | None) -> None:
    assert find_convergence(losses, smaller_is_better=True) == epoch


def test_figures_of_the_papers() -> None:
    ours = paper_figures("dalaresnet50", **BREAKHIS_100X)
    assert (ours["convergence_s"], ours["accuracy"], ours["parameters"]) == (2319.50, 0.987, 25_611_842)
    assert ours["images_per_s"] == pytest.approx(50 * 1249 / 2319.50)
    assert "A4000" in ours["hardware"]
    gated = paper_figures("densenet121_se", **BREAKHIS_100X)
    assert (gated["convergence_s"], gated["accuracy"]) == (1356 * 60, pytest.approx(0.756))
    assert gated["images_per_s"] is None  # how many images were trained on is not stated
    transferred = paper_figures("densenet121_se", **BREAKHIS_100X, two_stages=True)
    assert (transferred["convergence_s"], transferred["accuracy"]) == (976 * 60, pytest.approx(0.792))
    bach = paper_figures("dalaresnet50", dataset="bach", num_classes=4, magnification=None)
    assert (bach["convergence_s"], bach["accuracy"], bach["parameters"]) == (2475.49, 0.891, 24_042_692)
    mammograms = paper_figures("vgg16", dataset="mini_ddsm", num_classes=3, magnification=None)
    assert (mammograms["convergence_s"], mammograms["accuracy"]) == (7589.96, 0.6607)
    notes = paper_notes([ours, gated])
    assert ["A4000" in note for note in notes] == [True, False, False]
    assert "4090" in notes[1]


@pytest.mark.parametrize(
    ("arch", "changed"),
    [
        (TINY, {}),
        ("torchvision/mobilenet_v2", {}),
        ("dalaresnet50", {"num_classes": 8}),
        ("densenet121_se", {"magnification": None}),
        ("dalaresnet50", {"magnification": None}),  # the paper trains on one magnification at a time
        ("dalaresnet50", {"dataset": "sample"}),
    ],
)
def test_no_figures_of_something_else(arch: str, changed: dict[str, Any]) -> None:
    assert paper_figures(arch, **BREAKHIS_100X | changed) == NOTHING
    assert paper_notes([NOTHING]) == []


def test_timing_knows_validation_also_when_an_older_run_is_resumed(own_run: Path, tiny_config: TrainConfig) -> None:
    first, second = read_csv(own_run / "timing.csv")
    assert float(first["seconds_with_validation"]) > float(first["seconds"]) > 0
    saved = torch.load(own_run / RESUME, weights_only=True)
    saved["timing"] = [row[:3] for row in saved["timing"]]
    torch.save(saved, own_run / RESUME)
    train(dataclasses.replace(tiny_config, out=str(own_run), epochs=3, resume=True))
    timing = read_csv(own_run / "timing.csv")
    assert timing[:2] == [row | {"seconds_with_validation": ""} for row in (first, second)]
    assert float(timing[2]["seconds_with_validation"]) > float(timing[2]["seconds"])


@pytest.fixture
def no_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a command is started."""

    def refuse(words: list[str], *_: object) -> None:
        pytest.fail(f"started {words}")

    monkeypatch.setattr(convergence, "run_command", refuse)


def config(out: Path, data: Path | None, **values: Any) -> BenchmarkConfig:
    words = {"what": "convergence", "archs": TINY, "device": "cpu", "precision": "fp32"} | values
    return BenchmarkConfig(out=str(out), data=str(data) if data else None, **words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory: check --protocol"),
        ("prepare:\n  size: 64\n", "has no section 'train'"),
        ("train:\n  epohcs: 3\n", "did you mean 'epochs'"),
        ("train: [\n", "is not valid YAML in line .: check --protocol"),
        ("train:\n  init_from: latest\n", "--init-from latest"),
        ("train:\n  cache_embeddings: 'on'\n", "embeddings are cached"),
    ],
)
def test_bad_protocols_are_refused_at_once(
    text: str | None, message: str, tmp_path: Path, prepared: Path, no_children: None
) -> None:
    file = tmp_path / "protocol.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=message):
        benchmark(config(tmp_path / "out", prepared, protocol=str(file)))


def test_options_of_convergence_are_refused_elsewhere(tmp_path: Path, prepared: Path) -> None:
    with pytest.raises(UsageError, match="--data: models trains nothing"):
        benchmark(config(tmp_path, prepared, what="models"))


@pytest.mark.parametrize(("change", "message"), [({"epochs": 1}, "--epochs 2, not 1"), ({}, "on elsewhere, not cpu")])
def test_a_run_that_was_timed_otherwise_is_not_gone_on_with(
    change: dict[str, Any], message: str, own_run: Path, prepared: Path, tmp_path: Path, no_children: None
) -> None:
    run = tmp_path / "out/convergence" / TINY.replace("/", "-")
    shutil.copytree(own_run, run)
    if not change:
        info = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(info | {"device": "elsewhere"}))
    with pytest.raises(UserError, match=message):
        benchmark(config(tmp_path / "out", prepared, resume=True, **({"epochs": 2} | change)))


def test_missing_data_and_wrong_names_are_refused_at_once(tmp_path: Path, prepared: Path, no_children: None) -> None:
    with pytest.raises(UserError, match=r"nowhere is not a prepared folder"):
        benchmark(config(tmp_path / "a", tmp_path / "nowhere"))
    with pytest.raises(UserError, match="has no folds"):
        benchmark(config(tmp_path / "b", prepared, fold=1))
    with pytest.raises(UsageError, match="did you mean 'resnet50'"):
        benchmark(config(tmp_path / "c", prepared, archs=f"{TINY},resnet5"))
    with pytest.raises(UserError, match="nothing could be measured .dinov2_vitb14: dinov2_vitb14 cannot take 32-pixel"):
        benchmark(config(tmp_path / "d", prepared, archs="dinov2_vitb14"))
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "own.txt").write_text("kept")
    with pytest.raises(UserError, match="use --resume, --overwrite or another --out"):
        benchmark(config(tmp_path / "e", prepared))


def test_flags_win_over_the_protocol_and_that_over_defaults(tmp_path: Path, prepared: Path) -> None:
    file = tmp_path / "given.yaml"
    values = {"arch": "vit", "out": "x", "epochs": 7, "lr": 0.5, "batch_size": 4, "seed": 5, "mag": 100, "resume": True}
    file.write_text(json.dumps({"train": values | {"data": str(prepared)}}))  # JSON is YAML
    protocol = start_protocol(config(tmp_path, None, protocol=str(file), epochs=2, overwrite=True), tmp_path)
    kept = (protocol.train.epochs, protocol.train.lr, protocol.train.batch_size, protocol.train.seed)
    assert kept == (2, 0.5, 4, 5)
    assert (protocol.train.precision, protocol.train.device) == ("fp32", "cpu")
    assert protocol.flags == ("--overwrite",)  # what the protocol says of resuming is no part of it
    read_back = resolve(TrainConfig, read_section(tmp_path / "convergence" / "protocol.yaml", "train"), {})
    assert read_back == protocol.train
    assert not read_back.resume
    facts = protocol.facts()
    assert (facts["magnification"], facts["stamp"]) == ("100X", "drawn by a program, not real tissue")
    assert facts["num_images"] == protocol.num_images
    assert "arch" not in facts["train"]
    assert "at least 0.99 times" in facts["rule"]
    assert "val_loss" in dataclasses.replace(protocol, train=TrainConfig(monitor="val_loss")).rule


def test_images_are_drawn_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convergence, "DRAWN_IMAGES", 96)
    monkeypatch.setattr(convergence, "DRAWN_SIZE_PX", 32)
    protocol = start_protocol(config(tmp_path, None, what="all"), tmp_path)
    assert protocol.data.card["drawn"]
    assert sum(protocol.num_images.values()) == 96
    assert protocol.train.epochs == convergence.DRAWN_TRAINING["epochs"]
    written = (tmp_path / "convergence" / "sample" / MANIFEST).stat().st_mtime_ns
    protocol = start_protocol(config(tmp_path, None, what="all", epochs=2, resume=True), tmp_path)
    assert protocol.train.epochs == 2
    assert (protocol.data.folder / MANIFEST).stat().st_mtime_ns == written


def test_ends_without_a_word_are_named() -> None:
    assert children._reason(-9, "") == "ended by SIGKILL (out of memory?)"
    assert children._reason(3, "\n") == "ended with exit code 3"
    assert children._reason(1, "warning: slow\nerror: no memory\n") == "no memory"


def test_an_interrupted_benchmark_stops_its_child(
    tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(children, "POLL_S", 0.1)
    monkeypatch.setattr(children, "PATIENCE_S", 0.1)
    run = tmp_path / "run"

    def interrupt() -> None:
        if (run / "history.csv").is_file():
            raise KeyboardInterrupt

    words = ["train", "--arch", TINY, "--data", str(prepared), "--out", str(run), "--device", "cpu", "--epochs", "999"]
    with pytest.raises(KeyboardInterrupt):
        run_command(words, interrupt)
    assert read_json(run / "run.json")["status"] == "interrupted"


@dataclasses.dataclass(frozen=True)
class Benchmarked:
    done: Outcome
    out: Path


@pytest.fixture(scope="module")
def measured(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Benchmarked:
    """One network measured and one that fails, by the real command line; tests must not change it."""
    import subprocess
    import sys

    out = tmp_path_factory.mktemp("benchmark")
    (out / "convergence").mkdir()
    (out / "convergence" / FOLDERS[BLOCKED]).write_text("in the way")
    protocol = out / "given.yaml"
    protocol.write_text("train:\n  lr: 1.0e-3\n  augment: light\n")
    words = ["benchmark", "convergence", "--archs", f"{BLOCKED},{TINY}", "--data", prepared, "--protocol", protocol]
    words += ["--epochs", 1, "--out", out, "--device", "cpu", "--precision", "fp32", "--resume", "--json"]
    command = [sys.executable, "-m", "breastcli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return Benchmarked(Outcome(done.returncode, done.stdout, done.stderr), out)


def test_the_command(measured: Benchmarked) -> None:
    done, out = measured.done, measured.out
    assert done.code == 0, done.stderr
    failed, row = done.json["convergence"]
    assert failed["problem"] == f"{out / 'convergence' / FOLDERS[BLOCKED]} is a file: choose another --out"
    assert f"{BLOCKED} could not be trained" in done.stderr
    assert (failed["convergence_s"], failed["image"]["n"], failed["reason"]) == (None, None, "")
    run = out / "convergence" / FOLDERS[TINY]
    (timing,) = read_csv(run / "timing.csv")
    tested = read_json(run / "evaluate" / "test" / "metrics.json")
    assert (row["epochs"], row["convergence_epoch"], row["best_epoch"]) == (1, 1, 1)
    assert row["convergence_s"] == row["total_s"] == float(timing["seconds_with_validation"])
    assert row["images_per_s"] == pytest.approx(float(timing["images_per_second"]))
    assert row["image"]["n"] == done.json["protocol"]["num_images"]["test"]
    assert row["image"]["balanced_accuracy"] == tested["image"]["overall"]["balanced_accuracy"]
    assert row["patient"]["roc_auc"] == tested["patient"]["mean"]["overall"]["roc_auc"]
    assert (row["stamp"], row["problem"]) == ("drawn by a program, not real tissue", "")
    assert row["paper"] == NOTHING
    assert done.json["protocol"]["train"]["lr"] == 1e-3
    assert read_json(out / "benchmark.json")["convergence"] == [failed, row]
    assert {path.name for path in out.iterdir()} == {
        *("benchmark.json", "convergence.csv", "time_accuracy.png", "size_accuracy.png", "convergence", "given.yaml")
    }
    with (out / "convergence.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert lines[0]["image_accuracy"] == lines[0]["paper_convergence_s"] == ""
    assert float(lines[1]["image_accuracy_low"]) == row["image"]["accuracy"]["low"]
    assert int(lines[1]["parameters"]) == row["parameters"]


def test_an_interrupted_benchmark_goes_on(
    measured: Benchmarked, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first epoch is kept, the second is trained; what else the folder holds stays."""

    def tested_before(words: list[str], *rest: Any) -> dict[str, Any]:
        return {} if words[0] == "evaluate" else run_command(words, *rest)

    monkeypatch.setattr(convergence, "run_command", tested_before)
    out = Path(shutil.copytree(measured.out, tmp_path / "out"))
    run = out / "convergence" / FOLDERS[TINY]
    before = read_csv(run / "timing.csv")
    counted = []
    progress = SimpleNamespace(begin=lambda *_: None, advance=lambda task, amount=1: counted.append((task, amount)))
    values = {"protocol": str(out / "given.yaml"), "epochs": 2, "resume": True}
    result = benchmark(config(out, prepared, **values), progress)
    after = read_csv(run / "timing.csv")
    assert after[:1] == before
    assert len(after) == 2
    (row,) = result.document["convergence"]
    assert row["total_s"] == sum(float(line["seconds_with_validation"]) for line in after)
    assert row["epochs"] == 2
    assert sum(amount for task, amount in counted if task == TINY) == 2
    assert (out / "given.yaml").is_file()


def rows_of_a_benchmark() -> list[dict[str, Any]]:
    figure = {"value": 0.85, "low": 0.8, "high": 0.9}
    level = {"n": 624, "balanced_accuracy": figure, "accuracy": figure, "roc_auc": figure}
    shared = {"epochs": 50, "total_s": 250.0, "images_per_s": 321.0, "best_epoch": 7, "image": level}
    shared |= {"patient": level | {"n": 25}, "parameters": 25_611_842, "stamp": "", "run": "", "problem": ""}
    late = shared | {"convergence_epoch": None, "convergence_s": None, "reason": "not within the budget"}
    failed = dataclasses.asdict(convergence.Convergence("vit", problem="[no] memory"))
    rows = [
        shared | {"arch": "dalaresnet50", "convergence_epoch": 12, "convergence_s": 61.5, "reason": ""},
        late | {"arch": "torchvision/mobilenet_v2"},
        failed,
    ]
    return [row | {"paper": paper_figures(row["arch"], **BREAKHIS_100X)} for row in rows]


def test_plots_show_every_point_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(convergence_plots, "_write", lambda figure, path, stamp: drawn.append((figure, stamp)))
    rows = rows_of_a_benchmark()
    plot_time_accuracy(rows, tmp_path / "time.png", stamp="LEAKY")
    plot_size_accuracy(rows, tmp_path / "size.png")
    (time, stamp), (size, _) = drawn
    assert stamp == "LEAKY"
    found = {text.get_text(): text.xy for text in time.axes[0].texts}
    assert found == {
        "dalaresnet50": (61.5, 0.85),
        "torchvision/mobilenet_v2": (250.0, 0.85),  # its whole budget, in another style
        "dalaresnet50 (paper)": (2319.5, 0.987),
        "vit (paper)": (3022.54, 0.834),
    }
    assert [line.get_marker() for line in time.axes[0].lines] == ["o", ">", "D"]
    boxes = [text.get_window_extent() for text in size.axes[0].texts]
    assert len(boxes) == 4
    assert not any(one.overlaps(other) for k, one in enumerate(boxes) for other in boxes[:k])


def test_plots_without_figures_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    write = convergence_plots._write
    monkeypatch.setattr(
        convergence_plots, "_write", lambda figure, *given: drawn.append(figure) or write(figure, *given)
    )
    plot_time_accuracy([], tmp_path / "none.png")
    assert any("No network has both figures" in text.get_text() for text in drawn[0].axes[0].texts)


def test_what_is_printed(tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(console, "OUT", Console(file=text, width=120, highlight=False, soft_wrap=True))
    rows = rows_of_a_benchmark()
    facts = start_protocol(config(tmp_path, prepared), tmp_path).facts()
    document = {"device": "cuda", "processor": "some", "precision": "bfloat16", "num_cores": 8, "help": None}
    document |= {"networks": [], "pairs": [], "problems": {}, "convergence": rows}
    document |= {"protocol": facts | {"papers": paper_notes(row["paper"] for row in rows)}}
    show.show_benchmark(BenchmarkResult(tmp_path / "out", document, 0.0))
    lines = text.getvalue().splitlines()
    ours = [line.split() for line in lines if line.strip().startswith("dalaresnet50 ")]
    assert ours[0][1:] == ["25,611,842", "61.5", "2,320", "12", "250", "50", "7", "321", "26.9"]
    shown = ["0.850", "(0.800–0.900)"]
    assert ours[1][1:] == ["624", "images", *shown, *shown, "0.987", *shown]
    assert sum("25 patients" in line for line in lines) == 2
    assert "- vit: [no] memory" in lines
    assert "- torchvision/mobilenet_v2 has not converged: not within the budget" in lines
    assert f"- {facts['rule']}" in lines
    assert any("measured on: cpu" in line for line in lines)
    assert any("A4000" in line for line in lines)
    assert lines[-1].endswith("out")
