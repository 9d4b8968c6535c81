"""The procedural sample data set: its tree, its masks, and that it takes a network to tell its classes apart."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from breastcli.data.drawing import ARCHITECTURES, draw_field
from breastcli.data.sample_tree import SUBTYPE_FOLDERS, _look, _Plan, draw_sample

BREAKHIS_PATH = re.compile(
    r"BreaKHis_v1/histology_slides/breast/(?P<kind>benign|malignant)/SOB/(?P<folder>[a-z_]+)/"
    r"(?P<stem>SOB_[BM]_(?P<subtype>A|F|PT|TA|DC|LC|MC|PC))_(?P<slide>1[45]-(?P<exam>\d+)[A-Z]*)/"
    r"(?P<magnification>40|100|200|400)X/(?P=stem)-(?P=slide)-(?P=magnification)-(?P<sequence>\d{3})\.png"
)


def read_names(root: Path) -> list[dict[str, str]]:
    """Return what each image's path says; fails on a path that BreakHis could not have."""
    paths = sorted(path.relative_to(root).as_posix() for path in (root / "BreaKHis_v1").rglob("*.*"))
    matches = {path: BREAKHIS_PATH.fullmatch(path) for path in paths}
    assert all(matches.values()), [path for path, match in matches.items() if match is None]
    return [match.groupdict() | {"path": path} for path, match in matches.items()]


def read_pixels(root: Path, names: list[dict[str, str]]) -> list[np.ndarray]:
    return [np.asarray(Image.open(root / name["path"])) for name in names]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("small")
    draw_sample(root, num_images=96, height_px=64, width_px=80, seed=3)
    return root


@pytest.fixture(scope="module")
def names(small: Path) -> list[dict[str, str]]:
    return read_names(small)


def test_tree_is_spread_evenly(names):
    assert len(names) == 96
    assert {name["subtype"] for name in names} == set(SUBTYPE_FOLDERS)
    assert all(SUBTYPE_FOLDERS[name["subtype"]] == name["folder"] for name in names)
    assert all((name["kind"] == "benign") == name["stem"].startswith("SOB_B") for name in names)
    assert set(Counter(name["magnification"] for name in names).values()) == {24}
    assert set(Counter((name["subtype"], name["slide"]) for name in names).values()) == {2, 3}
    assert 0.35 < sum(name["kind"] == "benign" for name in names) / 96 < 0.45


@pytest.mark.parametrize(("num_images", "benign_exams", "malignant_exams"), [(67, 9, 14), (240, 12, 14)])
def test_number_of_images_and_exams(tmp_path, num_images, benign_exams, malignant_exams):
    draw_sample(tmp_path, num_images=num_images, height_px=32, width_px=32)
    names = read_names(tmp_path)
    assert len(names) == num_images
    exams = defaultdict(set)
    for name in names:
        exams[name["kind"]].add(name["exam"])
        exams[name["subtype"]].add(name["exam"])
    assert len(exams["benign"]) >= benign_exams
    assert len(exams["malignant"]) >= malignant_exams
    assert not exams["benign"] & exams["malignant"]
    assert min(len(exams[subtype]) for subtype in SUBTYPE_FOLDERS) >= 3


def test_one_label_conflict_and_exams_of_several_slides(names):
    subtypes, slides, years = defaultdict(set), defaultdict(set), defaultdict(set)
    for name in names:
        subtypes[name["slide"]].add(name["subtype"])
        slides[name["exam"]].add(name["slide"])
        years[name["exam"]].add(name["slide"][:2])
    assert [found for found in subtypes.values() if len(found) > 1] == [{"DC", "LC"}]
    assert sum(len(found) > 1 for found in slides.values()) >= 3
    assert set.union(*years.values()) == {"14", "15"}
    assert all(len(found) == 1 for found in years.values())  # the digits alone name an exam


def test_masks_match_images(small, names):
    masks = sorted(path.relative_to(small / "masks").as_posix() for path in (small / "masks").rglob("*.png"))
    assert masks == [name["path"].removeprefix("BreaKHis_v1/") for name in names]
    for name, mask_path in zip(names, masks, strict=True):
        with Image.open(small / name["path"]) as image, Image.open(small / "masks" / mask_path) as mask:
            assert (image.mode, image.size) == ("RGB", (80, 64))
            assert (mask.mode, mask.size) == ("L", (80, 64))
            inside = np.asarray(mask) == 255
            assert set(np.unique(mask)) == {0, 255}
            red = np.asarray(image, dtype=float)[..., 0]
        assert 0.03 < inside.mean() < 0.45
        # Haematoxylin takes the red; eosin hardly does.
        assert red[inside].mean() < red[~inside].mean() - 15, name["path"]


def test_card(small):
    assert json.loads((small / "sample.json").read_text()) == {
        "generator": "breastcli sample",
        "version": 1,
        "drawn": True,
        "seed": 3,
        "num_images": 96,
        "height_px": 64,
        "width_px": 80,
        "note": "Procedurally drawn; not real tissue.",
    }


