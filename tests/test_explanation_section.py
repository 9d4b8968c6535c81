"""The report's sections about saliency maps, from documents written by hand."""

from __future__ import annotations

import csv
import json
from copy import deepcopy
from pathlib import Path

import pytest
from test_report import DRAWN, STAMP, Page, figure, png, read

from breastcli.reporting import explanation_section
from breastcli.reporting.explanation_section import read_explanations
from breastcli.reporting.report import write_report

EVIL = "<script>alert(1)</script>"


def row(dice, baseline=False, **changes):
    """Return one method's localisation; ``dice`` is a figure, the other figures are fixed."""
    mean = {
        "iou": figure(0.3, 0.25, 0.35),
        "dice": dice,
        "precision": figure(0.41, None, None),
        "recall": figure(0.52, 0.4, 0.6),
        "average_precision": figure(0.33, 0.3, 0.4),
        "pointing_game": figure(None),
    }
    return {"baseline": baseline, "mean": mean | changes, "pooled": {}}


def explanation(**changes):
    document = {
        "name": "all",
        "methods": {
            "gradcam": {"title": "Grad-CAM", "source": "Selvaraju et al., ICCV 2017"},
            "dtgradcam": {"title": "DT Grad-CAM", "source": "the DALAResNet50 paper"},
        },
        "run": "runs/x",
        "split": "test",
        "n": 24,
        "target": "predicted",
        "layer": None,
        "options": {"noise": 0.1, "samples": 10, "top_k": None, "binarise": "otsu", "seed": 0},
        "dataset": {"name": "breakhis", "leaky": None, "drawn": False},
        "images": [image(k) for k in range(8)],
        "localisation": {
            "rule": "otsu",
            "n": 20,
            "missing": 0,
            "mismatched": 0,
            "empty": 0,
            "unreadable": 0,
            "thresholds": None,
            "methods": {
                "random": row(figure(0.2, 0.15, 0.25), baseline=True),
                "gradcam": row(figure(0.42, 0.38, 0.46)),
                "dtgradcam": row(figure(0.5, 0.45, 0.55)),
                "uniform": row(figure(0.3, 0.28, 0.32), baseline=True),
            },
            "differences": {"dtgradcam": {"gradcam": {"dice": figure(0.08, 0.01, 0.1)}}},
        },
        "faithfulness": {
            "methods": {
                "random": {"deletion_auc": figure(0.5, 0.4, 0.6), "insertion_auc": figure(0.5, 0.4, 0.6)},
                "gradcam": {"deletion_auc": figure(0.25, 0.2, 0.3), "insertion_auc": figure(0.75, 0.7, 0.8)},
            },
            "randomisation": {
                "gradcam": {"levels": levels(0.9, None, 0.12), "survives": False},
                "dtgradcam": {"levels": levels(0.95, 0.9, 0.876), "survives": True},
            },
        },
    }
    return document | changes


def levels(*correlations):
    names = ("head", "layer4", "conv1")
    return [{"layer": name, "correlation": value, "n": 24} for name, value in zip(names, correlations, strict=True)]


def image(number):
    return {
        "image_id": f"SOB_M_DC-{number}",
        "patient": "14-2985",
        "magnification": "100X",
        "label": "malignant",
        "predicted": "benign",
        "target": "benign",
        "probability": 0.9812,
        "panel": f"panels/{number}.png",
    }


def localised(**changes):
    document = explanation()
    document["localisation"] |= changes
    return document


def with_methods(**methods):
    document = explanation()
    document["localisation"]["methods"] |= methods
    return document


def write(run: Path, document, name="all") -> Path:
    folder = run / "explain" / name
    (folder / "panels").mkdir(parents=True, exist_ok=True)
    (folder / "explain.json").write_text(document if isinstance(document, str) else json.dumps(document))
    return folder


def page_of(run: Path, document) -> Page:
    write(run, document)
    return read(run)


def section_of(run: Path, document):
    write(run, document)
    (section,) = read_explanations(run)
    return section


