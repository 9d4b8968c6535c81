"""The rows of prepared folders that an evaluation scores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from breastcli.config import EvaluateConfig
from breastcli.data.store import PreparedData
from breastcli.errors import UsageError, UserError
from breastcli.metrics.classification import choose_threshold
from breastcli.parsing import parse_magnification
from breastcli.system.checkpoint import read_facts, require_checkpoint
from breastcli.system.runfolder import Run


def select_rows(run: Run, data: PreparedData, split: str) -> np.ndarray:
    """Return the rows (n,) of a split that are of a run's fold and magnification."""
    return data.select(split, fold=run.config.fold, magnification=parse_magnification(run.config.mag))


def choose_rows(run: Run, config: EvaluateConfig) -> tuple[PreparedData, np.ndarray]:
    """Return a run's data and the rows (n,) to score, or refuse what could not be done with them.

    Raises:
        UsageError: the threshold does not suit the classes, or is none.
        UserError: the data are not the run's, or the run has no weights yet.
    """
    data = run.open_data(config.data)
    if config.threshold != "0.5" and len(data.classes) != 2:
        raise UsageError(f"--threshold {config.threshold}: needs two classes, not {len(data.classes)}")
    choose_threshold(np.array([0, 1]), np.array([0.0, 1.0]), config.threshold)  # whether there is such a rule
    require_checkpoint(run.best)
    facts = read_facts(run.best)
    if facts is not None and tuple(facts["classes"]) != data.classes:
        raise UserError(f"{run.best} knows other classes than {data.folder}", fix="train again")
    return data, select_rows(run, data, config.split)


def refuse_overlap(runs: Sequence[Run], chosen: Sequence[tuple[PreparedData, np.ndarray]]) -> None:
    """Refuse to pool runs of different splits, or runs that would predict the same images.

    Raises:
        UserError: there are such runs.
    """
    for run, (data, _) in zip(runs, chosen, strict=True):
        if data.card["split_fingerprint"] != chosen[0][0].card["split_fingerprint"]:
            raise UserError(f"{run.folder} and {runs[0].folder} differ in their splits", fix="evaluate them apart")
    names = [data.rows[row].record.image_id for data, rows in chosen for row in rows]
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        shared = len(names) - len(set(names))
        raise UserError(
            f"{shared} images (such as {name}) were predicted by two runs", fix="pool runs of different folds"
        )
