"""The plots and the contact sheet: what is in the files, not only that there are files."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from breastcli.records import Predictions, Scores
from breastcli.reporting import plots
from breastcli.reporting.contact_sheet import contact_sheet

PREDICTION_PLOTS = [plots.plot_roc, plots.plot_precision_recall, plots.plot_reliability, plots.plot_patients]
HISTORY = [
    {
        "epoch": epoch,
        "lr": 1e-4,
        "train_loss": 1 / epoch,
        "val_loss": 1.2 / epoch,
        "val_accuracy": 0.8,
        "val_balanced_accuracy": 0.7,
        "val_roc_auc": float("nan") if epoch == 1 else 0.9,
    }
    for epoch in range(1, 6)
]


def make_predictions(num_images: int = 40, num_classes: int = 2, num_patients: int = 5) -> Predictions:
    generator = np.random.default_rng(3)
    patient = np.arange(num_images) % num_patients
    labels = patient % num_classes
    scores = generator.normal(size=(num_images, num_classes))
    scores[np.arange(num_images), labels] += 1
    probs = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    return Predictions(
        image_ids=np.array([f"image{i}" for i in range(num_images)], dtype=object),
        classes=("benign", "malignant") if num_classes == 2 else tuple(f"class {k}" for k in range(num_classes)),
        probs=probs,
        predicted=probs.argmax(axis=1),
        labels=labels,
        columns={"patient": np.array([f"14-{p}" for p in patient], dtype=object)},
    )


def make_scores(confusion: list[list[int]], classes: tuple[str, ...] = ("benign", "malignant")) -> Scores:
    counts = np.array(confusion)
    return Scores("image", int(counts.sum()), 0, {}, {}, counts, classes)


@pytest.fixture
def drawn(monkeypatch):
    """Keep the figure that a plot writes, so that a test can read its words."""
    kept = []
    write = plots._write
    monkeypatch.setattr(plots, "_write", lambda figure, path, stamp: (kept.append(figure), write(figure, path, stamp)))
    return kept


def words_of(figure: Figure) -> str:
    found = [
        text.get_text() for axes in figure.axes for text in axes.findobj(lambda artist: hasattr(artist, "get_text"))
    ]
    found += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    if figure._suptitle:
        found.append(figure._suptitle.get_text())
    return "\n".join(found)


def assert_readable_png(path, least_width: int = 600):
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width >= least_width
        assert image.height >= 300
        assert "Software" not in image.info
        pixels = np.asarray(image.convert("RGB"))
    share_of_ink = (pixels != 255).any(axis=2).mean()
    assert 0.005 < share_of_ink < 0.995
    assert not [other.name for other in path.parent.iterdir() if "partial" in other.name]


@pytest.mark.parametrize("num_classes", [2, 3, 8])
@pytest.mark.parametrize("plot", PREDICTION_PLOTS)
def test_prediction_plots_write_readable_files(plot, num_classes, tmp_path, recwarn):
    plot(make_predictions(num_classes=num_classes, num_patients=16), tmp_path / "plot.png")
    assert_readable_png(tmp_path / "plot.png")
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize("plot", PREDICTION_PLOTS)
def test_same_predictions_give_the_same_bytes(plot, tmp_path):
    for name in ("a.png", "b.png"):
        plot(make_predictions(), tmp_path / name)
    plot(make_predictions(num_images=38), tmp_path / "other.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "other.png").read_bytes()


def test_reliability_before_and_after_stand_side_by_side(tmp_path, drawn):
    plain = make_predictions()
    calibrated = dataclasses.replace(plain, probs=0.5 * plain.probs + 0.25)
    plots.plot_reliability(calibrated, tmp_path / "plot.png", plain)
    assert_readable_png(tmp_path / "plot.png", least_width=1500)
    titles = [axes.get_title(loc="left") for axes in drawn[0].axes if axes.get_title(loc="left")]
    assert [title.split()[1] for title in titles] == ["before", "after"]
    labels = [text.get_text() for part in drawn[0].subfigs for text in part.legends[0].get_texts()]
    assert len([label for label in labels if "ECE" in label]) == 2


def test_a_users_matplotlib_settings_change_nothing(tmp_path):
    import matplotlib

    plots.plot_roc(make_predictions(), tmp_path / "a.png")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "savefig.dpi": 40}):
        plots.plot_roc(make_predictions(), tmp_path / "b.png")
        assert matplotlib.rcParams["font.size"] == 30
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("plot", PREDICTION_PLOTS)
def test_unknown_labels_are_explained(plot, tmp_path, drawn):
    known = make_predictions()
    unknown = Predictions(known.image_ids, known.classes, known.probs, known.predicted, None, known.columns)
    plot(unknown, tmp_path / "plot.png")
    assert "true classes are unknown" in words_of(drawn[0]).replace("\n", " ")
    assert_readable_png(tmp_path / "plot.png")


@pytest.mark.parametrize("plot", PREDICTION_PLOTS)
def test_no_predictions_are_explained(plot, tmp_path, drawn):
    plot(make_predictions().select(np.array([], dtype=int)), tmp_path / "plot.png")
    assert "no predictions" in words_of(drawn[0])


@pytest.mark.parametrize("plot", [plots.plot_roc, plots.plot_precision_recall])
def test_one_class_is_explained(plot, tmp_path, drawn):
    predictions = make_predictions()
    plot(predictions.select(predictions.labels == 1), tmp_path / "plot.png")
    assert "Every image is of one class" in words_of(drawn[0])


def test_roc_legend_carries_area_and_operating_point(tmp_path, drawn):
    predictions = Predictions(
        image_ids=np.array(list("abcd"), dtype=object),
        classes=("benign", "malignant"),
        probs=np.array([[0.9, 0.1], [0.6, 0.4], [0.65, 0.35], [0.2, 0.8]]),
        predicted=np.array([0, 0, 0, 1]),
        labels=np.array([0, 0, 1, 1]),
    )
    plots.plot_roc(predictions, tmp_path / "roc.png")
    words = words_of(drawn[0])
    assert "malignant: AUC 0.750 (n = 2)" in words  # three of the four pairs are in order
    assert "sensitivity 0.500, specificity 1.000" in words
    assert "n = 4 images" in words
    assert "chance" in words


def test_precision_recall_legend_carries_prevalence(tmp_path, drawn):
    predictions = make_predictions(num_classes=4, num_patients=8)
    plots.plot_precision_recall(predictions, tmp_path / "pr.png")
    words = words_of(drawn[0])
    assert all(f"class {k}: AP 0." in words for k in range(4))
    assert words.count("prevalence 0.250 (n = 10)") == 4


def test_a_class_without_images_has_no_curve(tmp_path, drawn):
    predictions = make_predictions(num_classes=3, num_patients=6)
    plots.plot_roc(predictions.select(predictions.labels != 2), tmp_path / "roc.png")
    words = words_of(drawn[0])
    assert "class 0: AUC" in words
    assert "class 2" not in words


def test_reliability_counts_every_image(tmp_path, drawn):
    plots.plot_reliability(make_predictions(num_images=57), tmp_path / "plot.png")
    heights = [bar.get_height() for bar in drawn[0].axes[1].patches]
    assert sum(heights) == 57
    assert len(heights) == 15


def test_patients_come_worst_first(tmp_path, drawn):
    predictions = make_predictions(num_images=30, num_patients=6)
    right = predictions.labels.copy()
    right[predictions.column("patient") == "14-4"] ^= 1
    right[np.flatnonzero(predictions.column("patient") == "14-1")[:2]] ^= 1
    changed = Predictions(
        predictions.image_ids, predictions.classes, predictions.probs, right, predictions.labels, predictions.columns
    )
    plots.plot_patients(changed, tmp_path / "plot.png")
    rows = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    assert rows[0] == "14-4 · benign · 0/5"
    assert rows[1] == "14-1 · malignant · 3/5"
    assert len(rows) == 6
    assert "n = 6 patients, 30 images" in words_of(drawn[0])


def test_a_patient_with_two_labels_has_two_rows(tmp_path, drawn):
    predictions = make_predictions(num_images=12, num_patients=2)
    predictions.columns["patient"][:] = "13412"
    plots.plot_patients(predictions, tmp_path / "plot.png")
    rows = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    assert sorted(row.rsplit(" · ", 1)[0] for row in rows) == ["13412 · benign", "13412 · malignant"]


def test_patients_without_names_are_explained(tmp_path, drawn):
    predictions = make_predictions()
    predictions.columns.clear()
    plots.plot_patients(predictions, tmp_path / "plot.png")
    assert "patient is known" in words_of(drawn[0]).replace("\n", " ")


def test_patients_plot_grows_and_stops_at_its_limit(tmp_path, drawn):
    heights = {}
    for num_patients in (6, 82, 100):
        path = tmp_path / f"{num_patients}.png"
        plots.plot_patients(make_predictions(num_images=300, num_patients=num_patients), path)
        heights[num_patients] = Image.open(path).height
    assert heights[82] > 4 * heights[6]
    assert len(drawn[2].axes[0].get_yticklabels()) == 82
    assert "n = 100 patients" in words_of(drawn[2])
    assert "the 82 worst of them are shown" in words_of(drawn[2])
    assert "worst of them" not in words_of(drawn[1])


def test_confusion_shows_counts_and_row_percentages(tmp_path, drawn):
    plots.plot_confusion(make_scores([[6, 2], [1, 31]]), tmp_path / "plot.png", title="Test split")
    words = words_of(drawn[0])
    for expected in ("6\n75.0 %", "2\n25.0 %", "1\n3.1 %", "31\n96.9 %", "benign\n(n = 8)", "malignant\n(n = 32)"):
        assert expected in words
    assert "Test split\nimage level (n = 40 images)" in words
    assert_readable_png(tmp_path / "plot.png")


def test_confusion_of_an_absent_class_has_no_percentage(tmp_path, drawn):
    plots.plot_confusion(make_scores([[4, 0], [0, 0]]), tmp_path / "plot.png")
    assert "0\n–" in words_of(drawn[0])


def test_confusion_of_nothing_is_explained(tmp_path, drawn):
    plots.plot_confusion(make_scores([[0, 0], [0, 0]]), tmp_path / "plot.png")
    assert "nothing to count" in words_of(drawn[0]).replace("\n", " ")


def test_class_names_are_text_and_not_mathematics(tmp_path, drawn):
    plots.plot_confusion(make_scores([[1, 0], [0, 1]], (r"$\broken{$", "50 %_$")), tmp_path / "plot.png")
    assert r"$\broken{$" in words_of(drawn[0])
    assert_readable_png(tmp_path / "plot.png")


def test_curves_mark_the_best_epoch_and_skip_what_is_missing(tmp_path, drawn):
    plots.plot_curves(HISTORY, tmp_path / "curves.png", best_epoch=4)
    assert_readable_png(tmp_path / "curves.png", least_width=1200)
    words = words_of(drawn[0])
    assert "best epoch: 4" in words
    assert "n = 5 epochs" in words
    assert "ROC AUC" in words
    without = [{name: value for name, value in row.items() if name != "val_roc_auc"} for row in HISTORY]
    plots.plot_curves(without, tmp_path / "curves.png")
    assert "ROC AUC" not in words_of(drawn[1])
    assert "best epoch" not in words_of(drawn[1])


def test_curves_of_no_epoch_are_explained(tmp_path, drawn):
    plots.plot_curves([], tmp_path / "curves.png")
    assert words_of(drawn[0]).replace("\n", " ").count("No epoch with such a figure is finished.") == 3


@pytest.mark.parametrize("plot", PREDICTION_PLOTS)
def test_a_stamp_is_printed_above_the_plot(plot, tmp_path, drawn):
    plot(make_predictions(), tmp_path / "plot.png", stamp="LEAKY: image-level split")
    plot(make_predictions(), tmp_path / "clean.png")
    assert "LEAKY: image-level split" in words_of(drawn[0])
    assert "LEAKY" not in words_of(drawn[1])


RED, LIME, BLUE = (250, 10, 20), (20, 240, 30), (30, 40, 230)


def tiles(count: int, colour: tuple[int, int, int], side: int = 32) -> np.ndarray:
    return np.full((count, side, side, 3), colour, dtype=np.uint8)


def test_contact_sheet_places_every_thumbnail(tmp_path):
    cells = {
        ("test", "benign"): tiles(3, RED),
        ("train", "benign"): tiles(5, LIME),
        ("train", "malignant"): tiles(1, BLUE),
        ("test", "malignant"): tiles(0, BLUE),
    }
    contact_sheet(cells, tmp_path / "sheet.png", title="Sample\n9 images", thumb_px=40)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    for colour, count in ((RED, 3), (LIME, 5), (BLUE, 1)):
        assert (pixels == colour).all(axis=2).sum() == count * 40 * 40
    tops = {colour: np.argwhere((pixels == colour).all(axis=2))[:, 0].min() for colour in (RED, LIME, BLUE)}
    assert tops[LIME] < tops[BLUE] < tops[RED]  # train comes before test, whatever the order of the cells
    below = pixels[tops[RED] + 50 :]
    assert (below < 128).all(axis=2).any()  # the empty row has its name and "none"


def test_contact_sheet_keeps_the_shape_of_an_oblong_image(tmp_path):
    oblong = np.full((1, 20, 40, 3), RED, dtype=np.uint8)
    contact_sheet({("train", "benign"): oblong}, tmp_path / "sheet.png", title="Sample", thumb_px=60)
    rows, columns = np.nonzero((np.asarray(Image.open(tmp_path / "sheet.png")) == RED).all(axis=2))
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (30, 60)


def test_contact_sheet_draws_a_missing_pair_and_a_caption(tmp_path):
    cells = {("train", "benign"): tiles(1, RED), ("val", "malignant"): tiles(1, LIME)}
    contact_sheet(cells, tmp_path / "plain.png", title="Sample", thumb_px=64)
    captions = {("val", "malignant"): "312 images, 9 exams of a hospital with a long name"}
    contact_sheet(cells, tmp_path / "captions.png", title="Sample", thumb_px=64, captions=captions)
    plain, captioned = Image.open(tmp_path / "plain.png"), Image.open(tmp_path / "captions.png")
    assert plain.height > 4 * 64  # two splits by two classes, two of the pairs missing
    assert captioned.width > plain.width  # room is made for the caption
    assert captioned.height == plain.height


def test_contact_sheet_of_nothing_is_a_title(tmp_path):
    contact_sheet({}, tmp_path / "sheet.png", title="Sample")
    assert np.asarray(Image.open(tmp_path / "sheet.png")).min() < 128


def test_contact_sheet_gives_the_same_bytes(tmp_path):
    cells = {("train", "benign"): tiles(2, RED)}
    for name in ("a.png", "b.png"):
        contact_sheet(cells, tmp_path / name, title="Sample")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
