"""What ``synthesize --dry-run`` says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from breastcli.config import SynthesizeConfig
from breastcli.data.store import PreparedData, row_bytes
from breastcli.gan.checkpoint import TrainedGenerator
from breastcli.gan.training import GanSession, num_steps
from breastcli.models import num_parameters
from breastcli.plan import Plan
from breastcli.records import stamp_of
from breastcli.system.planning import state_bytes
from breastcli.system.runtime import describe_device


def plan_fit(session: GanSession, facts: dict[str, Any], images: tuple[Path, int] | None, out: Path) -> Plan:
    """Plan a fit whose session is ready; ``images`` says where how many would be generated after it."""
    config, card = session.config, facts["dataset"]
    known = {
        "data": facts["data"],
        "train": {one.name: one.num_images for one in session.conditions},
        "size_px": config.size,
        "generator_parameters": num_parameters(session.generator),
        "critic_parameters": num_parameters(session.critic),
        "device": describe_device(session.device),
        "precision": str(session.dtype).removeprefix("torch."),
        "steps": num_steps(config),
        "steps_done": session.steps,
        "images_shown": num_steps(config) * config.batch_size,
        "generates": f"{images[1]:,} images into {images[0]}" if images else None,
    }
    # The averaged generator by itself; to resume from, that and what learns, of which Adam keeps two numbers for each.
    num_bytes = 2 * state_bytes(session.average) + 3 * sum(map(state_bytes, (session.generator, session.critic)))
    num_bytes += images[1] * row_bytes(card["size_px"]) if images else 0
    stamp = stamp_of(card["split"]["leaky"], card["drawn"])
    return Plan("synthesize", out, known, (), stamp, num_bytes, resumes=config.resume)


def plan_generation(generator: TrainedGenerator, numbers: dict[int, int], run: Path, out: Path) -> Plan:
    """Plan images of a generator that is loaded."""
    card = generator.facts["dataset"]
    facts = {
        "run": str(run),
        "images": {generator.conditions[number].name: count for number, count in numbers.items()},
        "size_px": card["size_px"],
        "parameters": num_parameters(generator.network),
    }
    notes = (f"collapsed {generator.facts['collapse']}",) if generator.facts["collapse"] else ()
    num_bytes = sum(numbers.values()) * row_bytes(card["size_px"])
    return Plan("synthesize", out, facts, notes, stamp_of(card["split"]["leaky"], card["drawn"]), num_bytes)


def plan_assessment(source: Path, data: PreparedData, features: str, config: SynthesizeConfig, out: Path) -> Plan:
    """Plan the comparison of generated images with real ones."""
    facts = {"source": str(source), "data": str(data.folder), "features": features, "draws": config.draws}
    return Plan("synthesize", out, facts, (), stamp_of(data.card["split"]["leaky"], data.card["drawn"]))
