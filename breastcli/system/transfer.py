"""Starting from weights that were trained before, without carrying a leak along."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from breastcli.config import TrainConfig
from breastcli.errors import LeakError, UsageError
from breastcli.models import Classifier
from breastcli.system.checkpoint import load_initial_weights, read_facts
from breastcli.system.runfolder import find_run

logger = logging.getLogger(__name__)


def load_start(model: Classifier, config: TrainConfig, card: dict[str, Any]) -> list[dict[str, Any]]:
    """Load what ``--weights`` or ``--init-from`` names; return the splits that it was trained on.

    Args:
        model: network to load into; the head of another run is left out.
        config: the new run's configuration.
        card: of the prepared folder that it will be trained on.

    Returns:
        One entry per earlier training, oldest first: data set, fingerprint of its split, and fold.

    Raises:
        UsageError: both are given.
        LeakError: one of these trainings used another split of the same data set, so that images which are held out now
            may have been trained on.
        UserError: the weights cannot be used.
    """
    if config.weights and config.init_from:
        raise UsageError("--weights and --init-from are both given", fix="give one of them")
    if not config.weights and not config.init_from:
        return []
    given = f"--init-from {config.init_from}" if config.init_from else f"--weights {config.weights}"
    path = find_run(config.init_from).best if config.init_from else Path(config.weights or "")
    ancestors = trained_on(read_facts(path))
    for ancestor in ancestors:
        same_set = ancestor["name"] == card["name"]
        if same_set and (ancestor["split_fingerprint"] != card["split_fingerprint"] or ancestor["fold"] != config.fold):
            raise LeakError(
                f"{given} was trained on another split or fold of {card['name']}, so on images that are held out here",
                fix="train it on this split and fold first",
            )
    flag = "--init-from" if config.init_from else "--weights"
    report = load_initial_weights(model, path, head=not config.init_from, flag=flag)
    logger.info("weights: %s", report)
    if report.num_fitting < report.num_trunk / 2:
        logger.warning("%s: only %d of the trunk's %d tensors fit", given, report.num_fitting, report.num_trunk)
    return ancestors


def trained_on(facts: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the trainings that a checkpoint went through, oldest first; none for a file of somebody else."""
    if facts is None:
        return []
    dataset = facts["dataset"]
    last = {"name": dataset["name"], "split_fingerprint": dataset["split_fingerprint"], "fold": facts.get("fold")}
    last |= {"synthetic": bool(facts.get("synthetic"))}
    return [*facts.get("ancestors", []), last]


def saw_synthetic(facts: dict[str, Any]) -> bool:
    """Return whether a checkpoint was trained with synthetic images, or started from one that was."""
    return any(one.get("synthetic") for one in (facts, *facts.get("ancestors", [])))  # older ones do not say
