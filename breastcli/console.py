"""What the command line shows: progress and warnings on stderr, results on stdout."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from breastcli.errors import visible
from breastcli.progress import SILENT, Progress
from breastcli.records import DRAWN, TRAINED_WITH_SYNTHETIC, Interval

PIPE_WIDTH = 120  # columns where stdout is not a terminal that could tell
OUT = Console(highlight=False, emoji=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPE_WIDTH)
ERR = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)


class _Speed(ProgressColumn):
    """Steps per second, in the task's own unit."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {task.fields['unit']}/s" if speed else "", style="cyan")


class _RichProgress:
    """Draws the ``Progress`` protocol as bars; a finished task makes room for the next."""

    def __init__(self, bars: Bars) -> None:
        self.bars = bars
        self.tasks: dict[str, TaskID] = {}

    def begin(self, task: str, total: int, unit: str) -> None:
        for name, known in list(self.tasks.items()):
            if name == task or self.bars.tasks[self.bars.task_ids.index(known)].finished:
                self.bars.remove_task(self.tasks.pop(name))
        self.tasks[task] = self.bars.add_task(literal(task), total=total, unit=unit, figures="")

    def advance(self, task: str, amount: int = 1, **figures: float) -> None:
        fields = {"figures": ", ".join(f"{name} {value:.4f}" for name, value in figures.items())} if figures else {}
        self.bars.update(self.tasks[task], advance=amount, **fields)


class _StderrLog(logging.Handler):
    """Log lines that do not tear the progress bars apart."""

    def emit(self, record: logging.LogRecord) -> None:
        text = literal(record.getMessage())
        ERR.print(f"[yellow]warning:[/yellow] {text}" if record.levelno >= logging.WARNING else f"[dim]{text}[/dim]")


@contextlib.contextmanager
def watching(*, quiet: bool) -> Iterator[Progress]:
    """Show log lines, and bars where stderr is a terminal, while a job works."""
    logger = logging.getLogger("breastcli")
    handler = _StderrLog(logging.WARNING if quiet else logging.INFO)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        if quiet or not ERR.is_terminal:
            yield SILENT
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            _Speed(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("[dim]{task.fields[figures]}[/dim]"),
        )
        with Bars(*columns, console=ERR, transient=True) as bars:
            yield _RichProgress(bars)
    finally:
        logger.removeHandler(handler)


def literal(text: object) -> str:
    """Return text, such as a file's name, as the console prints it: neither markup nor control sequences act."""
    return escape(visible(str(text)))


def show_error(text: str) -> None:
    """Print one line about what went wrong."""
    ERR.print(f"[red]error:[/red] {literal(text)}")


def show_out(out: Path) -> None:
    """Print where the result is, which comes last."""
    OUT.print(visible(str(out)), markup=False)


def show_hints(lines: list[str]) -> None:
    """Print what to do next."""
    for line in lines:
        ERR.print(f"[cyan]{literal(line)}[/cyan]")


def show_json(result: Any) -> None:
    """Print the result as one JSON object, the output path last where there is one."""
    values = result.to_json() | ({"out": str(result.out)} if hasattr(result, "out") else {})
    print(json.dumps(values, allow_nan=False))  # in ASCII: no name in it can command a terminal


def show_architectures(*, as_json: bool) -> None:
    """Print the networks that ``--arch`` knows by name, and the doors to the libraries."""
    import torch

    from breastcli.models import ARCHITECTURES, ModelOptions, num_parameters

    rows = []
    for name in ARCHITECTURES.names():
        known = ARCHITECTURES.get(name)
        with torch.device("meta"):
            count = num_parameters(known.build(ModelOptions(name, 2), False))
        rows.append(
            {
                "arch": name,
                "parameters": count,
                "printed": known.published.get(2),
                "size_px": known.size_px,
                "multiple_px": known.multiple_px,
                "source": known.source,
                "remark": known.remark,
            }
        )
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    listing = make_table(
        "networks (parameters for 2 classes)", ["--arch", "parameters", "in a paper", "pixels", "source"]
    )
    listing.columns[-1].justify = "left"
    for row in rows:
        printed = f"{row['printed']:,}" if row["printed"] else ""
        pixels = f"{row['size_px']}" + (f" (n × {row['multiple_px']})" if row["multiple_px"] > 1 else "")
        remark = f" [dim]({escape(row['remark'])})[/dim]" if row["remark"] else ""
        listing.add_row(row["arch"], f"{row['parameters']:,}", printed, pixels, escape(row["source"]) + remark)
    OUT.print(listing)
    OUT.print("timm/<name>, torchvision/<name>       any classifier of these libraries")
    OUT.print(
        "hf-hub:<owner>/<name>                 an encoder of the model hub that timm can read, such as a pathology"
    )
    OUT.print(
        "                                      foundation model; add --pretrained or --weights, and --freeze trunk"
    )


def show_datasets(*, as_json: bool) -> None:
    """Print the data sets that ``--dataset`` knows, with licence and where to obtain them."""
    from breastcli.data.datasets import DATASETS

    known = [DATASETS.get(name) for name in DATASETS.names()]
    shown = ("name", "title", "num_images", "classes", "subtypes", "licence", "citation", "homepage")
    if as_json:
        print(json.dumps([{field: getattr(one, field) for field in shown} for one in known], indent=2))
        return
    listing = make_table("data sets", ["--dataset", "images", "classes", "licence", "where to obtain it"])
    for column in listing.columns[2:]:
        column.justify, column.overflow = "left", "fold"
    for one in known:
        names = list(dict.fromkeys((*one.classes, *one.subtypes)))
        images = f"{one.num_images:,}" if one.num_images else ""
        listing.add_row(one.name, images, escape(", ".join(names)), escape(one.licence), escape(one.homepage))
    OUT.print(listing)


def stamp(leaky: str | None, drawn: bool, *, synthetic: bool = False) -> None:
    """Print the warnings that a result must carry, one line each."""
    if leaky:
        OUT.print(f"[bold red]{literal(leaky)}[/bold red]")
    if drawn:
        OUT.print(f"[bold yellow]{DRAWN}[/bold yellow]")
    if synthetic:
        OUT.print(f"[bold yellow]{TRAINED_WITH_SYNTHETIC}[/bold yellow]")


def make_table(title: str, heads: list[str]) -> Table:
    """Return an empty table; its first column holds names, the others figures."""
    table = Table(title=literal(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for number, head in enumerate(heads):
        # Folded where the terminal is narrow: half an interval would be read as a whole one.
        table.add_column(literal(head), justify="left" if number == 0 else "right", overflow="fold")
    return table


def interval(figure: Interval) -> str:
    """Return "0.853 (0.801–0.899)", the interval dimmed; a dash stands for what is not known."""
    if figure.value != figure.value:
        return "–"
    if figure.low != figure.low:
        return f"{figure.value:.3f}"
    between = " to " if figure.low < 0 else "–"  # a dash beside a minus sign cannot be read
    return f"{figure.value:.3f} [dim]({figure.low:.3f}{between}{figure.high:.3f})[/dim]"


def read_interval(values: dict[str, float | None]) -> Interval:
    """Return the interval that a JSON document holds."""
    return Interval(*(float("nan") if values[name] is None else values[name] for name in ("value", "low", "high")))


def plain_figure(value: float | None) -> str:
    """Return a figure without an interval; a dash stands for what is not known."""
    return "–" if value is None else f"{value:.3f}"
