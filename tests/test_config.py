from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from breastcli.config import JOBS, EvaluateConfig, PrepareConfig, TrainConfig
from breastcli.configfile import read_section, resolve, to_yaml
from breastcli.errors import UsageError
from breastcli.parsing import parse_classes, parse_magnification, parse_ratio

SAMPLE_CONFIGS = sorted((Path(__file__).parents[1] / "sample_configs").glob("*.yaml"))


def test_flag_beats_yaml_beats_default() -> None:
    config = resolve(TrainConfig, {"epochs": 7, "lr": 0.5}, {"lr": 0.25, "batch_size": None})
    assert (config.epochs, config.lr, config.batch_size) == (7, 0.25, 32)


def test_yaml_keys_may_have_dashes_and_numbers_without_dots() -> None:
    config = resolve(TrainConfig, {"batch-size": 8, "lr": "1e-4"}, {})
    assert config.batch_size == 8
    assert config.lr == 1e-4


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'batchsize'.*did you mean 'batch_size'"):
        resolve(TrainConfig, {"batchsize": 8}, {})


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TrainConfig, {"epochs": 0}, "--epochs 0: too small"),
        (TrainConfig, {"dropout": 1.0}, "--dropout 1.0: too large"),
        (TrainConfig, {"optimizer": "adm"}, "did you mean 'adam'"),
        (TrainConfig, {"epochs": "many"}, "expected int"),
        (TrainConfig, {"epochs": True}, "expected int"),
        (TrainConfig, {"seed": -1}, "--seed -1"),
        (PrepareConfig, {"folds": 2}, "--folds 2"),
        (PrepareConfig, {"stain": "vahadane"}, "use one of none, macenko, reinhard"),
        (EvaluateConfig, {"resamples": 10}, "--resamples 10"),
    ],
)
def test_bad_values_are_refused_with_their_flag(kind: type, values: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        kind(**values)


@pytest.mark.parametrize("kind", JOBS.values(), ids=JOBS)
def test_yaml_round_trip(kind: type, tmp_path: Path) -> None:
    job = next(name for name, one in JOBS.items() if one is kind)
    config = kind(device="cuda:5")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert resolve(kind, read_section(tmp_path / "config.yaml", job), {}) == config


@pytest.mark.parametrize("text", ["train: [1, 2]", "- a\n- b", "trian:\n  epochs: 3", "train:\n\tepochs: 3", "{"])
def test_bad_yaml_is_one_clear_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"bad\.yaml") as caught:
        read_section(tmp_path / "bad.yaml", "train")
    assert "\n" not in str(caught.value)


def test_absent_section_is_empty(tmp_path: Path) -> None:
    (tmp_path / "some.yaml").write_text("prepare:\n  size: 64\n")
    assert read_section(tmp_path / "some.yaml", "train") == {}


def test_missing_config_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_section(tmp_path / "none.yaml", "train")


@pytest.mark.parametrize(("text", "expected"), [("100x", "100X"), ("100X", "100X"), ("40", "40X"), ("all", None)])
def test_magnifications(text: str, expected: str | None) -> None:
    assert parse_magnification(text) == expected


def test_bad_magnification_and_ratio() -> None:
    with pytest.raises(UsageError, match="--mag 50x"):
        parse_magnification("50x")
    assert parse_ratio("7:1:2") == (7, 1, 2)
    for text in ("6:1", "a:b:c", "0:1:3", "6-1-3"):
        with pytest.raises(UsageError, match="--split"):
            parse_ratio(text)


def test_classes_to_keep() -> None:
    known = ("lung_n", "lung_aca", "benign")
    assert parse_classes("all", known) == ()
    assert parse_classes("lung_n, benign", known) == ("lung_n", "benign")
    with pytest.raises(UsageError, match="no such class 'lung_ac': did you mean 'lung_aca'"):
        parse_classes("benign,lung_ac", known)
    for text in ("", "benign,", "all,benign", "Zebra"):
        with pytest.raises(UsageError, match="use lung_n, lung_aca, benign|did you mean"):
            parse_classes(text, known)


@pytest.mark.parametrize("path", SAMPLE_CONFIGS, ids=lambda path: path.stem)
def test_sample_configs_parse(path: Path) -> None:
    sections = [job for job in JOBS if read_section(path, job)]
    assert sections
    for job in sections:
        config = resolve(JOBS[job], read_section(path, job), {})
        changed = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default]
        assert changed, f"{path}: section {job} only repeats the defaults"


def test_there_are_sample_configs() -> None:
    assert SAMPLE_CONFIGS


def test_yaml_numbers_and_switches_stand_for_words() -> None:
    config = resolve(TrainConfig, {"freeze": 50, "mag": 100, "cache_embeddings": True}, {})
    assert (config.freeze, config.mag, config.cache_embeddings) == ("50", "100", "on")
