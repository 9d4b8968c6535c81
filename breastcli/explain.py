"""explain: where a network looks, measured against masks and against the network itself."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from breastcli.cams import CAMS, CamOptions
from breastcli.config import ExplainConfig
from breastcli.configfile import to_document
from breastcli.data.masks import MaskSet
from breastcli.errors import UsageError, UserError, visible
from breastcli.files import claimed_folder, refuse_links, remove_written, replacing, write_csv, write_json
from breastcli.metrics import localisation as local
from breastcli.models.splitting import split_at
from breastcli.plan import Plan
from breastcli.progress import SILENT, Progress
from breastcli.records import stamp_of
from breastcli.reporting.explanation_plots import Overlay, plot_comparison, plot_gallery, plot_panel
from breastcli.reporting.report import write_report
from breastcli.system.checkpoint import load_checkpoint
from breastcli.system.explaining import (
    FAITHFUL,
    MASK_PROBLEMS,
    Explainer,
    measure_faithfulness,
    measure_localisation,
    refinement_of,
)
from breastcli.system.planning import plan_explanation
from breastcli.system.runfolder import EXPLAINED, EXPLANATION, MAPS, PANELS, Run, find_run, panels_of, reading_run
from breastcli.system.runtime import resolve_device, resolve_precision
from breastcli.system.subjects import Subjects, from_files, from_split, parse_num, unique_names
from breastcli.system.transfer import saw_synthetic

logger = logging.getLogger(__name__)

MAX_NAME = 150  # bytes of a panel's name, which numbering lengthens


@dataclass(frozen=True)
class ExplainResult:
    """What ``explain`` made.

    Attributes:
        out: folder of panels, maps, figures and ``explain.json``.
        report: the page that shows it.
        document: the contents of ``explain.json``.
        seconds: wall-clock time.
    """

    out: Path
    report: Path
    document: dict[str, Any]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-safe dictionary."""
        return {**self.document, "seconds": self.seconds, "report": str(self.report)}


@dataclass
class _Work:
    """One explanation under way."""

    config: ExplainConfig
    run: Run
    facts: dict[str, Any]
    card: dict[str, Any] | None
    explainer: Explainer
    methods: tuple[str, ...]
    rule: local.Rule
    subjects: Subjects
    targets: np.ndarray
    probs: np.ndarray
    thresholds: dict[str, float] = field(default_factory=dict)
    maps: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def stamp(self) -> str:
        return _stamp(self.facts, self.card)


def explain(config: ExplainConfig, progress: Progress = SILENT) -> ExplainResult | Plan:
    """Explain images of a run's split, or loose files, and measure the explanations.

    Raises:
        UsageError: an option that cannot be accepted.
        UserError: the run, its data, the masks or the output folder cannot be used.
    """
    started = time.monotonic()
    methods = _parse_methods(config.method)
    rule = local.parse_rule(config.binarise)
    num = parse_num(config.num)
    _check_options(config, methods, rule)
    run = find_run(config.run)
    out = Path(config.out) if config.out else run.folder / "explain" / config.method.replace(",", "-")
    if not config.out:
        refuse_links(run.folder, str(out.relative_to(run.folder)))
    with reading_run(run, dry_run=config.dry_run) as run, _claimed(out, config):
        document = _explain(run, out, methods, rule, num, config, progress)
        if isinstance(document, Plan):
            return document
        report = write_report(run.folder)
    return ExplainResult(out, report, document, time.monotonic() - started)


def _explain(
    run: Run,
    out: Path,
    methods: tuple[str, ...],
    rule: local.Rule,
    num: int | None,
    config: ExplainConfig,
    progress: Progress,
) -> dict[str, Any] | Plan:
    """Do the work in a claimed folder; return ``explain.json``."""
    device = resolve_device(config.device)
    model, facts = load_checkpoint(run.best, device)
    if config.layer:
        model = split_at(model, config.layer)
    data = None if config.images else run.open_data(config.data)
    subjects = from_split(run, data, config.split, num, config.seed) if data else from_files(config, facts, num)
    cam_options = CamOptions(config.noise, config.samples, config.top_k, config.batch_size, config.seed)
    dtype = resolve_precision(config.precision, device)
    explainer = Explainer(model, device, dtype, cam_options, config.resamples, progress)
    masks = _find_masks(config, subjects, facts)
    _check_target(config.target, subjects, facts["classes"])
    if config.dry_run:
        explainer.maps(subjects.images[:1], np.zeros(1, dtype=np.int64), methods[0])  # whether there is a map at all
        stamp = _stamp(facts, data.card if data else None)
        return plan_explanation(run, model, methods, subjects, masks and len(masks.index), stamp, config, out)
    probs = explainer.probabilities(subjects.images)
    targets = _targets(config.target, subjects, probs, facts["classes"])
    card = data.card if data else None
    work = _Work(config, run, facts, card, explainer, methods, rule, subjects, targets, probs)
    if rule.name == "val":
        assert data is not None
        _fit_thresholds(work, from_split(run, data, "val", None, config.seed))
    work.maps = {name: explainer.maps(subjects.images, targets, name) for name in methods}
    document = _document(work)
    tables: dict[str, list[list[Any]]] = {}
    if masks is not None:
        part, rows = measure_localisation(explainer, subjects, work.maps, masks, rule, work.thresholds)
        document["localisation"] = part
        tables["localisation.csv"] = [["image_id", "patient", "method", *local.METRICS], *rows]
    if config.faithfulness:
        document["faithfulness"], rows = measure_faithfulness(explainer, subjects, work.maps, targets)
        tables["faithfulness.csv"] = [["image_id", "method", *FAITHFUL], *rows]
    _warn_of_unknown_patients(subjects)
    _write(work, document, tables, masks, out)
    return document


