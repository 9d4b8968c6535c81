"""Several runs on one page: what is marked as best, what is said to be incomparable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_report import STAMP, Page, figure, folder, metrics, scores, write  # noqa: F401 (a fixture)

from breastcli.config import ReportConfig
from breastcli.errors import UsageError, UserError
from breastcli.report import report
from breastcli.reporting.runs_page import best_of

APART = "These runs were not tested on the same images"


def known(low, high):
    return figure((low + high) / 2, low, high)


@pytest.mark.parametrize(
    ("figures", "lower", "expected"),
    [
        ([known(0.8, 0.9), known(0.5, 0.7)], False, 0),
        ([known(0.8, 0.9), known(0.5, 0.7)], True, 1),
        ([known(0.5, 0.7), known(0.1, 0.2), known(0.71, 0.9)], False, 2),
        ([known(0.8, 0.9), known(0.5, 0.8)], False, None),  # they touch
        ([known(0.8, 0.9), known(0.5, 0.95)], False, None),
        ([known(0.8, 0.9), figure(0.1)], False, None),  # who knows
        ([known(0.8, 0.9), None], False, None),
        ([known(0.8, 0.9)], False, None),
    ],
)
def test_the_best_is_apart_from_all_others(figures, lower, expected) -> None:
    assert best_of(figures, lower=lower) == expected


@pytest.fixture
def pair(folder: Path) -> tuple[Path, Path]:  # noqa: F811
    """Two runs on the same split, of which the second one is clearly better."""
    (folder / "config.yaml").write_text("train:\n  arch: resnet50\n  mag: 100x\n")
    run = json.loads((folder / "run.json").read_text())
    run["dataset"] |= {"name": "breakhis", "split_fingerprint": "s", "fingerprint": "f", "classes": ["b", "m"]}
    write(folder / "run.json", run | {"num_parameters": {"all": 1234567}})
    other = Path(shutil.copytree(folder, folder.with_name("other")))
    write(other / "evaluate/test/metrics.json", metrics(image=scores(balanced_accuracy=known(0.92, 0.96))))
    return folder, other


def page(*runs: Path, out: Path, split: str = "test") -> tuple[Page, dict]:
    made = report(ReportConfig(runs=tuple(map(str, runs)), out=str(out), split=split))
    return Page(made.out.read_text(encoding="utf-8")), json.loads((out / "report.json").read_text())


def bold(page: Page) -> int:
    return sum("tone-best" in (attributes.get("class") or "") for tag, attributes in page.tags if tag == "td")


def change(run: Path, **changes: object) -> None:
    info = json.loads((run / "run.json").read_text())
    write(run / "run.json", info | {"dataset": info["dataset"] | changes})


def test_runs_side_by_side_with_links_to_their_pages(pair, tmp_path: Path) -> None:
    found, document = page(*pair, out=tmp_path / "out")
    runs = found.table("Runs")
    assert runs["other"]["Network"] == "resnet50"
    assert runs["other"]["Parameters"] == "1,234,567"
    assert runs["other"]["Epochs"] == "2"
    assert runs["other"]["Magnification"] == "100X"
    assert runs["other"]["Synthetic images"] == "no"
    assert runs["other"]["Threshold"] == "0.531 (val-youden)"
    assert runs["other"]["Seconds"] == "3,725"
    images = found.table("Images: test split")
    assert images["other"]["Balanced accuracy"] == "0.940 (0.920–0.960)"
    assert images["dalaresnet50-100x"]["n"] == "111"
    patients = found.table("Patients")
    assert patients["other"]["Patient recognition rate"] == "0.777 (0.700–0.800)"
    links = {attributes["href"] for tag, attributes in found.tags if tag == "a"}
    assert {"../dalaresnet50-100x/report.html", "../other/report.html"} <= links
    assert all((tmp_path / "out" / link).is_file() for link in links if link.startswith("../"))
    assert bold(found) == 1  # the rest is equal
    assert APART not in found.text
    assert document["apart"] == {}
    assert len([tag for tag, _ in found.tags if tag == "img"]) == 1 + 2 * 2  # the overview; confusion and ROC of each


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"split_fingerprint": "t"}, "split: s (dalaresnet50-100x), t (other)"),
        ({"name": "bach"}, "data set: breakhis (dalaresnet50-100x), bach (other)"),
        ({"classes": ["b", "n", "m"]}, "classes: b, m (dalaresnet50-100x), b, n, m (other)"),
    ],
)
def test_other_images_are_said_loudly_and_nothing_is_best(pair, changes, what, tmp_path: Path) -> None:
    change(pair[1], **changes)
    found, _ = page(*pair, out=tmp_path / "out")
    assert APART in found.text
    assert what in found.text
    assert bold(found) == 0


def test_folds_and_magnifications_are_other_images_too(pair, tmp_path: Path) -> None:
    (pair[1] / "config.yaml").write_text("train:\n  arch: resnet50\n  mag: '200'\n  fold: 1\n")
    found, document = page(*pair, out=tmp_path / "out")
    assert document["apart"] == {
        "fold": {"dalaresnet50-100x": None, "other": 1},
        "magnification": {"dalaresnet50-100x": "100X", "other": "200X"},
    }
    assert "fold: – (dalaresnet50-100x), 1 (other)" in found.text


def test_a_magnification_that_prepare_chose_counts_like_one_that_train_chose(pair, tmp_path: Path) -> None:
    (pair[1] / "config.yaml").write_text("train:\n  arch: resnet50\n  mag: all\n")
    _, document = page(*pair, out=tmp_path / "out")
    assert document["apart"] == {"magnification": {"dalaresnet50-100x": "100X", "other": "all"}}
    change(pair[1], options={"mag": "100x"})
    found, document = page(*pair, out=tmp_path / "out2")
    assert document["apart"] == {}
    assert found.table("Runs")["other"]["Magnification"] == "100X"
    assert "at 100X, into these classes" in (pair[1] / "model_card.md").read_text()


def test_the_same_split_prepared_in_another_way_is_noted(pair, tmp_path: Path) -> None:
    change(pair[1], fingerprint="g")
    found, _ = page(*pair, out=tmp_path / "out")
    assert "prepared in several ways (stain, size): f (dalaresnet50-100x), g (other)" in found.text
    assert APART not in found.text
    assert bold(found) == 1


def test_leaky_runs_are_marked_and_never_best(pair, tmp_path: Path) -> None:
    document = json.loads((pair[1] / "evaluate/test/metrics.json").read_text())
    document["dataset"]["leaky"] = STAMP
    write(pair[1] / "evaluate/test/metrics.json", document)
    found, _ = page(*pair, out=tmp_path / "out")
    assert f"other: {STAMP}" in found.text
    assert found.table("Images: test split")["other"]["Leak"] == STAMP
    assert found.table("Images: test split")["dalaresnet50-100x"]["Leak"] == "–"
    assert bold(found) == 0


def test_a_run_without_an_evaluation_has_dashes(pair, tmp_path: Path) -> None:
    shutil.rmtree(pair[1] / "evaluate")
    found, _ = page(*pair, out=tmp_path / "out")
    assert "Not evaluated on this split: other" in found.text
    assert found.table("Images: test split")["other"]["Balanced accuracy"] == "–"
    assert APART not in found.text
    found, _ = page(*pair, out=tmp_path / "val", split="val")
    assert "Not evaluated on this split: dalaresnet50-100x, other" in found.text
    assert [table["caption"] for table in found.tables] == ["Runs"]


def test_names_are_escaped_and_two_of_a_name_are_told_apart(pair, tmp_path: Path) -> None:
    evil = "<script>alert(1)<&'\">"
    renamed = pair[1].with_name(evil)
    pair[1].rename(renamed)
    found, _ = page(pair[0], renamed, out=tmp_path / "out")
    assert not {"script", "i"} & {tag for tag, _ in found.tags}
    assert evil in found.table("Runs")
    links = [attributes["href"] for tag, attributes in found.tags if tag == "a"]
    assert "../%3Cscript%3Ealert%281%29%3C%26%27%22%3E/report.html" in links
    twin = Path(shutil.copytree(pair[0], tmp_path / "elsewhere" / pair[0].name))
    found, _ = page(pair[0], twin, out=tmp_path / "twins")
    assert list(found.table("Runs")) == [str(pair[0]), str(twin)]


def test_what_cannot_be_compared_is_refused(pair, tmp_path: Path) -> None:
    first, second = map(str, pair)
    out = str(tmp_path / "out")
    with pytest.raises(UsageError, match="needs a run folder"):
        report(ReportConfig())
    with pytest.raises(UsageError, match="given twice"):
        report(ReportConfig(runs=(first, first + "/"), out=out))
    with pytest.raises(UsageError, match="--out: the page of one run lies in its folder"):
        report(ReportConfig(runs=(first,), out=out))
    with pytest.raises(UserError, match="is not a run folder"):
        report(ReportConfig(runs=(first, str(tmp_path)), out=out))
    write(pair[1] / "run.json", {"command": "synthesize"})
    with pytest.raises(UserError, match="other is a GAN and has no figures to compare: give it alone"):
        report(ReportConfig(runs=(first, second), out=out))
    write(pair[1] / "run.json", {"command": "benchmark"})
    with pytest.raises(UserError, match="is not a run folder"):
        report(ReportConfig(runs=(second,)))
    assert not Path(out).exists()


def test_an_occupied_folder_is_refused_and_keeps_its_files(pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    page(*pair, out=out)
    (out / "mine.txt").write_text("mine")
    config = {"runs": tuple(map(str, pair)), "out": str(out)}
    with pytest.raises(UserError, match="is not empty: use --overwrite or another --out"):
        report(ReportConfig(**config))
    first = (out / "report.html").read_bytes()
    report(ReportConfig(**config, overwrite=True))
    assert (out / "report.html").read_bytes() == first
    assert (out / "mine.txt").read_text() == "mine"
