"""The geometry of embeddings: angles worked out by hand, and what the picture shows."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from breastcli.reporting import embedding_plot
from breastcli.reporting.embedding_plot import plot_embedding

pytestmark = pytest.mark.filterwarnings("error")
TWO = ("benign", "malignant")


def at(degrees: list[float]) -> np.ndarray:
    """Return vectors (N, 2) in these directions, of lengths 1, 2, 3 and so on."""
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1) * np.arange(1, len(degrees) + 1)[:, None]


def clouds(num_images: int, num_classes: int, width: int = 16) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = np.arange(num_images) % num_classes
    centres = generator.normal(size=(num_classes, width))
    return (centres[labels] + generator.normal(size=(num_images, width))).astype(np.float32), labels


@pytest.fixture
def drawn(monkeypatch):
    """Keep the figure that the plot writes, so that a test can read it."""
    kept = []
    write = embedding_plot._write

    def keep(figure: Figure, path: Path, stamp: str) -> None:
        kept.append(figure)
        write(figure, path, stamp)

    monkeypatch.setattr(embedding_plot, "_write", keep)
    return kept


def words_of(figure: Figure) -> str:
    found = [figure.get_suptitle()]
    for axes in figure.axes:
        found += [
            axes.get_title(loc="left"),
            axes.get_xlabel(),
            axes.get_ylabel(),
            *(text.get_text() for text in axes.texts),
        ]
        found += [text.get_text() for text in (axes.get_legend().get_texts() if axes.get_legend() else [])]
    return "\n".join(found).replace("\n", " ")


def dots_of(figure: Figure) -> list[np.ndarray]:
    """Return the points (n, 2) of each class as drawn."""
    drawn = [np.asarray(dots.get_offsets()) for dots in figure.axes[0].collections]
    return drawn[::2]  # every second collection is the legend's


def test_angles_by_hand(tmp_path):
    # Within: 20 and 60 degrees. Between: 90, 150, 70 and 130.
    figures = plot_embedding(at([0, 20, 90, 150]), np.array([0, 0, 1, 1]), TWO, tmp_path / "plot.png", stamp=None)
    assert figures == {"within_deg": 40.0, "between_deg": 110.0, "auc": 1.0}


def test_an_equal_angle_counts_half(tmp_path):
    # Within: 20 and 90. Between: 90, 180, 70 and 160. Of eight comparisons six are won and one is even.
    figures = plot_embedding(at([0, 20, 90, 180]), np.array([0, 0, 1, 1]), TWO, tmp_path / "plot.png", stamp=None)
    assert figures == {"within_deg": 55.0, "between_deg": 125.0, "auc": 6.5 / 8}


def test_three_vectors_by_hand(tmp_path):
    corners = np.array([[5.0, 0, 0], [0, 0.1, 0], [1, 1, 0]])  # 90, 45 and 45 degrees apart
    figures = plot_embedding(corners, np.array([0, 0, 1]), TWO, tmp_path / "plot.png", stamp=None)
    assert figures == {"within_deg": 90.0, "between_deg": 45.0, "auc": 0.0}


def test_equal_directions_of_any_length_are_even(tmp_path):
    same = np.array([[0.3, 0.7, 0.1]]) * np.array([[1.0], [3.0], [7.0], [0.01]])
    figures = plot_embedding(same, np.array([0, 0, 1, 1]), TWO, tmp_path / "plot.png", stamp=None)
    assert figures == {"within_deg": 0.0, "between_deg": 0.0, "auc": 0.5}


def test_rounding_takes_no_cosine_beyond_one(tmp_path):
    twice = np.tile(np.random.default_rng(0).normal(size=(40, 7)), (2, 1))
    figures = plot_embedding(twice, np.tile(np.arange(40), 2), ("any",) * 40, tmp_path / "plot.png", stamp=None)
    assert figures["within_deg"] == 0.0
    assert figures["auc"] == 1.0


def test_the_plane_holds_most_of_the_squared_length(tmp_path, drawn):
    axes = np.eye(4)[[0, 1, 0, 1, 0, 3]] * np.array([[2.0], [1], [5], [1], [1], [9]])
    plot_embedding(axes, np.array([0, 1, 0, 1, 0, 1]), TWO, tmp_path / "plot.png", stamp=None)
    left = drawn[0].axes[0]
    assert "50.0 % of squared length" in left.get_xlabel()
    assert "33.3 %" in left.get_ylabel()
    benign, malignant = dots_of(drawn[0])
    np.testing.assert_allclose(benign, [[1, 0]] * 3, atol=1e-9)
    np.testing.assert_allclose(malignant, [[0, 1], [0, 1], [0, 0]], atol=1e-9)  # the last one stands on the plane


def test_points_of_a_plane_keep_their_angles(tmp_path, drawn):
    flat = np.concatenate([at([10, 30, 75]), np.zeros((3, 5))], axis=1)
    plot_embedding(flat, np.array([0, 0, 1]), TWO, tmp_path / "plot.png", stamp=None)
    points = np.concatenate(dots_of(drawn[0]))
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1)
    turns = np.degrees(np.arctan2(points[:, 1], points[:, 0]))
    np.testing.assert_allclose(np.abs(np.diff(turns)), [20, 45])


def test_the_circle_and_the_origin_are_in_view(tmp_path, drawn):
    aside = np.random.default_rng(0).normal(size=(60, 2000))
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    cone = np.concatenate([np.full((60, 1), 0.6), 0.8 * aside], axis=1)
    plot_embedding(cone, np.arange(60) % 2, TWO, tmp_path / "plot.png", stamp=None)
    assert np.concatenate(dots_of(drawn[0])).max() < 0.7  # far from the circle
    low, high = drawn[0].axes[0].get_xlim()
    assert low < 0
    assert high > 1


@pytest.mark.parametrize("num_classes", [2, 4, 8])
def test_every_class_has_its_marker_and_count(num_classes, tmp_path, drawn):
    embeddings, labels = clouds(40, num_classes)
    names = tuple(f"class {k}" for k in range(num_classes))
    plot_embedding(embeddings, labels, names, tmp_path / "plot.png", stamp=None)
    dots = drawn[0].axes[0].collections[::2]
    looks = {(tuple(dot.get_facecolor()[0]), dot.get_paths()[0].vertices.tobytes()) for dot in dots}
    assert len(looks) == num_classes
    assert len({marker for _, marker in looks}) == num_classes
    assert [len(points) for points in dots_of(drawn[0])] == [40 // num_classes] * num_classes
    assert words_of(drawn[0]).count(f"(n = {40 // num_classes})") == num_classes


def test_histograms_are_densities_with_their_medians(tmp_path, drawn):
    embeddings, labels = clouds(50, 2)
    figures = plot_embedding(embeddings, labels, TWO, tmp_path / "plot.png", stamp=None)
    right = drawn[0].axes[1]
    filled, outline = (patch.get_xy() for patch in right.patches)
    for corners in (filled, outline):
        x, y = corners.T
        assert abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2 == pytest.approx(1)  # the area within the outline
    lines = [line.get_xdata()[0] for line in right.lines if len(line.get_xdata())]
    assert lines == [figures["within_deg"], figures["between_deg"]]
    words = words_of(drawn[0])
    assert "n = 1,225 pairs" in words
    assert f"same class: median {figures['within_deg']:.1f}° (n = 600 pairs)" in words
    assert f"different classes: median {figures['between_deg']:.1f}° (n = 625 pairs)" in words
    assert f"AUC {figures['auc']:.3f}" in words


def test_many_images_are_sampled(tmp_path, drawn, monkeypatch):
    embeddings, labels = clouds(200, 2)
    every = plot_embedding(embeddings, labels, TWO, tmp_path / "every.png", stamp=None)
    monkeypatch.setattr(embedding_plot, "MAX_IMAGES", 100)
    monkeypatch.setattr(embedding_plot, "NUM_PAIRS", 10_000)
    sampled = plot_embedding(embeddings, labels, TWO, tmp_path / "sampled.png", stamp=None)
    assert sampled == plot_embedding(embeddings, labels, TWO, tmp_path / "again.png", stamp=None)
    assert sampled == pytest.approx(every, rel=0.03)
    assert sampled != every
    assert "n = 10,000 pairs) a sample of all 19,900 pairs" in words_of(drawn[1])
    assert "a sample" not in words_of(drawn[0])


def test_no_image_is_paired_with_itself(monkeypatch):
    monkeypatch.setattr(embedding_plot, "MAX_IMAGES", 2)
    angles, alike = embedding_plot._pairs(np.eye(3), np.array([0, 0, 1]))
    assert (angles == 90).all()
    assert alike.mean() == pytest.approx(1 / 3, abs=0.01)


NAN = math.nan
EDGES = {
    "no image": (np.zeros((0, 4)), [], (NAN, NAN, NAN), "No image has an embedding"),
    "one image": (at([30]), [1], (NAN, NAN, NAN), "An angle needs two images"),
    "one class": (at([0, 30, 60]), [1, 1, 1], (30, NAN, NAN), "different classes: no pair"),
    "one image each": (at([0, 50]), [0, 1], (NAN, 50, NAN), "same class: no pair"),
    "one image of one": (at([0, 20, 80]), [0, 0, 1], (20, 70, 1), "malignant (n = 1)"),
    "one number": (np.array([[2.0], [-1.0], [5.0]]), [0, 1, 0], (0, 180, 1), "100.0 % of squared length"),
    "zeros": (np.zeros((3, 4)), [0, 1, 1], (NAN, NAN, NAN), "No image has an embedding"),
    "some zeros": (at([0, 40, 0, 90]) * [[1], [1], [0], [1]], [0, 0, 1, 1], (40, 70, 1), "direction: n = 1 image"),
    "not numbers": (
        np.array([[1.0, 0], [NAN, 1], [0, math.inf], [0, 1]]),
        [0, 0, 1, 1],
        (NAN, 90, NAN),
        "n = 2 images",
    ),
    "half precision": (at([0, 30, 90]).astype(np.float16) * 60, [0, 0, 1], (30, 75, 1), "n = 3 pairs"),
}


@pytest.mark.parametrize("name", EDGES)
def test_what_is_undefined_is_nan(name, tmp_path, drawn, caplog):
    embeddings, labels, expected, words = EDGES[name]
    figures = plot_embedding(embeddings, np.array(labels, dtype=int), TWO, tmp_path / "plot.png", stamp=None)
    assert list(figures) == ["within_deg", "between_deg", "auc"]
    assert tuple(figures.values()) == pytest.approx(
        expected, nan_ok=True, abs=0.1 if name == "half precision" else 1e-9
    )
    assert words in words_of(drawn[0])
    assert (tmp_path / "plot.png").is_file()
    assert not caplog.records


@pytest.mark.parametrize("num_classes", [2, 4])
def test_the_file_is_a_readable_png(num_classes, tmp_path):
    embeddings, labels = clouds(120, num_classes)
    names = tuple(f"class {k}" for k in range(num_classes))
    plot_embedding(embeddings, labels, names, tmp_path / "plot.png", stamp=None)
    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG"
        assert image.width >= 1200
        assert image.height >= 700
        assert "Software" not in image.info
        pixels = np.asarray(image.convert("RGB"))
    assert 0.01 < (pixels != 255).any(axis=2).mean() < 0.9
    assert (pixels[:8] == 255).all()  # nothing is cut off at the edges
    assert (pixels[-8:] == 255).all()
    assert (pixels[:, :8] == 255).all()
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]


def test_same_embeddings_give_the_same_bytes_and_stay_as_they_were(tmp_path):
    embeddings, labels = clouds(60, 3)
    before = embeddings.copy()
    for name in ("a.png", "b.png"):
        plot_embedding(embeddings, labels, ("a", "b", "c"), tmp_path / name, stamp=None)
    plot_embedding(embeddings[:-1], labels[:-1], ("a", "b", "c"), tmp_path / "other.png", stamp=None)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "other.png").read_bytes()
    assert np.array_equal(embeddings, before)


@pytest.mark.parametrize("stamp", ["LEAKY: image-level split", "", None])
def test_a_stamp_is_printed_above_the_plot(stamp, tmp_path, drawn):
    plot_embedding(*clouds(20, 2), (r"$\broken{$", "50 %_$"), tmp_path / "plot.png", stamp=stamp)
    assert ("LEAKY: image-level split" in words_of(drawn[0])) == bool(stamp)
    assert r"$\broken{$ (n = 10)" in words_of(drawn[0])
