"""What the command line prints of each job's result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from breastcli import console
from breastcli.config import MAGNIFICATIONS
from breastcli.console import interval, literal, make_table, plain_figure, read_interval
from breastcli.plan import Plan
from breastcli.records import Interval, Scores
from breastcli.show_benchmark import show_benchmark
from breastcli.show_checks import show_doctor, show_plan

if TYPE_CHECKING:
    from breastcli.data.audit import Audit
    from breastcli.data.shards import ShardResult
    from breastcli.evaluate import EvaluateResult
    from breastcli.explain import ExplainResult
    from breastcli.predict import PredictResult
    from breastcli.prepare import PrepareResult
    from breastcli.report import ReportResult
    from breastcli.synthesize import SynthesizeResult
    from breastcli.system.comparing import ComparisonResult
    from breastcli.train import TrainResult

SHORT = ("accuracy", "balanced_accuracy", "sensitivity", "specificity", "f1_weighted", "roc_auc")
REPORTED = ("accuracy", "balanced_accuracy", "roc_auc")
MAX_LISTED = 20


def show_prepare(result: PrepareResult | ShardResult) -> None:
    """Print what was prepared: images and exams (patients where exams are unknown) per side and class."""
    from breastcli.data.shards import ShardResult

    if isinstance(result, ShardResult):
        left = f"; files left out: {result.num_rejected}" if result.num_rejected else ""
        console.OUT.print(f"part {result.number} of {result.count}: {result.num_images:,} images decoded{left}")
        console.show_out(result.out)
        return
    card = result.card
    console.stamp(card["split"]["leaky"], card["drawn"])
    unit = next((name for name in ("exams", "patients") if card[f"num_{name}"]), "")
    groups = f"{card[f'num_{unit}']} {unit}" if unit else "patients unknown"
    table = make_table(f"{card['title']}: {card['num_images']:,} images, {groups}", ["", *card["classes"]])
    cells = {
        (row["side"], row["class"]): f"{row['images']:,}" + (f" ({row[unit]} {unit})" if unit else "")
        for row in card["counts"]
    }
    folds = card["split"]["folds"]
    for side in [str(k) for k in range(folds)] if folds else ["train", "val", "test"]:
        name = f"fold {side}" if folds else side
        table.add_row(name, *(cells.get((side, label), "none") for label in card["classes"]))
    console.OUT.print(table)
    _show_audit(result.audit)
    for note in card["notes"]:
        console.OUT.print(f"- {literal(note)}")
    if card["num_rejected"]:
        console.OUT.print(f"- files left out: {card['num_rejected']}, listed in {literal(result.out / 'rejected.csv')}")
    if card["num_stain_fallbacks"]:
        console.OUT.print(f"- {card['num_stain_fallbacks']} images kept their own stain: too little tissue")
    console.show_out(result.out)


def _show_audit(audit: Audit) -> None:
    """Print what was found of each kind, in figures; the notes name what matters."""
    from breastcli.data.findings import describe_findings

    table = make_table("audit", ["", "found"])
    table.columns[1].justify = "left"
    for kind, text in describe_findings(audit).items():
        table.add_row(kind, literal(text))
    images: Counter[tuple[str, str]] = Counter()
    for row in audit.counts:
        images[row["class"], row["magnification"]] += row["images"]
    for name in dict.fromkeys(row["class"] for row in audit.counts):
        figures = [f"{key} {images[name, key]:,}" for key in MAGNIFICATIONS if images[name, key]]
        if figures:
            table.add_row(literal(name), ", ".join(figures))
    console.OUT.print(table)


def show_synthesize(result: SynthesizeResult) -> None:
    """Print how the fit went, what was generated, or how good it is."""
    console.stamp(result.leaky, result.drawn)
    if result.history:
        last = result.history[-1]
        table = make_table(f"{result.run}: {last['kimg']:g} kimg", ["", "at the end"])
        for name, value in last.items():
            if name != "kimg" and value == value:
                table.add_row(name, f"{value:.4g}")
        console.OUT.print(table)
    for label, count in result.generated.items():
        console.OUT.print(f"- {count:,} images of {literal(label)}")
    if result.assessment:
        _show_assessment(result.assessment)
    if result.collapse:
        console.OUT.print(f"[bold red]collapsed {literal(result.collapse)}[/bold red]")
    console.show_out(result.out)


def _show_assessment(document: dict[str, Any]) -> None:
    """Print FID and KID beside those of real images, overlap, classes and possible copies."""
    n, features = document["n_per_draw"], document["features"]
    title = f"{document['draws']} draws of {n:,} images, features of {features['name']} (mean ± standard deviation)"
    table = make_table(title, ["", "FID", "KID"])
    for row in document["comparisons"]:
        name = literal(row["name"])
        name = name if row["kind"] == "generated" else f"[dim]{name} (real)[/dim]"
        table.add_row(name, _spread(row["fid"], 2), _spread(row["kid"], 4))
    console.OUT.print(table)
    table = make_table("overlap (mean ± standard deviation)", ["", "precision", "recall", "density", "coverage"])
    titles = {"training": "generated, of training", "held_out": "generated, of held-out"}
    for name, one in document["coverage"].items():
        shown = titles.get(name, "[dim]training, of held-out (real)[/dim]")
        table.add_row(shown, *(_spread(one[key], 3) for key in ("precision", "recall", "density", "coverage")))
    console.OUT.print(table)
    table = make_table("classes", ["", "n", "diversity", "of real", "KID to training", "recognised as such"])
    for row in document["classes"]:
        figures = [plain_figure(row[key]) for key in ("diversity", "real_diversity")]
        agreement = interval(read_interval(row["agreement"])) if row["agreement"] else "–"
        table.add_row(literal(row["class"]), f"{row['n']:,}", *figures, _spread(row["kid"], 4), agreement)
    console.OUT.print(table)
    near = document["neighbours"]
    text = (
        f"{near['num_below']:,} of {near['n']:,} images lie closer to a training image than "
        f"{1 - near['expected_share']:.0%} of training images to each other"
    )
    console.OUT.print(f"[bold red]possible copies: {text}[/bold red]" if near["copies"] else f"- {text}")
    for note in document["notes"]:
        console.OUT.print(f"[dim]- {literal(note)}[/dim]")


def _spread(figure: dict[str, float | None], digits: int) -> str:
    if figure["mean"] is None:
        return "–"
    return f"{figure['mean']:.{digits}f}" + ("" if figure["sd"] is None else f" ± {figure['sd']:.{digits}f}")


def show_train(result: TrainResult) -> None:
    """Print the best epoch."""
    console.stamp(result.leaky, result.drawn, synthetic=result.num_synthetic > 0)
    images, weights = result.num_images, result.num_parameters
    table = make_table(f"best of {len(result.history)} epochs", ["", ""])
    synthetic = f", {result.num_synthetic:,} of them synthetic" if result.num_synthetic else ""
    table.add_row("trained on", f"{images['train']:,} images{synthetic}, validated on {images['val']:,}")
    table.add_row("parameters", f"{weights['all']:,} ({weights['trainable']:,} trained)")
    for name, value in result.best.items():
        table.add_row(name, f"{value:.0f}" if name == "epoch" else f"{value:.4g}")
    console.OUT.print(table)
    console.show_out(result.out)


def show_evaluate(result: EvaluateResult | ComparisonResult) -> None:
    """Print all figures at image and patient level, and the short ones of every subset; or two runs' differences."""
    from breastcli.metrics.classification import METRICS
    from breastcli.system.comparing import ComparisonResult

    if isinstance(result, ComparisonResult):
        _show_comparison(result)
        return
    dataset = result.document["dataset"]
    console.stamp(dataset["leaky"], dataset["drawn"], synthetic=dataset["synthetic"])
    image, patient = result.image, result.patient
    heads = ["", f"images (n = {image.n:,})"]
    if patient:
        heads += [f"patients, majority vote (n = {patient.vote.n})", "patients, mean probability"]
    table = make_table(f"{', '.join(result.document['runs'])}: {result.document['split']}", heads)
    if patient:
        table.add_row("Patient recognition rate", "", interval(patient.recognition_rate), "")
    for name, metric in METRICS.items():
        levels = [image, *([patient.vote, patient.mean] if patient else [])]
        table.add_row(metric.title, *(interval(scores.overall[name]) for scores in levels))
    console.OUT.print(table)
    if result.document["calibration"]:
        _show_calibration(result.document["calibration"])
    if result.document["stress"]:
        _show_stress(result.document["stress"])
    if len(result.by_magnification) > 1:
        _show_subsets("magnification", result.by_magnification, SHORT)
    if len(result.by_subtype) > 1:
        _show_subsets("subtype", result.by_subtype, ("accuracy",))
    for spread in _spread_lines(result.document):
        console.OUT.print(spread)
    for note in image.notes:
        console.OUT.print(f"[dim]- {literal(note)}[/dim]")
    console.OUT.print(f"report: {literal(result.report)}")
    console.show_out(result.out)