def test_same_pixels_for_any_number_of_workers(small, names, tmp_path):
    draw_sample(tmp_path / "again", num_images=96, height_px=64, width_px=80, seed=3, workers=5)
    files = [path.relative_to(small) for path in small.rglob("*") if path.is_file()]
    assert len(files) == 2 * 96 + 1
    assert all((small / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)
    draw_sample(tmp_path / "other", num_images=96, height_px=64, width_px=80, seed=4)
    pairs = zip(read_pixels(small, names), read_pixels(tmp_path / "other", names), strict=True)
    assert all((one != other).any() for one, other in pairs)


def test_progress_is_reported_after_every_image_and_the_card_comes_last(tmp_path):
    cards = []
    draw_sample(
        tmp_path,
        num_images=64,
        height_px=32,
        width_px=40,
        on_drawn=lambda: cards.append((tmp_path / "sample.json").exists()),
    )
    assert cards == [False] * 64
    assert (tmp_path / "sample.json").exists()


@pytest.mark.parametrize("subtype", sorted(ARCHITECTURES))
@pytest.mark.parametrize(("height_px", "width_px"), [(32, 32), (33, 70), (230, 350)])
def test_any_subtype_at_any_size(subtype, height_px, width_px):
    for magnification in ("40X", "400X"):
        look = _look(_Plan(subtype, "14-50000", magnification, 1), seed=0)
        image, mask = draw_field(look, subtype, magnification, height_px, width_px, np.random.default_rng(0))
        assert (image.shape, image.dtype) == ((height_px, width_px, 3), np.uint8)
        assert (mask.shape, mask.dtype) == ((height_px, width_px), np.uint8)
        assert mask.any()


def test_nuclei_grow_with_magnification():
    look = _look(_Plan("TA", "14-50000", "40X", 1), seed=0)
    outlines = []
    for magnification in ("40X", "100X", "200X", "400X"):
        masks = [draw_field(look, "TA", magnification, 184, 280, np.random.default_rng(seed))[1] for seed in range(4)]
        edges = sum((np.diff(mask, axis=axis) != 0).sum() for mask in masks for axis in (0, 1))
        outlines.append(edges / sum((mask > 0).sum() for mask in masks))
    assert outlines == sorted(outlines, reverse=True)
    assert outlines[0] > 2 * outlines[-1]


def test_colour_varies_more_between_slides_than_within(small, names):
    colours = defaultdict(list)
    for name, pixels in zip(names, read_pixels(small, names), strict=True):
        colours[name["slide"]].append(pixels.reshape(-1, 3).mean(axis=0))
    between = np.var([np.mean(colour, axis=0) for colour in colours.values()], axis=0)
    within = np.mean([np.var(colour, axis=0) for colour in colours.values()], axis=0)
    assert (between > 1.5 * within).all(), (between, within)


def histogram(image: np.ndarray) -> np.ndarray:
    """Return (240,) shares: 8 bins of each channel, then 6 x 6 x 6 joint bins."""
    marginal = [np.histogram(image[..., channel], 8, (0, 256))[0] for channel in range(3)]
    joint = np.bincount((image // 43).reshape(-1, 3).astype(int) @ [36, 6, 1], minlength=216)
    return np.concatenate([*marginal, joint]) / (image.size / 3)


def by_histogram(images: np.ndarray, labels: np.ndarray, train: np.ndarray) -> float:
    """Return the better of two histogram classifiers' balanced accuracy on the rows that are not ``train``."""
    colours = np.stack([histogram(image) for image in images])
    regression = LogisticRegression(C=0.1, max_iter=2000, class_weight="balanced")
    forest = RandomForestClassifier(200, class_weight="balanced", random_state=0)
    models = [
        model.fit(colours[train], labels[train]) for model in (make_pipeline(StandardScaler(), regression), forest)
    ]
    return max(balanced_accuracy_score(labels[~train], model.predict(colours[~train])) for model in models)


def by_network(images: np.ndarray, labels: np.ndarray, train: np.ndarray, num_epochs: int = 16) -> float:
    """Return a small network's balanced accuracy on the rows that are not ``train``."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    layers = []
    for before, after in ((3, 24), (24, 48), (48, 64), (64, 96)):
        layers += [torch.nn.Conv2d(before, after, 3, padding=1, bias=False), torch.nn.BatchNorm2d(after)]
        layers += [torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
    pool = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Dropout(0.2), torch.nn.Linear(96, 2)]
    network = torch.nn.Sequential(*layers[:-1], *pool).to(memory_format=torch.channels_last)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    targets, rows = torch.from_numpy(labels), np.flatnonzero(train)
    weight = torch.from_numpy(1 / np.bincount(labels[train])).float()
    steps = len(rows) // 24
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, num_epochs * steps)
    for _ in range(num_epochs):
        for batch in np.array_split(rng.permutation(rows), steps):
            turned = torch.rot90(pixels[batch], int(rng.integers(4)), (2, 3))
            turned = turned.flip(3) if rng.random() < 0.5 else turned
            logits = network(turned.contiguous(memory_format=torch.channels_last))
            torch.nn.functional.cross_entropy(logits, targets[batch], weight).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    with torch.inference_mode():
        predicted = network.eval()(pixels[torch.from_numpy(~train)]).argmax(dim=1).numpy()
    return balanced_accuracy_score(labels[~train], predicted)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """So small a network is no slower on one thread, and far faster where other processes share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_arrangement_tells_the_classes_apart_and_colour_does_not(tmp_path):
    draw_sample(tmp_path, num_images=360, height_px=96, width_px=96)
    names = read_names(tmp_path)
    labels = np.array([int(name["kind"] == "malignant") for name in names])
    images = np.stack([np.asarray(Image.open(tmp_path / name["path"]).resize((48, 48))) for name in names])
    # Every third exam of each subtype is held out, in whichever subtype it turns up.
    exams = {
        subtype: list(dict.fromkeys(n["exam"] for n in names if n["subtype"] == subtype)) for subtype in ARCHITECTURES
    }
    held_out = {exam for found in exams.values() for exam in found[1::3]}
    train = np.array([name["exam"] not in held_out for name in names])
    colour, network = by_histogram(images, labels, train), by_network(images, labels, train)
    print(f"balanced accuracy on held-out exams: colour histogram {colour:.3f}, network {network:.3f}")
    assert network > 0.75
    assert network - colour > 0.08
