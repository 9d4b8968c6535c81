from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from breastcli.data.augment import dihedral
from breastcli.data.loading import to_network
from breastcli.errors import LeakError, UserError
from breastcli.gan.assessment import Assessment, ImageSet, assess_images
from breastcli.gan.features import INCEPTION_FILE, FeatureNetwork, load_features
from breastcli.gan.training import resize
from breastcli.models import ModelOptions
from breastcli.system.checkpoint import load_checkpoint, save_checkpoint
from breastcli.system.runfolder import find_run

CLASSES = ("benign", "malignant")
CPU = torch.device("cpu")


def pixels(count: int, seed: int, brightness: int = 0) -> torch.Tensor:
    values = torch.randint(0, 128, (count, 3, 8, 8), generator=torch.Generator().manual_seed(seed))
    return (values + brightness).to(torch.uint8)


def image_set(count: int, seed: int, brightness: int = 0, images: torch.Tensor | None = None) -> ImageSet:
    images = pixels(count, seed, brightness) if images is None else images
    labels = np.arange(len(images)) % 2
    return ImageSet(images, labels, [f"{seed}-{number}" for number in range(len(images))])


def flat_network() -> FeatureNetwork:
    """Features are the pixels themselves; the score of "malignant" is the brightness above 100."""

    def apply(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = images.float().flatten(1)
        return values, torch.stack([torch.full((len(values),), 100.0), values.mean(dim=1)], dim=1)

    return FeatureNetwork("pixels", "run", None, CLASSES, "", apply, CPU)


def assess(generated: ImageSet, training: ImageSet, held_out: ImageSet, **changes: object) -> Assessment:
    settings = {"draws": 4, "seed": 0, "batch_size": 16, "turn": True} | changes
    return assess_images(generated, training, held_out, CLASSES, flat_network(), **settings)


def figures_of(found: Assessment) -> dict[str, dict[str, float]]:
    return {row["name"]: row for row in found.figures["comparisons"]}


def test_images_like_the_real_ones_reach_the_baseline_and_others_do_not() -> None:
    training, held_out = image_set(80, 1), image_set(40, 2)
    good = figures_of(assess(image_set(60, 3), training, held_out))
    bad = figures_of(assess(image_set(60, 3, brightness=60), training, held_out))
    baseline = good["training / held-out"]
    for other in ("generated / training", "generated / held-out"):
        assert good[other]["fid"]["mean"] == pytest.approx(baseline["fid"]["mean"], rel=0.1)
        assert bad[other]["fid"]["mean"] > 2 * baseline["fid"]["mean"]
        assert bad[other]["kid"]["mean"] > 10 * abs(good[other]["kid"]["mean"])
    assert [row["kind"] for row in good.values()] == ["generated", "generated", "real", "real"]


def test_every_set_has_the_same_size_and_mixture() -> None:
    generated = image_set(30, 3)
    lopsided = ImageSet(generated.images, np.array([0] * 24 + [1] * 6), generated.names)
    found = assess(lopsided, image_set(80, 1), image_set(40, 2)).figures
    assert found["n_per_draw"] == 20 + 6  # held out: 20 of each class; generated: 24 and 6; half of training: 20
    assert [row["n"] for row in found["classes"]] == [24, 6]


def test_training_images_given_out_as_generated_are_reported_as_copies() -> None:
    training, held_out = image_set(80, 1), image_set(40, 2)
    copied = assess(image_set(0, 9, images=training.images[:40]), training, held_out)
    near = copied.figures["neighbours"]
    assert near["copies"]
    assert near["num_below"] == 40
    assert near["closest"][0]["distance"] == 0
    assert copied.closest[:3] == [(0, 0), (1, 1), (2, 2)]
    honest = assess(image_set(40, 3), training, held_out).figures["neighbours"]
    assert not honest["copies"]
    assert honest["num_below"] <= 2


def test_a_turned_copy_is_found_where_the_generator_saw_turned_images() -> None:
    training, held_out = image_set(80, 1), image_set(40, 2)
    turned = image_set(0, 9, images=dihedral(training.images[:20], 5))
    assert assess(turned, training, held_out).figures["neighbours"]["num_below"] == 20
    assert assess(turned, training, held_out, turn=False).figures["neighbours"]["num_below"] < 5


def test_the_baseline_distances_leave_an_image_itself_out() -> None:
    found = assess(image_set(40, 3), image_set(80, 1), image_set(40, 2))
    assert found.distances["training to training"].min() > 0
    assert len(found.distances["held-out to training"]) == 40


def test_agreement_and_diversity_of_each_class() -> None:
    images = torch.cat([pixels(20, 3), pixels(20, 4, brightness=100)])
    generated = ImageSet(images, np.repeat([0, 1], 20), [str(number) for number in range(40)])
    benign, malignant = assess(generated, image_set(80, 1), image_set(40, 2)).figures["classes"]
    assert benign["agreement"]["value"] == 1
    assert malignant["agreement"]["value"] == 1
    assert 0.8 < benign["agreement"]["low"] < 1
    swapped = dataclasses.replace(generated, labels=1 - generated.labels)
    assert assess(swapped, image_set(80, 1), image_set(40, 2)).figures["classes"][0]["agreement"]["value"] == 0
    alike = ImageSet(images[:1].expand(40, -1, -1, -1), generated.labels, generated.names)
    flat = assess(alike, image_set(80, 1), image_set(40, 2)).figures["classes"][0]
    assert flat["diversity"] == pytest.approx(0, abs=1e-6)
    assert benign["diversity"] == pytest.approx(benign["real_diversity"], rel=0.1)


def test_draws_repeat_and_depend_on_the_seed() -> None:
    sets = image_set(60, 3), image_set(80, 1), image_set(40, 2)
    assert assess(*sets).figures == assess(*sets).figures
    assert assess(*sets).figures["comparisons"] != assess(*sets, seed=1).figures["comparisons"]


def test_too_few_images_are_refused() -> None:
    with pytest.raises(UserError, match="too few images: 60 generated, 8 training"):
        assess(image_set(60, 3), image_set(8, 1), image_set(40, 2))


def test_features_of_a_run_are_its_embedding(trained: Path) -> None:
    run = find_run(str(trained))
    network = load_features(str(trained), run.info["dataset"], None, CPU)
    assert network.classes == CLASSES
    features, predicted = network(pixels(5, 0), batch_size=2)
    model, facts = load_checkpoint(run.best, CPU)
    with torch.inference_mode():
        images = to_network(resize(pixels(5, 0), facts["model"]["size_px"]))
        np.testing.assert_allclose(features, model.embed(model.features(images)).numpy(), atol=1e-5)
    assert predicted is not None
    assert np.isin(predicted, [0, 1]).all()
    both, _ = network(pixels(5, 0), batch_size=5)
    np.testing.assert_allclose(features, both, atol=1e-5)


def test_features_that_saw_synthetic_images_are_said_to(
    trained: Path, own_run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = find_run(str(trained)).info["dataset"]
    assert "same training images" in load_features(str(trained), source, None, CPU).note
    model, facts = load_checkpoint(own_run / "checkpoints/best.safetensors", CPU)
    options = ModelOptions(**facts.pop("model"))
    save_checkpoint(own_run / "checkpoints/best.safetensors", model, options, {**facts, "synthetic": {"run": "x"}})
    assert "nothing follows" in load_features(str(own_run), source, None, CPU).note
    assert "nothing follows" in caplog.text


def test_features_learned_on_another_split_are_refused(trained: Path) -> None:
    source = find_run(str(trained)).info["dataset"]
    with pytest.raises(LeakError, match="another split or fold"):
        load_features(str(trained), {**source, "split_fingerprint": "other"}, None, CPU)
    with pytest.raises(LeakError, match="another split or fold"):
        load_features(str(trained), source, 1, CPU)
    elsewhere = {**source, "name": "another set", "split_fingerprint": "other"}
    assert load_features(str(trained), elsewhere, 1, CPU).kind == "run"


def test_inception_without_its_package_or_weights_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match=f"not at hand as .*{INCEPTION_FILE}"):
        load_features("inception", {}, None, CPU)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / INCEPTION_FILE).write_bytes(b"not weights")
    with pytest.raises(UserError, match="is damaged"):
        load_features("inception", {}, None, CPU)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UserError, match="torch-fidelity is not installed"):
        load_features("inception", {}, None, CPU)


def test_inception_gives_its_2048_features(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    # The published weights cannot be had in a test; the network's own random ones go through the same door.
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    saved = {}
    monkeypatch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: saved.update(state))
    (tmp_path / "checkpoints").mkdir()
    torch.save({"a": torch.zeros(1)}, tmp_path / "checkpoints" / INCEPTION_FILE)
    network = load_features("inception", {}, None, CPU)
    assert list(saved) == ["a"]
    features, predicted = network(pixels(3, 0), batch_size=2)
    assert features.shape == (3, 2048)
    assert predicted is None
