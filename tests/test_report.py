"""The HTML report: built from a made-up run folder, read back with a parser."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from PIL import Image

from breastcli.errors import UserError
from breastcli.metrics.classification import METRICS
from breastcli.reporting.cases import thumbnail_name
from breastcli.reporting.report import write_report

STAMP = "LEAKY: image-level split"
DRAWN = "This data set was drawn by a program; it is not real tissue"
VOID = {"img", "meta", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """Text, tags and attributes of a page; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.tables: list[dict] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, self._open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append({"caption": "", "rows": []})
        if tag == "tr":
            self.tables[-1]["rows"].append([])
        if tag in ("th", "td"):
            self.tables[-1]["rows"][-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" in self._open:
            return
        self.words.append(data)
        if "caption" in self._open:
            self.tables[-1]["caption"] += data
        if "th" in self._open or "td" in self._open:
            self.tables[-1]["rows"][-1][-1] += data

    def table(self, start: str) -> dict[str, dict[str, str]]:
        """Return row head to column head to cell of the table whose caption starts so."""
        (found,) = [table for table in self.tables if table["caption"].startswith(start)]
        heads, *rows = found["rows"]
        return {row[0]: dict(zip(heads[1:], row[1:], strict=True)) for row in rows}


def figure(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


def scores(level="image", n=111, classes=("benign", "malignant"), **overall):
    known = {
        "balanced_accuracy": figure(0.8531, 0.8012, 0.8994),
        "sensitivity": figure(0.9, None, None),
        "mcc": figure(-0.12, -0.3, 0.1),
        "npv": figure(None, None, None),
        "iba": figure(0.61234, 0.5, 0.7),
    }
    return {
        "level": level,
        "n": n,
        "num_groups": 6,
        "overall": known | overall,
        "per_class": {name: {"sensitivity": figure(0.75, 0.5, 1.0)} for name in classes},
        "classes": list(classes),
        "confusion": [[20, 4], [7, 80]],
        "notes": ["positive class: malignant"],
    }


def png(side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), "teal").save(buffer, format="PNG")
    return buffer.getvalue()


def metrics(**changes):
    dataset = {
        "name": "breakhis",
        "drawn": False,
        "leaky": None,
        "split_level": "exam",
        "fingerprint": "abc123",
        "split_fingerprint": "def456",
        "notes": ["111 of 7,909 images"],
    }
    document = {
        "runs": ["runs/x"],
        "split": "test",
        "threshold": {"rule": "val-youden", "value": 0.5312},
        "tta": "none",
        "dataset": dataset | changes.pop("dataset", {}),
        "image": scores(),
        "patient": {
            "recognition_rate": figure(0.7766, 0.7, 0.8),
            "vote": scores("patient", 6),
            "mean": scores("patient", 6, balanced_accuracy=figure(0.99, 0.9, 1.0)),
        },
        "by_magnification": {"100X": scores(n=1111)},
        "by_subtype": {"adenosis": scores(n=33, balanced_accuracy=figure(None))},
        "folds": None,
        "spread": None,
    }
    return document | changes


@pytest.fixture
def folder(tmp_path):
    """A run folder with everything in it."""
    run = tmp_path / "dalaresnet50-100x"
    (run / "evaluate" / "test").mkdir(parents=True)
    card = {"title": "BreakHis", "drawn": False, "split": {"level": "exam", "leaky": None}, "licence": "CC BY 4.0"}
    card["counts"] = [{"side": "train", "class": "benign", "images": 312}]
    values = {
        "command": "train",
        "argv": ["/opt/venv/bin/breastcli", "train", "--data", "data/break his"],
        "versions": {"torch": "2.8.0"},
        "device": "cuda:0 (H200)",
        "seed": 0,
        "seconds": 3725.4,
        "status": "finished",
        "dataset": card,
    }
    write(run / "run.json", values)
    (run / "config.yaml").write_text("train:\n  lr: 0.0001\n")
    (run / "history.csv").write_text("epoch,lr,val_loss,val_roc_auc\n1,0.0001,0.69314718,nan\n2,0.0001,0.5,0.91\n")
    (run / "curves.png").write_bytes(png())
    write(run / "evaluate" / "test" / "metrics.json", metrics())
    for name in ("confusion", "roc", "patients"):
        (run / "evaluate" / "test" / f"{name}.png").write_bytes(png())
    return run


def write(path, values):
    path.write_text(json.dumps(values))


def read(run) -> Page:
    path = write_report(run)
    assert path == run / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_figures_at_both_levels_with_n_and_intervals(folder):
    page = read(folder)
    table = page.table("All figures")
    images, vote, mean = (
        f"{name} (n = {n} in 6 groups)"
        for name, n in (("Images", 111), ("Patients, by vote", 6), ("Patients, by mean", 6))
    )
    assert table["Balanced accuracy"] == {
        images: "0.853 (0.801–0.899)",
        vote: "0.853 (0.801–0.899)",
        mean: "0.990 (0.900–1.000)",
    }
    assert table["Sensitivity"][images] == "0.900 (–)"  # a figure without an interval
    assert table["NPV"][images] == "–"  # no figure at all
    assert table["MCC"][images] == "−0.120 (−0.300 to 0.100)"
    assert table[METRICS["iba"].title][images] == "0.612 (0.500–0.700)"
    assert list(table) == [METRICS[name].title for name in METRICS if METRICS[name].title in table]
    assert "Patient recognition rate 0.777 (0.700–0.800) n = 6 patients" in page.text


def test_classes_subsets_and_confusion_have_their_tables(folder):
    page = read(folder)
    assert page.table("By class")["malignant"] == {"n": "87", "Sensitivity": "0.750 (0.500–1.000)"}
    assert page.table("Confusion matrix, image level (n = 111")["benign"] == {"benign": "20", "malignant": "4"}
    assert page.table("By magnification")["100X"]["n"] == "1,111"
    assert page.table("By magnification")["100X"]["Balanced accuracy"] == "0.853 (0.801–0.899)"
    subtype = page.table("By subtype")["adenosis"]
    assert subtype["n"] == "33"
    assert "Balanced accuracy" not in subtype  # no subset has it
    assert not [table for table in page.tables if table["caption"].startswith("By fold")]


def test_folds_and_their_spread(folder):
    folds = [{"run": f"runs/{k}", "n": 10 + k, "overall": {"accuracy": 0.8 + k / 100}} for k in range(3)]
    spread = {"accuracy": {"mean": 0.81, "sd": 0.01}}
    write(folder / "evaluate" / "test" / "metrics.json", metrics(folds=folds, spread=spread))
    table = read(folder).table("By fold")
    assert table["runs/2"] == {"n": "12", "Accuracy": "0.820"}
    assert table["Mean ± standard deviation"] == {"n": "33", "Accuracy": "0.810 ± 0.010"}


def test_conventions_stand_beside_the_figures_once(folder):
    page = read(folder)
    assert page.text.count("positive class: malignant") == 1
    assert "111 of 7,909 images" in page.text
    assert METRICS["brier"].description in page.text
    assert "0.531 (rule: val-youden)" in page.text


def test_tables_have_captions_and_heads(folder):
    page = read(folder)
    assert page.tables
    assert all(table["caption"].strip() for table in page.tables)
    scopes = [attributes.get("scope") for tag, attributes in page.tags if tag == "th"]
    assert set(scopes) == {"row", "col"}


@pytest.mark.parametrize(
    ("dataset", "card", "expected"),
    [
        ({}, {}, False),
        ({"leaky": STAMP}, {}, True),
        ({"split_level": "image"}, {}, True),
        ({}, {"split": {"level": "image", "leaky": STAMP}}, True),
        ({"split_level": "patient"}, {"split": {"level": "patient", "leaky": None}}, False),
    ],
)
def test_leaky_banner(folder, dataset, card, expected):
    write(folder / "run.json", {"dataset": card})
    write(folder / "evaluate" / "test" / "metrics.json", metrics(dataset=dataset))
    page = read(folder)
    banners = [attributes for _, attributes in page.tags if "leaky" in (attributes.get("class") or "")]
    assert len(banners) == expected
    assert (STAMP in page.text) == expected


def test_every_table_of_a_leaky_evaluation_is_stamped(folder):
    write(folder / "evaluate" / "test" / "metrics.json", metrics(dataset={"leaky": STAMP}))
    page = read(folder)
    figures = [table["caption"] for table in page.tables if table["caption"].startswith(("All", "By", "Confusion"))]
    assert len(figures) == 5
    assert all(STAMP in caption for caption in figures)


@pytest.mark.parametrize("where", ["card", "metrics", "nowhere"])
def test_drawn_banner(folder, where):
    write(folder / "run.json", {"dataset": {"drawn": where == "card"}})
    write(folder / "evaluate" / "test" / "metrics.json", metrics(dataset={"drawn": where == "metrics"}))
    assert (DRAWN in read(folder).text) == (where != "nowhere")


def test_pictures_are_inside_the_page(folder):
    page = read(folder)
    sources = [(attributes["src"], attributes["alt"]) for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 4  # three of the five plots, and the curves
    for source, alt in sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data, validate=True) == png()
        assert len(alt) > 20
    assert len({alt for _, alt in sources}) == 4


def test_nothing_is_fetched_and_nothing_runs(folder):
    run = json.loads((folder / "run.json").read_text())
    write(folder / "run.json", run | {"dataset": {"homepage": "https://example.org/data"}})
    page = read(folder)
    assert "https://example.org/data" in page.text  # printed, but not linked
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "#").startswith(("data:", "#"))
    style = (folder / "report.html").read_text().partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style


