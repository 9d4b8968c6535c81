from __future__ import annotations

import csv
import dataclasses
import io
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from breastcli import benchmark as job
from breastcli import console, show
from breastcli.benchmark import BenchmarkResult, benchmark
from breastcli.benchmarks import (
    COMPARISONS,
    Setting,
    cams,
    gan_metrics,
    inference,
    intervals,
    models,
    prepare,
    samples,
    stain,
    timing,
    training,
)
from breastcli.benchmarks.convergence import Convergence
from breastcli.benchmarks.models import (
    NetworkFigures,
    count_flops,
    describe_network,
    parse_archs,
    time_network,
)
from breastcli.benchmarks.timing import CPU, Pair, Timing, Waiting, compare, find_rival, measure
from breastcli.config import BenchmarkConfig
from breastcli.errors import UsageError, UserError
from breastcli.models import ARCHITECTURES, ModelOptions, build_model, num_parameters


class Clock:
    """Time that passes only when a piece of code says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def code(self, name: str, seconds: Iterable[float]) -> Callable[[], None]:
        durations = iter(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += next(durations)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_measure_leaves_the_warm_up_out(clock: Clock) -> None:
    figures = measure(clock.code("code", [64.0, 32.0, 4.0, 1.0, 8.0, 2.0]), CPU, 4, warmup=2)
    assert figures.seconds == (4.0, 1.0, 8.0, 2.0)
    assert (figures.median_s, figures.low_s, figures.high_s) == (3.0, 1.0, 8.0)
    assert figures.p50_ms == 3000.0
    assert figures.p95_ms == pytest.approx(4000 + 0.85 * 4000)  # rank 0.95 x 3 = 2.85 of 1, 2, 4, 8
    assert figures.to_json() == {"rounds": 4, "median_s": 3.0, "low_s": 1.0, "high_s": 8.0}


def test_fast_code_is_repeated_until_a_round_lasts(clock: Clock) -> None:
    figures = measure(clock.code("code", [0.25, *[0.25] * 2, *[0.5] * 2]), CPU, 2, round_s=0.5)
    assert len(clock.calls) == 1 + 2 * 2
    assert figures.seconds == (0.25, 0.5)
    assert measure(clock.code("code", [2.0, 3.0]), CPU, 1, round_s=0.5).seconds == (3.0,)


def test_compare_takes_turns(clock: Clock) -> None:
    ours, theirs = clock.code("ours", [9.0, 1.0, 2.0, 4.0]), clock.code("theirs", [9.0, 8.0, 4.0, 12.0])
    pair = compare("a / b", "images/s", 16, ours, theirs, 3)
    assert clock.calls == ["ours", "theirs"] * 4
    assert pair.ours.seconds == (1.0, 2.0, 4.0)
    assert (pair.ratio, pair.ratio_range) == (4.0, (2.0, 8.0))
    document = pair.to_json()
    assert (document["ours"], document["ours_low"], document["ours_high"]) == (8.0, 4.0, 16.0)
    assert (document["theirs"], document["ratio_low"], document["ratio_high"]) == (2.0, 2.0, 8.0)
    assert document["missing"] == ""


@pytest.mark.parametrize(("theirs_s", "asked", "taken"), [(2.0, 5, 5), (9.0, 5, 3), (40.0, 5, 2), (40.0, 1, 1)])
def test_a_slow_comparison_gets_fewer_rounds(clock: Clock, theirs_s: float, asked: int, taken: int) -> None:
    ours, theirs = clock.code("ours", [100.0, *[1.0] * 5]), clock.code("theirs", [100.0, *[theirs_s] * 5])
    pair = compare("a / b", "images/s", 1, ours, theirs, asked)
    assert clock.calls == ["ours", "theirs"] * (1 + taken)  # of the warm-up nothing counts
    assert pair.to_json()["rounds"] == len(pair.ours.seconds) == taken


def test_a_rival_that_was_tried_is_warm(clock: Clock) -> None:
    theirs = find_rival("thing", lambda: clock.code("theirs", [9.0, 2.0]))
    pair = compare("a / b", "images/s", 1, clock.code("ours", [9.0, 1.0]), theirs, 1)
    assert clock.calls == ["theirs", "ours", "ours", "theirs"]
    assert pair.ratio == 2.0


def test_waiting_is_what_passes_between_the_items(clock: Clock) -> None:
    def items(seconds: float) -> Iterable[int]:
        for number in range(3):
            clock.now += seconds
            yield number
        clock.now += 1.0  # the end has to be waited for as well

    waiting = Waiting()
    for seconds in (50.0, 1.0, 2.0):  # the first is a warm-up
        for _ in waiting.watch(items(seconds)):
            clock.now += 3.0
    assert waiting.seconds == [151.0, 4.0, 7.0]
    assert waiting.share(Timing((13.0, 16.0))) == 11 / 29


def test_without_a_rival_ours_is_measured_alone(clock: Clock) -> None:
    pair = compare("a / b", "images/s", 3, clock.code("ours", [9.0, 3.0]), "b is not installed", 1)
    assert pair == Pair("a / b", "images/s", 3, Timing((3.0,)), None, "b is not installed")
    document = pair.to_json()
    assert (document["ours"], document["theirs"], document["ratio"]) == (1.0, None, None)
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_a_rival_that_fails_says_why() -> None:
    def fail() -> None:
        raise RuntimeError("no kernel\nand more")

    assert find_rival("thing", lambda: fail) == "thing fails here (no kernel)"
    assert callable(find_rival("thing", lambda: len([]).bit_length))


@pytest.mark.parametrize(
    ("module", "name", "package"),
    [
        ("torchstain.torch.normalizers.macenko", "stain", "torchstain"),
        ("pytorch_grad_cam", "cams", "grad-cam"),
        ("torch_fidelity.metric_fid", "gan-metrics", "torch-fidelity"),
        ("torchmetrics.image.fid", "gan-metrics", "torchmetrics"),
        ("torchstain.torch.normalizers.macenko", "prepare", "torchstain"),
    ],
)
def test_missing_rivals_are_named(
    module: str, name: str, package: str, raw: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    pairs = COMPARISONS.get(name).run(Setting(CPU, size_px=64, rounds=1, raw=raw))
    pair = next(pair for pair in pairs if package in pair.title)
    assert (pair.theirs, pair.missing) == (None, f"{package} is not installed")
    assert pair.ours.median_s > 0


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every comparison do little."""
    monkeypatch.setattr(stain, "WIDTH_PX", 70)
    monkeypatch.setattr(stain, "HEIGHT_PX", 46)
    monkeypatch.setattr(stain, "NUM_IMAGES", 4)
    monkeypatch.setattr(cams, "CASES", (cams.Case("dtgradcam", "GradCAM", "resnet18", 2, copies=2),))
    monkeypatch.setattr(gan_metrics, "NUM_FEATURES", 40)
    monkeypatch.setattr(gan_metrics, "WIDTH", 16)
    monkeypatch.setattr(gan_metrics, "SUBSET_SIZE", 20)
    monkeypatch.setattr(intervals, "RESAMPLES", 5)
    monkeypatch.setattr(prepare, "MAX_IMAGES", 4)
    for module in (training, inference):
        monkeypatch.setattr(module, "ARCH", TINY)
        monkeypatch.setattr(module, "MAX_IMAGES", 9)
    monkeypatch.setattr(models, "ROUND_S", 0.0)
    monkeypatch.setattr(models, "LATENCIES_PER_ROUND", 2)


