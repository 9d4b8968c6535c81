"""What the command line shows: progress and warnings on stderr, results on stdout."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from breastcli.progress import SILENT, Progress
from breastcli.records import DRAWN, Interval, Scores

if TYPE_CHECKING:
    from breastcli.evaluate import EvaluateResult
    from breastcli.explain import ExplainResult
    from breastcli.predict import PredictResult
    from breastcli.prepare import PrepareResult
    from breastcli.train import TrainResult

PIPE_WIDTH = 120  # columns where stdout is not a terminal that could tell
OUT = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPE_WIDTH)
ERR = Console(stderr=True, highlight=False, soft_wrap=True)
SHORT = ("accuracy", "balanced_accuracy", "sensitivity", "specificity", "f1_weighted", "roc_auc")
MAX_LISTED = 20


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
        self.tasks[task] = self.bars.add_task(escape(task), total=total, unit=unit, figures="")

    def advance(self, task: str, amount: int = 1, **figures: float) -> None:
        fields = {"figures": ", ".join(f"{name} {value:.4f}" for name, value in figures.items())} if figures else {}
        self.bars.update(self.tasks[task], advance=amount, **fields)


class _StderrLog(logging.Handler):
    """Log lines that do not tear the progress bars apart."""

    def emit(self, record: logging.LogRecord) -> None:
        text = escape(record.getMessage())
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


def show_error(text: str) -> None:
    """Print one line about what went wrong."""
    ERR.print(f"[red]error:[/red] {escape(text)}")


def show_json(result: Any) -> None:
    """Print the result as one JSON object, the output path last."""
    values = {**result.to_json(), "out": str(result.out)}
    print(json.dumps(values, ensure_ascii=False, allow_nan=False))


def show_prepare(result: PrepareResult) -> None:
    """Print what was prepared: images and exams (patients where exams are unknown) per side and class."""
    card = result.card
    _stamp(card["split"]["leaky"], card["drawn"])
    unit = next((name for name in ("exams", "patients") if card[f"num_{name}"]), "")
    groups = f"{card[f'num_{unit}']} {unit}" if unit else "patients unknown"
    table = _table(f"{card['title']}: {card['num_images']:,} images, {groups}", ["", *card["classes"]])
    cells = {
        (row["side"], row["class"]): f"{row['images']:,}" + (f" ({row[unit]} {unit})" if unit else "")
        for row in card["counts"]
    }
    folds = card["split"]["folds"]
    for side in [str(k) for k in range(folds)] if folds else ["train", "val", "test"]:
        name = f"fold {side}" if folds else side
        table.add_row(name, *(cells.get((side, label), "none") for label in card["classes"]))
    OUT.print(table)
    for note in card["notes"]:
        OUT.print(f"- {escape(note)}")
    if card["num_rejected"]:
        OUT.print(f"- files left out: {card['num_rejected']}, listed in {result.out / 'rejected.csv'}")
    if card["num_stain_fallbacks"]:
        OUT.print(f"- {card['num_stain_fallbacks']} images kept their own stain: too little tissue")
    OUT.print(str(result.out))


def show_train(result: TrainResult) -> None:
    """Print the best epoch."""
    _stamp(result.leaky, result.drawn)
    images, weights = result.num_images, result.num_parameters
    table = _table(f"best of {len(result.history)} epochs", ["", ""])
    table.add_row("trained on", f"{images['train']:,} images, validated on {images['val']:,}")
    table.add_row("parameters", f"{weights['all']:,} ({weights['trainable']:,} trained)")
    for name, value in result.best.items():
        table.add_row(name, f"{value:.0f}" if name == "epoch" else f"{value:.4g}")
    OUT.print(table)
    OUT.print(str(result.out))


def show_evaluate(result: EvaluateResult) -> None:
    """Print all figures at image and patient level, and the short ones of every subset."""
    from breastcli.metrics.classification import METRICS

    _stamp(result.document["dataset"]["leaky"], result.document["dataset"]["drawn"])
    image, patient = result.image, result.patient
    heads = ["", f"images (n = {image.n:,})"]
    if patient:
        heads += [f"patients, majority vote (n = {patient.vote.n})", "patients, mean probability"]
    table = _table(f"{', '.join(result.document['runs'])}: {result.document['split']}", heads)
    if patient:
        table.add_row("Patient recognition rate", "", _interval(patient.recognition_rate), "")
    for name, metric in METRICS.items():
        levels = [image, *([patient.vote, patient.mean] if patient else [])]
        table.add_row(metric.title, *(_interval(scores.overall[name]) for scores in levels))
    OUT.print(table)
    if len(result.by_magnification) > 1:
        _show_subsets("magnification", result.by_magnification, SHORT)
    if len(result.by_subtype) > 1:
        _show_subsets("subtype", result.by_subtype, ("accuracy",))
    for spread in _spread_lines(result.document):
        OUT.print(spread)
    for note in image.notes:
        OUT.print(f"[dim]- {escape(note)}[/dim]")
    OUT.print(f"report: {result.report}")
    OUT.print(str(result.out))


def show_explain(result: ExplainResult) -> None:
    """Print what was measured of each method, beside the baselines."""
    document = result.document
    _stamp(document["dataset"]["leaky"], document["dataset"]["drawn"])
    titles = {name: one["title"] for name, one in document["methods"].items()}
    OUT.print(f"{document['n']:,} images, class explained: {document['target']}")
    localisation = document["localisation"]
    if localisation:
        heads = ["", "IoU", "Dice", "precision", "recall", "average precision", "pointing game"]
        keys = ("iou", "dice", "precision", "recall", "average_precision", "pointing")
        counted = f"{localisation['n']} masks in {localisation['num_groups']} groups (patients where known)"
        table = _table(f"localisation on {counted}, {localisation['rule']}: means over images", heads)
        for name, one in localisation["methods"].items():
            shown = titles.get(name, f"[dim]{name} (baseline)[/dim]")
            table.add_row(shown, *(_interval(_read_interval(one["mean"][key])) for key in keys))
        OUT.print(table)
        for line in _difference_lines(localisation["differences"], titles):
            OUT.print(f"- {line}")
        for name, printed in _printed_localisation(document["methods"]).items():
            OUT.print(f"[dim]- {titles[name]} in the DALAResNet50 paper (Table 14, its own masks): {printed}[/dim]")
    faithfulness = document["faithfulness"]
    if faithfulness:
        heads = ["", "deletion AUC (low)", "insertion AUC (high)", "average drop (low)", "increase (high)"]
        table = _table("faithfulness (means over images)", heads)
        for name, one in faithfulness["methods"].items():
            table.add_row(
                titles.get(name, f"[dim]{name} (baseline)[/dim]"), *(_interval(_read_interval(v)) for v in one.values())
            )
        OUT.print(table)
        for name, check in faithfulness["randomisation"].items():
            last = check["levels"][-1]["correlation"]
            verdict = (
                "[bold red]survives: shows the image, not the network[/bold red]" if check["survives"] else "changes"
            )
            shown = "–" if last is None else f"{last:.2f}"
            OUT.print(f"- {titles[name]} when the network is made random: rank correlation {shown}, {verdict}")
    if document["rejected"]:
        OUT.print(f"- files that could not be read: {document['rejected']}")
    OUT.print(f"report: {result.report}")
    OUT.print(str(result.out))


def _difference_lines(differences: dict[str, Any], titles: dict[str, str]) -> Iterator[str]:
    """Yield the first method's Dice minus that of every other method; DT Grad-CAM comes first where it is there."""
    first = "dtgradcam" if "dtgradcam" in differences else next(iter(differences))
    for name, figures in differences[first].items():
        if name in titles:
            yield f"Dice of {titles[first]} minus {titles[name]}: {_interval(_read_interval(figures['dice']))}"