def test_names_are_escaped(folder):
    evil = "<script>alert(1)</script>"
    run = json.loads((folder / "run.json").read_text())
    run |= {"argv": ["breastcli", "train", "--data", "<img src=x onerror=alert(2)>"], "dataset": {evil: evil}}
    write(folder / "run.json", run)
    (folder / "config.yaml").write_text(f"train:\n  arch: {evil}\n")
    classes = (evil, '"><b>malignant')
    document = metrics(image=scores(classes=classes), by_subtype={evil: scores()}, split="</section><i>")
    write(folder / "evaluate" / "test" / "metrics.json", document)
    renamed = folder.with_name("run <b>bold<&b>")
    folder.rename(renamed)
    page = read(renamed)
    tags = {tag for tag, _ in page.tags}
    assert not {"script", "i"} & tags
    assert [attributes for tag, attributes in page.tags if tag == "img" and attributes["src"] == "x"] == []
    assert [tag for tag, _ in page.tags].count("b") == 3  # only the page's own headline figures
    assert evil in page.table("By class")
    assert "run <b>bold<&b>" in page.text
    assert "<script>" not in (renamed / "report.html").read_text()


def test_the_contents_lead_somewhere_and_headings_follow_each_other(folder):
    page = read(folder)
    places = {attributes.get("id") for _, attributes in page.tags}
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert {"#evaluation-1", "#evaluation-1-figures", "#evaluation-1-plots", "#training", "#data", "#reproduce"} <= set(
        links
    )
    assert {link.removeprefix("#") for link in links} <= places
    levels = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(deeper <= before + 1 for before, deeper in pairwise(levels))
    (html,) = [attributes for tag, attributes in page.tags if tag == "html"]
    assert html["lang"] == "en"


