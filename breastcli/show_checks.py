"""What the command line prints of what was only looked at: the plan of a dry run, and what ``doctor`` found."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from breastcli import console
from breastcli.console import literal, make_table
from breastcli.plan import Plan
from breastcli.records import DRAWN

if TYPE_CHECKING:
    from breastcli.doctor import DoctorResult

OUTPUT = {"new": "new", "replaces": "replaces what breastcli wrote there", "resumes": "goes on with what is there"}
STATES = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "failed": "[bold red]failed[/bold red]"}


def show_plan(plan: Plan) -> None:
    """Print what a job would do."""
    if plan.stamp:
        colour = "yellow" if plan.stamp == DRAWN else "red"
        console.OUT.print(f"[bold {colour}]{literal(plan.stamp)}[/bold {colour}]")
    table = make_table(f"{plan.job} would do this; nothing was written", ["", ""])
    table.columns[1].justify = "left"
    for name, value in plan.facts.items():
        if value is not None:
            table.add_row(name.replace("_", " "), literal(_shown(value)))
    table.add_row("output", literal(f"{plan.out} ({OUTPUT[plan.output]})"))
    if plan.num_bytes is not None:
        table.add_row("disk", f"about {_size(plan.num_bytes)} of {_size(plan.free_bytes)} that are free")
    console.OUT.print(table)
    for note in plan.notes:
        console.OUT.print(f"- {literal(note)}")
    console.show_out(plan.out)


def show_doctor(result: DoctorResult) -> None:
    """Print everything that was looked at, group by group."""
    table = make_table("what works here", ["", "", "found", "what it costs, and what to do"])
    for column in table.columns:
        column.justify = "left"
    for _, checks in groupby(result.checks, key=lambda check: check.group):
        for check in checks:
            table.add_row(literal(check.name), STATES[check.state], literal(check.found), literal(check.cost))
        table.add_section()
    console.OUT.print(table)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count:,}" for name, count in value.items())
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _size(num_bytes: int) -> str:
    unit, factor = next(one for one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if num_bytes >= one[1] or one[0] == "kB")
    return f"{num_bytes / factor:,.1f} {unit}"
