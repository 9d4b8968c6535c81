"""Pictures of a GAN: where each pixel lies, what the film holds, and what the plots say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image, ImageSequence

from breastcli.reporting import synthesis_plots
from breastcli.reporting.synthesis_plots import (
    BAND_GAP,
    FILM_HOLD,
    GAP,
    MARGIN,
    NAME,
    PAIR_GAP,
    neighbour_sheet,
    plot_distances,
    plot_gan_curves,
    sample_grid,
    write_film,
)

pytestmark = pytest.mark.filterwarnings("error")
TOP = MARGIN + 40  # below a heading of one line
STAMP = "LEAKY: image-level split"
NAN = float("nan")
HISTORY = [
    {
        "kimg": 2.0 * step,
        "critic_loss": -float(step),
        "generator_loss": 0.5,
        "critic_gap": 3.0,
        "gradient_penalty": 0.1 / step,
        "r1_penalty": NAN if step % 2 else 0.2,
        "diversity": 0.6,
    }
    for step in range(1, 41)
]


def flat(number: int, side: int = 64, width: int | None = None) -> np.ndarray:
    """Return (number, side, width, 3) images of one colour each, all different."""
    shades = np.arange(number, dtype=np.uint8)[:, None, None, None]
    return np.broadcast_to(shades + np.array([10, 60, 120], np.uint8), (number, side, width or side, 3)).copy()


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def kept(path: Path) -> bool:
    """Return whether a file was written, with no temporary file beside it."""
    return path.exists() and not [other.name for other in path.parent.iterdir() if "partial" in other.name]


@pytest.fixture
def drawn(monkeypatch):
    """Keep the figures that are written."""
    figures = []
    write = synthesis_plots._write
    keep = lambda figure, path, stamp: (figures.append(figure), write(figure, path, stamp))  # noqa: E731
    monkeypatch.setattr(synthesis_plots, "_write", keep)
    return figures


def words_of(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_samples_lie_in_bands_pixel_by_pixel(tmp_path):
    images = {"benign": flat(10), "malignant": flat(3) + 100}
    sample_grid(images, tmp_path / "grid.png", title="Samples", columns=4)
    sheet = pixels(tmp_path / "grid.png")
    assert kept(tmp_path / "grid.png")
    assert sheet.shape[1] == 2 * MARGIN + 4 * 64 + 3 * GAP
    second = TOP + NAME + 3 * 64 + 2 * GAP + BAND_GAP  # three rows of the first band
    assert len(sheet) == second + NAME + 64 + MARGIN
    for band, top in (("benign", TOP + NAME), ("malignant", second + NAME)):
        for number, image in enumerate(images[band]):
            upper, left = top + number // 4 * (64 + GAP), MARGIN + number % 4 * (64 + GAP)
            np.testing.assert_array_equal(sheet[upper : upper + 64, left : left + 64], image)
    assert (sheet[TOP + NAME + 64 : TOP + NAME + 64 + GAP] == 255).all()
    assert (sheet[TOP : TOP + NAME] != 255).any()  # the band's name
    assert (sheet[second : second + NAME] != 255).any()


def test_small_samples_are_enlarged_unsmoothed_and_large_ones_reduced(tmp_path):
    checks = np.zeros((1, 16, 16, 3), np.uint8)
    checks[:, ::2, ::2] = checks[:, 1::2, 1::2] = 255
    sample_grid({"a": checks}, tmp_path / "small.png", title="")
    sheet = pixels(tmp_path / "small.png")
    top = MARGIN + 20 + NAME
    tile = sheet[top : top + 64, MARGIN : MARGIN + 64]
    np.testing.assert_array_equal(tile, checks[0].repeat(4, axis=0).repeat(4, axis=1))
    sample_grid({"a": flat(2, 300, 150)}, tmp_path / "large.png", title="")
    sheet = pixels(tmp_path / "large.png")
    assert len(sheet) == top + 128 + MARGIN
    assert (sheet[top : top + 128, MARGIN : MARGIN + 64] == flat(1)[0, 0, 0]).all()  # 300 x 150 becomes 128 x 64
    sample_grid({"a": flat(1, 100)}, tmp_path / "between.png", title="")
    assert len(pixels(tmp_path / "between.png")) == top + 100 + MARGIN


def test_a_condition_without_images_is_named(tmp_path):
    sample_grid({"a": flat(2), "b": flat(0)}, tmp_path / "grid.png", title="Samples\nmore")
    sheet = pixels(tmp_path / "grid.png")
    below = TOP + 20 + NAME + 64 + BAND_GAP
    assert (sheet[below : below + NAME] != 255).any()
    assert (sheet[below + NAME : below + NAME + 64] != 255).any()  # it says "none"
    sample_grid({}, tmp_path / "nothing.png", title="Samples")
    assert kept(tmp_path / "nothing.png")


def test_pictures_have_the_same_bytes_each_time(tmp_path):
    for name in ("a", "b"):
        sample_grid({"x": flat(3)}, tmp_path / f"{name}-grid.png", title="Samples")
        neighbour_sheet(flat(2), flat(2), ["x", "y"], tmp_path / f"{name}-pairs.png", title="Pairs")
        plot_gan_curves(HISTORY, tmp_path / f"{name}-curves.png", collapse_limit=0.2)
        plot_distances({"x": np.arange(9.0)}, tmp_path / f"{name}-distances.png", threshold=2.0)
    for kind in ("grid", "pairs", "curves", "distances"):
        assert (tmp_path / f"a-{kind}.png").read_bytes() == (tmp_path / f"b-{kind}.png").read_bytes()


def write_frames(folder: Path, number: int, side: int = 20) -> list[Path]:
    files = [folder / f"{k:06d}.png" for k in range(number)]
    for k, file in enumerate(files):
        Image.new("RGB", (side, side // 2), (k, 255 - k, 90)).save(file)
    return files


def frames_of(path: Path) -> list[tuple[np.ndarray, int]]:
    with Image.open(path) as film:
        assert film.format == "GIF"
        assert film.info["loop"] == 0
        return [(np.asarray(frame.convert("RGB")), frame.info["duration"]) for frame in ImageSequence.Iterator(film)]


def test_a_film_has_every_frame_and_holds_the_last(tmp_path):
    write_film(write_frames(tmp_path, 5), tmp_path / "film.gif", frame_ms=100)
    frames = frames_of(tmp_path / "film.gif")
    assert kept(tmp_path / "film.gif")
    assert [duration for _, duration in frames] == [100] * 4 + [100 * FILM_HOLD]
    for k, (frame, _) in enumerate(frames):
        assert frame.shape == (10, 20, 3)
        assert (frame == (k, 255 - k, 90)).all()


def test_a_long_film_is_thinned_evenly_with_its_first_and_last_frame(tmp_path):
    write_film(write_frames(tmp_path, 101), tmp_path / "film.gif", max_frames=5)
    assert [frame[0, 0, 0] for frame, _ in frames_of(tmp_path / "film.gif")] == [0, 25, 50, 75, 100]


def test_a_long_side_is_reduced(tmp_path):
    write_film(write_frames(tmp_path, 2, side=60), tmp_path / "film.gif", side_px=30)
    assert [frame.shape for frame, _ in frames_of(tmp_path / "film.gif")] == [(15, 30, 3)] * 2


def test_a_smaller_picture_keeps_its_pixels_and_its_place(tmp_path):
    files = write_frames(tmp_path, 2)
    Image.new("RGB", (23, 12), (7, 8, 9)).save(tmp_path / "other.png")  # as a longer heading makes it
    write_film([*files, tmp_path / "other.png"], tmp_path / "film.gif")
    frames = [frame for frame, _ in frames_of(tmp_path / "film.gif")]
    assert [frame.shape for frame in frames] == [(12, 23, 3)] * 3
    assert (frames[1][:10, :20] == (1, 254, 90)).all()
    assert (frames[1][10:] == 255).all()
    assert (frames[1][:, 20:] == 255).all()
    assert (frames[2] == (7, 8, 9)).all()


def test_a_film_has_the_same_bytes_each_time_and_of_nothing_there_is_none(tmp_path):
    files = write_frames(tmp_path, 6)
    for name in ("a.gif", "b.gif"):
        write_film(files, tmp_path / name)
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()
    write_film(files[::-1], tmp_path / "c.gif")
    assert (tmp_path / "c.gif").read_bytes() != (tmp_path / "a.gif").read_bytes()
    write_film([], tmp_path / "none.gif")
    assert not (tmp_path / "none.gif").exists()


def test_curves_have_four_panels_and_their_limit(tmp_path, drawn):
    plot_gan_curves(HISTORY, tmp_path / "curves.png", collapse_limit=0.25, stamp=STAMP)
    assert kept(tmp_path / "curves.png")
    losses, gap, penalties, diversity = drawn[0].axes
    assert [line.get_label() for line in losses.lines] == ["critic", "generator"]
    np.testing.assert_array_equal(losses.lines[0].get_xdata(), [row["kimg"] for row in HISTORY])
    np.testing.assert_array_equal(losses.lines[0].get_ydata(), [row["critic_loss"] for row in HISTORY])
    assert list(gap.lines[1].get_ydata()) == [0, 0]
    assert penalties.get_yscale() == "log"
    assert losses.get_yscale() == "linear"
    assert list(diversity.lines[1].get_ydata()) == [0.25, 0.25]
    assert "collapse: below 0.25" in words_of(drawn[0])
    assert STAMP in words_of(drawn[0])
    assert "mathdefault" not in words_of(drawn[0])


def test_gaps_in_a_column_do_not_hide_it(tmp_path, drawn):
    plot_gan_curves(HISTORY, tmp_path / "curves.png", collapse_limit=0.2)
    (r1,) = [line for line in drawn[0].axes[2].lines if line.get_label() == "R1 penalty"]
    assert list(r1.get_xdata()) == [row["kimg"] for row in HISTORY[1::2]]
    assert set(r1.get_ydata()) == {0.2}


@pytest.mark.parametrize(
    ("column", "value", "panels"),
    [
        ("r1_penalty", NAN, 4),
        ("r1_penalty", 0.0, 4),
        ("critic_gap", NAN, 3),
        ("diversity", None, 3),
        ("diversity", 0.0, 4),  # a collapse is no column to leave out
    ],
)
def test_columns_without_figures_are_left_out(column, value, panels, tmp_path, drawn):
    plot_gan_curves([row | {column: value} for row in HISTORY], tmp_path / "curves.png", collapse_limit=0.2)
    assert len(drawn[0].axes) == panels
    assert ("R1 penalty" in words_of(drawn[0])) == (column != "r1_penalty")
    absent = [{name: figure for name, figure in row.items() if name != column} for row in HISTORY]
    plot_gan_curves(absent, tmp_path / "absent.png", collapse_limit=0.2)
    assert len(drawn[1].axes) == (4 if column == "r1_penalty" else 3)


def test_a_penalty_that_is_sometimes_zero_has_a_linear_axis(tmp_path, drawn):
    history = [HISTORY[0] | {"gradient_penalty": 0.0}, *HISTORY[1:]]
    plot_gan_curves(history, tmp_path / "curves.png", collapse_limit=0.2)
    assert drawn[0].axes[2].get_yscale() == "linear"


@pytest.mark.parametrize("history", [[], [{"kimg": 1.0}], [{"kimg": 1.0, "critic_loss": NAN}]])
def test_a_history_with_nothing_in_it_is_explained(history, tmp_path, drawn):
    plot_gan_curves(history, tmp_path / "curves.png", collapse_limit=0.2)
    assert "Nothing of the training" in words_of(drawn[0])
    assert kept(tmp_path / "curves.png")


def test_neighbours_lie_in_pairs_the_generated_image_on_the_left(tmp_path):
    generated, neighbours = flat(4), flat(4) + 100
    neighbour_sheet(generated, neighbours, ["benign · 3.21"] * 4, tmp_path / "pairs.png", title="Pairs")
    sheet = pixels(tmp_path / "pairs.png")
    pair, top = 2 * 128 + 2, TOP + 20  # images of 64 pixels are doubled, and a line says which is which
    assert sheet.shape[1] == 2 * MARGIN + 3 * pair + 2 * PAIR_GAP
    for number in range(4):
        upper, left = top + number // 3 * (128 + NAME + GAP), MARGIN + number % 3 * (pair + PAIR_GAP)
        assert (sheet[upper : upper + 128, left : left + 128] == generated[number, 0, 0]).all()
        assert (sheet[upper : upper + 128, left + 130 : left + 258] == neighbours[number, 0, 0]).all()
        assert (sheet[upper + 128 : upper + 128 + NAME, left : left + pair] != 255).any()


def test_a_long_caption_stays_below_its_pair(tmp_path):
    neighbour_sheet(flat(2), flat(2), ["W" * 90, ""], tmp_path / "pairs.png", title="Pairs")
    sheet = pixels(tmp_path / "pairs.png")
    caption = sheet[TOP + 20 + 128 : TOP + 20 + 128 + NAME]
    assert (caption[:, MARGIN + 200 : MARGIN + 258] != 255).any()
    assert (caption[:, MARGIN + 258 :] == 255).all()


def test_no_neighbours_are_no_error_and_missing_ones_are(tmp_path):
    neighbour_sheet(flat(0), flat(0), [], tmp_path / "pairs.png", title="Pairs")
    assert (pixels(tmp_path / "pairs.png")[TOP + 20 :] != 255).any()  # it says "none"
    with pytest.raises(ValueError, match="argument"):
        neighbour_sheet(flat(2), flat(1), ["a", "b"], tmp_path / "wrong.png", title="Pairs")
    assert not (tmp_path / "wrong.png").exists()


def test_distances_are_distributions_with_their_share_below(tmp_path, drawn):
    series = {"generated to training": np.array([1.0, NAN, 3.0, 2.0, 4.0]), "training to training": np.arange(5, 10.0)}
    plot_distances(series, tmp_path / "distances.png", threshold=2.0, stamp=STAMP)
    assert kept(tmp_path / "distances.png")
    (axes,) = drawn[0].axes
    generated, training, threshold = axes.lines
    assert list(generated.get_xdata()) == [1, 1, 2, 3, 4]
    assert list(generated.get_ydata()) == [0, 0.25, 0.5, 0.75, 1]
    assert generated.get_label() == "generated to training (n = 4, 25.0 % below)"
    assert training.get_label() == "training to training (n = 5, 0.0 % below)"
    assert list(threshold.get_xdata()) == [2, 2]
    assert "possible copy: below 2" in words_of(drawn[0])
    assert STAMP in words_of(drawn[0])


def test_a_threshold_far_below_is_still_in_sight(tmp_path, drawn):
    plot_distances({"x": np.array([10.0, 11.0])}, tmp_path / "distances.png", threshold=1.0)
    left, right = drawn[0].axes[0].get_xlim()
    assert left < 1
    assert right > 11


@pytest.mark.parametrize("series", [{}, {"x": np.array([])}, {"x": np.array([NAN])}])
def test_no_distances_are_explained(series, tmp_path, drawn):
    plot_distances(series, tmp_path / "distances.png", threshold=1.0)
    assert "no distances" in words_of(drawn[0])


def test_without_a_threshold_nothing_is_called_a_copy(tmp_path, drawn):
    plot_distances({"x": np.array([10.0, 11.0])}, tmp_path / "distances.png", threshold=NAN)
    assert "below" not in words_of(drawn[0])
    assert "x (n = 2)" in words_of(drawn[0])
