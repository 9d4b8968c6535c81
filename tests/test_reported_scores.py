"""The papers' test figures beside ours: only those of the same images and the same definition."""

from __future__ import annotations

from test_report import figure, metrics, scores

from breastcli.reporting.reported_scores import paper_notes, paper_table

NOBODY = ["DALAResNet50 paper (2024): dalaresnet50", "Wang et al. (2024): densenet_se_two_stage"]


def document(levels=("200X",), **changes):
    overall = {"accuracy": figure(0.8, 0.7, 0.9), "gmean": figure(0.7, 0.6, 0.8), "brier": figure(0.1, 0.0, 0.2)}
    found = {level: scores(accuracy=figure(0.5 + place / 10)) for place, level in enumerate(levels)}
    return metrics(image=scores(**overall), by_magnification=found, **changes)


def cells(table):
    heads = table.columns[1:]
    return {head: dict(zip(heads, [cell.text for cell in row], strict=True)) for head, row in table.rows}


def test_one_magnification_is_set_beside_the_same_one() -> None:
    table = paper_table(document(), "resnet50")
    found = cells(table)
    assert found["Accuracy"] == {
        "This evaluation": "0.800",
        "DALAResNet50 paper (2024): resnet50": "0.960",
        NOBODY[0]: "0.979",
        NOBODY[1]: "0.797",
    }
    assert found["G-mean"][NOBODY[0]] == "0.980"
    assert found["Patient recognition rate"][NOBODY[1]] == "0.812"
    assert found["Sensitivity"][NOBODY[0]] == "0.978"
    assert "Brier score" not in found  # no paper prints it
    assert "which leaks" in table.caption


def test_a_network_that_no_paper_has_gets_the_proposed_ones() -> None:
    assert paper_table(document(), "timm/resnet18").columns[2:] == NOBODY
    assert paper_table(document(), None).columns[2:] == NOBODY


def test_all_magnifications_are_compared_one_by_one_and_together() -> None:
    found = cells(paper_table(document(("40X", "100X")), "multiscale"))
    together = "Deebani et al. (2025): multiscale+tradaug+cwgan"
    assert found["Accuracy"][together] == "0.996"
    assert found["Accuracy"][NOBODY[0]] == "–"
    assert found["Accuracy, 100X"]["This evaluation"] == "0.600"
    assert found["Accuracy, 100X"][NOBODY[1]] == "0.792"
    assert found["Accuracy, 100X"][together] == "–"


def test_other_data_sets_and_tasks_have_no_such_table() -> None:
    assert paper_table(document(dataset={"name": "sample", "drawn": True}), "resnet50") is None
    assert paper_table(document(dataset={"drawn": True}), "resnet50") is None
    subtypes = metrics(image=scores(classes=tuple("abcdefgh")))
    assert paper_table(subtypes, "resnet50") is None
    assert paper_table({}, None) is None


def test_notes_name_the_tables_and_what_speaks_against_them() -> None:
    notes = paper_notes(paper_table(document(), "vit"))
    assert "DALAResNet50 paper (2024): Tables 7, 8, 11; Wang et al. (2024): Table 3" in notes[0]
    assert "divide by image, which leaks" in notes[0]
    assert "nearly coincide" in notes[1]
