"""Panels, galleries and comparisons of saliency maps: what is drawn, and that nothing runs over."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from breastcli.reporting import explanation_plots
from breastcli.reporting.contact_sheet import BLUE
from breastcli.reporting.explanation_plots import (
    HEAT,
    MOST_OPAQUE,
    Overlay,
    blend,
    plot_comparison,
    plot_gallery,
    plot_panel,
)

pytestmark = pytest.mark.filterwarnings("error")
SIDE = 64
STAMP = "LEAKY: image-level split"
CYAN = tuple(round(255 * part) for part in to_rgb(explanation_plots.TRUTH[0]))


def disc(row: int, column: int, radius: int) -> np.ndarray:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


IMAGE = np.full((SIDE, SIDE, 3), (200, 150, 190), np.uint8)
LEFT, RIGHT = disc(32, 16, 9), disc(32, 48, 9)
SALIENCY = (LEFT + 0.8 * RIGHT).astype(np.float32)
PLAIN = Overlay("Grad-CAM", SALIENCY, None)
MARKED = Overlay("Grad-CAM", SALIENCY, LEFT)
INSIDE = Overlay("DT Grad-CAM", SALIENCY, LEFT, inside_mask=True)


@pytest.fixture
def drawn(monkeypatch):
    """Keep the figures that are written."""
    kept = []
    write = explanation_plots._write
    keep = lambda figure, path, stamp: (kept.append(figure), write(figure, path, stamp))  # noqa: E731
    monkeypatch.setattr(explanation_plots, "_write", keep)
    return kept


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def close_to(path: Path, colour: tuple[int, ...]) -> int:
    """Return the number of pixels of nearly that colour."""
    return int((np.abs(pixels(path) - colour).max(axis=2) <= 40).sum())


def at(figure: Figure, path: Path, tile: int, row: int, column: int) -> np.ndarray:
    """Return the colour of the PNG where a tile shows an image's pixel."""
    x, y = figure.axes[tile].transData.transform((column, row))
    shown = pixels(path)
    return shown[shown.shape[0] - 1 - round(y), round(x)]


def words_of(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def assert_all_inside(figure: Figure) -> None:
    """Fail where a text leaves the figure, or two of its texts overlap."""
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.texts]
    for box in boxes:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.width
        assert box.y1 <= figure.bbox.height
    for number, box in enumerate(boxes):
        for other in boxes[number + 1 :]:
            wide, high = min(box.x1, other.x1) - max(box.x0, other.x0), min(box.y1, other.y1) - max(box.y0, other.y0)
            assert wide <= 1 or high <= 2


def panel(path: Path, overlays, truth=None, caption="an image", stamp=None) -> Path:
    plot_panel(path, IMAGE, overlays, truth, caption, stamp=stamp)
    return path


def test_blend_by_hand():
    grey = 0.55 * (0.299 * 200 + 0.587 * 150 + 0.114 * 190)
    blended = blend(IMAGE[:1, :3], np.array([[0, 1, np.nan]], np.float32))
    strongest = (1 - MOST_OPAQUE) * grey + MOST_OPAQUE * 255 * np.array(HEAT(1.0)[:3])
    np.testing.assert_allclose(blended[0], [[grey] * 3, strongest, [grey] * 3], atol=0.51)


def test_blend_shows_nothing_outside():
    blended = blend(IMAGE, SALIENCY, LEFT)
    assert (blended[32, 48] == blended[0, 0]).all()
    assert (blended[32, 16] != blended[0, 0]).any()


def test_stronger_values_are_brighter_and_let_less_tissue_through():
    bright, dark = np.full((1, 5, 3), 240, np.uint8), np.full((1, 5, 3), 60, np.uint8)
    strength = np.linspace(0, 1, 5, dtype=np.float32)[None]
    over_bright, over_dark = (blend(tissue, strength)[0].astype(int).mean(axis=1) for tissue in (bright, dark))
    assert (np.diff(over_dark) > 0).all()
    assert over_bright[4] > over_bright[0]
    assert (np.diff(over_bright - over_dark) < 0).all()
    assert over_bright[4] - over_dark[4] > 10  # tissue is visible even below the strongest value


