"""Perturbed images: the functions against other libraries, the figures by hand, and the command."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageEnhance
from rich.console import Console
from scipy.ndimage import gaussian_filter
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from test_comparison import make_predictions as exams_of_images
from torch import Tensor

from breastcli import console, show
from breastcli.config import EvaluateConfig, PrepareConfig, TrainConfig
from breastcli.data.loading import to_network
from breastcli.data.stain import fit_reference
from breastcli.data.store import PreparedData
from breastcli.data.stress import (
    PERTURBATIONS,
    STRENGTHS,
    blur,
    recompress,
    scale_brightness,
    scale_contrast,
    scale_stains,
    suitable_perturbations,
)
from breastcli.errors import UsageError
from breastcli.evaluate import evaluate
from breastcli.metrics.calibration import temper
from breastcli.metrics.intervals import resampled_weights
from breastcli.metrics.robustness import FIGURES, FLIPPED, Stressed, describe_stress
from breastcli.prepare import prepare
from breastcli.records import Predictions
from breastcli.reporting import stress as reporting
from breastcli.reporting.stress import plot_stress, stress_section, write_stress
from breastcli.system.checkpoint import load_checkpoint
from breastcli.system.runfolder import remove_results
from breastcli.system.stressing import predict_stressed
from breastcli.train import train

SIZE_PX = 96
VECTORS = np.array([[0.65, 0.70, 0.29], [0.27, 0.88, 0.39]]).T / np.linalg.norm(
    [[0.65, 0.70, 0.29], [0.27, 0.88, 0.39]], axis=1
)  # (3, 2), haematoxylin and eosin
RESAMPLES = 200
SETTINGS = {"resamples": RESAMPLES, "seed": 0}
CARD = {"name": "breakhis", "size_px": 224}
QUICK = {"device": "cpu", "precision": "fp32", "resamples": 100}


def amounts(seed: int) -> np.ndarray:
    """Draw (2, N) concentrations: a third each of nuclei, stroma and a mixture, a tenth of it blank."""
    generator = np.random.default_rng(seed)
    drawn = generator.uniform(0.2, 1.2, (2, SIZE_PX**2))
    kind = generator.integers(0, 3, SIZE_PX**2)
    drawn[1, kind == 0] = 0
    drawn[0, kind == 1] = 0
    drawn[:, generator.random(SIZE_PX**2) < 0.1] = 0
    return drawn


def stain(concentrations: np.ndarray) -> Tensor:
    """Return the (3, H, W) uint8 image of (2, N) concentrations by Beer-Lambert."""
    levels = 240 * np.exp(-VECTORS @ concentrations) - 1
    return torch.from_numpy(levels.round().clip(0, 255).astype(np.uint8)).reshape(3, SIZE_PX, SIZE_PX)


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Three stained fields with channels-last strides, as batches have them; smoothed, so that blur has grades."""
    fields = np.stack([stain(amounts(seed)).permute(1, 2, 0).numpy() for seed in range(3)]).astype(float)
    smooth = gaussian_filter(fields, (0, 1, 1, 0))
    return torch.from_numpy(smooth.round().astype(np.uint8)).permute(0, 3, 1, 2)


def largest_difference(first: Tensor, second: Any) -> int:
    return int(np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).max())


def pillow(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(one.permute(1, 2, 0).contiguous().numpy()) for one in images]


def planes(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(one) for one in pictures]).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("factors", [(1.5, 1), (1, 2), (0.5, 0.5)])
def test_stains_are_scaled_as_beer_and_lambert_say(factors: tuple[float, float]) -> None:
    drawn = amounts(0)
    changed = scale_stains(stain(drawn)[None], *factors)[0]
    expected = stain(drawn * np.array(factors)[:, None])
    apart = (changed.int() - expected.int()).abs().float()
    assert apart.mean() < 2  # the vectors are measured: within a degree of those that drew the image
    assert apart.mean() < 0.1 * (stain(drawn).int() - expected.int()).abs().float().mean()


