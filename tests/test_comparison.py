"""Two evaluations beside each other: the arithmetic, the plot, and the command."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from breastcli import console, show
from breastcli.config import EvaluateConfig, PrepareConfig, TrainConfig
from breastcli.errors import UsageError, UserError
from breastcli.evaluate import evaluate
from breastcli.metrics.classification import METRICS, score_images, score_patients
from breastcli.metrics.comparison import Comparison, compare_predictions
from breastcli.metrics.intervals import resampled_weights
from breastcli.prepare import prepare
from breastcli.records import Predictions, strings
from breastcli.reporting.comparison import plot_comparison
from breastcli.train import train

RESAMPLES = 200
LEAKY = "LEAKY: image-level split"


def make_predictions(
    noise: float, num_images: int = 120, num_exams: int = 24, seed: int = 0, hardness: float = 1.5
) -> Predictions:
    """Images whose difficulty belongs to their exam, with each side's own noise on top."""
    exams = np.arange(num_images) % num_exams
    labels = exams % 2
    hard = np.random.default_rng(1).normal(size=num_exams)[exams]
    logits = 1.2 * (2 * labels - 1) + hardness * hard + noise * np.random.default_rng(seed).normal(size=num_images)
    positive = 1 / (1 + np.exp(-logits))
    return Predictions(
        image_ids=strings(f"image{row}" for row in range(num_images)),
        classes=("benign", "malignant"),
        probs=np.stack([1 - positive, positive], axis=1),
        predicted=(positive >= 0.5).astype(np.int64),
        labels=labels,
        columns={"exam": strings(f"e{exam}" for exam in exams), "patient": strings(f"p{exam}" for exam in exams)},
    )


def renamed(predictions: Predictions) -> Predictions:
    return dataclasses.replace(predictions, image_ids=strings(f"other-{name}" for name in predictions.image_ids))


A, B = make_predictions(0.3, seed=2), make_predictions(0.6, seed=3)


def rows_of_resamples(predictions: Predictions, seed: int | tuple[int, int]) -> list[np.ndarray]:
    weights, member = resampled_weights(predictions.groups(), RESAMPLES, seed)
    return [np.repeat(np.arange(len(predictions)), counts[member]) for counts in weights[1:]]


def both_figures(predictions: Predictions, rows: np.ndarray) -> tuple[float, float]:
    labels = predictions.labels[rows]
    found = balanced_accuracy_score(labels, predictions.predicted[rows])
    return found, roc_auc_score(labels, predictions.probs[rows, 1])


def assert_by_hand(found: Comparison, a: Predictions, b: Predictions, seed_b: int | tuple[int, int]) -> None:
    pairs = zip(rows_of_resamples(a, 0), rows_of_resamples(b, seed_b), strict=True)
    samples = np.array([np.subtract(both_figures(b, rows_b), both_figures(a, rows_a)) for rows_a, rows_b in pairs])
    everything = np.arange(len(a)), np.arange(len(b))
    values = np.subtract(both_figures(b, everything[1]), both_figures(a, everything[0]))
    for column, name in enumerate(("balanced_accuracy", "roc_auc")):
        difference = found.levels["image"].figures[name].difference
        expected = (values[column], *np.quantile(samples[:, column], (0.025, 0.975)))
        assert (difference.value, difference.low, difference.high) == pytest.approx(expected, abs=1e-12)


def test_paired_differences_are_those_of_a_plain_bootstrap_with_the_same_draws() -> None:
    shuffled = B.select(np.random.default_rng(0).permutation(len(B)))
    found = compare_predictions(A, shuffled, resamples=RESAMPLES)
    assert (found.paired, found.num_common, found.levels["image"].num_groups) == (True, 120, (24, 24))
    assert_by_hand(found, A, B, seed_b=0)
    assert "paired on the 120 common images;" in found.notes[0]


def test_unpaired_sides_are_resampled_by_themselves() -> None:
    other = renamed(B).select(np.arange(100))
    found = compare_predictions(A, other, resamples=RESAMPLES)
    assert (found.paired, found.num_common, found.num_images) == (False, 0, (120, 100))
    assert_by_hand(found, A, other, seed_b=(0, 1))
    assert "unpaired: 0 of 120 (A) and 100 (B) images are common" in found.notes[0]
    assert "24 exams are on both sides" in found.notes[-1]
    elsewhere = compare_predictions(A, B, same_data=False, resamples=RESAMPLES)  # of another data set, by chance alike
    assert (elsewhere.paired, elsewhere.num_common) == (False, 0)
    assert not any("both sides and" in note for note in elsewhere.notes)