def test_a_salient_spot_has_another_colour_than_its_surroundings(tmp_path, drawn):
    path = panel(tmp_path / "panel.png", [PLAIN])
    for tile, differs in ((0, False), (1, True)):
        spot, weaker, around = (at(drawn[0], path, tile, 32, column) for column in (16, 48, 32))
        assert (np.abs(spot - around).max() > 60) == differs
        assert (np.abs(spot - weaker).max() > 20) == differs
    assert np.abs(at(drawn[0], path, 0, 32, 32) - IMAGE[0, 0]).max() <= 1
    assert np.ptp(at(drawn[0], path, 1, 32, 32)) <= 1  # greyed


def test_inside_mask_hides_the_outside(tmp_path, drawn):
    path = panel(tmp_path / "panel.png", [MARKED, INSIDE])
    right_of_marked, right_of_inside = at(drawn[0], path, 1, 32, 48), at(drawn[0], path, 3, 32, 48)
    assert np.ptp(right_of_marked) > 60
    assert np.ptp(right_of_inside) <= 1
    np.testing.assert_array_equal(at(drawn[0], path, 1, 32, 16), at(drawn[0], path, 3, 32, 16))
    assert "mask: 6.2 % (map inside)" in words_of(drawn[0])
    assert f"{100 * LEFT.mean():.1f}" == "6.2"


def test_the_truth_has_its_colour_and_only_where_there_is_one(tmp_path, drawn):
    without = panel(tmp_path / "without.png", [MARKED])
    path = panel(tmp_path / "with.png", [MARKED], truth=RIGHT)
    assert close_to(without, CYAN) == 0
    assert close_to(path, CYAN) > 100
    assert "ground truth" not in words_of(drawn[0])
    assert "outline of the ground truth" in words_of(drawn[1])
    assert len(drawn[1].axes[0].collections) == 2  # a dark line and the dashes on it, on the image itself


def test_an_outline_follows_the_mask_and_closes_at_the_border(tmp_path, drawn):
    corner = np.zeros((SIDE, SIDE), bool)
    corner[:10, :20] = True
    panel(tmp_path / "panel.png", [Overlay("any", SALIENCY, corner)])
    (path,) = drawn[0].axes[1].collections[0].get_paths()
    assert path.vertices.min(axis=0).tolist() == [-0.5, -0.5]
    assert path.vertices.max(axis=0).tolist() == [19.5, 9.5]
    np.testing.assert_array_equal(path.vertices[0], path.vertices[-1])
    assert drawn[0].axes[1].get_xlim() == (-0.5, SIDE - 0.5)


def test_masks_are_shown_black_and_white_below(tmp_path, drawn):
    path = panel(tmp_path / "panel.png", [MARKED], truth=RIGHT)
    truth, mask = 1, 3  # after the image, and after the map
    for tile, column in ((truth, 48), (mask, 16)):
        assert at(drawn[0], path, tile, 32, column).tolist() == [255] * 3
        assert at(drawn[0], path, tile, 32, 64 - column).tolist() == [0] * 3
    one_row = panel(tmp_path / "one_row.png", [PLAIN])
    assert pixels(one_row).shape[0] < pixels(path).shape[0] - 100


@pytest.mark.parametrize("region", [np.zeros((SIDE, SIDE), bool), np.ones((SIDE, SIDE), bool)])
def test_masks_of_nothing_and_of_everything(region, tmp_path):
    path = panel(tmp_path / "panel.png", [Overlay("any", SALIENCY, region, inside_mask=True)], truth=region)
    assert pixels(path).std() > 10  # drawn, and not one colour


@pytest.mark.parametrize("count", [0, 1, 3, 4, 6])
def test_no_text_overlaps_however_many_methods(count, tmp_path, drawn):
    overlays = [Overlay(f"Grad-CAM {k} with a rather long name", SALIENCY, LEFT, k == 5) for k in range(count)]
    path = panel(tmp_path / "panel.png", overlays, truth=RIGHT, stamp=STAMP + ", of which many more words are said" * 2)
    assert_all_inside(drawn[0])
    height, width, _ = pixels(path).shape
    assert 250 < height < 700
    assert width == pytest.approx(110 * drawn[0].get_size_inches()[0], abs=1)
    boxes = [axes.get_window_extent() for axes in drawn[0].axes]
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])
    assert drawn[0].legends[0].get_window_extent().x1 <= drawn[0].bbox.width