def test_localisation_has_every_figure_and_the_baselines_last(tmp_path):
    table = page_of(tmp_path, explanation()).table("Localisation, mean over n = 20 images; binarised by otsu")
    assert list(table) == ["Grad-CAM", "DT Grad-CAM", "Random (baseline)", "Uniform (baseline)"]
    gradcam = table["Grad-CAM"]
    assert gradcam["IoU"] == "0.300 (0.250–0.350)"
    assert gradcam["Dice"] == "0.420 (0.380–0.460)"
    assert gradcam["Precision"] == "0.410 (–)"  # the interval is withheld, not invented
    assert gradcam["Recall"] == "0.520 (0.400–0.600)"
    assert gradcam["Average precision"] == "0.330 (0.300–0.400)"
    assert "Pointing game" not in gradcam  # nobody has it
    assert "Threshold" not in gradcam


def test_thresholds_have_their_column(tmp_path):
    table = page_of(tmp_path, localised(rule="val", thresholds={"gradcam": 0.31})).table("Localisation")
    assert table["Grad-CAM"]["Threshold"] == "0.310"
    assert table["DT Grad-CAM"]["Threshold"] == "–"


def test_the_papers_figures_at_the_magnification_of_the_images(tmp_path):
    table = page_of(tmp_path, explanation()).table("Localisation")
    assert table["Grad-CAM"]["IoU in the paper"] == "0.313"  # Table 14, 100X: .3132, .4704, .4758
    assert table["Grad-CAM"]["Dice in the paper"] == "0.470"
    assert table["Grad-CAM"]["Recall in the paper"] == "0.476"
    assert table["DT Grad-CAM"]["Dice in the paper"] == "0.564"
    assert table["Uniform (baseline)"]["Dice in the paper"] == "–"


@pytest.mark.parametrize(
    ("name", "magnifications", "expected", "note"),
    [
        ("breakhis", ["40X", "400X"], "0.394–0.399", "at 40X, 400X, the lowest and the highest"),
        ("breakhis", [None], "0.393–0.401", "at 40X, 100X, 200X, 400X"),
        ("tnbc_nuclei", ["100X"], "0.393–0.401", "at 40X, 100X, 200X, 400X"),
    ],
)
def test_the_papers_figures_over_several_magnifications(name, magnifications, expected, note, tmp_path):
    images = [image(k) | {"magnification": level} for k, level in enumerate(magnifications)]
    page = page_of(tmp_path, explanation(dataset={"name": name}, images=images))
    assert page.table("Localisation")["DT Grad-CAM"]["IoU in the paper"] == expected  # .3993, .4009, .3931, .3940
    assert note in page.text


def test_a_method_that_the_paper_lacks_gets_no_such_columns(tmp_path):
    document = explanation(methods={"layercam": {"title": "LayerCAM"}})
    document["localisation"]["methods"] = {"layercam": row(figure(0.5, 0.4, 0.6))}
    page = page_of(tmp_path, document)
    assert not [head for head in page.table("Localisation")["LayerCAM"] if "paper" in head]
    assert "Table 14" not in page.text


def test_packaged_figures_are_the_papers_own_rows():
    with explanation_section.REPORTED.open(newline="") as file:
        rows = [line for line in csv.DictReader(file) if (line["source"], line["table"]) == ("dalaresnet50-2024", "14")]
    assert len(rows) == 64  # four methods, four magnifications, four figures
    assert sum(len(values) for values in explanation_section._paper().values()) == 64


def test_faithfulness_and_randomisation_have_their_tables(tmp_path):
    page = page_of(tmp_path, explanation())
    table = page.table("Faithfulness, mean over n = 24 images")
    assert list(table) == ["Grad-CAM", "Random (baseline)"]
    assert table["Grad-CAM"] == {
        "Deletion AUC (lower is better)": "0.250 (0.200–0.300)",
        "Insertion AUC (higher is better)": "0.750 (0.700–0.800)",
    }
    assert page.table("Randomisation check") == {
        "Grad-CAM": {"head": "0.900", "layer4": "–", "conv1": "0.120"},
        "DT Grad-CAM": {"head": "0.950", "layer4": "0.900", "conv1": "0.876"},
    }


