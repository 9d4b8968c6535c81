from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from breastcli.config import SynthesizeConfig
from breastcli.data.loading import to_network
from breastcli.data.store import PreparedData
from breastcli.errors import UserError
from breastcli.gan import training
from breastcli.gan.conditions import Condition, choose_numbers, find_conditions
from breastcli.gan.start import start_fit
from breastcli.gan.training import (
    GanSession,
    RealImages,
    _draw_real,
    diversity_share,
    find_collapse,
    mean_figures,
    resize,
    take_step,
    to_pixels,
)
from breastcli.system.distributed import Processes

CONFIG = SynthesizeConfig(
    kimg=1,
    width=4,
    batch_size=8,
    objective="wgan-gp",
    gp_weight=10.0,
    gamma=1.0,
    n_critic=1,
    precision="fp32",
    device="cpu",
)
CONDITIONS = [
    Condition("adenosis", "benign", "adenosis", None, 30),
    Condition("ductal_carcinoma", "malignant", "ductal_carcinoma", None, 90),
    Condition("fibroadenoma", "benign", "fibroadenoma", None, 10),
]
COUNTS = {"benign": 40, "malignant": 90}


def make_session(prepared: Path, **changes: object) -> GanSession:
    config = dataclasses.replace(CONFIG, **changes)
    return start_fit(config, PreparedData.open(prepared), Processes(), torch.device("cpu"))[0]