@pytest.mark.parametrize("caption", ["malignant " * 100, "W" * 900, "$x_1^{2", "a\nb\tc", "", "image \N{BULLET} 40X"])
def test_captions_never_widen_the_panel(caption, tmp_path, drawn):
    path = panel(tmp_path / "panel.png", [Overlay("W" * 300, SALIENCY, None)], caption=caption, stamp=STAMP)
    assert pixels(path).shape[1] == pixels(panel(tmp_path / "short.png", [PLAIN])).shape[1]
    assert_all_inside(drawn[0])
    if len(caption) > 500:
        assert words_of(drawn[0]).count("…") == 2  # of the title and of the caption
    else:
        assert " ".join(caption.split()) in words_of(drawn[0]).replace("\n", " ")


def test_a_stamp_is_above_the_panel_and_the_gallery(tmp_path, drawn):
    panel(tmp_path / "panel.png", [PLAIN], stamp=STAMP)
    gallery(tmp_path / "gallery.png", 2, stamp=STAMP)
    plot_comparison(tmp_path / "comparison.png", DOCUMENT, stamp=STAMP)
    panel(tmp_path / "plain.png", [PLAIN])
    assert [STAMP in words_of(figure) for figure in drawn] == [True, True, True, False]


def gallery(
    path: Path, count: int, *, masks=True, truths=True, stamp=None, caption="image {}", title="Grad-CAM"
) -> Path:
    plot_gallery(
        path,
        np.stack([IMAGE] * count) if count else np.zeros((0, SIDE, SIDE, 3), np.uint8),
        np.stack([SALIENCY] * count) if count else np.zeros((0, SIDE, SIDE), np.float32),
        np.stack([LEFT] * count) if masks else None,
        [RIGHT if truths and k % 2 == 0 else None for k in range(count)],
        [caption.format(k) for k in range(count)],
        title,
        stamp=stamp,
    )
    return path


@pytest.mark.parametrize("count", [1, 3, 24])
def test_gallery_shows_image_and_map_of_every_tile(count, tmp_path, drawn):
    path = gallery(tmp_path / "gallery.png", count)
    assert len(drawn[0].axes) == 2 * count + 1  # and the colour bar
    last = 2 * count - 1
    assert np.abs(at(drawn[0], path, last - 1, 32, 16) - IMAGE[0, 0]).max() <= 1
    assert np.abs(at(drawn[0], path, last, 32, 16) - at(drawn[0], path, last, 5, 32)).max() > 60
    assert f"image {count - 1}" in words_of(drawn[0])
    assert_all_inside(drawn[0])
    assert pixels(path).shape[1] < 1500