@pytest.mark.parametrize(
    ("name", "num_pairs"),
    [
        ("input", 2),
        ("prepare", 2),
        ("training", 1),
        ("inference", 1),
        ("stain", 2),
        ("cams", 1),
        ("gan-metrics", 4),
        ("intervals", 1),
    ],
)
def test_both_sides_of_every_comparison_run(name: str, num_pairs: int, raw: Path, small: None) -> None:
    for package in ("torchstain", "pytorch_grad_cam", "torch_fidelity"):
        pytest.importorskip(package)
    pairs = COMPARISONS.get(name).run(Setting(CPU, size_px=64, rounds=1, workers=1, raw=raw))
    assert len(pairs) == num_pairs
    for pair in pairs:
        if pair.missing != "torchmetrics is not installed":  # as it need not be
            assert pair.missing == ""
            assert pair.ratio > 0


def test_every_comparison_can_be_asked_for() -> None:
    choices = BenchmarkConfig.__dataclass_fields__["what"].metadata["choices"]
    assert sorted(choices) == sorted(["all", "models", "convergence", *COMPARISONS.names()])


def test_flops_counted_by_hand() -> None:
    with torch.device("meta"):
        network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 8 * 8, 5))
    assert count_flops(network, 8) == 2 * (8 * 8 * 4 * 3 * 3 * 3 + 4 * 8 * 8 * 5)