def test_the_sides_figures_are_those_of_evaluate() -> None:
    levels = compare_predictions(A, B, resamples=RESAMPLES).levels
    image, patient = score_images(B, resamples=100), score_patients(B, resamples=100)
    assert list(levels["image"].figures) == list(METRICS)
    for key, scores in (("image", image), ("patient_vote", patient.vote), ("patient_mean", patient.mean)):
        found = {name: levels[key].figures[name].b for name in METRICS}
        assert found == pytest.approx({name: one.value for name, one in scores.overall.items()}, abs=1e-12)
    rate = levels["patient_vote"].figures["recognition_rate"].b
    assert rate == pytest.approx(patient.recognition_rate.value, abs=1e-12)


def test_a_run_does_not_differ_from_itself_and_no_interval_is_claimed() -> None:
    for level in compare_predictions(A, A, resamples=RESAMPLES).levels.values():
        for one in level.figures.values():
            assert one.difference.value == 0
            assert np.isnan([one.difference.low, one.difference.high]).all()
            assert one.leaves_out_zero is None


def test_pairing_narrows_the_interval_of_sides_that_find_the_same_exams_hard() -> None:
    paired = compare_predictions(A, B, resamples=RESAMPLES).levels["image"]
    apart = compare_predictions(A, B, same_data=False, resamples=RESAMPLES).levels["image"]
    for name in ("balanced_accuracy", "roc_auc", "brier"):
        one, other = paired.figures[name].difference, apart.figures[name].difference
        assert one.value == other.value
        assert one.high - one.low < 0.7 * (other.high - other.low)


def test_an_interval_on_one_side_of_zero_leaves_it_out() -> None:
    worse = dataclasses.replace(A, probs=A.probs[:, ::-1], predicted=1 - A.predicted)
    for a, b, sign in ((A, worse, -1), (worse, A, 1)):
        found = compare_predictions(a, b, resamples=RESAMPLES).levels["image"].figures["accuracy"]
        assert found.leaves_out_zero is True
        assert np.sign(found.difference.value) == sign
    assert compare_predictions(A, B, resamples=RESAMPLES).levels["image"].figures["roc_auc"].leaves_out_zero is False


@pytest.mark.parametrize(("num_common", "paired"), [(30, False), (31, True)])
def test_more_than_half_of_the_smaller_side_decides(num_common: int, paired: bool) -> None:
    small = B.select(np.arange(60))
    rows = np.arange(60)
    names = small.image_ids.copy()
    names[num_common:] = [f"other-{name}" for name in names[num_common:]]
    found = compare_predictions(A, dataclasses.replace(small, image_ids=names), resamples=100)
    assert (found.paired, found.num_common) == (paired, num_common)
    expected = A.select(rows[:num_common]) if paired else A
    assert found.levels["image"].n == ((num_common, num_common) if paired else (120, 60))
    assert found.levels["image"].figures["brier"].a == pytest.approx(
        score_images(expected, resamples=100).overall["brier"].value, abs=1e-12
    )
    assert f"paired on the {num_common} common images (of 120 of A and 60 of B)" in found.notes[0] or not paired


def test_an_image_with_another_label_is_another_image() -> None:
    labels = B.labels.copy()
    labels[:50] = 1 - labels[:50]
    assert compare_predictions(A, dataclasses.replace(B, labels=labels), resamples=100).num_common == 70


def test_other_classes_and_missing_labels_are_refused() -> None:
    with pytest.raises(UserError, match="the classes differ: benign, malignant and a, b"):
        compare_predictions(A, dataclasses.replace(B, classes=("a", "b")))
    with pytest.raises(UserError, match="nothing to score"):
        compare_predictions(A, dataclasses.replace(B, labels=None))


def test_one_exam_gives_no_interval() -> None:
    one = renamed(B).select(np.flatnonzero(B.column("exam") == "e0"))
    found = compare_predictions(A, one, resamples=100)
    assert found.levels["image"].num_groups == (0, 0)
    assert np.isnan(found.levels["image"].figures["accuracy"].difference.low)
    assert any("no bootstrap intervals" in note for note in found.notes)


def test_without_patients_there_are_images_only() -> None:
    unknown = dataclasses.replace(B, columns={})
    assert list(compare_predictions(A, unknown, resamples=100).levels) == ["image"]


def test_the_plot_is_readable_and_the_same_each_time(tmp_path: Path) -> None:
    found = compare_predictions(A, B, resamples=100)
    for name in ("a.png", "b.png"):
        plot_comparison(found, ("left", "right"), tmp_path / name, stamp=f"B: {LEAKY}")
    plot_comparison(found, ("left", "right"), tmp_path / "plain.png")
    first, second, plain = ((tmp_path / f"{name}.png").read_bytes() for name in ("a", "b", "plain"))
    assert first == second != plain
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 1500
        assert 0.005 < (np.asarray(image.convert("L")) < 250).mean() < 0.5