def test_the_audit_as_train_kept_it(folder):
    run = json.loads((folder / "run.json").read_text())
    findings = {"identical images": "none", "colour of <b>": "+1.3 SD"}
    run["audit"] = {"verdict": "clean", "findings": findings}
    run["dataset"]["notes"] = ["111 of 7,909 images"]
    write(folder / "run.json", run)
    page = read(folder)
    assert page.table("Audit of the split, verdict: clean")["Identical images"]["Found"] == "none"
    assert page.text.count("111 of 7,909 images") == 1  # not among the notes on the figures too


def predictions(folder, names, patient="p<b>"):
    """Write wrong predictions of malignant images, each with a thumbnail."""
    lines = ["image_id,label,predicted,prob_benign,prob_malignant,patient,subtype"]
    lines += [f'"{name}",malignant,benign,0.9,0.1,{patient},' for name in names]
    lines += [f"right,malignant,malignant,0.2,0.8,{patient},"]
    (folder / "evaluate/test/predictions.csv").write_text("\n".join(lines) + "\n")
    (folder / "evaluate/test/errors").mkdir()
    for name in names:
        (folder / "evaluate/test/errors" / thumbnail_name(name)).write_bytes(png(24))


def test_the_worst_patients_and_the_confident_errors(folder):
    evil = "<script>alert(1)</script>"
    predictions(folder, [evil, "field 2"])
    page = read(folder)
    assert page.table("Patients, the worst 1 of 1")["p<b>"] == {
        "True class": "malignant",
        "Images right": "1 of 3",
        "Mean probability of the true class": "0.333",
    }
    errors = page.table("Confident errors, the 2 most probable of 2 among 3 images")
    assert errors[evil] == {
        "True class": "malignant",
        "Predicted": "benign",
        "Its probability": "0.900",
        "Patient": "p<b>",
    }
    alts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert f"{evil}: true class malignant, predicted benign (0.900): the image as the network saw it." in alts
    assert "script" not in {tag for tag, _ in page.tags}