def _show_calibration(document: dict[str, Any]) -> None:
    from breastcli.metrics.calibration import TITLES, show_temperatures

    temperatures = show_temperatures(document["temperatures"])
    heads = {"before": "before", "after": "calibrated", "difference": "difference"}
    table = make_table(f"calibration (lower is better), temperature {temperatures}", ["", *heads.values()])
    for name, title in TITLES.items():
        table.add_row(title, *(interval(read_interval(document[side][name])) for side in heads))
    console.OUT.print(table)


def _show_stress(document: dict[str, Any]) -> None:
    from breastcli.metrics.robustness import FLIPPED, TITLES
    from breastcli.reporting.stress import DRAWN

    heads = [f"{TITLES[name]} - clean" for name in DRAWN]
    table = make_table(f"perturbed images (n = {document['n']:,})", ["", "", *heads, TITLES[FLIPPED]])
    for one in document["conditions"]:
        figures = [*(one["differences"][name] for name in DRAWN), one[FLIPPED]]
        table.add_row(one["title"], one["label"], *(interval(read_interval(figure)) for figure in figures))
    console.OUT.print(table)
    for note in document["notes"]:
        console.OUT.print(f"[dim]- {literal(note)}[/dim]")


def _show_comparison(result: ComparisonResult) -> None:
    """Print every figure that counts images and the short ones that count patients: A, B, and B - A."""
    from breastcli.metrics.comparison import LEVELS, RECOGNITION_RATE, TITLES

    document, found = result.document, result.comparison
    if document["stamp"]:
        console.OUT.print(f"[bold red]{literal(document['stamp'])}[/bold red]")
    for side in "ab":
        console.OUT.print(f"{side.upper()}: {literal(document[side]['folder'])}")
    words = {True: "yes", False: "no", None: "–"}
    for key, level in found.levels.items():
        counts = f"n = {level.n[0]:,}" if level.n[0] == level.n[1] else f"n = {level.n[0]:,} (A), {level.n[1]:,} (B)"
        table = make_table(f"{LEVELS[key]} ({counts}): {document['split']}", ["", "A", "B", "B - A", "leaves out 0"])
        for name, one in level.figures.items():
            if key == "image" or name in (RECOGNITION_RATE, *SHORT):
                sides = (interval(Interval(value)) for value in (one.a, one.b))
                table.add_row(TITLES[name], *sides, interval(one.difference), words[one.leaves_out_zero])
        console.OUT.print(table)
    for note in (*found.notes, *document["apart"]):
        console.OUT.print(f"[dim]- {literal(note)}[/dim]")
    console.show_out(result.out)


