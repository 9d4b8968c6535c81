"""What to do next: one line after each job, ready to be copied into a shell."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from breastcli.config import EvaluateConfig, ExplainConfig, PrepareConfig, SynthesizeConfig, TrainConfig
from breastcli.launch import num_processes
from breastcli.plan import Plan

if TYPE_CHECKING:
    from breastcli.evaluate import EvaluateResult
    from breastcli.explain import ExplainResult
    from breastcli.prepare import PrepareResult
    from breastcli.synthesize import SynthesizeResult
    from breastcli.train import TrainResult


def hints_after(job: str, config: Any, result: Any, words: Sequence[str]) -> list[str]:
    """Return what to say after a job that went well: the next command, and what to know before following it.

    Args:
        job: its name.
        config: its options.
        result: what it returned.
        words: the command line that the user typed, without the program.
    """
    if isinstance(result, Plan):
        return [] if num_processes() > 1 else [_next(*_without(words, "dry-run"))]  # torchrun's own words are not known
    return AFTER[job](config, result, words) if job in AFTER else []


def _next(*words: object) -> str:
    return f"next: {shlex.join(['breastcli', *map(str, words)])}"


def _without(words: Sequence[str], flag: str) -> list[str]:
    """Return the command line with a switch turned off, also where a configuration file turned it on."""
    others = [word for word in words if word != f"--{flag}"]
    return others if len(others) < len(words) else [*others, f"--no-{flag}"]


def _after_prepare(config: PrepareConfig, result: PrepareResult, words: Sequence[str]) -> list[str]:
    if config.shard:
        others = [
            word for place, word in enumerate(words) if "--shard" not in (word.split("=")[0], *words[place - 1 : place])
        ]
        return [f"{_next(*others, '--merge', result.to_json()['shard']['count'])} (once all parts are decoded)"]
    if config.audit:
        again = _without(words, "audit")
        # In a folder that was named for it the audit's findings lie where the images shall.
        return [_next(*again, *(["--overwrite"] if config.out and not config.overwrite else []))]
    split = result.card["split"]
    fold = ["--fold", 0] if split["folds"] else []
    lines = []
    if split["leaky"]:
        known = next((name for name in ("exam", "patient") if result.card[f"num_{name}s"]), None)
        way = f"--group-by {known} makes one that does not leak" if known else "--patients tells who they belong to"
        lines.append(f"note: every figure from this split will say {split['leaky']}; {way}")
    return [*lines, _next("train", "--data", result.out, *fold)]


def _after_train(config: TrainConfig, result: TrainResult, words: Sequence[str]) -> list[str]:
    return [_next("evaluate", result.out)]


def _after_evaluate(config: EvaluateConfig, result: EvaluateResult, words: Sequence[str]) -> list[str]:
    if config.compare or len(result.document["runs"]) > 1:
        return []  # several networks have no explanation in common
    return [_next("explain", result.document["runs"][0], *(["--data", config.data] if config.data else []))]


def _after_explain(config: ExplainConfig, result: ExplainResult, words: Sequence[str]) -> list[str]:
    return [_next("predict", result.document["run"], "IMAGE_OR_FOLDER")]


def _after_synthesize(config: SynthesizeConfig, result: SynthesizeResult, words: Sequence[str]) -> list[str]:
    from breastcli.files import read_json
    from breastcli.gan.runs import GENERATOR

    if result.collapse or (result.assessment and result.assessment["neighbours"]["copies"]) or result.run is None:
        return []  # the table says what is wrong, or there is no generator
    facts = read_json((result.run / GENERATOR).with_suffix(".json"))
    if not result.generated:
        counts = facts["class_counts"]
        largest = max(counts.values())
        lacking = any(counts[one["label"]] < largest for one in facts["conditions"])
        return [_next("synthesize", "generate", result.run, *([] if lacking else ["--label", "all", "--num", largest]))]
    words = ["--data", config.data or facts["data"]]
    words += [] if facts["mag"] == "all" else ["--mag", facts["mag"]]
    words += [] if facts["fold"] is None else ["--fold", str(facts["fold"])]
    return [_next("train", *words, "--extra", result.out)]


def _after_doctor(config: Any, result: Any, words: Sequence[str]) -> list[str]:
    if Path("data/breakhis/manifest.csv").is_file():
        return [_next("train")]
    return [_next("prepare", "--dataset", "sample", "--out", "data/sample")]


AFTER: dict[str, Callable[[Any, Any, Sequence[str]], list[str]]] = {
    "prepare": _after_prepare,
    "synthesize": _after_synthesize,
    "train": _after_train,
    "evaluate": _after_evaluate,
    "explain": _after_explain,
    "doctor": _after_doctor,
}