@pytest.mark.parametrize(
    ("split", "epoch", "panel", "expected"),
    [
        ("test", 3, "panels/a.png", True),
        ("val", 3, "panels/a.png", False),  # an image of that name in another split
        ("test", 4, "panels/a.png", False),  # of an older checkpoint
        ("test", 3, "../../history.png", False),
    ],
)
def test_an_error_that_was_explained_shows_its_maps(folder, split, epoch, panel, expected):
    predictions(folder, ["field 1"])
    run = json.loads((folder / "run.json").read_text())
    write(folder / "run.json", run | {"started": "today"})
    (folder / "checkpoints").mkdir()
    write(folder / "checkpoints/best.json", {"epoch": epoch})
    (folder / "explain/gradcam/panels").mkdir(parents=True)
    (folder / "explain/gradcam/panels/a.png").write_bytes(png(30))
    (folder / "history.png").write_bytes(png(30))
    document = {"methods": {"gradcam": {"title": "Grad-CAM"}}, "split": split, "checkpoint": {"epoch": 3}}
    document["checkpoint"]["started"] = "today"
    document["images"] = [{"image_id": "field 1", "panel": panel}]
    write(folder / "explain/gradcam/explain.json", document)
    alts = [attributes["alt"] for tag, attributes in read(folder).tags if tag == "img"]
    title = "field 1: true class malignant, predicted benign (0.900)"
    assert (f"{title}: the image, and what explains it." in alts) == expected
    assert (f"{title}: the image as the network saw it." in alts) != expected


def test_command_can_be_pasted_into_a_shell(folder):
    assert "breastcli train --data 'data/break his'" in read(folder).text
    write(folder / "run.json", {"argv": ["/site-packages/breastcli/__main__.py", "train"]})
    assert "python -m breastcli train" in read(folder).text
    write(folder / "run.json", {"argv": ["train", "--lr", "0.1"]})
    assert "breastcli train --lr 0.1" in read(folder).text
    write(folder / "run.json", {"argv": ["/opt/ipykernel_launcher.py", "-f", "kernel.json"], "command": "train"})
    text = read(folder).text
    assert "breastcli train --config config.yaml" in text
    assert "ipykernel" not in text


def test_environment_history_and_card(folder):
    page = read(folder)
    for expected in ("1 h 2 min 5 s", "cuda:0 (H200)", "2.8.0", "CC BY 4.0", "lr: 0.0001"):
        assert expected in page.text
    history = page.table("Every epoch (n = 2)")
    assert history["1"] == {"Learning rate": "0.0001", "Validation loss": "0.6931", "Validation ROC AUC": "–"}
    assert page.table("Images on each side")["Train"] == {"Class": "benign", "Images": "312"}
    assert "not a medical device" in page.text


def test_an_almost_empty_run_folder(tmp_path):
    write(tmp_path / "run.json", {"status": "running"})
    page = read(tmp_path)
    assert "has not been evaluated yet" in page.text
    assert "This run is not finished (status: running)." in page.text
    assert not page.tables
    assert STAMP not in page.text
    (tmp_path / "run.json").unlink()
    assert "does not say how the run was started" in read(tmp_path).text


def test_a_finished_run_says_nothing_about_its_status_above(folder):
    assert "not finished" not in read(folder).text


def test_the_test_split_comes_before_the_others(folder):
    for split in ("val", "another"):
        (folder / "evaluate" / split).mkdir()
        write(folder / "evaluate" / split / "metrics.json", metrics(split=split))
    (folder / "evaluate" / "unfinished").mkdir()
    text = read(folder).text
    places = [text.rindex(f"Evaluation: {split}") for split in ("test", "val", "another")]
    assert places == sorted(places)
    assert "unfinished" not in text


def test_metrics_with_little_in_them(folder):
    write(folder / "evaluate" / "test" / "metrics.json", {"image": scores(), "patient": None})
    table = read(folder).table("All figures")
    assert list(table["Balanced accuracy"]) == ["Images (n = 111 in 6 groups)"]
    write(folder / "evaluate" / "test" / "metrics.json", {})
    assert "Evaluation: test" in read(folder).text


def test_writing_again_gives_the_same_bytes_and_leaves_nothing_else(folder):
    before = {path.name for path in folder.iterdir()}
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert {path.name for path in folder.iterdir()} == before | {"report.html"}


def test_a_damaged_file_is_named(folder):
    (folder / "evaluate" / "test" / "metrics.json").write_text('{"image": ')
    with pytest.raises(UserError, match=r"metrics\.json is not valid JSON"):
        write_report(folder)
    (folder / "run.json").write_text("[1]")
    with pytest.raises(UserError, match=r"run\.json does not hold a JSON object"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        write_report(tmp_path / "nowhere")
