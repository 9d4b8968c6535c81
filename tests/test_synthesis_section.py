"""The report's section about generated images, from documents written by hand."""

from __future__ import annotations

import base64
import json
from copy import deepcopy
from pathlib import Path

import pytest
from test_report import DRAWN, STAMP, Page, png, read

from breastcli.reporting import synthesis_section
from breastcli.reporting.synthesis_section import read_synthesis

EVIL = "<script>alert(1)</script>"
HISTORY = "kimg,critic_loss,diversity\n6.0,-1.23456,nan\n12.0,-2.5,0.61\n"


def spread(mean, sd=None):
    return {"mean": mean, "sd": sd}


def assessment(**changes):
    document = {
        "generated": {"source": "runs/cwgan-all", "n": 300, "kimg": 120.0, "truncation": 1.0, "size_px": 64},
        "features": {"name": "runs/resnet-all", "kind": "run", "dimensions": 512},
        "dataset": {
            "name": "breakhis",
            "fingerprint": "abc123",
            "split_fingerprint": "def456",
            "fold": None,
            "leaky": None,
            "drawn": False,
            "split": "val",
        },
        "n_per_draw": 60,
        "draws": 20,
        "kid_subset": 50,
        "comparisons": [
            comparison("generated / training", "generated", spread(31.234, 0.871), spread(0.02149, 0.0031)),
            comparison("generated / held-out", "generated", spread(1040.5, None), spread(None, None)),
            comparison("training / training", "real", spread(9.0, 0.5), spread(-0.00012, 0.0004)),
        ],
        "coverage": {
            "training": overlap(0.7, 0.4, 1.25, 0.6, 1300),
            "held_out": overlap(0.5, None, 0.8, 0.55, 300),
            "baseline": overlap(0.9, 0.9, 1.0, 0.9, 300),
        },
        "classes": [class_row("benign", 10.126, 12.0, 0.9333), class_row("malignant", 3.0, None, None)],
        "neighbours": {
            "threshold": 2.1,
            "num_below": 3,
            "n": 300,
            "expected_share": 0.012,
            "copies": False,
            "closest": [neighbour(k) for k in range(12)],
        },
        "collapse": None,
        "notes": ["60 of 300 images are drawn each time"],
    }
    return deepcopy(document) | changes


def comparison(name, kind, fid, kid):
    return {"name": name, "kind": kind, "fid": fid, "kid": kid}


def overlap(precision, recall, density, coverage, n):
    names = ("precision", "recall", "density", "coverage")
    return {
        name: spread(value, 0.05) for name, value in zip(names, (precision, recall, density, coverage), strict=True)
    } | {"n": n}


def class_row(name, diversity, real, agreement):
    kid = spread(0.031, 0.002)
    share = agreement and {"value": agreement, "low": agreement - 0.1, "high": agreement + 0.05}
    figures = {"diversity": diversity, "real_diversity": real, "kid": kid, "agreement": share}
    return {"class": name, "n": 150, **figures}


def neighbour(number):
    return {
        "image_id": f"synthetic-benign-{number:05d}",
        "class": "benign",
        "training_id": f"SOB_B_A-{number}",
        "distance": 1.9 + number / 10,
    }


def with_neighbours(**changes):
    document = assessment()
    document["neighbours"] |= changes
    return document


def with_dataset(**changes):
    document = assessment()
    document["dataset"] |= changes
    return document


def write(run: Path, document) -> Path:
    (run / "assess").mkdir(parents=True, exist_ok=True)
    file = run / "assess" / "assessment.json"
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    return file


def page_of(run: Path, document) -> Page:
    write(run, document)
    return read(run)


def part_of(run: Path, document):
    write(run, document)
    return read_synthesis(run)


def test_fid_and_kid_have_their_decimals_and_spread(tmp_path):
    page = page_of(tmp_path, assessment())
    table = page.table("FID and KID, mean ± standard deviation over 20 draws of 60 images from each side")
    assert table == {
        "generated / training": {"FID": "31.23 ± 0.87", "KID": "0.0215 ± 0.0031"},
        "generated / held-out": {"FID": "1040.50 ± –", "KID": "–"},
        "training / training (real images)": {"FID": "9.00 ± 0.50", "KID": "−0.0001 ± 0.0004"},
    }
    assert "(KID: subsets of 50)" in page.text


def test_overlap_with_real_images(tmp_path):
    table = page_of(tmp_path, assessment()).table("How generated and real images overlap")
    assert table["Training images, by generated ones"] == {
        "n": "1,300",
        "Precision": "0.700 ± 0.050",
        "Recall": "0.400 ± 0.050",
        "Density": "1.250 ± 0.050",
        "Coverage": "0.600 ± 0.050",
    }
    assert table["Held-out images, by generated ones"]["Recall"] == "–"
    assert table["Held-out images, by training ones (real)"]["Coverage"] == "0.900 ± 0.050"