def _stamp(facts: dict[str, Any], card: dict[str, Any] | None) -> str:
    """Return the warning that belongs to every picture, or ""."""
    synthetic = saw_synthetic(facts)
    return stamp_of(card["split"]["leaky"], card["drawn"], synthetic) if card else stamp_of(None, False, synthetic)


def _write(
    work: _Work, document: dict[str, Any], tables: dict[str, list[list[Any]]], masks: MaskSet | None, out: Path
) -> None:
    """Put everything in place of what an earlier explanation left; ``explain.json`` last."""
    before = panels_of(out)
    panels = [{"panel": name} for name in before] + document["images"]
    write_json(out / EXPLANATION, {"unfinished": True, "images": panels})
    for name in [*before, *EXPLAINED[1:]]:
        remove_written(out / name)
    for name, (head, *rows) in tables.items():
        write_csv(out / name, head, rows)
    _draw(work, document, masks, out)
    with replacing(out / MAPS) as temporary, temporary.open("wb") as stream:
        stored = {name: maps.astype(np.float16) for name, maps in work.maps.items()}
        np.savez_compressed(stream, image_ids=np.array(work.subjects.image_ids), **stored)
    write_json(out / EXPLANATION, document, durable=True)


def _warn_of_unknown_patients(subjects: Subjects) -> None:
    if len(subjects) > 1 and not any(subjects.patients):
        logger.warning("patients are unknown: intervals count every image as one; --patients tells them from the names")


def _parse_methods(text: str) -> tuple[str, ...]:
    names = tuple(CAMS.names()) if text == "all" else tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        CAMS.get(name)
    return names


def _check_options(config: ExplainConfig, methods: tuple[str, ...], rule: local.Rule) -> None:
    """Refuse what cannot be done, and what would have no effect although a figure depends on it."""
    if rule.name == "val" and (config.images or not config.masks or config.split == "val"):
        raise UsageError("--binarise val: needs masks of validation images", fix="use otsu, fixed=T or quantile=Q")
    if config.patients and not config.images:
        raise UsageError("--patients: a split's patients are known", fix="leave it out, or give --images")
    if config.data and config.images:
        raise UsageError("--data and --images are both given", fix="give one of them")
    if config.top_k and "scorecam" not in methods:
        logger.warning("--top-k has no effect without scorecam")


@contextlib.contextmanager
def _claimed(out: Path, config: ExplainConfig) -> Iterator[None]:
    """Take the output folder; what an earlier explanation left stays until this one has something to put there."""
    with claimed_folder(out, allowed=config.overwrite, dry_run=config.dry_run):
        refuse_links(out, PANELS)
        foreign = [name for name in EXPLAINED if (out / name).exists()]
        if foreign and not (out / EXPLANATION).is_file():
            raise UserError(f"{out / foreign[0]} was not written by breastcli explain", fix="choose another --out")
        yield


def _find_masks(config: ExplainConfig, subjects: Subjects, facts: dict[str, Any]) -> MaskSet | None:
    if not config.masks:
        return None
    masks = subjects.masks(Path(config.masks), facts["dataset"]["name"])
    for kind in MASK_PROBLEMS:
        names = getattr(masks, kind)
        if names:
            logger.warning("%d images with %s masks, such as %s", len(names), kind, names[0])
    if not len(masks.index):
        raise UserError(f"--masks {config.masks}: no mask can be used", fix="see the warnings above")
    return masks