def show_explain(result: ExplainResult) -> None:
    """Print what was measured of each method, beside the baselines."""
    document = result.document
    dataset = document["dataset"]
    console.stamp(dataset["leaky"], dataset["drawn"], synthetic=dataset["synthetic"])
    titles = {name: one["title"] for name, one in document["methods"].items()}
    console.OUT.print(f"{document['n']:,} images, class explained: {literal(document['target'])}")
    localisation = document["localisation"]
    if localisation:
        heads = ["", "IoU", "Dice", "precision", "recall", "average precision", "pointing game"]
        keys = ("iou", "dice", "precision", "recall", "average_precision", "pointing")
        counted = f"{localisation['n']} masks in {localisation['num_groups']} groups (patients where known)"
        table = make_table(f"localisation on {counted}, {localisation['rule']}: means over images", heads)
        for name, one in localisation["methods"].items():
            shown = titles.get(name, f"[dim]{name} (baseline)[/dim]")
            table.add_row(shown, *(interval(read_interval(one["mean"][key])) for key in keys))
        console.OUT.print(table)
        for line in _difference_lines(localisation["differences"], titles):
            console.OUT.print(f"- {line}")
        for name, printed in _printed_localisation(document["methods"]).items():
            console.OUT.print(
                f"[dim]- {titles[name]} in the DALAResNet50 paper (Table 14, its own masks): {printed}[/dim]"
            )
    faithfulness = document["faithfulness"]
    if faithfulness:
        heads = ["", "deletion AUC (low)", "insertion AUC (high)", "average drop (low)", "increase (high)"]
        table = make_table("faithfulness (means over images)", heads)
        for name, one in faithfulness["methods"].items():
            table.add_row(
                titles.get(name, f"[dim]{name} (baseline)[/dim]"),
                *(interval(read_interval(v)) for v in one.values()),
            )
        console.OUT.print(table)
        for name, check in faithfulness["randomisation"].items():
            last = check["levels"][-1]["correlation"]
            verdict = (
                "[bold red]survives: shows the image, not the network[/bold red]" if check["survives"] else "changes"
            )
            shown = "–" if last is None else f"{last:.2f}"
            console.OUT.print(f"- {titles[name]} when the network is made random: rank correlation {shown}, {verdict}")
    if document["rejected"]:
        console.OUT.print(f"- files that could not be read: {document['rejected']}")
    console.OUT.print(f"report: {literal(result.report)}")
    console.show_out(result.out)