def test_classes_with_their_share_of_real_diversity(tmp_path):
    table = page_of(tmp_path, assessment()).table("By class")
    assert table["benign"] == {
        "n": "150",
        "Diversity": "10.13",
        "Diversity of real images": "12.00",
        "Share": "0.84",  # 10.126 / 12
        "KID to training images": "0.0310 ± 0.0020",
        "Recognised": "0.933 (0.833–0.983)",
    }
    assert table["malignant"]["Share"] == table["malignant"]["Recognised"] == "–"


def test_features_that_know_no_classes_have_no_such_column(tmp_path):
    rows = [class_row("benign", 1.0, 2.0, None), class_row("malignant", 0.0, 0.0, None)]
    page = page_of(tmp_path, assessment(classes=rows))
    assert "Recognised" not in page.table("By class")["benign"]
    assert page.table("By class")["malignant"]["Share"] == "–"
    assert "recognised" not in page.text


def test_neighbours_are_counted_and_the_closest_are_named(tmp_path):
    page = page_of(tmp_path, assessment())
    sentence = "3 of 300 images (1.0 %) are nearer to a training image than 2.100; 1.2 % would be expected without"
    assert sentence in page.text
    assert "may be copies" not in page.text
    table = page.table("Nearest neighbours, the closest 10")
    assert list(table) == [f"synthetic-benign-{k:05d}" for k in range(10)]
    assert table["synthetic-benign-00001"] == {
        "Class": "benign",
        "Nearest training image": "SOB_B_A-1",
        "Distance": "2.000",
    }


def test_facts_say_what_was_assessed(tmp_path):
    facts = part_of(tmp_path, assessment()).facts
    assert facts["Images"] == "300 of runs/cwgan-all"
    assert facts["Trained for"] == "120 thousand images"
    assert facts["Features"] == "runs/resnet-all, 512 dimensions"
    assert facts["Size"] == "64 × 64 pixels"
    assert facts["Truncation"] == "1"
    assert facts["Split fingerprint"] == "def456"
    assert "Fold" not in facts
    assert part_of(tmp_path, with_dataset(fold=0)).facts["Fold"] == "0"


def test_copies_are_warned_of(tmp_path):
    page = page_of(tmp_path, with_neighbours(copies=True, num_below=30))
    assert "Before you use these images" in page.text
    assert "may be copies of training images: 30 of 300 images (10.0 %)" in page.text
    banners = [attributes for _, attributes in page.tags if attributes.get("class") == "banner"]
    assert len(banners) == 1
    page = page_of(tmp_path, with_neighbours(copies=True, num_below=None))
    assert "their number is not known" in page.text


def test_a_collapse_is_warned_of(tmp_path):
    part = part_of(tmp_path, assessment(collapse="diversity fell to 0.08 at 40 kimg"))
    assert part.warnings == ["The training collapsed: diversity fell to 0.08 at 40 kimg"]
    assert "The training collapsed: diversity fell to 0.08" in read(tmp_path).text
    assert part_of(tmp_path, assessment()).warnings == []


@pytest.mark.parametrize(("leaky", "drawn"), [(STAMP, False), (None, True), (None, False)])
def test_stamps(leaky, drawn, tmp_path):
    page = page_of(tmp_path, with_dataset(leaky=leaky, drawn=drawn))
    assert (DRAWN in page.text) == drawn
    assert len([1 for _, attributes in page.tags if "leaky" in (attributes.get("class") or "")]) == bool(leaky)
    assert all((STAMP in table["caption"]) == bool(leaky) for table in page.tables)
    assert len(page.tables) == 4


def test_the_papers_figures_are_a_note_and_not_a_column(tmp_path):
    page = page_of(tmp_path, assessment())
    assert (
        "FID 16.11 and KID 0.0030 (gamma 1.0, Table 8), and FID 15.95 and KID 0.0039 (batch 32, Table 9)" in page.text
    )
    assert "not comparable: other features, other n" in page.text
    assert not [head for table in page.tables for row in table["rows"] for head in row if "15.95" in head]


@pytest.mark.parametrize("dataset", [{"name": "bach"}, {"drawn": True}])
def test_the_papers_figures_are_of_its_own_data_set_only(dataset, tmp_path):
    assert "Deebani" not in page_of(tmp_path, with_dataset(**dataset)).text


def test_the_papers_tables_have_the_lowest_fid_of_each():
    assert set(synthesis_section._paper()) == {"8", "9"}
    assert synthesis_section._paper()["9"] == ("batch 32", {"fid": 15.9542, "kid": 0.0039})