def test_stains_are_scaled_along_the_measured_vectors(images: Tensor) -> None:
    changed = scale_stains(images, 1.5, 0.7)
    for image, found in zip(images, changed, strict=True):
        vectors = np.array(fit_reference(image[None], "macenko", source="test").matrix)
        density = -np.log((image.flatten(1).double().numpy() + 1) / 240)
        amount, *_ = np.linalg.lstsq(vectors, density, rcond=None)
        rest = density - vectors @ amount
        levels = 240 * np.exp(-(vectors @ (amount * [[1.5], [0.7]]) + rest)) - 1
        assert largest_difference(found, levels.round().clip(0, 255).reshape(found.shape)) <= 1


def test_images_without_measurable_stain_stay_as_they_are(images: Tensor) -> None:
    white, grey = (
        torch.full_like(images[:1], 250),
        images[:1].float().mean(dim=1, keepdim=True).byte().expand(1, 3, -1, -1),
    )
    mixed = scale_stains(torch.cat([white, images[:1], grey]), 2, 2)
    assert torch.equal(mixed[0], white[0])
    assert torch.equal(mixed[2], grey[0])
    assert not torch.equal(mixed[1], images[0])


@pytest.mark.parametrize("sigma_px", [0.6, 1, 2, 4])
def test_blur_is_that_of_scipy(images: Tensor, sigma_px: float) -> None:
    expected = gaussian_filter(images.double().numpy(), (0, 0, sigma_px, sigma_px), mode="nearest", truncate=4.0)
    assert largest_difference(blur(images, sigma_px), expected.round()) <= 1
    assert (blur(images, sigma_px).numpy() != expected.round()).mean() < 1e-3  # rounded, not cut off
    small = images[:, :, :5, :7]  # smaller than the kernel
    expected = gaussian_filter(small.double().numpy(), (0, 0, sigma_px, sigma_px), mode="nearest", truncate=4.0)
    assert largest_difference(blur(small, sigma_px), expected.round()) <= 1


@pytest.mark.parametrize("quality", [60, 10])
def test_recompression_is_that_of_opencv(images: Tensor, quality: int) -> None:
    cv2 = pytest.importorskip("cv2")  # comes with grad-cam
    for image, found in zip(images, recompress(images, quality), strict=True):
        _, file = cv2.imencode(".jpg", image.permute(1, 2, 0).numpy()[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        expected = torch.from_numpy(cv2.imdecode(file, cv2.IMREAD_COLOR)[..., ::-1].copy()).permute(2, 0, 1)
        assert largest_difference(found, expected) <= 2
        assert largest_difference(image, expected) > 20


def test_recompression_is_what_a_saved_file_holds(images: Tensor) -> None:
    for picture, found in zip(pillow(images), recompress(images, 30), strict=True):
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=30)
        assert np.array_equal(np.asarray(Image.open(file)), found.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.25])
def test_brightness_is_that_of_pillow(images: Tensor, factor: float) -> None:
    expected = planes([ImageEnhance.Brightness(one).enhance(factor) for one in pillow(images)])
    assert largest_difference(scale_brightness(images, factor), expected) <= 1


@pytest.mark.parametrize("factor", [0.4, 0.8, 1.3])
def test_contrast_is_that_of_pillow(images: Tensor, factor: float) -> None:
    expected = planes([ImageEnhance.Contrast(one).enhance(factor) for one in pillow(images)])
    assert largest_difference(scale_contrast(images, factor), expected) <= 1  # Pillow rounds the mean and cuts off


