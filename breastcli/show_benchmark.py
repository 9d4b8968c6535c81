"""What the command line prints of a benchmark."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from breastcli import console
from breastcli.console import interval, literal, make_table, plain_figure, read_interval

if TYPE_CHECKING:
    from breastcli.benchmark import BenchmarkResult


def show_benchmark(result: BenchmarkResult) -> None:
    """Print size, speed and convergence of networks, our code beside that of others, and what could not be measured."""
    document = result.document
    console.OUT.print(f"{document['device']}, {document['processor']}, {document['precision']}")
    if document["networks"]:
        _show_networks(document)
    if document["convergence"]:
        _show_convergence(document)
    if document["pairs"]:
        table = make_table(
            f"ours / theirs, in turn: medians of up to {document['rounds']} rounds", ["", "ours", "theirs", "", "ratio"]
        )
        for one in document["pairs"]:
            ratio = f"{_figure(one['ratio'])} [dim]({_figure(one['ratio_low'])}–{_figure(one['ratio_high'])})[/dim]"
            table.add_row(
                literal(one["title"]) + (f"\n[dim]{literal(one['remark'])}[/dim]" if one["remark"] else ""),
                _figure(one["ours"]),
                literal(one["missing"]) or _figure(one["theirs"]),
                one["unit"],
                "–" if one["ratio"] is None else ratio,
            )
        console.OUT.print(table)
    if document["help"]:
        console.OUT.print(f"- breastcli --help, whole process: {document['help']['median_s']:.2f} s")
    for name, problem in document["problems"].items():
        console.OUT.print(f"[bold red]{name} could not be measured: {literal(problem)}[/bold red]")
    console.show_out(result.out)


def _show_networks(document: dict[str, Any]) -> None:
    heads = ["", "pixels", "parameters", "in a paper", "GFLOPs", "MB", "training", "inference", "p50, p95"]
    title = f"networks: images/s in batches of {document['batch_size']}, percentiles of one image's ms"
    table = make_table(title, [*heads, "memory MB"])
    for one in document["networks"]:
        whole = ["" if one[name] is None else f"{one[name]:,}" for name in ("size_px", "parameters", "printed")]
        names = ("gflops", "checkpoint_mb", "training_images_per_s", "inference_images_per_s")
        latency = f"{_figure(one['latency_p50_ms'])}, {_figure(one['latency_p95_ms'])}"
        memory = _figure(one["training_memory_mb"])
        table.add_row(literal(one["arch"]), *whole, *(_figure(one[name]) for name in names), latency, memory)
    console.OUT.print(table)
    for one in document["networks"]:
        if one["remark"]:
            console.OUT.print(f"[dim]- {literal(one['arch'])}: {literal(one['remark'])}[/dim]")
        if one["problem"]:
            console.OUT.print(f"[bold red]- {literal(one['arch'])}: {literal(one['problem'])}[/bold red]")
    for convention in document["conventions"]:
        console.OUT.print(f"[dim]- {literal(convention)}[/dim]")


def _show_convergence(document: dict[str, Any]) -> None:
    """Print the time to converge and the test scores of each network, the papers' figures beside ours."""
    rows, protocol = document["convergence"], document["protocol"]
    if protocol["stamp"]:
        console.OUT.print(f"[bold red]{literal(protocol['stamp'])}[/bold red]")
    counts = ", ".join(f"{name} {count:,}" for name, count in protocol["num_images"].items())
    title = f"convergence: {protocol['title']}, magnification {protocol['magnification']}, images: {counts}"
    heads = ["", "parameters", "converged s", "paper", "at epoch", "all s", "epochs", "best", "images/s", "paper"]
    table = make_table(title, heads)
    for one in rows:
        paper, keys = one["paper"], ("parameters", "convergence_epoch", "epochs", "best_epoch")
        parameters, epoch, *epochs = ("–" if one[key] is None else f"{one[key]:,}" for key in keys)
        seconds = [_figure(one["convergence_s"]), _figure(paper["convergence_s"]), epoch]
        speeds = [_figure(one["images_per_s"]), _figure(paper["images_per_s"])]
        table.add_row(literal(one["arch"]), parameters, *seconds, _figure(one["total_s"]), *epochs, *speeds)
    console.OUT.print(table)
    _show_convergence_scores(rows)
    for one in rows:
        if one["reason"]:
            console.OUT.print(f"- {literal(one['arch'])} has not converged: {one['reason']}")
        if one["problem"]:
            console.OUT.print(f"[bold red]- {literal(one['arch'])}: {literal(one['problem'])}[/bold red]")
    machine = f"{protocol['device']}, {document['processor']}, {document['num_cores']} cores, {protocol['precision']}"
    for note in (protocol["rule"], *protocol["conventions"], f"measured on: {machine}", *protocol["papers"]):
        console.OUT.print(f"[dim]- {literal(note)}[/dim]")


def _show_convergence_scores(rows: list[dict[str, Any]]) -> None:
    heads = ["", "n", "balanced accuracy", "accuracy", "paper", "ROC AUC"]
    table = make_table("test scores of the best epoch, with 95 % intervals", heads)
    for one in rows:
        images = literal(one["arch"]), plain_figure(one["paper"]["accuracy"])
        for level, (name, printed) in (("image", images), ("patient", ("", ""))):
            if one[level]["n"] is not None:
                keys = ("balanced_accuracy", "accuracy", "roc_auc")
                balanced, accuracy, area = (interval(read_interval(one[level][key])) for key in keys)
                table.add_row(name, f"{one[level]['n']:,} {level}s", balanced, accuracy, printed, area)
    console.OUT.print(table)


def _figure(value: float | None) -> str:
    """Return a figure of a benchmark with three digits or all before its point."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")