def _printed_localisation(methods: Iterable[str]) -> dict[str, str]:
    """Return the DALAResNet50 paper's figures of the methods that it compares, as ranges over magnifications."""
    from breastcli.reporting.explanation_section import printed_localisation

    found = {}
    for name in methods:
        ranges = printed_localisation(name)
        if ranges:
            found[name] = ", ".join(f"{metric} {low:.3f}–{high:.3f}" for metric, (low, high) in ranges.items())
    return found


def _read_interval(values: dict[str, float | None]) -> Interval:
    return Interval(*(float("nan") if values[name] is None else values[name] for name in ("value", "low", "high")))


def show_predict(result: PredictResult) -> None:
    """Print the first predictions, per patient where the names tell."""
    for title, values in (("images", result.predictions), ("patients, mean probability", result.patients)):
        if values is None:
            continue
        table = _table(f"{len(values):,} {title}", ["", "predicted", *values.classes])
        for name, chosen, probs in islice(
            zip(values.image_ids, values.predicted, values.probs, strict=True), MAX_LISTED
        ):
            table.add_row(escape(str(name)), values.classes[chosen], *(f"{value:.3f}" for value in probs))
        if len(values) > MAX_LISTED:
            table.add_row(f"… {len(values) - MAX_LISTED:,} more", "", *("" for _ in values.classes))
        OUT.print(table)
    if result.rejected:
        OUT.print(f"- files that could not be read: {len(result.rejected)}")
    OUT.print(str(result.out))


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
    table = _table("networks (parameters for 2 classes)", ["--arch", "parameters", "in a paper", "pixels", "source"])
    table.columns[-1].justify = "left"
    for row in rows:
        printed = f"{row['printed']:,}" if row["printed"] else ""
        pixels = f"{row['size_px']}" + (f" (n × {row['multiple_px']})" if row["multiple_px"] > 1 else "")
        remark = f" [dim]({escape(row['remark'])})[/dim]" if row["remark"] else ""
        table.add_row(row["arch"], f"{row['parameters']:,}", printed, pixels, escape(row["source"]) + remark)
    OUT.print(table)
    OUT.print("timm/<name>, torchvision/<name>       any classifier of these libraries")
    OUT.print(
        "hf-hub:<owner>/<name>                 an encoder of the model hub that timm can read, such as a pathology"
    )
    OUT.print(
        "                                      foundation model; add --pretrained or --weights, and --freeze trunk"
    )