def test_no_strength_changes_nothing(images: Tensor) -> None:
    same = (scale_stains(images, 1, 1), blur(images, 0), scale_brightness(images, 1), scale_contrast(images, 1))
    assert all(torch.equal(one, images) for one in same)
    worst = (recompress(images, 10).int() - images.int()).abs().float().mean()
    best = (recompress(images, 95).int() - images.int()).abs().float().mean()
    assert best < 0.3 * worst


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_levels_grow_and_images_are_changed_each_by_itself(name: str, images: Tensor) -> None:
    one = PERTURBATIONS[name]
    changed = [one.apply(images, level) for level in one.levels]
    assert len(changed) == len(STRENGTHS)
    for found in changed:
        assert found.shape == images.shape
        assert found.dtype == torch.uint8
    distances = [(found.int() - images.int()).abs().float().mean().item() for found in changed]
    assert 0.5 < distances[0] < distances[1] < distances[2]
    assert torch.equal(one.apply(images.contiguous(), one.levels[1]), changed[1])  # whatever the memory layout
    assert torch.equal(one.apply(images[1:2], one.levels[1]), changed[1][1:2])


@pytest.mark.gpu
@pytest.mark.parametrize("name", PERTURBATIONS)
def test_a_gpu_makes_the_same_images(name: str, images: Tensor) -> None:
    one = PERTURBATIONS[name]
    on_gpu = one.apply(images.cuda(), one.levels[1])
    assert on_gpu.is_cuda
    assert largest_difference(on_gpu.cpu(), one.apply(images, one.levels[1])) <= 1


def test_stains_need_a_stained_data_set() -> None:
    assert suitable_perturbations("breakhis") == (PERTURBATIONS, {})
    kept, left_out = suitable_perturbations("mini_ddsm")
    assert set(left_out) == {"haematoxylin", "eosin", "pale"}
    assert set(kept) == set(PERTURBATIONS) - set(left_out)
    assert set(left_out.values()) == {"mini_ddsm is not H&E-stained"}


def make_predictions(seed: int = 0) -> Predictions:
    return exams_of_images(noise=1.0, num_images=60, num_exams=12, seed=seed, hardness=1.0)


def test_figures_and_paired_differences_by_hand() -> None:
    clean, other = make_predictions(0), make_predictions(1)
    document = describe_stress(clean, [[Stressed("blur", 2, other, 0)]], CARD, **SETTINGS)
    weights, member = resampled_weights(clean.groups(), RESAMPLES, 0)
    draws = [np.repeat(np.arange(len(clean)), counts[member]) for counts in weights]

    def figures(side: Predictions, rows: np.ndarray) -> dict[str, float]:
        labels = side.labels[rows]
        balanced = balanced_accuracy_score(labels, side.predicted[rows])
        return {"balanced_accuracy": balanced, "roc_auc": roc_auc_score(labels, side.probs[rows, 1])}

    (found,) = document["conditions"]
    for name in ("balanced_accuracy", "roc_auc"):
        before, after = (np.array([figures(side, rows)[name] for rows in draws]) for side in (clean, other))
        for values, given in (
            (before, document["clean"][name]),
            (after, found["figures"][name]),
            (after - before, found["differences"][name]),
        ):
            expected = (values[0], *np.quantile(values[1:], (0.025, 0.975)))
            assert tuple(given.values()) == pytest.approx(expected, abs=1e-12)
    flipped = np.array([(clean.predicted != other.predicted)[rows].mean() for rows in draws])
    expected = (flipped[0], *np.quantile(flipped[1:], (0.025, 0.975)))
    assert tuple(found[FLIPPED].values()) == pytest.approx(expected, abs=1e-12)
    assert (found["n"], document["num_groups"]) == (60, 12)
    assert (found["strength"], found["label"], found["kind"]) == ("moderate", "σ 2 px", "sharpness")


def test_unchanged_predictions_differ_by_nothing_and_have_no_interval() -> None:
    clean = make_predictions()
    (found,) = describe_stress(clean, [[Stressed("dark", 0.9, clean, 0)]], CARD, **SETTINGS)["conditions"]
    assert found[FLIPPED] == {"value": 0, "low": None, "high": None}
    assert all(one == {"value": 0, "low": None, "high": None} for one in found["differences"].values())