def test_maps_that_survive_are_named_with_their_correlation(tmp_path):
    warnings = section_of(tmp_path, explanation()).warnings
    assert len(warnings) == 1
    assert warnings[0].startswith("DT Grad-CAM fails the randomisation check")
    assert "rank correlation 0.876" in warnings[0]


@pytest.mark.parametrize(
    ("dice", "expected"),
    [
        (figure(0.42, 0.33, 0.5), None),  # the intervals are apart: uniform ends at 0.32
        (figure(0.42, 0.31, 0.5), "does not clearly beat the best baseline, uniform: Dice 0.420 (0.310–0.500)"),
        (figure(0.1, 0.05, 0.15), "does not beat the best baseline, uniform: Dice 0.100 (0.050–0.150)"),
        (figure(0.42, None, None), "may or may not beat the best baseline, uniform: Dice 0.420 (–)"),
        (figure(0.25, None, None), "does not beat the best baseline, uniform: Dice 0.250 (–)"),
        (figure(None), None),  # nothing to compare
    ],
)
def test_a_method_must_beat_the_best_baseline(dice, expected, tmp_path):
    document = with_methods(gradcam=row(dice))
    document["faithfulness"] = None
    warnings = section_of(tmp_path, document).warnings
    assert warnings == ([f"Grad-CAM {expected} against 0.300 (0.280–0.320)."] if expected else [])


@pytest.mark.parametrize(("low", "beaten"), [(0.01, False), (-0.01, True)])
def test_a_paired_difference_decides_where_there_is_one(low, beaten, tmp_path):
    document = with_methods(gradcam=row(figure(0.42, 0.31, 0.5)))
    document["localisation"]["differences"] = {"gradcam": {"uniform": {"dice": figure(0.12, low, 0.2)}}}
    warnings = [text for text in section_of(tmp_path, document).warnings if "baseline" in text]
    assert len(warnings) == beaten
    assert not beaten or "difference 0.120 (−0.010 to 0.200)" in warnings[0]


def test_images_without_a_usable_mask_are_counted(tmp_path):
    text = page_of(tmp_path, localised(missing=4, mismatched=["a", "b"], empty=0, unreadable=1)).text
    assert "leaves out: 4 without a mask, 2 with a mask of another size than the image, 1 with a mask that" in text
    assert "empty mask" not in text
    assert "leaves out" not in page_of(tmp_path, explanation()).text


def test_facts_say_what_was_explained(tmp_path):
    text = page_of(tmp_path, explanation()).text
    for expected in ("24 of the test split", "predicted", "noise 0.1, samples 10, binarise otsu, seed 0", "the last"):
        assert expected in text
    assert "Grad-CAM: Selvaraju et al., ICCV 2017" in text
    assert "None" not in text


def test_pictures_have_their_own_words(tmp_path):
    folder = write(tmp_path, explanation())
    for name in ("gallery.png", "comparison.png", *(f"panels/{k}.png" for k in range(1, 8))):
        (folder / name).write_bytes(png())
    page = read(tmp_path)
    alts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert len(alts) == len(set(alts)) == 2 + 6  # panel 0 is missing, panel 7 is one too many
    assert (
        "SOB_M_DC-1, true class malignant, predicted benign, explained benign (0.981), 100X, patient 14-2985" in alts[2]
    )
    assert "maps by Grad-CAM, DT Grad-CAM" in alts[2]
    assert "SOB_M_DC-6" in alts[-1]


@pytest.mark.parametrize("panel", ["../../secret.png", "panels/../../secret.png", "/etc/hostname", 3, None, "a\0b.png"])
def test_no_picture_comes_from_outside_the_folder(panel, tmp_path):
    (tmp_path / "explain").mkdir()
    (tmp_path / "explain" / "secret.png").write_bytes(png())
    (tmp_path / "secret.png").write_bytes(png())
    assert section_of(tmp_path, explanation(images=[image(0) | {"panel": panel}])).pictures == []


def test_leaky_and_drawn_reach_the_page(tmp_path):
    page = page_of(tmp_path, explanation(dataset={"name": "breakhis", "leaky": STAMP, "drawn": True}))
    assert DRAWN in page.text
    assert len([tag for tag, attributes in page.tags if "leaky" in (attributes.get("class") or "")]) == 1
    tables = [table["caption"] for table in page.tables]
    assert len(tables) == 4
    assert all(STAMP in caption for caption in tables)
    page = page_of(tmp_path, explanation())
    assert DRAWN not in page.text
    assert STAMP not in page.text