def test_gallery_leaves_out_what_is_too_many_and_says_so(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(explanation_plots, "MAX_TILES", 2)
    gallery(tmp_path / "gallery.png", 3)
    assert len(drawn[0].axes) == 2 * 2 + 1
    assert "Grad-CAM (the first 2 of 3 images)" in words_of(drawn[0])


def test_gallery_outlines_only_what_there_is(tmp_path, drawn):
    assert close_to(gallery(tmp_path / "with.png", 2), CYAN) > 20
    assert close_to(gallery(tmp_path / "without.png", 2, truths=False), CYAN) == 0
    gallery(tmp_path / "nothing.png", 2, masks=False, truths=False)
    assert "outline" not in words_of(drawn[2])
    assert not any(axes.collections for axes in drawn[2].axes)


def test_long_words_never_widen_the_gallery(tmp_path, drawn):
    long = gallery(tmp_path / "long.png", 3, caption="W" * 200 + "{}", title="x" * 400, stamp=STAMP * 20)
    assert pixels(long).shape[1] == pixels(gallery(tmp_path / "short.png", 3)).shape[1]
    assert_all_inside(drawn[0])


def test_an_empty_gallery_says_so(tmp_path, drawn):
    gallery(tmp_path / "gallery.png", 0, masks=False)
    assert "No image was explained." in words_of(drawn[0])


def figure(value, half=None):
    return {
        "value": value,
        "low": None if half is None else value - half,
        "high": None if half is None else value + half,
    }


DOCUMENT = {
    "n": 24,
    "methods": {"gradcam": {"title": "Grad-CAM"}, "dtgradcam": {"title": "DT Grad-CAM"}},
    "localisation": {
        "n": 20,
        "methods": {
            "random": {
                "baseline": True,
                "mean": {"iou": figure(0.1, 0.05), "dice": figure(0.2), "average_precision": {}},
            },
            "gradcam": {
                "baseline": False,
                "mean": {"iou": figure(0.3, 0.1), "dice": figure(0.4), "average_precision": figure(None)},
            },
            "dtgradcam": {"baseline": False, "mean": {"iou": figure(0.5, 0.1), "dice": figure(0.6)}},
            "centre": {"baseline": True, "mean": {"iou": figure(0.2, 0.05), "dice": figure(0.1)}},
        },
    },
    "faithfulness": {
        "methods": {
            "random": {"deletion_auc": figure(0.6, 0.1), "insertion_auc": figure(0.5, 0.1)},
            "centre": {"deletion_auc": figure(0.8, 0.1), "insertion_auc": figure(0.4, 0.1)},
            "gradcam": {"deletion_auc": figure(0.3, 0.1), "insertion_auc": figure(0.7, 0.1)},
        }
    },
}


def dots_of(axes) -> list[tuple[float, float, str]]:
    """Return value, row and marker of each dot."""
    lines = [line for line in axes.lines if line.get_marker() in ("o", "s")]
    return [(line.get_xdata()[0], line.get_ydata()[0], line.get_marker()) for line in lines]


def test_comparison_draws_methods_first_then_grey_baselines(tmp_path, drawn):
    plot_comparison(tmp_path / "comparison.png", DOCUMENT, stamp=None)
    iou, dice, precision, deletion, insertion = drawn[0].axes
    names = [label.get_text() for label in iou.get_yticklabels()]
    assert names == ["Grad-CAM", "DT Grad-CAM", "Random (baseline)", "Centre (baseline)"]
    assert dots_of(iou) == [(0.3, 0, "o"), (0.5, 1, "o"), (0.1, 2, "s"), (0.2, 3, "s")]
    assert dots_of(deletion) == [(0.3, 0, "o"), (0.6, 1, "s"), (0.8, 2, "s")]
    assert dots_of(insertion) == [(0.7, 0, "o"), (0.5, 1, "s"), (0.4, 2, "s")]
    intervals = [
        line.get_xdata() for line in iou.lines if len(set(line.get_ydata())) == 1 and len(line.get_xdata()) == 2
    ]
    np.testing.assert_allclose(intervals[:2], [[0.2, 0.4], [0.4, 0.6]])
    assert len(dots_of(dice)) == 4  # dots without intervals
    assert not [line for line in dice.lines if line.get_marker() == "None" and line.get_color() == BLUE]
    assert [text.get_text() for text in precision.texts] == ["no figure"] * 4
    assert iou.get_title(loc="left") == "IoU (n = 20 images)"
    assert deletion.get_title(loc="left") == "Deletion AUC, lower is better (n = 24 images)"


def test_the_line_is_the_best_baseline(tmp_path, drawn):
    document = DOCUMENT | {"methods": {"gradcam": {"title": "Grad-CAM"}}}  # dtgradcam now counts as a baseline
    plot_comparison(tmp_path / "comparison.png", document, stamp=None)
    upright = [
        [line.get_xdata()[0] for line in axes.lines if list(line.get_ydata()) == [0, 1]] for axes in drawn[0].axes
    ]
    assert upright == [[0.5], [0.6], [], [0.6], [0.5]]


@pytest.mark.parametrize("left_out", ["localisation", "faithfulness"])
def test_comparison_of_one_part(left_out, tmp_path, drawn):
    plot_comparison(tmp_path / "comparison.png", DOCUMENT | {left_out: None}, stamp=None)
    assert len(drawn[0].axes) == {"localisation": 2, "faithfulness": 3}[left_out]


@pytest.mark.parametrize("nothing", [None, {}, {"methods": {}}])
def test_nothing_to_compare_writes_nothing(nothing, tmp_path):
    plot_comparison(
        tmp_path / "plot.png", {"methods": {}, "localisation": nothing, "faithfulness": nothing}, stamp=None
    )
    assert list(tmp_path.iterdir()) == []


def test_the_same_bytes_again(tmp_path):
    for write in (lambda path: panel(path, [MARKED, INSIDE], RIGHT), lambda path: gallery(path, 3)):
        write(tmp_path / "a.png")
        write(tmp_path / "b.png")
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "b.png"}
