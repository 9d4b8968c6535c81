"""The model card says what the run's files say, and nothing in a file's text becomes markup."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_report import folder, metrics, scores, write  # noqa: F401 (a fixture)

from breastcli.config import EvaluateConfig
from breastcli.evaluate import evaluate
from breastcli.reporting.model_card import escape
from breastcli.reporting.report import write_report

EVIL = "<script>alert(1)</script>[x](http://a) | `b` *c* # _d_ ![e](f) mail@host www.g"


def card(run: Path) -> str:
    write_report(run)
    return (run / "model_card.md").read_text(encoding="utf-8")


def test_a_real_run_has_a_card_from_training_on(own_run: Path) -> None:
    first = (own_run / "model_card.md").read_text()
    assert "Not evaluated yet." in first
    assert "Not tested on any held-out image." in first
    config = EvaluateConfig(runs=(str(own_run),), resamples=100, device="cpu", overwrite=True, calibrate=True)
    document = evaluate(config).document
    text = (own_run / "model_card.md").read_text()
    accuracy = document["image"]["overall"]["accuracy"]
    assert f"| Accuracy | {accuracy['value']:.3f} " in text
    assert f"Images (n = {document['image']['n']} in {document['image']['num_groups']} groups)" in text
    assert f"n = {document['patient']['vote']['n']} patients" in text
    temperature = document["calibration"]["temperatures"][0]
    assert f"Temperature: {temperature:.3f}, fitted on validation images" in text
    info = json.loads((own_run / "run.json").read_text())
    assert f"- Parameters: {info['num_parameters']['all']:,}" in text
    assert "Drawn by a program, not real tissue" in text
    assert "| batch\\_size | 16 |" in text
    assert "attention\\_stage" not in text  # says nothing of this network
    assert "- Audit: clean" in text
    assert "breastcli evaluate" in text


def test_headings_are_in_order_and_the_warning_is_there(folder) -> None:  # noqa: F811
    (folder / "config.yaml").write_text("train:\n  arch: resnet50\n  mag: 100x\n")
    text = card(folder)
    assert text.startswith("# Model card: dalaresnet50-100x\n")
    assert "not a medical device" in text
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Intended use",
        "## Out of scope",
        "## Training data",
        "## Network and training",
        "## Figures",
        "## Calibration",
        "## Limits",
        "## Environment",
        "## Licence and citation",
    ]
    assert "- Images: CC BY 4.0" in text
    assert "- Network: resnet50" in text
    assert "rest on 6 groups (examinations, patients or images), fewer than 10" in text
    assert "Leaks: none found" in text
    assert "LEAKY" not in text


def test_a_leak_and_synthetic_images_stand_at_the_top(folder) -> None:  # noqa: F811
    (folder / "config.yaml").write_text("train:\n  arch: resnet50\n")
    dataset = {"leaky": "LEAKY: image-level split", "synthetic": True}
    write(folder / "evaluate/test/metrics.json", metrics(dataset=dataset, patient=None))
    text = card(folder)
    top, _, rest = text.partition("## Intended use")
    assert "> **LEAKY: image-level split**" in top
    assert "> **Trained with synthetic images**" in top
    assert "the figures can be higher than they would be for new patients" in rest
    assert "No figures count patients on the test split" in rest


def test_text_from_files_is_no_markup(folder) -> None:  # noqa: F811
    run = json.loads((folder / "run.json").read_text())
    run["dataset"] |= {"title": EVIL, "citation": EVIL, "classes": [EVIL, "b"], "notes": [EVIL]}
    run["argv"] = ["breastcli", "train", "--data", "```\n# Heading <b>"]
    write(folder / "run.json", run)
    (folder / "config.yaml").write_text(f"train:\n  arch: {json.dumps(EVIL)}\n")
    write(folder / "evaluate/test/metrics.json", metrics(image=scores(classes=(EVIL, "b"))))
    text = card(folder)
    prose, fence, block = text.partition("````console\n")
    assert fence, "the fence is longer than any in the commands"
    prose += block.rpartition("````")[2]
    assert "<script" not in prose
    assert "<b>" not in prose
    assert not re.search(r"(?<!\\)\[x", prose)
    assert not re.search(r"(?<!\\)[`*_]b[`*_]", prose.replace("\\_", ""))
    assert "http://" not in prose
    assert "mail@host" not in prose
    assert "alert(1)" in prose  # shown as text
    for line in prose.splitlines():
        if line.startswith("| ") and "alert" in line:
            assert len(re.findall(r"(?<!\\)\|", line)) == len(re.findall(r"(?<!\\)\|", prose_head(prose, line)))


def prose_head(text: str, line: str) -> str:
    """Return the head line of the table that a line stands in."""
    before = text[: text.index(line)].splitlines()
    return before[max(k for k, one in enumerate(before) if one.startswith("|---")) - 1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb\t c", "a b c"),
        ("<b>&amp;", "&lt;b&gt;&amp;amp;"),
        ("a|b_c", "a\\|b\\_c"),
        ("https://a www.b", "https&#58;//a www&#46;b"),
        (0.5, "0.5"),
    ],
)
def test_escaping(text: object, expected: str) -> None:
    assert escape(text) == expected


def test_a_generator_has_no_model_card(tmp_path: Path) -> None:
    write(tmp_path / "run.json", {"command": "synthesize"})
    (tmp_path / "config.yaml").write_text("synthesize:\n  size: 64\n")
    write_report(tmp_path)
    assert not (tmp_path / "model_card.md").exists()