@pytest.mark.parametrize(
    ("arch", "multiply_adds"),
    [
        ("resnet50", 4.09e9),  # torchvision's documentation, with 1000 classes
        ("torchvision/vit_b_16", 17.56e9),
        ("swin", 15.47e9),  # timm's table of results
    ],
)
def test_flops_of_known_networks(arch: str, multiply_adds: float) -> None:
    figures = describe_network(arch, Setting(CPU))
    assert figures.size_px == 224
    assert figures.gflops == pytest.approx(2 * multiply_adds / 1e9, rel=0.01)


def test_description_of_a_network(tmp_path: Path) -> None:
    figures = describe_network("resnet50", Setting(CPU, size_px=64))
    assert (figures.size_px, figures.parameters, figures.printed) == (64, 23_512_130, 21_797_672)
    assert figures.remark == ARCHITECTURES.get("resnet50").remark
    assert figures.trainable == figures.parameters
    assert describe_network("dalaresnet50", Setting(CPU, size_px=64)).remark == ""  # the printed number is met
    figures = describe_network(TINY, Setting(CPU, size_px=32))
    model = build_model(ModelOptions(TINY, 2, 32))
    assert figures.parameters == num_parameters(model)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    assert figures.checkpoint_mb == pytest.approx((tmp_path / "weights.safetensors").stat().st_size / 1e6, rel=0.01)
    assert (figures.source, figures.printed) == ("timm", None)


def test_a_size_that_does_not_fit_is_a_row_and_a_wrong_name_an_error() -> None:
    figures = describe_network("swin", Setting(CPU, size_px=100))
    assert figures.problem == "swin cannot take 100-pixel images (a multiple of 32 is needed)"
    assert figures.parameters is None
    assert time_network(figures, Setting(CPU)) is figures
    with pytest.raises(UsageError, match="did you mean 'resnet50'"):
        describe_network("resnet5", Setting(CPU))


def test_networks_where_none_are_asked_for() -> None:
    assert job._archs(BenchmarkConfig(what="models")) == ARCHITECTURES.names()
    assert job._archs(BenchmarkConfig(what="convergence")) == job._archs(BenchmarkConfig(what="all"))
    assert len(job._archs(BenchmarkConfig(what="all"))) == 3
    assert job._archs(BenchmarkConfig(what="all", archs="all")) == ARCHITECTURES.names()
    assert job._archs(BenchmarkConfig(what="stain", archs="vit")) == []


def test_lists_of_networks() -> None:
    assert parse_archs("all") == ARCHITECTURES.names()
    assert parse_archs("vit, timm/x,vit") == ["vit", "timm/x"]
    with pytest.raises(UsageError, match="an empty name"):
        parse_archs("vit,")


