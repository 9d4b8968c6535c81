from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from breastcli.config import PrepareConfig, SynthesizeConfig, TrainConfig
from breastcli.data.store import PreparedData
from breastcli.errors import UsageError, UserError
from breastcli.files import read_csv, read_json, write_json
from breastcli.gan import training
from breastcli.gan.checkpoint import load_generator
from breastcli.gan.runs import GENERATOR
from breastcli.gan.start import start_fit, with_defaults
from breastcli.gan.subject import open_folder, real_set
from breastcli.prepare import prepare
from breastcli.synthesize import synthesize
from breastcli.system.distributed import Processes
from breastcli.system.runfolder import RESUME, find_run
from breastcli.train import train

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def tiny_gan(prepared: Path) -> SynthesizeConfig:
    """A fit that takes seconds: eight steps, four snapshots."""
    return SynthesizeConfig(
        step="fit",
        data=str(prepared),
        kimg=0.064,
        snapshot=0.016,
        width=4,
        batch_size=8,
        objective="wgan-gp",
        n_critic=1,
        precision="fp32",
        device="cpu",
        on_collapse="warn",
    )


@pytest.fixture(scope="session")
def fitted(tiny_gan: SynthesizeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished fit; tests must not change it."""
    out = tmp_path_factory.mktemp("gans") / "tiny"
    synthesize(dataclasses.replace(tiny_gan, out=str(out)))
    return out


@pytest.fixture
def own_gan(fitted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fitted, tmp_path / "gan"))


def test_fit_generate_and_assess_through_the_command_line(
    breastcli, prepared: Path, trained: Path, tmp_path: Path
) -> None:
    done = breastcli("synthesize", "--smoke", "--data", prepared, "--device", "cpu", "--out", "images", "--json")
    assert done.code == 0, done.stderr
    assert done.json["out"] == "images"
    assert done.json["run"] == "runs/cwgan-all-smoke"
    assert done.json["drawn"] is True
    real, images = PreparedData.open(prepared), PreparedData.open(tmp_path / "images")
    counts = np.bincount(real.labels[real.select("train")])
    assert done.json["generated"] == {"benign": len(images.rows)} == {"benign": counts[1] - counts[0]}
    found = breastcli("synthesize", "assess", "runs/cwgan-all-smoke", "--features", trained, "--device", "cpu")
    assert found.code == 0, found.stderr
    assert found.stdout.splitlines()[-1] == "runs/cwgan-all-smoke/assess"
    assert "generated / held-out" in found.stdout
    assert "drawn by a program" in found.stdout
    run = tmp_path / "runs/cwgan-all-smoke"
    assert {path.name for path in (run / "assess").iterdir()} == {
        "assessment.json",
        "samples.png",
        "neighbours.png",
        "distances.png",
    }
    page = (run / "report.html").read_text()
    assert "generated / held-out" in page
    document = read_json(run / "assess/assessment.json")
    assert document["generated"]["n"] == counts.sum()
    assert document["dataset"]["split"] == "val"


def test_the_run_folder_holds_what_a_reader_needs(fitted: Path) -> None:
    history = read_csv(fitted / "history.csv")
    assert [float(row["kimg"]) for row in history] == [0.016, 0.032, 0.048, 0.064]
    assert {"critic_loss", "generator_loss", "critic_gap", "gradient_penalty", "diversity"} <= set(history[0])
    assert sorted(path.name for path in (fitted / "samples").iterdir()) == [f"{n:08d}.png" for n in (16, 32, 48, 64)]
    with Image.open(fitted / "training.gif") as film:
        assert film.n_frames >= 2
    info = read_json(fitted / "run.json")
    assert info["status"] == "finished"
    assert info["kimg"] == 0.064
    assert "step: fit" in (fitted / "config.yaml").read_text()
    assert (fitted / "curves.png").is_file()
    facts = read_json(fitted / "checkpoints/generator.json")
    assert facts["dataset"]["split_fingerprint"] == info["dataset"]["split_fingerprint"]


def test_only_training_rows_are_learned_from(prepared: Path, tiny_gan: SynthesizeConfig, tmp_path: Path) -> None:
    """Other validation and test images must not change a single weight."""
    copied = Path(shutil.copytree(prepared, tmp_path / "data"))
    data = PreparedData.open(copied)
    images = np.load(copied / "images.npy")
    images[np.concatenate([data.select("val"), data.select("test")])] = 7
    np.save(copied / "images.npy", images)
    runs = []
    for folder in (prepared, copied):
        config = dataclasses.replace(tiny_gan, data=str(folder), out=str(tmp_path / f"run{len(runs)}"), kimg=0.016)
        synthesize(config)
        runs.append(load_file(tmp_path / f"run{len(runs)}" / GENERATOR))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_resumed_fit_is_the_uninterrupted_one(
    tiny_gan: SynthesizeConfig, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    config = dataclasses.replace(tiny_gan, out=str(out))
    steps = 0
    whole = training.take_step

    def interrupted(session: training.GanSession) -> None:
        nonlocal steps
        steps += 1
        if steps == 6:  # between two snapshots: step 5 is taken again
            raise KeyboardInterrupt
        whole(session)

    monkeypatch.setattr("breastcli.synthesize.take_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        synthesize(config)
    assert read_json(out / "run.json")["status"] == "interrupted"
    monkeypatch.undo()
    synthesize(dataclasses.replace(config, resume=True))
    assert (out / "history.csv").read_bytes() == (fitted / "history.csv").read_bytes()
    mine, theirs = load_file(out / GENERATOR), load_file(fitted / GENERATOR)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_collapse_on_record_survives_resuming(
    own_gan: Path, tiny_gan: SynthesizeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = torch.load(own_gan / RESUME, weights_only=True)
    torch.save({**saved, "collapse": "at 0.0 kimg: alike"}, own_gan / RESUME)
    result = synthesize(dataclasses.replace(tiny_gan, out=str(own_gan), resume=True, kimg=0.08))
    assert result.collapse == "at 0.0 kimg: alike"


def test_resuming_under_other_options_or_another_split_is_refused(
    own_gan: Path, tiny_gan: SynthesizeConfig, folds: Path
) -> None:
    again = dataclasses.replace(tiny_gan, out=str(own_gan), resume=True)
    with pytest.raises(UserError, match="fitted with --gp-weight 10.0, not 5.0"):
        synthesize(dataclasses.replace(again, gp_weight=5.0))
    saved = torch.load(own_gan / RESUME, weights_only=True)
    torch.save({**saved, "split_fingerprint": "other"}, own_gan / RESUME)
    with pytest.raises(UserError, match="another split"):
        synthesize(again)


def test_more_images_continue_a_finished_fit(own_gan: Path, tiny_gan: SynthesizeConfig) -> None:
    result = synthesize(dataclasses.replace(tiny_gan, out=str(own_gan), resume=True, kimg=0.08))
    assert [row["kimg"] for row in result.history][-2:] == [0.064, 0.08]


def test_overwriting_removes_what_was_written_and_nothing_else(own_gan: Path, tiny_gan: SynthesizeConfig) -> None:
    (own_gan / "notes.txt").write_text("mine")
    (own_gan / "samples/mine.png").write_bytes(b"x")
    with pytest.raises(UserError, match="not empty"):
        synthesize(dataclasses.replace(tiny_gan, out=str(own_gan)))
    synthesize(dataclasses.replace(tiny_gan, out=str(own_gan), kimg=0.016, overwrite=True))
    assert (own_gan / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in (own_gan / "samples").iterdir()) == ["00000016.png", "mine.png"]


def test_overwriting_with_bad_options_loses_nothing(own_gan: Path, tiny_gan: SynthesizeConfig) -> None:
    before = sorted(own_gan.rglob("*"))
    with pytest.raises(UsageError, match="no such class"):
        synthesize(dataclasses.replace(tiny_gan, out=str(own_gan), overwrite=True, classes="normal"))
    assert sorted(own_gan.rglob("*")) == before


def test_an_occupied_folder_for_the_images_is_seen_before_the_fit(tiny_gan: SynthesizeConfig, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/mine.txt").write_text("x")
    config = dataclasses.replace(tiny_gan, step="all", run=str(tmp_path / "run"), out=str(tmp_path / "images"))
    with pytest.raises(UserError, match="not empty"):
        synthesize(config)
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"log.txt"}


def test_a_collapse_stops_the_fit_and_keeps_the_last_healthy_generator(
    tiny_gan: SynthesizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, shares = tmp_path / "run", iter([0.9, 0.5, 0.01, 0.01])
    monkeypatch.setattr("breastcli.synthesize.diversity_share", lambda session: next(shares))
    with pytest.raises(UserError, match="stopped at 0.1 kimg: the images are nearly all alike"):
        synthesize(dataclasses.replace(tiny_gan, out=str(out), on_collapse="stop"))
    assert read_json(out / "run.json")["status"] == "failed"
    facts = read_json(out / "checkpoints/generator.json")
    assert (facts["kimg"], facts["collapse"]) == (0.032, None)
    assert [float(row["diversity"]) for row in read_csv(out / "history.csv")] == [0.9, 0.5, 0.01, 0.01]


def test_a_collapse_that_is_only_warned_of_stays_on_record(
    tiny_gan: SynthesizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = iter([0.9, 0.5, 0.01, 0.01])
    monkeypatch.setattr("breastcli.synthesize.diversity_share", lambda session: next(shares))
    result = synthesize(dataclasses.replace(tiny_gan, out=str(tmp_path / "run")))
    assert "nearly all alike" in (result.collapse or "")
    images = tmp_path / "images"
    synthesize(SynthesizeConfig(step="generate", run=str(tmp_path / "run"), out=str(images), num=4, device="cpu"))
    assert "nearly all alike" in read_json(images / "dataset.json")["synthetic"]["collapse"]


def generate(run: Path, out: Path, **changes: object) -> PreparedData:
    settings = {"label": "benign", "num": 6, "device": "cpu"} | changes
    synthesize(SynthesizeConfig(step="generate", run=str(run), out=str(out), **settings))
    return PreparedData.open(out)


def test_the_folder_of_images_says_where_it_comes_from(fitted: Path, prepared: Path, tmp_path: Path) -> None:
    images, real = generate(fitted, tmp_path / "a"), PreparedData.open(prepared)
    made = images.card["synthetic"]
    for name in ("name", "fingerprint", "split_fingerprint", "size_px"):
        assert made["source"][name] == real.card[name]
    assert (made["source"]["fold"], made["kimg"], made["generated_px"]) == (None, 0.064, 64)
    assert images.classes == real.classes
    assert images.images.shape == (6, real.size_px, real.size_px, 3)
    assert {row.split for row in images.rows} == {"train"}
    assert {row.record.patient for row in images.rows} == {""}
    with pytest.raises(UserError, match="synthetic training images only"):
        images.select("val")


def test_images_for_a_copy_of_another_size(fitted: Path, raw: Path, folds: Path, tmp_path: Path) -> None:
    prepare(PrepareConfig(raw=str(raw), out=str(tmp_path / "larger"), size=48))
    images = generate(fitted, tmp_path / "images", data=str(tmp_path / "larger"))
    assert images.size_px == 48
    larger = PreparedData.open(tmp_path / "larger").card
    assert images.card["synthetic"]["source"]["fingerprint"] == larger["fingerprint"]
    drawn = load_generator(fitted / GENERATOR, CPU).draw({0: 6}, seed=0)[0]
    assert np.array_equal(images.images, training.resize(drawn, 48).permute(0, 2, 3, 1).numpy())
    with pytest.raises(UserError, match="another split"):
        generate(fitted, tmp_path / "none", data=str(folds))


def test_images_depend_on_the_seed_alone(fitted: Path, tmp_path: Path) -> None:
    first = generate(fitted, tmp_path / "a").images
    assert np.array_equal(first, generate(fitted, tmp_path / "b", batch_size=4).images)
    assert np.array_equal(first, generate(fitted, tmp_path / "c", num=9, label="all").images[:6])
    assert not np.array_equal(first, generate(fitted, tmp_path / "d", seed=1).images)


def test_truncation_pulls_towards_the_mean(fitted: Path) -> None:
    generator = load_generator(fitted / GENERATOR, CPU)

    def spread(truncation: float) -> float:
        return float(generator.draw({0: 16}, seed=0, truncation=truncation)[0].float().std(dim=0).mean())

    assert spread(0.0) == 0
    assert spread(0.5) < spread(1.0)


def test_one_noise_gives_every_condition_its_own_image(fitted: Path) -> None:
    network = load_generator(fitted / GENERATOR, CPU).network
    noise = torch.randn((4, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = (network(noise, torch.full((4,), number)) for number in (0, 1))
    assert float((first - second).abs().mean()) > 1e-3


def test_generated_images_train_a_classifier(
    fitted: Path, prepared: Path, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    generate(fitted, tmp_path / "images", label="all", num=5)
    result = train(
        dataclasses.replace(tiny_config, epochs=1, extra=str(tmp_path / "images"), out=str(tmp_path / "run"))
    )
    assert result.num_synthetic == 5  # of the minority class alone


def test_a_fold_is_written_down_and_named(folds: Path, tiny_gan: SynthesizeConfig, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folds, tmp_path / "data")
    config = dataclasses.replace(tiny_gan, step="all", data="data", fold=1, kimg=0.016, mag="100x", label="all", num=3)
    result = synthesize(config)
    assert (result.run, result.out) == (Path("runs/cwgan-100x-fold1"), Path("data-synthetic-100x-fold1"))
    images = PreparedData.open(result.out)
    assert images.card["synthetic"]["source"]["fold"] == 1
    assert {row.record.magnification for row in images.rows} == {"100X"}  # also where it was no condition


def test_subtypes_and_magnifications_reach_the_manifest(
    prepared: Path, tiny_gan: SynthesizeConfig, tmp_path: Path
) -> None:
    for kind in ("subtype", "class+magnification"):
        run = tmp_path / kind
        synthesize(dataclasses.replace(tiny_gan, out=str(run), condition=kind, kimg=0.016, classes="benign"))
        images = generate(run, tmp_path / f"{kind}-images", num=12)
        records = [row.record for row in images.rows]
        assert {one.label for one in records} == {"benign"}
        values = {one.subtype if kind == "subtype" else one.magnification for one in records}
        assert len(values) > 1
        assert values.isdisjoint({"", None})
        with pytest.raises(UsageError, match="malignant: not known"):
            generate(run, tmp_path / "none", label="malignant")


def test_real_images_are_never_overwritten(fitted: Path, prepared: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(prepared, tmp_path / "data"))
    with pytest.raises(UserError, match="holds real images"):
        generate(fitted, copied, overwrite=True)
    assert PreparedData.open(copied).card == PreparedData.open(prepared).card


def test_a_folder_is_assessed_like_a_run(fitted: Path, trained: Path, tmp_path: Path) -> None:
    generate(fitted, tmp_path / "images", label="all", num=20)
    settings = {"features": str(trained), "device": "cpu"}
    result = synthesize(SynthesizeConfig(step="assess", run=str(tmp_path / "images"), **settings))
    assert result.out == tmp_path / "images/assess"
    assert result.assessment["generated"]["n"] == 40
    json.dumps(result.to_json(), allow_nan=False)
    with pytest.raises(UserError, match="not empty"):
        synthesize(SynthesizeConfig(step="assess", run=str(tmp_path / "images"), **settings))


def test_assessing_against_other_data_is_refused(fitted: Path, trained: Path, folds: Path, prepared: Path) -> None:
    settings = {"step": "assess", "features": str(trained), "device": "cpu"}
    with pytest.raises(UserError, match="another split"):
        synthesize(SynthesizeConfig(run=str(fitted), data=str(folds), **settings))
    with pytest.raises(UserError, match="real images"):
        synthesize(SynthesizeConfig(run=str(prepared), **settings))
    with pytest.raises(UserError, match="is a run of train"):
        synthesize(SynthesizeConfig(run=str(trained), **settings))


def test_a_fit_never_takes_a_classifiers_folder(own_run: Path, tiny_gan: SynthesizeConfig) -> None:
    before = sorted(own_run.rglob("*"))
    with pytest.raises(UserError, match="is a run of train"):
        synthesize(dataclasses.replace(tiny_gan, out=str(own_run), overwrite=True))
    assert sorted(own_run.rglob("*")) == before


def test_options_that_the_fit_contradicts_are_refused(fitted: Path, tmp_path: Path) -> None:
    for changes in ({"mag": "100x"}, {"fold": 2}, {"size": 128}, {"condition": "subtype"}):
        with pytest.raises(UsageError, match="was fitted with"):
            generate(fitted, tmp_path / "images", **changes)


def test_an_assessment_of_other_images_goes_when_they_do(fitted: Path, trained: Path, tmp_path: Path) -> None:
    generate(fitted, tmp_path / "images", label="all", num=20)
    settings = {"features": str(trained), "device": "cpu"}
    synthesize(SynthesizeConfig(step="assess", run=str(tmp_path / "images"), **settings))
    generate(fitted, tmp_path / "images", label="all", num=21, overwrite=True)
    assert not (tmp_path / "images/assess/assessment.json").exists()


def test_a_fit_that_did_not_finish_is_said_so(own_gan: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    info = read_json(own_gan / "run.json")
    write_json(own_gan / "run.json", info | {"status": "interrupted"})
    generate(own_gan, tmp_path / "images")
    assert "did not finish" in caplog.text


def test_folders_of_some_conditions_are_compared_with_their_like(
    prepared: Path, tiny_gan: SynthesizeConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    synthesize(dataclasses.replace(tiny_gan, out=str(run), condition="class+magnification", kimg=0.016))
    generate(run, tmp_path / "images", label="benign 40X", num=4)
    subject = open_folder(tmp_path / "images")
    data = PreparedData.open(prepared)
    like = real_set(data, "train", subject)
    rows = [row.record for row in data.rows if row.split == "train"]
    assert len(like) == sum(one.label == "benign" and one.magnification == "40X" for one in rows) > 0


def test_one_class_that_collapses_alone_is_seen(fitted: Path, prepared: Path, tiny_gan: SynthesizeConfig) -> None:
    session = start_fit(with_defaults(tiny_gan), PreparedData.open(prepared), Processes(), CPU)[0]
    normal = session.generator.forward
    healthy = training.diversity_share(session)
    session.generator.forward = lambda noise, conditions: normal(noise * (conditions[:, None] > 0) + 1e-6, conditions)
    assert training.diversity_share(session) < 0.05 < healthy


def test_a_generator_is_no_classifier(fitted: Path) -> None:
    with pytest.raises(UserError, match="is a run of synthesize"):
        find_run(str(fitted))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"size": 96}, "--size 96"),
        ({"precision": "fp16"}, "fp16"),
        ({"diffaugment": "blur"}, "blur"),
        ({"classes": "normal"}, "normal"),
        ({"run": "elsewhere"}, "named twice"),
        ({"mag": "50x"}, "50x"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    tiny_gan: SynthesizeConfig, tmp_path: Path, changes: dict[str, object], match: str
) -> None:
    out = tmp_path / "run"
    with pytest.raises(UsageError, match=match):
        synthesize(dataclasses.replace(tiny_gan, **{"out": str(out), **changes}))
    assert not out.exists() or {path.name for path in out.iterdir()} <= {"log.txt"}


@pytest.mark.parametrize(
    ("objective", "given", "expected"), [("wgan-gp", None, 5), ("hinge", None, 2), ("hinge", 4, 4)]
)
def test_objectives_bring_their_own_critic_steps(objective: str, given: int | None, expected: int) -> None:
    assert with_defaults(SynthesizeConfig(objective=objective, n_critic=given)).n_critic == expected


def test_a_damaged_generator_is_one_line(own_gan: Path, tmp_path: Path) -> None:
    (own_gan / GENERATOR).write_bytes(b"damaged")
    with pytest.raises(UserError, match="is damaged"):
        generate(own_gan, tmp_path / "images")
    (own_gan / GENERATOR).unlink()
    with pytest.raises(UserError, match="no such generator"):
        generate(own_gan, tmp_path / "images")


def test_two_processes_fit_one_generator(breastcli, prepared: Path, tmp_path: Path) -> None:
    words = ["synthesize", "fit", "--smoke", "--data", prepared, "--device", "cpu", "--out", "run", "--json"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, "-m", "breastcli", *words]
    done = subprocess.run(
        list(map(str, command)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    info = read_json(tmp_path / "run/run.json")
    assert (info["status"], info["processes"], info["kimg"]) == ("finished", 2, 0.256)
    assert len(read_csv(tmp_path / "run/history.csv")) == 2
    objects = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(objects) == 1  # one process speaks