def test_notes_of_the_document_come_first_and_once(tmp_path):
    own = "60 of 300 images are drawn each time"
    part = part_of(tmp_path, assessment(notes=[own, own, synthesis_section.ABOUT_CLASSES]))
    assert part.notes[0] == own
    assert len(part.notes) == len(set(part.notes))
    part = part_of(tmp_path, assessment(classes=[], coverage=None))
    assert synthesis_section.ABOUT_CLASSES not in part.notes
    assert synthesis_section.ABOUT_COVERAGE not in part.notes


def test_pictures_are_the_last_grid_and_those_of_the_assessment(tmp_path):
    write(tmp_path, assessment())
    (tmp_path / "samples").mkdir()
    for side, name in enumerate(("000006.png", "000012.png", "000120.png", "real.png"), start=1):
        (tmp_path / "samples" / name).write_bytes(png(side))
    for name in ("samples.png", "neighbours.png", "distances.png"):
        (tmp_path / "assess" / name).write_bytes(png())
    sources = [attributes["src"] for tag, attributes in read(tmp_path).tags if tag == "img"]
    assert [base64.b64decode(source.partition(",")[2]) for source in sources] == [png(3)] + [png()] * 3
    assert "training.gif" not in read(tmp_path).text
    (tmp_path / "training.gif").write_bytes(b"GIF89a")
    assert "training.gif in the run folder" in read(tmp_path).text


def test_a_run_that_was_not_assessed_says_so(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "000006.png").write_bytes(png())
    page = read(tmp_path)
    assert "not been assessed yet: breastcli synthesize assess" in page.text
    assert "breastcli evaluate" not in page.text
    assert not page.tables
    assert "not been assessed yet" not in page_of(tmp_path, assessment()).text


def test_other_folders_have_no_such_section(tmp_path):
    assert read_synthesis(tmp_path) is None
    (tmp_path / "evaluate").mkdir()
    assert read_synthesis(tmp_path) is None
    page = read(tmp_path)
    assert "Generated images" not in page.text
    assert "has not been evaluated yet" in page.text


def test_training_of_a_gan_has_its_history_and_curves(tmp_path):
    write(tmp_path, assessment())
    (tmp_path / "history.csv").write_text(HISTORY)
    (tmp_path / "curves.png").write_bytes(png())
    page = read(tmp_path)
    assert page.table("Every line of the history (n = 2)") == {
        "6.0": {"Critic loss": "-1.235", "Diversity": "–"},
        "12.0": {"Critic loss": "-2.5", "Diversity": "0.61"},
    }
    assert "Every epoch" not in page.text
    (alt,) = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert "critic's gap" in alt
    (tmp_path / "history.csv").write_text("kimg,critic_loss\n")
    assert "Every line" not in read(tmp_path).text


def test_names_are_escaped(tmp_path):
    document = with_neighbours(closest=[neighbour(0) | {"image_id": EVIL, "training_id": '"><b>x'}], copies=True)
    document["comparisons"][0]["name"] = document["classes"][0]["class"] = EVIL
    document |= {"collapse": EVIL, "notes": [EVIL], "coverage": {EVIL: {"precision": 0.5}}}
    document["generated"]["source"] = document["features"]["name"] = document["dataset"]["split"] = EVIL
    page = page_of(tmp_path, document)
    assert not {"script", "b"} & {tag for tag, _ in page.tags}
    assert EVIL in page.table("By class")
    assert "<script>" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("document", ["", "{", "[]", "null", "{}", '{"comparisons": {}}', '{"comparisons": [1]}'])
def test_a_damaged_assessment_is_left_out_and_named(document, tmp_path):
    part = part_of(tmp_path, document)
    assert len(part.warnings) == 1
    assert "assessment.json is damaged" in part.warnings[0]
    assert not part.tables
    page = read(tmp_path)
    assert "assessment.json is damaged" in page.text
    assert "not been assessed yet" not in page.text


@pytest.mark.parametrize("wrong", [None, 3, "text", [], {}, [None, 3], {"n": "many"}])
def test_whatever_is_not_as_expected_counts_as_absent(wrong, tmp_path):
    for key in assessment():
        if key != "comparisons":
            assert part_of(tmp_path, assessment(**{key: wrong})).tables
    read(tmp_path)
    rows = [comparison("x", wrong, wrong, wrong)]
    part = part_of(tmp_path, assessment(comparisons=rows, classes=[{"class": wrong, "kid": wrong}]))
    assert [cell.text for cell in part.tables[0].rows[0][1]] == ["–", "–"]
