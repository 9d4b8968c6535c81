"""The model card: what a trained network is for, what it learned from, how good it is, and what nobody knows of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from breastcli.config import TrainConfig
from breastcli.files import write_text
from breastcli.metrics.calibration import show_temperatures
from breastcli.metrics.classification import FEW_GROUPS
from breastcli.records import DRAWN, TRAINED_WITH_SYNTHETIC
from breastcli.reporting.data_section import counts_table
from breastcli.reporting.evaluation_section import calibration_table, overall_table, patient_levels
from breastcli.reporting.parts import Cell, Table, is_finite, part, whole_number
from breastcli.reporting.reproduce import commands
from breastcli.reporting.run_files import RunFiles
from breastcli.system.runfolder import MODEL_CARD

# What of an option's name says nothing about the network or how it learned.
NO_HYPER_PARAMETERS = ("out", "data", "device", "workers", "overwrite", "resume", "arch", "precision", "compile")
ENVIRONMENT = ("started", "seconds", "device", "precision", "processes", "git")
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;"}  # the last one keeps addresses from becoming links

NOT_A_DEVICE = (
    "**Research software, not a medical device.** Nothing that this network puts out may be used for diagnosis, "
    "treatment or triage."
)
OUT_OF_SCOPE = (
    "Any use that touches the care of a patient.",
    "Images of another kind than those of the data set below: another organ, stain, magnification, microscope, scanner "
    "or laboratory. Nothing here says how the network behaves on them.",
    "Images that show none of the classes below: the network knows no other answer and gives one of them all the same.",
)
ABOUT_SYNTHETIC = "A generative network made part of the training images; what it gets wrong may have been learned."
ABOUT_DRAWN = "The images were drawn by a program: the figures say that the software works, and nothing about tissue."


def write_model_card(files: RunFiles) -> Path:
    """Write ``model_card.md`` from what the run folder holds: only what its files say, nothing else.

    Args:
        files: of a classifier's run, or of the pooled evaluation of several.

    Returns:
        the card's path.
    """
    blocks = [f"# Model card: {escape(files.name)}", NOT_A_DEVICE, *_stamps(files)]
    sections = {
        "Intended use": _intended(files),
        "Out of scope": [_list(OUT_OF_SCOPE)],
        "Training data": _training_data(files),
        "Network and training": _network(files),
        "Figures": _figures(files),
        "Calibration": _calibration(files),
        "Limits": [_list(_limits(files))],
        "Environment": _environment(files),
        "Licence and citation": _licence(files),
    }
    for title, content in sections.items():
        blocks += [f"## {title}", *filter(None, content)]
    write_text(files.folder / MODEL_CARD, "\n\n".join(blocks) + "\n")
    return files.folder / MODEL_CARD


def escape(text: Any) -> str:
    """Return text on one line that Markdown shows as it is: no markup, no HTML, no links."""
    plain = re.sub(r"\s+", " ", str(text)).strip()
    plain = re.sub(r"[&<>@]", lambda sign: ENTITIES[sign.group()], plain)
    plain = re.sub(r"[\\`*_\[\]|~#$!]", lambda sign: f"\\{sign.group()}", plain)
    return plain.replace("://", "&#58;//").replace("www.", "www&#46;")


def _stamps(files: RunFiles) -> list[str]:
    marks = [
        *files.leaks,
        *[DRAWN.capitalize()] * files.drawn,
        *[TRAINED_WITH_SYNTHETIC.capitalize()] * files.synthetic,
    ]
    return [f"> **{escape(mark)}**" for mark in marks]


def _intended(files: RunFiles) -> list[str]:
    classes = ", ".join(map(escape, files.card.get("classes") or ()))
    name = escape(files.card.get("title") or files.card.get("name") or "an unknown data set")
    where = "" if files.magnification == "all" else f" at {escape(files.magnification)}"
    return [
        f"Research on the classification of images as in {name}{where}, into these classes: {classes or 'unknown'}; "
        "comparing networks, splits and ways to train."
    ]


def _training_data(files: RunFiles) -> list[str]:
    card, split, audit = files.card, part(files.card, "split"), part(files.info, "audit")
    if not card:
        return ["The run folder does not say."]
    used = part(files.info, "num_images")
    extra = part(files.info, "synthetic")
    facts = {
        "Data set": card.get("title") or card.get("name"),
        "Task": card.get("task"),
        "Images": whole_number(card.get("num_images")),
        "Used by this run": ", ".join(f"{whole_number(n)} {side}" for side, n in used.items()),
        "Examinations": card.get("num_exams") or "unknown",
        "Patients": card.get("num_patients") or "unknown",
        "Size": f"{card.get('size_px')} px, {card.get('resize')}",
        "Stain normalisation": part(card, "stain").get("method", "none"),
        "Split by": split.get("level"),
        "Fold": files.settings.get("fold"),
        "Leaks": "; ".join(files.leaks) or "none found",
        "Audit": audit.get("verdict"),
        "Synthetic training images": ", ".join(f"{n} {name}" for name, n in part(extra, "num_images").items()),
        "Fingerprints": f"images {card.get('fingerprint')}, split {card.get('split_fingerprint')}",
        "Homepage": card.get("homepage"),
    }
    return [_facts(facts), _table(counts_table(card)), _list(card.get("notes") or ())]


def _network(files: RunFiles) -> list[str]:
    settings, info = files.settings, files.info
    known = {field.name for field in dataclasses.fields(TrainConfig) if _concerns(field, files.arch)}
    parameters, best = part(info, "num_parameters"), part(info, "best")
    pooled = info.get("runs") if files.is_pooled else None
    facts = {
        "Network": files.arch,
        "Runs": f"{len(pooled)}, pooled; what follows is the first one's" if pooled else None,
        "Parameters": f"{whole_number(parameters.get('all'))}, of which {whole_number(parameters.get('trainable'))} "
        "learned"
        if parameters
        else None,
        "Best epoch": f"{best.get('epoch')}, by {settings.get('monitor')}" if best else None,
        "Trained before on": ", ".join(str(one.get("name")) for one in info.get("ancestors") or ()),
    }
    rows = [(name, [Cell(str(value))]) for name, value in settings.items() if name in known and value is not None]
    return [_facts(facts), _table(Table("", ["Option of train", "Value"], rows))]


def _concerns(field: dataclasses.Field[Any], arch: str | None) -> bool:
    """Return whether an option says something of this network: the help of another network's begins with its name."""
    of_network, _, more = field.metadata["help"].partition(": ")
    foreign = bool(more) and of_network.islower() and of_network != arch
    return field.name not in NO_HYPER_PARAMETERS and not foreign