@pytest.fixture(scope="module")
def sides(raw: Path, trained: Path, tiny_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of three runs: an exam-level one, the same with another seed, and an image-level one."""
    root = tmp_path_factory.mktemp("sides")
    prepare(PrepareConfig(raw=str(raw), out=str(root / "image-level"), size=32, group_by="image"))
    changes = {"exam": {}, "seed": {"seed": 1}, "image": {"data": str(root / "image-level")}}
    for name, change in changes.items():
        train(dataclasses.replace(tiny_config, epochs=1, out=str(root / name), **change))
    return root


def test_the_command_compares_and_evaluates_what_is_not_evaluated(breastcli: Callable, sides: Path) -> None:
    given = ("--compare", "--resamples", 100, "--device", "cpu", "--json", "--quiet")
    done = breastcli("evaluate", sides / "exam", sides / "seed", *given)
    assert done.code == 0, done.stderr
    document = done.json
    assert document["out"] == str(sides / "compare-exam-seed")
    assert document["paired"] is True
    written = json.loads((sides / "compare-exam-seed/comparison.json").read_text())
    assert {**written, "seconds": document["seconds"], "out": document["out"]} == document
    expected = json.loads((sides / "seed/evaluate/test/metrics.json").read_text())["image"]["overall"]["roc_auc"]
    assert document["levels"]["image"]["figures"]["roc_auc"]["b"] == pytest.approx(expected["value"], abs=1e-12)
    with (sides / "compare-exam-seed/comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * len(METRICS) + 1
    (row,) = [row for row in rows if (row["level"], row["figure"]) == ("image", "roc_auc")]
    assert float(row["difference"]) == pytest.approx(float(row["b"]) - float(row["a"]))


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    text = io.StringIO()
    monkeypatch.setattr(console, "OUT", Console(file=text, width=120, highlight=False))
    return text


def test_the_leaky_side_is_named(sides: Path, tmp_path: Path, printed: io.StringIO) -> None:
    folders = (str(sides / "exam"), str(sides / "image"))
    config = EvaluateConfig(runs=folders, compare=True, out=str(tmp_path / "out"), resamples=100, device="cpu")
    result = evaluate(config)
    assert result.document["a"]["stamp"] == "drawn by a program, not real tissue"
    assert result.document["b"]["stamp"].startswith(LEAKY)
    assert f"B: {LEAKY}" in result.document["stamp"]
    assert f"A: {LEAKY}" not in result.document["stamp"]
    assert "split: by exam (A), by image (B)" in result.document["apart"]
    assert LEAKY in (tmp_path / "out/comparison.csv").read_text()
    with pytest.raises(UserError, match="not empty"):
        evaluate(config)
    show.show_evaluate(result)
    text = printed.getvalue()
    assert text.startswith(f"A: drawn by a program, not real tissue; B: {LEAKY}")
    assert text.split()[-1].endswith("out")
    for words in ("B - A", "leaves out 0", "Patient recognition rate", "unpaired"):
        assert words in text


def test_what_cannot_be_compared_is_refused(sides: Path, tmp_path: Path) -> None:
    one, other = str(sides / "exam"), str(sides / "seed")
    evaluate(EvaluateConfig(runs=(one,), resamples=100, device="cpu", overwrite=True))
    for runs in ((), (one,), (one, other, one)):
        with pytest.raises(UsageError, match="--compare takes two folders"):
            evaluate(EvaluateConfig(runs=runs, compare=True))
    for change in ({"calibrate": True}, {"tta": "d4"}, {"threshold": "0.3"}, {"embedding": True}, {"data": "x"}):
        with pytest.raises(UsageError, match=f"--{next(iter(change))}: --compare takes what"):
            evaluate(EvaluateConfig(runs=(one, other), compare=True, **change))
    with pytest.raises(UserError, match="is not a run folder"):
        evaluate(EvaluateConfig(runs=(one, str(tmp_path)), compare=True))
    shutil.copytree(one, tmp_path / "changed", copy_function=shutil.copy)
    file = tmp_path / "changed/evaluate/test/predictions.csv"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(UserError, match="is not what was evaluated"):
        evaluate(EvaluateConfig(runs=(str(tmp_path / "changed"), other), compare=True))
    weights = Path(one) / "checkpoints/best.safetensors"
    known = weights.read_bytes()
    weights.write_bytes(known + b" ")
    with pytest.raises(UserError, match="has other weights than when"):
        evaluate(EvaluateConfig(runs=(one, other), compare=True, out=str(tmp_path / "stale")))
    weights.write_bytes(known)
    folder = tmp_path / "old/evaluate/test"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text("{}")
    (folder / "predictions.csv").write_text("image_id,predicted,prob_a,prob_b\nx,a,0.5,0.5\n")
    with pytest.raises(UserError, match="is not an evaluation of this version"):
        evaluate(EvaluateConfig(runs=(str(tmp_path / "old"),) * 2, compare=True, out=str(tmp_path / "out")))