def test_runs_are_pooled_in_their_order() -> None:
    clean, other = make_predictions(0), make_predictions(1)
    halves = [np.arange(60) < 25, np.arange(60) >= 25]
    runs = [[Stressed("eosin", 2, other.select(rows), count)] for rows, count in zip(halves, (3, 4), strict=True)]
    pooled = describe_stress(clean, runs, CARD, **SETTINGS)
    whole = describe_stress(clean, [[Stressed("eosin", 2, other, 7)]], CARD, **SETTINGS)
    assert pooled == whole
    assert pooled["conditions"][0]["num_unchanged"] == 7
    assert any("7 images whose stains cannot be told apart stay as they are" in note for note in pooled["notes"])


def test_threshold_and_temperature_are_those_of_the_clean_images(images: Tensor) -> None:
    """A network that sees nothing but brightness: what it is asked about, and what becomes of its answer."""

    def predictor(rows: np.ndarray, task: str, change: Callable[[Tensor], Tensor]) -> np.ndarray:
        changed = change(torch.cat([images, torch.zeros_like(images[:1])])[rows])
        assert changed.is_contiguous(memory_format=torch.channels_last)
        positive = changed.float().mean(dim=(1, 2, 3)).double().numpy() / 255
        return np.stack([1 - positive, positive], axis=1)

    predictor.data = SimpleNamespace(card=CARD)  # type: ignore[attr-defined]
    rows = np.array([2, 0, 3])
    clean = make_predictions().select(np.arange(3))
    found = {(one.perturbation, one.level): one for one in predict_stressed(predictor, rows, "test", clean, 0.5, 0.02)}
    assert len(found) == sum(len(one.levels) for one in PERTURBATIONS.values())
    half = found["dark", 0.5]
    levels = scale_brightness(images[[2, 0]], 0.5).float().mean(dim=(1, 2, 3)).double().numpy() / 255
    expected = temper(np.stack([1 - levels, levels], axis=1), 0.5)
    assert half.predictions.probs[:2] == pytest.approx(expected)
    assert (expected[:, 1] > 0.02).all()
    assert (expected[:, 1] < 0.5).all()
    assert half.predictions.predicted.tolist() == [1, 1, 0]
    assert half.num_unchanged == 1  # black stays black
    assert half.predictions.image_ids.tolist() == clean.image_ids.tolist()