def _show_subsets(title: str, subsets: dict[str, Scores], metrics: tuple[str, ...]) -> None:
    from breastcli.metrics.classification import METRICS

    table = _table(f"by {title}", ["", "n", *(METRICS[name].title for name in metrics)])
    for name, scores in subsets.items():
        table.add_row(escape(name), f"{scores.n:,}", *(_interval(scores.overall[metric]) for metric in metrics))
    OUT.print(table)


def _spread_lines(document: dict[str, Any]) -> list[str]:
    if not document["spread"]:
        return []
    shown = ((name, document["spread"][name]) for name in SHORT if name in document["spread"])
    figures = ", ".join(f"{name} {one['mean']:.3f} ± {one['sd']:.3f}" for name, one in shown)
    return [f"over {len(document['folds'])} runs (mean ± standard deviation): {figures}"]


def _stamp(leaky: str | None, drawn: bool) -> None:
    if leaky:
        OUT.print(f"[bold red]{leaky}[/bold red]")
    if drawn:
        OUT.print(f"[bold yellow]{DRAWN}[/bold yellow]")


def _table(title: str, heads: list[str]) -> Table:
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for number, head in enumerate(heads):
        table.add_column(escape(head), justify="left" if number == 0 else "right")
    return table


def _interval(figure: Interval) -> str:
    if figure.value != figure.value:
        return "–"
    if figure.low != figure.low:
        return f"{figure.value:.3f}"
    return f"{figure.value:.3f} [dim]({figure.low:.3f}–{figure.high:.3f})[/dim]"


SHOW = {
    "prepare": show_prepare,
    "train": show_train,
    "evaluate": show_evaluate,
    "explain": show_explain,
    "predict": show_predict,
}