def _check_target(target: str, subjects: Subjects, classes: list[str]) -> None:
    """Refuse a class to explain that is not known."""
    if target == "true" and subjects.labels is None:
        raise UsageError("--target true: loose files have no label", fix="use predicted or a class")
    if target not in ("predicted", "true", *classes):
        near = get_close_matches(target, [*classes, "predicted", "true"], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use predicted, true, {', '.join(classes)}"
        raise UsageError(f"--target {target}: no such class", fix=hint)


def _targets(target: str, subjects: Subjects, probs: np.ndarray, classes: list[str]) -> np.ndarray:
    """Return the class to explain (n,)."""
    if target == "predicted":
        return probs.argmax(axis=1)
    if target == "true":
        assert subjects.labels is not None  # checked at the start
        return subjects.labels
    return np.full(len(subjects), classes.index(target))


def _fit_thresholds(work: _Work, subjects: Subjects) -> None:
    """Fit one level per method on the validation images that have masks; baselines get theirs too."""
    masks = subjects.masks(Path(work.config.masks or ""), work.facts["dataset"]["name"])
    probs = work.explainer.probabilities(subjects.images)
    targets = _targets(work.config.target, subjects, probs, work.facts["classes"])
    maps = {name: work.explainer.maps(subjects.images, targets, name) for name in work.methods}
    maps |= local.baseline_maps(subjects.images, work.config.seed)
    work.thresholds = {name: local.fit_threshold(one[masks.index], masks.masks) for name, one in maps.items()}


def _document(work: _Work) -> dict[str, Any]:
    """Return ``explain.json`` without what is measured."""
    config, subjects, classes = work.config, work.subjects, work.facts["classes"]
    predicted = work.probs.argmax(axis=1)
    panels = unique_names([_file_name(name) for name in subjects.image_ids])
    images = [
        {
            "image_id": name,
            "patient": subjects.patients[place],
            "magnification": subjects.magnifications[place],
            "label": None if subjects.labels is None else classes[subjects.labels[place]],
            "predicted": classes[predicted[place]],
            "target": classes[work.targets[place]],
            "probability": float(work.probs[place, work.targets[place]]),
            "panel": f"{PANELS}/{panels[place]}.png",
        }
        for place, name in enumerate(subjects.image_ids)
    ]
    kinds = {name: CAMS.get(name) for name in work.methods}
    return {
        "name": config.method,
        "methods": {name: {"title": kind.title, "source": kind.source} for name, kind in kinds.items()},
        "run": str(work.run.folder),
        "config": to_document(config),
        "checkpoint": {"epoch": work.facts["epoch"], "started": work.run.info["started"]},
        "split": None if config.images else config.split,
        "n": len(subjects),
        "target": config.target,
        "layer": config.layer,
        "options": {
            "noise": config.noise,
            "samples": config.samples,
            "top_k": config.top_k,
            "binarise": config.binarise,
            "seed": config.seed,
        },
        "dataset": {
            "name": work.facts["dataset"]["name"] if work.card else "image files",
            "leaky": work.card["split"]["leaky"] if work.card else None,
            "drawn": work.card["drawn"] if work.card else False,
            "synthetic": saw_synthetic(work.facts),
        },
        "rejected": len(subjects.rejected),
        "images": images,
        "localisation": None,
        "faithfulness": None,
    }


def _draw(work: _Work, document: dict[str, Any], masks: MaskSet | None, out: Path) -> None:
    """Draw a panel per image, the gallery and the comparison."""
    subjects = work.subjects
    truths: dict[int, np.ndarray] = dict(zip(masks.index.tolist(), masks.masks, strict=True)) if masks else {}
    selections = {name: _selection(work, name) for name in work.methods}
    captions = [_caption(one) for one in document["images"]]
    work.explainer.progress.begin("panels", len(subjects), "images")
    (out / PANELS).mkdir(exist_ok=True)
    for place, one in enumerate(document["images"]):
        overlays = [
            Overlay(
                CAMS.get(name).title,
                work.maps[name][place],
                selections[name][place],
                inside_mask=CAMS.get(name).refine is not None,
            )
            for name in work.methods
        ]
        image = subjects.images[place]
        plot_panel(out / one["panel"], image, overlays, truths.get(place), captions[place], stamp=work.stamp)
        work.explainer.progress.advance("panels")
    first = work.methods[0] if "dtgradcam" not in work.methods else "dtgradcam"
    all_truths = [truths.get(place) for place in range(len(subjects))]
    plot_gallery(
        out / "gallery.png",
        subjects.images,
        work.maps[first],
        selections[first],
        all_truths,
        captions,
        CAMS.get(first).title,
        stamp=work.stamp,
    )
    plot_comparison(out / "comparison.png", document, stamp=work.stamp)


def _selection(work: _Work, name: str) -> np.ndarray:
    """Return the masks (n, S, S) that a method's maps become."""
    selected = local.binarise(work.maps[name], work.rule, work.thresholds.get(name))
    refine = refinement_of(name)
    return selected if refine is None else np.stack([refine(one) for one in selected])


def _caption(one: dict[str, Any]) -> str:
    parts = [visible(one["image_id"]), f"{one['target']} {one['probability']:.3f}"]
    if one["predicted"] != one["target"]:
        parts.append(f"predicted {one['predicted']}")
    parts += [f"true {one['label']}"] if one["label"] else []
    parts += [one["magnification"]] if one["magnification"] else []
    parts += [f"patient {one['patient']}"] if one["patient"] else []
    return " · ".join(parts)


def _file_name(image_id: str) -> str:
    """Return an image's name as a file name: anything unusual becomes a line, and a long one is cut."""
    plain = "".join(sign if sign.isalnum() or sign in "-_.~" else "_" for sign in image_id)
    return plain.encode()[:MAX_NAME].decode(errors="ignore")