def document_of(clean: Predictions, other: Predictions, names: tuple[str, ...] = tuple(PERTURBATIONS)) -> dict:
    stressed = [Stressed(name, level, other, 0) for name in names for level in PERTURBATIONS[name].levels]
    return describe_stress(clean, [stressed], CARD, **SETTINGS)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Keep the figures that plots write, so that a test can read them."""
    kept: list[Figure] = []
    write = reporting._write
    monkeypatch.setattr(reporting, "_write", lambda figure, *rest: (kept.append(figure), write(figure, *rest)))
    return kept


def test_the_plot_shows_every_perturbation_at_its_figures(tmp_path: Path, drawn: list[Figure]) -> None:
    document = document_of(make_predictions(0), make_predictions(1))
    plot_stress(document, tmp_path / "stress.png", stamp="LEAKY: image-level split")
    panels = drawn[0].axes
    assert len(panels) == 6
    lines = {line.get_label(): line.get_ydata() for axes in panels[:3] for line in axes.lines}
    after, before = (document[key] for key in ("conditions", "clean"))
    expected = [before["roc_auc"]["value"], *[after[0]["figures"]["roc_auc"]["value"]] * 3]
    assert lines["Blur: σ 1, 2, 4 px"] == pytest.approx(expected)
    assert len(lines) == 1 + len(PERTURBATIONS)  # the clean line has the same name in each
    assert drawn[0].get_suptitle() == "LEAKY: image-level split"
    assert "(n = 60 images)" in panels[0].get_title(loc="left")
    again = tmp_path / "again.png"
    plot_stress(document, again, stamp="LEAKY: image-level split")
    assert again.read_bytes() == (tmp_path / "stress.png").read_bytes()


def test_a_figure_that_is_undefined_is_explained(tmp_path: Path, drawn: list[Figure]) -> None:
    clean = dataclasses.replace(make_predictions(), labels=np.ones(60, dtype=np.int64))
    document = document_of(clean, clean, ("blur", "dark"))
    write_stress(tmp_path, document, "")
    assert len(drawn[0].axes) == 4
    assert "needs images of two" in drawn[0].axes[0].texts[0].get_text().replace("\n", " ")
    rows = list(csv.DictReader((tmp_path / "stress.csv").open()))
    assert all(row["value"] == "" for row in rows if row["figure"] == "roc_auc")
    section = stress_section(tmp_path, document)
    assert section is not None
    assert section.table.rows[1][1][0].text == "–"


def run(folder: Path, **options: object) -> dict:
    return evaluate(EvaluateConfig(runs=(str(folder),), **(QUICK | options))).document


def test_the_command(breastcli: Callable, own_run: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--stress", "--device", "cpu", "--precision", "fp32", "--resamples", 100)
    done = breastcli("evaluate", own_run, *words, "--json")
    assert done.code == 0, done.stderr
    folder = own_run / "evaluate/test"
    document = json.loads((folder / "metrics.json").read_text())
    told = document["stress"]
    assert done.json["stress"] == told
    assert told["clean"] == {name: document["image"]["overall"][name] for name in FIGURES}
    assert len(told["conditions"]) == 24
    assert all(one["n"] == document["image"]["n"] for one in told["conditions"])
    assert_table_holds(folder / "stress.csv", told)
    assert_network_saw_perturbed_images(own_run, prepared, told)
    page = (own_run / "report.html").read_text()
    assert "Perturbed images, image level" in page
    assert "JPEG quality 30 (moderate)" in page
    assert page.count("Robustness: ROC AUC and balanced accuracy") == 1

    printed = io.StringIO()
    monkeypatch.setattr(console, "OUT", Console(file=printed, width=120))
    again = evaluate(EvaluateConfig(runs=(str(own_run),), stress=True, overwrite=True, **QUICK))
    assert again.document == document
    show.show_evaluate(again)
    assert f"perturbed images (n = {told['n']})" in printed.getvalue()
    (line,) = [line for line in printed.getvalue().splitlines() if "quality 30" in line]
    (one,) = [one for one in told["conditions"] if one["label"] == "quality 30"]
    assert line.split()[:3] == ["JPEG", "quality", "30"]
    assert f"{one['differences']['roc_auc']['value']:.3f}" in line
    assert f"{one[FLIPPED]['value']:.3f}" in line

    assert run(own_run, overwrite=True)["stress"] is None
    assert not [path for path in folder.iterdir() if path.name.startswith("stress")]
    assert "Perturbed images" not in (own_run / "report.html").read_text()


def assert_table_holds(file: Path, told: dict) -> None:
    rows = list(csv.DictReader(file.open()))
    assert len(rows) == len(FIGURES) + 24 * (1 + len(FIGURES))
    assert {row["stamp"] for row in rows} == {"drawn by a program, not real tissue"}
    table = {(row["perturbation"], row["level"], row["figure"]): row for row in rows}
    assert len(table) == len(rows)

    def cells(row: dict[str, str], prefix: str = "") -> dict[str, float | None]:
        names = (prefix or "value", *(f"{prefix}_{end}" if prefix else end for end in ("low", "high")))
        return {
            key: float(row[name]) if row[name] else None
            for key, name in zip(("value", "low", "high"), names, strict=True)
        }

    for name in FIGURES:
        assert cells(table["clean", "", name]) == told["clean"][name]
    for one in told["conditions"]:
        known = (one["perturbation"], str(one["level"]))
        assert cells(table[(*known, FLIPPED)]) == one[FLIPPED]
        for name in FIGURES:
            row = table[(*known, name)]
            assert (row["strength"], int(row["n"])) == (one["strength"], one["n"])
            assert cells(row) == one["figures"][name]
            assert cells(row, "difference") == one["differences"][name]


def assert_network_saw_perturbed_images(folder: Path, prepared: Path, told: dict) -> None:
    data = PreparedData.open(prepared)
    rows = data.select("test")
    model, _ = load_checkpoint(folder / "checkpoints/best.safetensors", torch.device("cpu"))
    images = torch.from_numpy(np.array(data.images[rows])).permute(0, 3, 1, 2)
    clean = Predictions.from_csv(folder / "evaluate/test/predictions.csv")
    for one in told["conditions"]:
        if one["perturbation"] in ("blur", "eosin", "jpeg"):
            with torch.no_grad():
                changed = PERTURBATIONS[one["perturbation"]].apply(images, one["level"])
                positive = model(to_network(changed)).softmax(dim=1)[:, 1].numpy()
            expected = ((positive >= 0.5) != clean.predicted).mean()
            assert math.isclose(one[FLIPPED]["value"], expected, abs_tol=1e-9), one["label"]
            brier = np.square(positive - data.labels[rows]).mean()
            assert one["figures"]["brier"]["value"] == pytest.approx(brier, abs=1e-5)


def test_folds_are_pooled(folds: Path, tiny_config: TrainConfig, tmp_path: Path, breastcli: Callable) -> None:
    for fold in range(3):
        out = str(tmp_path / f"tiny-fold{fold}")
        train(dataclasses.replace(tiny_config, data=str(folds), fold=fold, epochs=1, out=out))
    words = ("--stress", "--device", "cpu", "--precision", "fp32", "--resamples", 100, "--json", "--calibrate")
    done = breastcli("evaluate", *(f"tiny-fold{fold}" for fold in range(3)), *words)
    assert done.code == 0, done.stderr
    told = done.json["stress"]
    assert told["n"] == 96
    assert {one["n"] for one in told["conditions"]} == {96}
    assert told["clean"] == {name: done.json["image"]["overall"][name] for name in FIGURES}
    assert (tmp_path / "tiny-pooled/evaluate/test/stress.png").is_file()
    assert "Perturbed images" in (tmp_path / "tiny-pooled/report.html").read_text()


def test_a_data_set_that_is_not_stained(tmp_path: Path, tiny_config: TrainConfig) -> None:
    generator = np.random.default_rng(0)
    for folder, letter, level in (("Benign", "C", 90), ("Cancer", "B", 150)):
        for case in range(1, 7):
            path = tmp_path / "raw" / folder / f"{letter}_{case:04d}_1.LEFT_CC.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(level - 40, level + 40, (40, 40)).astype(np.uint8)).save(path)
    prepare(PrepareConfig(raw=str(tmp_path / "raw"), out=str(tmp_path / "data"), size=32, group_by="patient"))
    train(dataclasses.replace(tiny_config, data=str(tmp_path / "data"), out=str(tmp_path / "run"), epochs=1))
    told = run(tmp_path / "run", stress=True)["stress"]
    assert "left out: More eosin (mini_ddsm is not H&E-stained)" in told["notes"]
    assert {one["kind"] for one in told["conditions"]} == {"sharpness", "light"}
    assert told["left_out"] == suitable_perturbations("mini_ddsm")[1]
    assert "mini_ddsm is not H&amp;E-stained" in (tmp_path / "run/report.html").read_text()


def test_validation_images_and_a_new_training(own_run: Path) -> None:
    document = run(own_run, split="val", stress=True)
    assert document["stress"]["n"] == document["image"]["n"]
    assert (own_run / "evaluate/val/stress.png").is_file()
    remove_results(own_run)
    assert not list((own_run / "evaluate/val").iterdir())


def test_a_comparison_takes_what_was_predicted(own_run: Path) -> None:
    with pytest.raises(UsageError, match="--stress: --compare takes what each side's evaluation predicted"):
        evaluate(EvaluateConfig(runs=(str(own_run), str(own_run)), compare=True, stress=True, **QUICK))