def _figures(files: RunFiles) -> list[str]:
    if not files.evaluations:
        return ["Not evaluated yet."]
    blocks = []
    for split, document in files.evaluations.items():
        image, patient, threshold = part(document, "image"), part(document, "patient"), part(document, "threshold")
        rule = f"decision threshold {threshold.get('rule')}" if threshold.get("value") is not None else "largest one"
        caption = f"{split} split, 95 % intervals; {rule}; test-time augmentation {document.get('tta')}"
        table = overall_table(image, patient)
        rate = part(patient, "recognition_rate")
        blocks += [f"### {escape(split)}", escape(caption), _table(table)]
        if is_finite(rate.get("value")):
            n = part(patient, "vote").get("n")
            low, high = (f"{rate[end]:.3f}" if is_finite(rate.get(end)) else "unknown" for end in ("low", "high"))
            blocks.append(f"Patient recognition rate: {rate['value']:.3f} ({low} to {high}), n = {n} patients.")
        notes = [note for scores in (image, *patient_levels(patient)) for note in scores.get("notes", ())]
        blocks.append(_list(dict.fromkeys(notes)))
    return blocks


def _calibration(files: RunFiles) -> list[str]:
    blocks = []
    for split, document in files.evaluations.items():
        found = part(document, "calibration")
        if found:
            temperatures = show_temperatures(found.get("temperatures", ()))
            text = f"Temperature: {temperatures}, fitted on validation images; `breastcli predict` does not use it."
            blocks += [f"{escape(split)} split. {text}", _table(calibration_table(found))]
        else:
            blocks.append(
                f"{escape(split)} split: the probabilities are not calibrated; see ECE and Brier score above."
            )
    return blocks or ["Not measured."]


def _limits(files: RunFiles) -> Iterator[str]:
    for leak in files.leaks:
        yield f"{leak}: the figures can be higher than they would be for new patients."
    for split, document in files.evaluations.items():
        groups = part(document, "image").get("num_groups")
        few = f", fewer than {FEW_GROUPS}: their intervals are too narrow" if groups and groups < FEW_GROUPS else ""
        yield f"The {split} figures rest on {groups or 'one'} groups (examinations, patients or images){few}."
        if not part(document, "patient"):
            yield f"No figures count patients on the {split} split: they are unknown."
    if files.drawn:
        yield ABOUT_DRAWN
    if files.synthetic:
        yield ABOUT_SYNTHETIC
    if files.info.get("status") not in (None, "finished"):
        yield f"The training is not finished (status: {files.info['status']})."
    names = {str(part(document, "dataset").get("name")) for document in files.evaluations.values()}
    if names:
        yield f"Tested on held-out images of {', '.join(sorted(names))} only: no other data set, laboratory or scanner."
    else:
        yield "Not tested on any held-out image."
    yield "Not tested: use by people, groups of patients by age, sex or origin, which the files do not name."


def _environment(files: RunFiles) -> list[str]:
    facts = {name.capitalize(): files.info.get(name) for name in ENVIRONMENT}
    versions = ", ".join(f"{name} {version}" for name, version in part(files.info, "versions").items())
    typed = "\n".join(command for _, command in commands(files))
    fence = "`" * (max([2, *map(len, re.findall("`+", typed))]) + 1)
    return [_facts({**facts, "Versions": versions}), *([f"{fence}console\n{typed}\n{fence}"] if typed else [])]


def _licence(files: RunFiles) -> list[str]:
    card = files.card
    facts = {
        "Images": card.get("licence"),
        "Cite": card.get("citation"),
        "Software": "breastcli, MIT licence",
    }
    began = any(files.settings.get(name) for name in ("pretrained", "weights", "init_from"))
    return [_facts(facts), "The weights that training began with have a licence that no file here names." * began]


def _facts(facts: Mapping[str, Any]) -> str:
    known = {name: value for name, value in facts.items() if value not in (None, "")}
    return "\n".join(f"- {name}: {escape(value)}" for name, value in known.items())


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    rows = [[head, *(f"{cell.text} {cell.interval}" for cell in cells)] for head, cells in table.rows]
    head, *body = (f"| {' | '.join(map(escape, row))} |" for row in [table.columns, *rows])
    return "\n".join([head, f"|{'---|' * len(table.columns)}", *body])