def flat(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([one.detach().flatten() for one in network.parameters()])


@pytest.mark.parametrize("kind", ["class", "subtype", "class+magnification"])
def test_conditions_divide_the_rows(prepared: Path, kind: str) -> None:
    data = PreparedData.open(prepared)
    rows = data.select("train")
    conditions, members = find_conditions(data, rows, kind)
    assert [one.num_images for one in conditions] == np.bincount(members).tolist()
    for row, member in zip(rows, members, strict=True):
        record, condition = data.rows[row].record, conditions[member]
        assert condition.label == record.label
        assert condition.subtype in ("", record.subtype)
        assert condition.magnification in (None, record.magnification)
        named = {"class": record.label, "subtype": record.subtype}
        assert condition.name == named.get(kind, f"{record.label} {record.magnification}")


def test_a_condition_that_the_data_set_does_not_know_is_refused(prepared: Path) -> None:
    data = PreparedData.open(prepared)
    rows = [dataclasses.replace(row, record=dataclasses.replace(row.record, magnification=None)) for row in data.rows]
    unknown = PreparedData(data.folder, data.card, rows)
    with pytest.raises(UserError, match="does not know the magnification"):
        find_conditions(unknown, np.array([0]), "class+magnification")


def test_numbers_balance_the_minority_in_the_shares_of_its_conditions() -> None:
    assert choose_numbers("minority", None, CONDITIONS, COUNTS) == {0: 38, 2: 12}  # 50 in shares of 30 and 10
    assert choose_numbers("benign", 10, CONDITIONS, COUNTS) == {0: 8, 2: 2}
    assert choose_numbers("fibroadenoma,malignant", 5, CONDITIONS, COUNTS) == {2: 5, 1: 5}
    assert choose_numbers("all", 4, CONDITIONS, COUNTS) == {0: 3, 2: 1, 1: 4}


@pytest.mark.parametrize(
    ("text", "num", "counts", "match"),
    [
        ("malignant", None, COUNTS, "balanced"),
        ("adenoma", 3, COUNTS, "adenoma: not known"),
        ("minority", None, {"benign": 40, "malignant": 40}, "no minority class"),
    ],
)
def test_what_cannot_be_drawn_is_refused(text: str, num: int | None, counts: dict[str, int], match: str) -> None:
    with pytest.raises(UserError, match=match):
        choose_numbers(text, num, CONDITIONS, counts)


def test_real_images_are_those_of_the_folder_or_resized(prepared: Path) -> None:
    data = PreparedData.open(prepared)
    rows = data.select("train")[:5]
    same = RealImages(data, rows, data.size_px).take(np.array([3, 0]))
    assert np.array_equal(same.permute(0, 2, 3, 1).numpy(), data.images[rows[[3, 0]]])
    larger = RealImages(data, rows, 64).take(np.array([3, 0]))
    assert torch.equal(larger, resize(same, 64))
    assert larger.shape == (2, 3, 64, 64)


def test_pixels_and_network_values_agree() -> None:
    values = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    assert to_pixels(values).tolist() == [0, 128, 255, 255]


def test_conditions_are_drawn_equally_often_and_images_belong_to_them(prepared: Path) -> None:
    session = make_session(prepared, batch_size=64, turn=False)
    session.members[0] = session.members[0][:3]  # drawn as they come, these would be one in ten
    counts = np.zeros(2)
    for step in range(8):
        images, conditions = _draw_real(session, np.random.default_rng(step), torch.Generator().manual_seed(step))
        counts += np.bincount(conditions, minlength=2)
        for image, condition in zip(to_pixels(images), conditions.tolist(), strict=True):
            assert any(torch.equal(image, known) for known in session.images.take(session.members[condition]))
    assert abs(counts[0] / counts.sum() - 0.5) < 0.1


def test_the_generator_steps_once_for_several_critic_steps(prepared: Path) -> None:
    session = make_session(prepared, n_critic=3)
    generator, critic = flat(session.generator), flat(session.critic)
    for _ in range(2):
        take_step(session)
    assert torch.equal(flat(session.generator), generator)
    assert not torch.equal(flat(session.critic), critic)
    take_step(session)
    assert not torch.equal(flat(session.generator), generator)
    assert session.images_seen == 24


def test_the_average_trails_the_generator(prepared: Path) -> None:
    session = make_session(prepared, ema=0.0)
    take_step(session)
    assert torch.equal(flat(session.average), flat(session.generator))  # no half-life: no memory


@pytest.mark.parametrize(("steps", "ema", "half_life"), [(10**6, 0.04, 40), (40, 1000.0, 0.05 * 8 * 42)])
def test_the_average_halves_what_is_older_than_its_half_life(
    prepared: Path, steps: int, ema: float, half_life: float
) -> None:
    session = make_session(prepared, ema=ema, n_critic=2, gp_weight=0.0, gamma=0.0)
    session.steps = steps
    before = flat(session.average)
    for _ in range(2):
        take_step(session)
    share = 0.5 ** (16 / half_life)  # two critic steps of eight images between two of the generator
    expected = share * before + (1 - share) * flat(session.generator)
    torch.testing.assert_close(flat(session.average), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("weight", "network"), [("gp_weight", "critic"), ("gamma", "critic"), ("feature_weight", "generator")]
)
def test_every_weight_matters(prepared: Path, weight: str, network: str) -> None:
    learned = []
    for value in (0.1, 10.0):
        session = make_session(prepared, **{weight: value})
        for _ in range(2):  # Adam's first step knows no size
            take_step(session)
        learned.append(flat(getattr(session, network)))
    assert not torch.equal(*learned)


def test_r1_counts_sixteen_times_and_gamma(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    monkeypatch.setattr(
        "breastcli.gan.training._descend", lambda session, loss, *others: losses.append(float(loss.detach()))
    )
    figures = []
    for gamma in (0.0, 3.0):
        session = make_session(prepared, gamma=gamma, gp_weight=2.0)
        take_step(session)
        figures.append(mean_figures(session))
    with_r1, without = losses[2], losses[0]  # critic, generator, critic, generator
    assert with_r1 - without == pytest.approx(16 * 3.0 * figures[1]["r1_penalty"], rel=1e-4)
    assert without == pytest.approx(figures[0]["critic_loss"] + 2.0 * figures[0]["gradient_penalty"], rel=1e-4)


def test_penalties_are_float32_under_bfloat16(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    for name in ("gradient_penalty", "r1_penalty"):
        real = getattr(training, name)

        def watch(critic, *args, real=real, name=name):
            seen[name] = (
                critic(args[0], args[2] if name == "gradient_penalty" else args[1]).dtype,
                real(critic, *args).dtype,
            )
            return real(critic, *args)

        monkeypatch.setattr(training, name, watch)
    take_step(make_session(prepared, precision="bf16"))
    assert seen == dict.fromkeys(("gradient_penalty", "r1_penalty"), (torch.float32, torch.float32))


@pytest.mark.parametrize("objective", ["wgan-gp", "hinge", "paper"])
def test_every_objective_steps_with_every_penalty(prepared: Path, objective: str) -> None:
    session = make_session(prepared, objective=objective, feature_weight=0.5)
    take_step(session)
    figures = mean_figures(session)
    assert all(np.isfinite(value) for value in figures.values())
    assert figures["gradient_penalty"] > 0
    assert figures["r1_penalty"] > 0
    assert figures["feature_matching"] > 0
    assert all(np.isnan(value) for value in mean_figures(session).values())  # begun anew


def test_penalties_that_are_off_are_not_computed(prepared: Path) -> None:
    session = make_session(prepared, gp_weight=0.0, gamma=0.0)
    take_step(session)
    figures = mean_figures(session)
    assert np.isnan([figures["gradient_penalty"], figures["r1_penalty"], figures["feature_matching"]]).all()


def test_r1_is_lazy(prepared: Path) -> None:
    session = make_session(prepared, gp_weight=0.0)
    for _ in range(17):
        take_step(session)
    assert session.sums[1].tolist()[4] == 2  # in steps 0 and 16


def test_steps_repeat_bit_for_bit_and_go_on_where_they_stopped(prepared: Path) -> None:
    whole = make_session(prepared)
    for _ in range(6):
        take_step(whole)
    first = make_session(prepared)
    for _ in range(3):
        take_step(first)
    second = make_session(prepared)
    second.restore(first.state())
    for _ in range(3):
        take_step(second)
    for name in ("generator", "average", "critic"):
        assert torch.equal(flat(getattr(whole, name)), flat(getattr(second, name)))
    other = make_session(prepared, seed=1)
    for _ in range(3):
        take_step(other)
    assert not torch.equal(flat(other.generator), flat(first.generator))


def test_a_loss_that_is_no_number_is_reported(prepared: Path) -> None:
    session = make_session(prepared)
    with torch.no_grad():
        session.critic.score.bias.fill_(float("nan"))
    take_step(session)
    with pytest.raises(UserError, match="not a finite number after 0.0 kimg"):
        mean_figures(session)


def test_conditions_are_learned_apart(prepared: Path) -> None:
    """A critic that is told the wrong labels must score real images lower after some training."""
    session = make_session(prepared, batch_size=32, objective="hinge", diffaugment="none", width=8)
    with torch.no_grad():  # make the classes differ in brightness
        pixels = session.images.resized
        pixels[session.members[0]] //= 4
        pixels[session.members[1]] = 255 - pixels[session.members[1]] // 4
    for _ in range(30):
        take_step(session)
    images, conditions = _draw_real(session, np.random.default_rng(0), torch.Generator().manual_seed(0))
    with torch.no_grad():
        right, swapped = session.critic(images, conditions), session.critic(images, 1 - conditions)
    assert float((right - swapped).mean()) > 0.1
    noise = torch.randn(64, session.options.noise_dim)
    dark, bright = (session.average(noise, torch.full((64,), label)).mean() for label in (0, 1))
    assert float(bright - dark) > 0.05


def test_diversity_is_a_share_of_the_real_images(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_session(prepared)
    real = to_network(session.images.take(np.resize(session.members[0], 64)))
    others = to_network(session.images.take(np.resize(session.members[1], 64)))
    with monkeypatch.context() as patch:  # a generator that knows the training images by heart
        images = {0: real, 1: others}
        patch.setattr(session.generator, "forward", lambda noise, conditions: images[int(conditions[0])])
        assert diversity_share(session) == pytest.approx(1, abs=0.15)
        patch.setattr(session.generator, "forward", lambda noise, conditions: images[int(conditions[0])] / 4)
        assert diversity_share(session) == pytest.approx(0.25, abs=0.05)
    with torch.no_grad():  # noise reaches neither style nor layout any more: every image of a condition is the same
        for layer in (session.generator.mapping[0], session.generator.start):
            layer.weight[:, : session.options.noise_dim] = 0
    assert diversity_share(session) < 1e-3


def test_a_collapse_is_seen_and_a_slow_start_is_none() -> None:
    def rows(*diversities: float, gap: float = 1.0) -> list[dict[str, float]]:
        return [
            {"kimg": 10.0 * number, "diversity": value, "critic_gap": gap}
            for number, value in enumerate(diversities, start=1)
        ]

    assert find_collapse([], 100, 64) is None
    assert find_collapse(rows(0.01, 0.01), 100, 64) is None  # the first quarter
    assert find_collapse(rows(0.5, 0.5, 0.1), 100, 64) is None  # one bad snapshot
    assert "nearly all alike" in (find_collapse(rows(0.5, 0.5, 0.1), 100, 64, finished=True) or "")
    assert find_collapse(rows(0.5, 0.1, 0.5, 0.1), 100, 64) is None
    assert "nearly all alike" in (find_collapse(rows(0.5, 0.5, 0.1, 0.1), 100, 64) or "")
    assert "run away" in (find_collapse(rows(0.9, 0.9, gap=-300.0), 100, 64) or "")  # beyond 2 sqrt(3 * 64²) = 222
    assert find_collapse(rows(0.9, 0.9, gap=220.0), 100, 64) is None