def test_a_network_without_memory_for_training_keeps_the_rest(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand more")

    monkeypatch.setattr(models, "_time_training", fail)
    setting = Setting(CPU, size_px=32, batch_size=2, rounds=1)
    figures = time_network(describe_network(TINY, setting), setting)
    assert figures.problem == "training: CUDA out of memory. Tried to allocate 9 GiB"
    assert figures.training_images_per_s is None
    assert figures.inference_images_per_s > 0
    assert 0 < figures.latency_p50_ms <= figures.latency_p95_ms
    monkeypatch.setattr(models, "build_model", fail)
    assert time_network(NetworkFigures(TINY, 32), setting).problem.startswith("CUDA out of memory")


def test_training_is_real(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A timed step changes the weights, and both phases see the whole batch."""
    seen = []

    def watched(options: ModelOptions) -> nn.Module:
        model = build_model(options)
        before.append(model.head[1].weight.detach().clone())
        built.append(model)
        model.register_forward_hook(lambda module, inputs, _: seen.append((module.training, len(inputs[0]))))
        return model

    before, built = [], []
    setting = Setting(CPU, size_px=32, batch_size=3, rounds=1)
    described = describe_network(TINY, setting)
    monkeypatch.setattr(models, "build_model", watched)
    figures = time_network(described, setting)
    assert figures.problem == ""
    assert figures.training_memory_mb is None  # not on CUDA
    assert seen == [(True, 3)] * 2 + [(False, 3)] * 2 + [(False, 1)] * 3
    assert not torch.equal(built[0].head[1].weight, before[0])


@pytest.mark.gpu
def test_memory_is_measured_on_cuda(small: None) -> None:
    setting = Setting(torch.device("cuda"), torch.bfloat16, size_px=32, batch_size=4, rounds=1)
    figures = time_network(describe_network(TINY, setting), setting)
    assert figures.problem == ""
    assert figures.training_memory_mb > figures.inference_memory_mb > figures.checkpoint_mb


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["input", "prepare", "training", "inference", "stain", "cams"])
def test_both_sides_run_on_cuda(name: str, raw: Path, small: None) -> None:
    setting = Setting(torch.device("cuda"), torch.bfloat16, size_px=64, rounds=1, workers=1, raw=raw)
    for pair in COMPARISONS.get(name).run(setting):
        assert pair.missing == ""
        assert pair.ratio > 0


def config(out: Path, **values: object) -> BenchmarkConfig:
    return BenchmarkConfig(out=str(out), archs=TINY, size=64, batch_size=2, rounds=1, device="cpu", **values)


def test_a_comparison_that_fails_is_listed(
    small: None, raw: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = samples.find_dataset("auto", raw)
    monkeypatch.setattr(stain, "choose_records", lambda *_: (SimpleNamespace(stained=False, name=failing.name), []))
    with pytest.raises(UserError, match="nothing could be measured .sample is not H&E-stained"):
        benchmark(config(tmp_path / "one", what="stain", raw=str(raw)))
    monkeypatch.setattr(job, "time_help", lambda rounds: Timing((0.25,) * rounds))
    monkeypatch.setattr(job, "train_network", lambda network, *_: Convergence(network.arch, problem="no memory"))
    result = benchmark(config(tmp_path / "all", raw=str(raw), workers=1, data=str(prepared)))
    assert result.document["problems"] == {"stain": "sample is not H&E-stained: choose another --raw"}
    assert result.document["help"]["median_s"] == 0.25
    assert len(result.document["pairs"]) == 12
    assert [one["arch"] for one in result.document["networks"]] == [TINY]
    assert [(one["arch"], one["problem"]) for one in result.document["convergence"]] == [(TINY, "no memory")]


def test_tables_follow_what_was_measured(small: None, tmp_path: Path) -> None:
    benchmark(config(tmp_path, what="models"))
    assert {path.name for path in tmp_path.iterdir()} == {"benchmark.csv", "benchmark.json"}
    with pytest.raises(UserError, match="is not empty"):
        benchmark(config(tmp_path, what="intervals"))
    (tmp_path / "own.txt").write_text("kept")
    benchmark(config(tmp_path, what="intervals", overwrite=True))
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.csv", "benchmark.json", "own.txt"}


def test_raw_images_must_be_known_and_wanted(tmp_path: Path, raw: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        benchmark(config(tmp_path / "a", what="input", raw=str(tmp_path / "none")))
    with pytest.raises(UsageError, match="intervals reads no raw images"):
        benchmark(config(tmp_path / "b", what="intervals", raw=str(raw)))


def test_drawn_images_are_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "NUM_DRAWN", 64)
    monkeypatch.setattr(samples, "WIDTH_PX", 40)
    monkeypatch.setattr(samples, "HEIGHT_PX", 32)
    counted = []
    progress = SimpleNamespace(begin=lambda *_: None, advance=counted.append)
    with samples.raw_folder(None, 0, progress) as folder:
        adapter, records = samples.choose_records(folder, 10)
        assert adapter.drawn
        assert len(records) == 10
        assert len({record.label for record in records}) == 2
    assert counted == ["drawing"] * 64
    assert not folder.exists()


def test_the_command(breastcli: Callable, tmp_path: Path) -> None:
    words = ("benchmark", "models", "--archs", TINY, "--size", 32, "--batch-size", 2, "--rounds", 1, "--device", "cpu")
    done = breastcli(*words, "--json")
    assert done.code == 0, done.stderr
    (row,) = done.json["networks"]
    assert row["training_images_per_s"] > 0
    assert done.json["out"] == "runs/benchmark"
    assert done.json["pairs"] == []
    document = json.loads((tmp_path / "runs/benchmark/benchmark.json").read_text())
    assert document["networks"] == [row]
    with (tmp_path / "runs/benchmark/benchmark.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert list(line) == list(row)
    assert int(line["parameters"]) == row["parameters"]
    assert line["training_memory_mb"] == ""


def test_what_is_printed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = io.StringIO()
    monkeypatch.setattr(console, "OUT", Console(file=text, width=120, highlight=False))
    whole = NetworkFigures(
        "dalaresnet50",
        224,
        parameters=25_611_842,
        printed=24_000_000,
        remark="[counts] differ",
        gflops=8.2763,
        checkpoint_mb=102.61,
        training_images_per_s=12.345,
        inference_images_per_s=1234.5,
        latency_p50_ms=99.96,
        latency_p95_ms=0.51239,
    )
    pairs = [
        Pair("a / b", "images/s", 8, Timing((1.0, 2.0, 4.0)), Timing((2.0, 8.0, 8.0))),
        Pair("c / d", "images/s", 8, Timing((1.0,)), None, "d is not installed", remark="and [all] that"),
    ]
    document = {
        "device": "cpu",
        "processor": "some",
        "precision": "float32",
        "batch_size": 32,
        "rounds": 3,
        "networks": [dataclasses.asdict(one) for one in (whole, NetworkFigures("swin", 100, problem="out of memory"))],
        "pairs": [pair.to_json() for pair in pairs],
        "convergence": [],
        "help": {"median_s": 0.163},
        "problems": {"stain": "no tissue"},
        "conventions": ["how it counts"],
    }
    show.show_benchmark(BenchmarkResult(tmp_path / "out", document, 0.0))
    lines = text.getvalue().splitlines()
    found = {line.split()[0]: line.split() for line in lines if line.strip()}
    assert found["dalaresnet50"][1:5] == ["224", "25,611,842", "24,000,000", "8.28"]
    assert found["dalaresnet50"][5:] == ["103", "12.3", "1,234", "100,", "0.512", "–"]
    assert found["a"][3:] == ["4.00", "1.00", "images/s", "4.00", "(2.00–4.00)"]
    assert found["c"][3:] == ["8.00", "d", "is", "not", "installed", "images/s", "–"]
    assert found["and"] == ["and", "[all]", "that"]
    for line in (
        "- dalaresnet50: [counts] differ",
        "- swin: out of memory",
        "- breastcli --help, whole process: 0.16 s",
        "stain could not be measured: no tissue",
        "- how it counts",
    ):
        assert line in lines
    assert lines[-1].endswith("out")
