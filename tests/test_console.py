from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress as Bars

from breastcli import console, show
from breastcli.predict import PredictResult
from breastcli.records import Interval, Predictions


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    text = io.StringIO()
    monkeypatch.setattr(console, "OUT", Console(file=text, width=100, highlight=False))
    return text


def predictions(names: list[str]) -> Predictions:
    probs = np.tile([0.25, 0.75], (len(names), 1))
    ids = np.array(names, dtype=object)
    return Predictions(ids, ("benign", "malignant"), probs, np.ones(len(names), dtype=np.int64), columns={"path": ids})


def test_intervals_are_printed_as_far_as_they_are_known() -> None:
    nan = float("nan")
    assert console.interval(Interval(nan)) == "–"
    assert console.interval(Interval(0.5)) == "0.500"
    assert console.interval(Interval(0.5, 0.25, 0.75)) == "0.500 [dim](0.250–0.750)[/dim]"
    assert console.interval(Interval(0.1, -0.25, 0.75)) == "0.100 [dim](-0.250 to 0.750)[/dim]"


def test_long_lists_are_cut_and_names_are_not_markup(printed: io.StringIO, tmp_path: Path) -> None:
    names = ["[red]odd[/red]", *(f"field {k}" for k in range(30))]
    show.show_predict(PredictResult(tmp_path / "p.csv", predictions(names), None, [], 0.0))
    text = printed.getvalue()
    assert "[red]odd[/red]" in text
    assert "field 18" in text
    assert "field 19" not in text
    assert "… 11 more" in text
    assert text.split()[-1].endswith("p.csv")


def test_progress_bars_follow_the_tasks() -> None:
    bars = Bars(console=Console(file=io.StringIO(), force_terminal=True))
    progress = console._RichProgress(bars)
    progress.begin("epochs", 2, "epochs")
    progress.begin("epoch 1", 10, "images")
    progress.advance("epoch 1", 4, loss=0.5)
    assert [(task.description, task.completed, task.total) for task in bars.tasks] == [
        ("epochs", 0, 2),
        ("epoch 1", 4, 10),
    ]
    assert bars.tasks[1].fields["figures"] == "loss 0.5000"
    progress.advance("epoch 1", 6)
    progress.begin("epoch 2", 10, "images")  # the finished one makes room
    assert [task.description for task in bars.tasks] == ["epochs", "epoch 2"]
    progress.begin("epoch 2", 5, "images")
    assert [task.total for task in bars.tasks] == [2, 5]


@pytest.mark.parametrize(("quiet", "shown"), [(False, {"some fact", "some danger"}), (True, {"some danger"})])
def test_log_lines_go_to_stderr(quiet: bool, shown: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(console, "ERR", Console(file=text))
    with console.watching(quiet=quiet) as progress:
        progress.begin("task", 1, "images")
        logging.getLogger("breastcli.somewhere").info("some fact")
        logging.getLogger("breastcli.somewhere").warning("some danger")
    assert {line for line in ("some fact", "some danger") if line in text.getvalue()} == shown
    assert not logging.getLogger("breastcli").handlers