def test_everything_is_escaped(tmp_path):
    document = explanation(name=EVIL, run=EVIL, layer=EVIL, options={EVIL: EVIL}, methods={})
    document["methods"] = {EVIL: {"title": EVIL, "source": EVIL}}
    document["localisation"]["methods"] = {EVIL: row(figure(0.1, 0.05, 0.2)), "x": row(figure(0.3, 0.2, 0.4), True)}
    document["localisation"]["rule"] = document["faithfulness"]["randomisation"]["dtgradcam"]["levels"][0]["layer"] = (
        EVIL
    )
    document["faithfulness"]["randomisation"][EVIL] = {"levels": levels(0.9, 0.9, 0.9), "survives": True}
    document["images"] = [dict.fromkeys(image(0), EVIL) | {"panel": "panels/0.png"}]
    folder = write(tmp_path, document, name="<i>&")
    (folder / "panels" / "0.png").write_bytes(png())
    page = read(tmp_path)
    assert not {"script", "i"} & {tag for tag, _ in page.tags}
    assert "<script>" not in (tmp_path / "report.html").read_text()
    assert EVIL in page.table("Localisation")
    assert f"Explanations: {EVIL}" in page.text
    assert f"{EVIL} fails the randomisation check" in page.text


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "3", "null", '{"methods": 3}', '{"name": "x"}', "\ud800", "[" * 100_000, b"\xff\xfe{"]
)
def test_a_damaged_or_foreign_file_is_left_out_with_a_note(text, tmp_path):
    file = write(tmp_path, explanation(), "good").with_name("bad") / "explain.json"
    file.parent.mkdir()
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    bad, good = read_explanations(tmp_path)
    assert (bad.title, bad.tables, bad.pictures) == ("bad", [], [])
    assert bad.warnings == ["bad/explain.json is damaged, or was not written by breastcli explain: it is left out."]
    assert good.title == "all"
    assert "bad/explain.json is damaged" in read(tmp_path).text


def paths_of(values, path=()):
    yield path
    for key, value in (
        values.items() if isinstance(values, dict) else enumerate(values if isinstance(values, list) else ())
    ):
        yield from paths_of(value, (*path, key))


@pytest.mark.parametrize("junk", [None, 3, "x", [[]], {"a": 1}, float("nan")], ids=repr)
def test_no_part_of_the_wrong_kind_stops_the_report(junk, tmp_path):
    whole = explanation(images=[image(0)])
    for path in list(paths_of(whole))[1:]:
        document = deepcopy(whole)
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = junk
        section_of(tmp_path, document)
    assert write_report(tmp_path).is_file()


def test_folders_come_by_name_and_may_be_absent(tmp_path):
    (tmp_path / "explain" / "unfinished").mkdir(parents=True)
    assert read_explanations(tmp_path) == []
    assert "Explanations" not in read(tmp_path).text
    for name in ("scorecam", "all"):
        write(tmp_path, explanation(name=name), name)
    assert [section.title for section in read_explanations(tmp_path)] == ["all", "scorecam"]
    targets = {attributes["id"] for _, attributes in read(tmp_path).tags if attributes.get("id")}
    links = {attributes["href"][1:] for tag, attributes in read(tmp_path).tags if tag == "a"}
    assert {"explanation-1", "explanation-2"} <= links <= targets


def test_a_document_with_neither_masks_nor_faithfulness(tmp_path):
    section = section_of(tmp_path, explanation(localisation=None, faithfulness=None))
    assert (section.tables, section.warnings, section.notes) == ([], [], [])


def test_differences_are_those_of_dt_grad_cam(tmp_path):
    page = page_of(tmp_path, explanation())
    (table,) = [table for table in page.tables if "minus each other" in table["caption"]]
    assert table["caption"].startswith("DT Grad-CAM minus each other")
    assert table["rows"] == [["", "Dice"], ["Grad-CAM", "0.080 (0.010–0.100)"]]