def _difference_lines(differences: dict[str, Any], titles: dict[str, str]) -> Iterator[str]:
    """Yield the first method's Dice minus that of every other method; DT Grad-CAM comes first where it is there."""
    first = "dtgradcam" if "dtgradcam" in differences else next(iter(differences))
    for name, figures in differences[first].items():
        if name in titles:
            yield f"Dice of {titles[first]} minus {titles[name]}: {interval(read_interval(figures['dice']))}"


def _printed_localisation(methods: Iterable[str]) -> dict[str, str]:
    """Return the DALAResNet50 paper's figures of the methods that it compares, as ranges over magnifications."""
    from breastcli.reporting.explanation_section import printed_localisation

    found = {}
    for name in methods:
        ranges = printed_localisation(name)
        if ranges:
            found[name] = ", ".join(f"{metric} {low:.3f}–{high:.3f}" for metric, (low, high) in ranges.items())
    return found


def show_predict(result: PredictResult) -> None:
    """Print the first predictions, per patient where the names tell."""
    for title, values in (("images", result.predictions), ("patients, mean probability", result.patients)):
        if values is None:
            continue
        table = make_table(f"{len(values):,} {title}", ["", "predicted", *values.classes])
        for name, chosen, probs in islice(
            zip(values.image_ids, values.predicted, values.probs, strict=True), MAX_LISTED
        ):
            table.add_row(literal(name), literal(values.classes[chosen]), *(f"{value:.3f}" for value in probs))
        if len(values) > MAX_LISTED:
            table.add_row(f"… {len(values) - MAX_LISTED:,} more", "", *("" for _ in values.classes))
        console.OUT.print(table)
    if result.rejected:
        console.OUT.print(f"- files that could not be read: {len(result.rejected)}")
    console.show_out(result.out)


def show_report(result: ReportResult) -> None:
    """Print the figures of each run, what makes them hard to compare, and where the pages are."""
    document = result.document
    known = [(name, row) for name, row in zip(document["names"], document["runs"], strict=True) if row["n"]]
    for name, row in known:
        if row["stamp"]:
            console.OUT.print(f"[bold red]{literal(name)}: {literal(row['stamp'])}[/bold red]")
    table = make_table(f"{document['split']} split", ["", "n", *REPORTED])
    for name, row in known:
        figures = [interval(read_interval(row["image"][key])) if row["image"][key] else "–" for key in REPORTED]
        table.add_row(literal(name), f"{row['n']:,}", *figures)
    if known:
        console.OUT.print(table)
    if document["apart"]:
        what = ", ".join(document["apart"])
        console.OUT.print(f"[bold red]not tested on the same images: they differ in {what}[/bold red]")
    for path in [*result.pages, *result.model_cards]:
        if path != result.out:
            console.OUT.print(f"- {literal(path)}")
    console.show_out(result.out)


def _show_subsets(title: str, subsets: dict[str, Scores], metrics: tuple[str, ...]) -> None:
    from breastcli.metrics.classification import METRICS

    table = make_table(f"by {title}", ["", "n", *(METRICS[name].title for name in metrics)])
    for name, scores in subsets.items():
        table.add_row(literal(name), f"{scores.n:,}", *(interval(scores.overall[metric]) for metric in metrics))
    console.OUT.print(table)


def _spread_lines(document: dict[str, Any]) -> list[str]:
    if not document["spread"]:
        return []
    shown = ((name, document["spread"][name]) for name in SHORT if name in document["spread"])
    figures = ", ".join(f"{name} {one['mean']:.3f} ± {one['sd']:.3f}" for name, one in shown)
    return [f"over {len(document['folds'])} runs (mean ± standard deviation): {figures}"]


SHOW = {
    "prepare": show_prepare,
    "synthesize": show_synthesize,
    "train": show_train,
    "evaluate": show_evaluate,
    "explain": show_explain,
    "predict": show_predict,
    "benchmark": show_benchmark,
    "report": show_report,
    "doctor": show_doctor,
}


def show(job: str, result: Any) -> None:
    """Print what a job returned: its result, or the plan of a dry run."""
    (show_plan if isinstance(result, Plan) else SHOW[job])(result)
