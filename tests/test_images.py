from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from breastcli.data import images
from breastcli.data.images import RejectedImageError, decode, decode_in_order, read_rgb


def pattern(height_px: int = 40, width_px: int = 60) -> np.ndarray:
    rows, columns = np.mgrid[:height_px, :width_px]
    return np.stack([rows * 4, columns * 4, (rows + columns) * 2], axis=2).astype(np.uint8)


def test_rgb_is_left_as_it_is(tmp_path: Path) -> None:
    Image.fromarray(pattern()).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "a.png")), pattern())


def test_opaque_rgba_loses_only_its_alpha(tmp_path: Path) -> None:
    Image.fromarray(pattern()).convert("RGBA").save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "a.png")), pattern())


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    clear = np.dstack([pattern(), np.zeros((40, 60), np.uint8)])
    Image.fromarray(clear).save(tmp_path / "a.png")
    assert np.asarray(read_rgb(tmp_path / "a.png")).min() == 255


def test_palette_and_grey_become_rgb(tmp_path: Path) -> None:
    grey = pattern()[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "grey.png")), np.dstack([grey] * 3))
    Image.fromarray(grey).convert("P").save(tmp_path / "palette.png")
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "palette.png")), np.dstack([grey] * 3))
    Image.fromarray(grey > 80).save(tmp_path / "bits.png")
    assert set(np.unique(np.asarray(read_rgb(tmp_path / "bits.png")))) == {0, 255}


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_keep_their_full_range(tmp_path: Path, suffix: str) -> None:
    wide = np.linspace(0, 65535, 40 * 60).reshape(40, 60).astype(np.uint16)
    Image.fromarray(wide).save(tmp_path / f"wide.{suffix}")
    narrow = np.asarray(read_rgb(tmp_path / f"wide.{suffix}"))[:, :, 0]
    assert np.abs(narrow.astype(float) - wide / 257).max() <= 0.5
    assert (narrow[0, 0], narrow[-1, -1]) == (0, 255)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn
    Image.fromarray(pattern()).save(tmp_path / "a.png", exif=exif)
    assert read_rgb(tmp_path / "a.png").size == (40, 60)


def make_bad(folder: Path, kind: str) -> Path:
    path = folder / "bad.png"
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("not an image")
    elif kind == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:4000])
    elif kind == "tiny":
        Image.new("RGB", (8, 300)).save(path)
    elif kind == "cmyk":
        path = folder / "bad.jpg"
        Image.new("CMYK", (60, 60)).save(path)
    elif kind == "floating":
        path = folder / "bad.tif"
        Image.fromarray(np.zeros((60, 60), np.float32)).save(path)
    elif kind == "frames":
        path = folder / "bad.tif"
        Image.new("RGB", (60, 60)).save(path, save_all=True, append_images=[Image.new("RGB", (60, 60))])
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "empty file"),
        ("text", "not an image"),
        ("truncated", "cannot be decoded"),
        ("tiny", "8x300 is smaller than 16 pixels"),
        ("cmyk", "CMYK colours"),
        ("floating", "F colours"),
        ("frames", "holds 2 frames"),
        ("folder", "not a regular file"),
    ],
)
def test_unusable_files_are_rejected_with_the_reason(tmp_path: Path, kind: str, reason: str) -> None:
    path = make_bad(tmp_path, kind)
    with pytest.raises(RejectedImageError, match=reason):
        read_rgb(path)
    decoded = decode(path, 32)
    assert decoded.pixels is None
    assert reason in decoded.reason


def test_decompression_bombs_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    with pytest.raises(RejectedImageError, match="more than 100,000,000 pixels"):
        read_rgb(tmp_path / "bomb.png")
    Image.new("RGB", (100, 100)).save(tmp_path / "small.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 9_999)
    with pytest.raises(RejectedImageError, match="100x100 is more than 9,999 pixels"):
        read_rgb(tmp_path / "small.png")


def test_decode_resizes_and_hashes_the_full_pixels(tmp_path: Path) -> None:
    Image.fromarray(pattern()).save(tmp_path / "a.png")
    Image.fromarray(pattern()).save(tmp_path / "b.tif")
    other = pattern()
    other[3, 4, 0] += 1
    Image.fromarray(other).save(tmp_path / "c.png")
    first, second, third = (decode(tmp_path / name, 24) for name in ("a.png", "b.tif", "c.png"))
    assert first.pixels.shape == (24, 24, 3)
    assert (first.width_px, first.height_px) == (60, 40)
    expected = Image.fromarray(pattern()).resize((24, 24), Image.Resampling.BICUBIC)
    assert np.array_equal(first.pixels, np.asarray(expected))
    assert first.pixel_hash == second.pixel_hash != third.pixel_hash


def test_hash_tells_shapes_apart(tmp_path: Path) -> None:
    Image.new("RGB", (20, 40)).save(tmp_path / "a.png")
    Image.new("RGB", (40, 20)).save(tmp_path / "b.png")
    assert decode(tmp_path / "a.png", 16).pixel_hash != decode(tmp_path / "b.png", 16).pixel_hash


def test_threads_keep_the_order(tmp_path: Path) -> None:
    paths = []
    for number in range(30):
        size = 900 if number % 5 == 0 else 20  # large ones finish late
        Image.new("RGB", (size, size), (number, 0, 0)).save(tmp_path / f"{number}.png")
        paths.append(tmp_path / f"{number}.png")
    values = [int(one.pixels[0, 0, 0]) for one in decode_in_order(paths, 16, workers=4)]
    assert values == list(range(30))


def test_who_does_not_inspect_gets_the_same_pixels_alone(tmp_path: Path) -> None:
    Image.fromarray(pattern()).save(tmp_path / "a.png")
    (plain,) = decode_in_order([tmp_path / "a.png"], 24, 1, inspect=False)
    assert np.array_equal(plain.pixels, decode(tmp_path / "a.png", 24).pixels)
    assert (plain.width_px, plain.height_px, plain.pixel_hash, plain.measures) == (60, 40, "", None)
