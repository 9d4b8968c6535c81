"""explain: from a run to panels, figures and the report."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from breastcli.cams import CAMS
from breastcli.config import ExplainConfig, PrepareConfig, TrainConfig
from breastcli.data.store import PreparedData
from breastcli.errors import UsageError, UserError
from breastcli.explain import explain
from breastcli.files import read_csv
from breastcli.prepare import prepare
from breastcli.reporting.report import write_report
from breastcli.system.subjects import Subjects
from breastcli.train import train

SIZE_PX = 96  # the tiny network's last maps are then 3 x 3


@pytest.fixture(scope="module")
def large(raw: Path, tiny_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The drawn data set at a size at which maps are maps, and a run on it; tests must not change them."""
    folder = tmp_path_factory.mktemp("large")
    prepare(PrepareConfig(raw=str(raw), out=str(folder / "data"), size=SIZE_PX))
    train(dataclasses.replace(tiny_config, data=str(folder / "data"), out=str(folder / "run")))
    return folder / "data", folder / "run"


@pytest.fixture
def own_run(large: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the run to write into."""
    return Path(shutil.copytree(large[1], tmp_path / "run"))


def config_of(run: Path, **options: object) -> ExplainConfig:
    return ExplainConfig(
        **(
            {"run": str(run), "num": "4", "device": "cpu", "precision": "fp32", "samples": 3, "resamples": 100}
            | options
        )
    )


@pytest.fixture
def loose(tmp_path: Path) -> tuple[Path, Path]:
    """Six images of three patients with a dark square each, and masks of the squares; one mask is missing."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    generator = np.random.default_rng(0)
    for number in range(6):
        pixels = generator.integers(180, 255, size=(48, 64, 3), dtype=np.uint8)
        row, column = generator.integers(0, 30, size=2)
        pixels[row : row + 16, column : column + 20] //= 4
        region = np.zeros((48, 64), dtype=np.uint8)
        region[row : row + 16, column : column + 20] = 255
        name = f"p{number // 2}_{number}"
        Image.fromarray(pixels).save(images / f"{name}.png")
        if number:
            Image.fromarray(region).save(masks / f"{name}_mask.png")
    return images, masks


def test_a_split_is_explained(own_run: Path) -> None:
    result = explain(config_of(own_run, method="gradcam,eigencam"))
    out = own_run / "explain/gradcam-eigencam"
    assert result.out == out
    document = json.loads((out / "explain.json").read_text())
    assert document["n"] == 4
    assert {one["label"] for one in document["images"]} == {"benign", "malignant"}  # drawn evenly
    assert document["dataset"]["drawn"]
    for one in document["images"]:
        assert one["target"] == one["predicted"]
        assert 0.5 <= one["probability"] <= 1
        assert (out / one["panel"]).stat().st_size > 5000
    stored = np.load(out / "saliency.npz", allow_pickle=False)
    assert stored["gradcam"].shape == (4, SIZE_PX, SIZE_PX)
    assert stored["image_ids"].tolist() == [one["image_id"] for one in document["images"]]
    assert stored["eigencam"].min() >= 0
    assert stored["eigencam"].max() == pytest.approx(1, abs=1e-3)
    assert "Grad-CAM" in (own_run / "report.html").read_text()


def test_masks_are_measured_against_baselines(own_run: Path, loose: tuple[Path, Path]) -> None:
    images, masks = loose
    options = {"images": (str(images),), "masks": str(masks), "num": "all", "patients": r"^(p\d)_"}
    result = explain(config_of(own_run, method="all", **options))
    part = result.document["localisation"]
    assert part["n"] == 5
    assert part["missing"] == 1
    assert part["num_groups"] == 3
    assert set(part["methods"]) == {*CAMS.names(), "uniform", "centre", "luminance", "brightness", "random"}
    # The squares are the dark part of each image, so inverted luminance finds them and no untrained map can beat it.
    best = max(one["mean"]["average_precision"]["value"] for one in part["methods"].values())
    assert part["methods"]["luminance"]["mean"]["average_precision"]["value"] == best > 0.9
    uniform = part["methods"]["uniform"]["mean"]
    assert uniform["recall"]["value"] == 1
    assert uniform["precision"]["value"] == pytest.approx(uniform["average_precision"]["value"])
    assert set(part["differences"]["dtgradcam"]) == set(part["methods"]) - {"dtgradcam"}
    rows = read_csv(result.out / "localisation.csv")
    assert len(rows) == 5 * len(part["methods"])
    assert {row["patient"] for row in rows} == {"p0", "p1", "p2"}
    assert (result.out / "comparison.png").is_file()


def test_faithfulness_needs_no_masks(own_run: Path) -> None:
    result = explain(config_of(own_run, method="gradcam", faithfulness=True))
    part = result.document["faithfulness"]
    assert set(part["methods"]) == {"gradcam", "random"}
    assert 0 <= part["methods"]["gradcam"]["deletion_auc"]["value"] <= 1
    levels = part["randomisation"]["gradcam"]["levels"]
    assert levels[0]["layer"].startswith("head")
    assert len(read_csv(result.out / "faithfulness.csv")) == 2 * 4


def test_the_explained_class_can_be_chosen(own_run: Path) -> None:
    one = explain(config_of(own_run, method="gradcam", target="malignant"))
    other = explain(config_of(own_run, method="gradcam", target="benign", overwrite=True))
    assert {image["target"] for image in other.document["images"]} == {"benign"}
    pairs = zip(one.document["images"], other.document["images"], strict=True)
    assert all(a["probability"] + b["probability"] == pytest.approx(1) for a, b in pairs)
    true = explain(config_of(own_run, method="gradcam", target="true", overwrite=True))
    assert all(image["target"] == image["label"] for image in true.document["images"])


def test_same_seed_same_maps_whatever_the_batch(own_run: Path, tmp_path: Path) -> None:
    options = {"method": "dtgradcam,eigencam", "target": "malignant"}
    one = explain(config_of(own_run, out=str(tmp_path / "a"), batch_size=32, **options))
    other = explain(config_of(own_run, out=str(tmp_path / "b"), batch_size=2, **options))
    for method in ("dtgradcam", "eigencam"):
        first, second = (np.load(result.out / "saliency.npz")[method].astype(float) for result in (one, other))
        np.testing.assert_allclose(first, second, atol=2e-3)
    assert first.max() > 0.5


def test_val_rule_fits_on_validation_masks_only(own_run: Path, large: tuple[Path, Path], tmp_path: Path) -> None:
    """Masks for every image of the drawn set, named by the images; the level comes from the validation images."""
    data = PreparedData.open(large[0])
    masks = tmp_path / "masks"
    masks.mkdir()
    for row in data.rows:
        region = np.zeros((row.height_px, row.width_px), dtype=np.uint8)
        region[: row.height_px // 2] = 255
        Image.fromarray(region).save(masks / f"{Path(row.record.path).stem}.png")
    result = explain(config_of(own_run, method="gradcam", masks=str(masks), binarise="val"))
    thresholds = result.document["localisation"]["thresholds"]
    assert set(thresholds) == {"gradcam", "uniform", "centre", "luminance", "brightness", "random"}
    assert all(0 <= level <= 1 for level in thresholds.values())


def test_overwriting_removes_old_panels_and_keeps_foreign_files(own_run: Path) -> None:
    first = explain(config_of(own_run, method="gradcam", num="6"))
    (first.out / "panels/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty.*--overwrite"):
        explain(config_of(own_run, method="gradcam"))
    second = explain(config_of(own_run, method="gradcam", num="2", overwrite=True))
    panels = {path.name for path in (second.out / "panels").iterdir()}
    assert panels == {Path(one["panel"]).name for one in second.document["images"]} | {"notes.txt"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gradcamm"}, "did you mean 'gradcam"),
        ({"num": "0"}, "--num 0: not a number"),
        ({"target": "malignent"}, "did you mean 'malignant'"),
        ({"binarise": "ostu"}, "no rule 'ostu'"),
        ({"binarise": "val"}, "--binarise val: needs masks of validation images"),
        ({"patients": "x"}, "--patients: a split's patients are known"),
    ],
)
def test_refusals(options: dict, message: str, own_run: Path) -> None:
    with pytest.raises(UsageError, match=message):
        explain(config_of(own_run, **options))


def test_masks_of_other_images_are_refused(own_run: Path, loose: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="no mask in .* belongs to any of the 4 images"):
        explain(config_of(own_run, masks=str(loose[1])))


def test_breakhis_was_published_without_masks(loose: tuple[Path, Path]) -> None:
    subjects = Subjects(
        images=np.zeros((1, 8, 8, 3), np.uint8),
        image_ids=["x"],
        paths=[Path("SOB_B_A-14-22549AB-40-001.png")],
        sizes_px=[(8, 8)],
        groups=np.array(["x"]),
        patients=["x"],
        magnifications=["40X"],
        labels=np.zeros(1, np.int64),
        root=Path(),
    )
    with pytest.raises(UserError, match=r"BreakHis was published without masks.*--images.*--faithfulness"):
        subjects.masks(loose[1], "breakhis")
    with pytest.raises(UserError, match="no such folder$|no such folder:"):
        subjects.masks(Path("nowhere"), "breakhis")


def test_masks_among_the_images_are_no_images(own_run: Path, loose: tuple[Path, Path]) -> None:
    images, masks = loose
    for mask in masks.iterdir():
        shutil.copy(mask, images / mask.name)
    options = {"images": (str(images),), "masks": str(images), "num": "all"}
    assert explain(config_of(own_run, method="gradcam", **options)).document["n"] == 6


def test_a_refused_option_leaves_the_earlier_result(own_run: Path) -> None:
    first = explain(config_of(own_run, method="gradcam"))
    before = {path: path.read_bytes() for path in first.out.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="did you mean 'malignant'"):
        explain(config_of(own_run, method="gradcam", overwrite=True, target="malignnt"))
    assert {path: path.read_bytes() for path in first.out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("text", ["", "[]", '{"images": [{}]}', '{"images": [{"panel": "../../run.json"}]}'])
def test_a_damaged_result_can_be_overwritten(text: str, own_run: Path) -> None:
    first = explain(config_of(own_run, method="gradcam"))
    (first.out / "explain.json").write_text(text)
    assert explain(config_of(own_run, method="gradcam", overwrite=True)).document["n"] == 4
    assert (own_run / "run.json").is_file()


def test_foreign_files_of_our_names_are_kept(own_run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/gallery.png").write_text("mine")
    with pytest.raises(UserError, match="gallery.png was not written by breastcli explain"):
        explain(config_of(own_run, out=str(tmp_path / "mine"), overwrite=True))


def test_names_that_look_alike_as_files_have_a_panel_each(own_run: Path, loose: tuple[Path, Path]) -> None:
    images, _ = loose
    shutil.copy(images / "p0_0.png", images / "p0 0.png")
    result = explain(config_of(own_run, method="gradcam", images=(str(images),), num="all"))
    panels = [one["panel"] for one in result.document["images"]]
    assert len(set(panels)) == len(panels) == 7
    assert all((result.out / panel).is_file() for panel in panels)


def test_training_again_removes_the_explanations(
    own_run: Path, large: tuple[Path, Path], tiny_config: TrainConfig
) -> None:
    out = explain(config_of(own_run, method="gradcam")).out
    config = dataclasses.replace(tiny_config, data=str(large[0]), out=str(own_run), epochs=1, overwrite=True)
    train(config)
    assert not (out / "explain.json").exists()
    assert "Explanations" not in (own_run / "report.html").read_text()


def test_the_report_tells_of_another_checkpoint(own_run: Path) -> None:
    explain(config_of(own_run, method="gradcam"))
    assert "older one" not in (own_run / "report.html").read_text()
    best = own_run / "checkpoints/best.json"
    best.write_text(json.dumps(json.loads(best.read_text()) | {"epoch": 99}))
    assert "older one" in write_report(own_run).read_text()


def test_patterns_that_do_not_fit_are_refused(own_run: Path, loose: tuple[Path, Path]) -> None:
    config = config_of(own_run, images=(str(loose[0]),))
    with pytest.raises(UsageError, match=r"finds nothing in p\d_\d.png: make it fit"):
        explain(dataclasses.replace(config, patients="x(.)"))
    with pytest.raises(UsageError, match="not a regular expression"):
        explain(dataclasses.replace(config, patients="(", overwrite=True))
    with pytest.raises(UsageError, match="loose files have no label"):
        explain(dataclasses.replace(config, target="true", overwrite=True))


def test_command_line(own_run: Path, breastcli: Callable[..., object]) -> None:
    words = ("--method", "gradcam", "--num", 2, "--faithfulness", "--device", "cpu", "--resamples", 100)
    outcome = breastcli("explain", own_run, *words)
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout.strip().splitlines()[-1] == str(own_run / "explain/gradcam")
    assert "faithfulness" in outcome.stdout
    assert "rank correlation" in outcome.stdout
    again = breastcli("explain", own_run, *words, "--overwrite", "--json")
    assert again.json["n"] == 2


@pytest.mark.real
def test_real_nuclei(own_run: Path, real_data: Path) -> None:
    folder = real_data / "tnbc_nuclei"
    options = {"images": (str(folder / "images"),), "masks": str(folder / "masks"), "patients": r"^(\d+)_", "num": "6"}
    part = explain(config_of(own_run, method="gradcam", **options)).document["localisation"]
    assert part["n"] == 6
    assert part["methods"]["luminance"]["mean"]["average_precision"]["value"] > 0.4  # nuclei are dark
