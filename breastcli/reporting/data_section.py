"""A report's section about the data set: its card, and what the audit found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from breastcli.config import SPLITS
from breastcli.reporting.parts import Cell, Table, leak_stamp, part, title_of, whole_number

APART = ("counts", "notes", "options", "format", "breastcli")  # what has a place of its own, or says nothing of images


@dataclass(frozen=True)
class DataSection:
    """The data set as the page shows it.

    Attributes:
        stamp: warning that belongs to every table, or "".
        facts: what the card says, name to value.
        tables: images on each side, and the findings of the audit.
        notes: what the audit warned of.
    """

    stamp: str
    facts: dict[str, Any]
    tables: list[Table]
    notes: list[str]


def read_data(card: Mapping[str, Any], audit: Mapping[str, Any]) -> DataSection | None:
    """Return what the page shows of a data set, or None where nothing is known.

    Args:
        card: the contents of ``dataset.json``.
        audit: its verdict and findings as ``train`` keeps them, empty in older runs.
    """
    if not card:
        return None
    facts = {name: value for name, value in card.items() if name not in APART}
    tables = [counts_table(card), _audit_table(audit)]
    notes = [str(note) for note in card.get("notes") or ()]
    return DataSection(leak_stamp(card) or "", facts, [table for table in tables if table.rows], notes)


def counts_table(card: Mapping[str, Any]) -> Table:
    """Return the number of images of every class on every side, and that of their groups where those are known."""
    counts: Sequence[Mapping[str, Any]] = card.get("counts") or ()
    names = dict.fromkeys(name for row in counts for name in row if name != "side")
    names = [name for name in names if any(row.get(name) is not None for row in counts)]
    order = {side: place for place, side in enumerate(SPLITS)}
    rows = [
        (
            f"Fold {row['side']}" if str(row.get("side")).isdigit() else title_of(str(row.get("side"))),
            [Cell(whole_number(row.get(name)) if name != "class" else str(row.get(name))) for name in names],
        )
        for row in sorted(counts, key=lambda row: order.get(str(row.get("side")), len(order)))
    ]
    return Table("Images on each side of the split", ["Side", *map(title_of, names)], rows)


def _audit_table(audit: Mapping[str, Any]) -> Table:
    findings = part(audit, "findings")
    rows = [(title_of(str(kind)), [Cell(str(text))]) for kind, text in findings.items()]
    return Table(f"Audit of the split, verdict: {audit.get('verdict')}", ["Kind", "Found"], rows)
