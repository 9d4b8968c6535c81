from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from breastcli.data.images import decode, hash_pixels, read_rgb
from breastcli.data.masks import MaskProblem, find_masks, load_masks, read_mask
from breastcli.errors import UserError

SIZE = (20, 16)  # width, height


def corner(dtype: type = np.uint8, value: int = 255) -> np.ndarray:
    """A region of 5 columns and 4 rows at the upper left: a quarter of either side."""
    pixels = np.zeros((16, 20), dtype)
    pixels[:4, :5] = value
    return pixels


def save(path: Path, pixels: np.ndarray | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(corner() if pixels is None else pixels).save(path, **options)
    return path


def touch(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths


def small_corner(size: int = 4) -> np.ndarray:
    expected = np.zeros((size, size), bool)
    expected[: size // 4, : size // 4] = True
    return expected


def test_masks_are_found_by_relative_path_before_the_name(tmp_path: Path) -> None:
    images = touch(tmp_path / "images", "a/1.png", "b/1.jpg", "c/2.png")
    masks = touch(tmp_path / "masks", "a/1.tif", "b/1.png", "d/2.png")
    found = find_masks(images, tmp_path / "images", tmp_path / "masks")
    # d/2 may be the mask of an image that was not asked for, so c/2 does not get it.
    assert found == {images[0]: [masks[0]], images[1]: [masks[1]]}


@pytest.mark.parametrize("root", [None, "elsewhere"])
def test_masks_are_found_by_name_where_no_path_fits(tmp_path: Path, root: str | None) -> None:
    images = touch(tmp_path / "images", "a/1.png", "b/2.png", "b/3.png")
    masks = touch(tmp_path / "masks", "2.png", "deep/1.bmp", "readme.txt")
    found = find_masks(images, None if root is None else tmp_path / root, tmp_path / "masks")
    assert found == {images[0]: [masks[1]], images[1]: [masks[0]]}
    assert list(found) == images[:2]


def test_relative_and_absolute_folders_may_be_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "images/a/1.png", "images/b/1.png", "masks/a/1.png", "masks/b/1.png")
    monkeypatch.chdir(tmp_path)
    image = Path("images/b/1.png")
    assert find_masks([image], tmp_path / "images", Path("masks")) == {image: [Path("masks/b/1.png")]}


@pytest.mark.parametrize(
    "ending", ["_mask", "_Mask", "_masks", "_seg", "-SEG", " mask", "_segmentation", "_mask_1", ""]
)
@pytest.mark.parametrize("root", [True, False])
def test_names_of_masks_may_have_an_ending(tmp_path: Path, ending: str, root: bool) -> None:
    images = touch(tmp_path / "images", "benign (1).png", "benign (2).png")
    masks = touch(tmp_path / "masks", f"benign (2){ending}.tiff")
    found = find_masks(images, tmp_path / "images" if root else None, tmp_path / "masks")
    assert found == {images[1]: [masks[0]]}


def test_other_endings_are_part_of_the_name(tmp_path: Path) -> None:
    images = touch(tmp_path / "images", "1.png", "2.png")
    masks = touch(tmp_path / "masks", "1_predicted.png", "1unmask.png", "2.png")
    assert find_masks(images, None, tmp_path / "masks") == {images[1]: [masks[2]]}


def test_an_image_whose_own_name_ends_so_keeps_its_mask(tmp_path: Path) -> None:
    images = touch(tmp_path / "images", "x.png", "x_seg.png")
    masks = touch(tmp_path / "masks", "x.png", "x_seg.png")
    assert find_masks(images, None, tmp_path / "masks") == {
        image: [mask] for image, mask in zip(images, masks, strict=True)
    }


@pytest.mark.parametrize("root", [True, False])
def test_masks_may_lie_among_the_images(tmp_path: Path, root: bool) -> None:
    files = touch(tmp_path, "a/1.png", "a/1_mask.png", "b/2.png")
    found = find_masks(files, tmp_path if root else None, tmp_path)
    assert found == {files[0]: [files[1]]}


def test_an_image_is_never_its_own_mask(tmp_path: Path) -> None:
    files = touch(tmp_path, "1.png", "2.png")
    with pytest.raises(UserError, match="no mask in"):
        find_masks(files, tmp_path, tmp_path)
    files = touch(tmp_path / "other", "a/1.png", "b/1.png")
    with pytest.raises(UserError, match="no mask in"):
        find_masks(files, None, tmp_path / "other")


def test_images_whose_folder_is_unknown_are_known_by_their_pixels(tmp_path: Path) -> None:
    """An image below the folder of masks is not its own mask, though its name would fit."""
    images = [Path("a/1.png"), Path("a/2.png"), Path("a/3.png")]
    files = [save(tmp_path / image, corner(value=number + 7)) for number, image in enumerate(images)]
    hashes = {image: hash_pixels(read_rgb(file)) for image, file in zip(images, files, strict=True)}
    mask = save(tmp_path / "a" / "1_Mask.png")
    save(files[2])  # another picture of the third's name is its mask
    assert find_masks(images, Path(), tmp_path, hashes) == {images[0]: [mask], images[2]: [files[2]]}
    assert find_masks(images, Path(), tmp_path / "a", hashes) == {images[0]: [mask], images[2]: [files[2]]}
    with pytest.raises(UserError, match="no mask in"):
        find_masks(images[1:2], Path(), tmp_path, hashes)


@pytest.mark.parametrize(
    "names", [("1.png", "1_mask.png"), ("1_mask.png", "1_seg_1.png"), ("1_mask.png", "1_mask.tif"), ("1.png", "1.tif")]
)
@pytest.mark.parametrize("root", [True, False])
def test_two_masks_of_one_image_are_refused_by_name(tmp_path: Path, names: tuple[str, str], root: bool) -> None:
    images = touch(tmp_path / "images", "1.png")
    masks = touch(tmp_path / "masks", *names)
    with pytest.raises(UserError) as caught:
        find_masks(images, tmp_path / "images" if root else None, tmp_path / "masks")
    assert all(str(path) in caught.value.problem for path in [*images, *masks])
    assert "merge" in caught.value.fix


def test_numbered_masks_are_the_regions_of_one_image(tmp_path: Path) -> None:
    images = touch(tmp_path / "images", "x_1.LEFT_CC.png", "x_1.LEFT_MLO.png")
    left, right = corner(), corner()[:, ::-1]
    masks = [tmp_path / "masks" / f"x_1.LEFT_CC_Mask{number}.png" for number in ("", "2")]
    masks[0].parent.mkdir()
    for path, pixels in zip(masks, (left, right), strict=True):
        save(path, pixels)
    assert find_masks(images, None, tmp_path / "masks") == {images[0]: masks}
    joined = read_mask(masks, SIZE, 4)
    assert np.array_equal(joined, small_corner() | small_corner()[:, ::-1])
    save(masks[1], np.zeros_like(right))  # a lesion that was not drawn does not take the other's place
    assert np.array_equal(read_mask(masks, SIZE, 4), small_corner())


def test_two_masks_with_the_image_s_name_are_told_apart_by_folders_only(tmp_path: Path) -> None:
    images = touch(tmp_path / "images", "a/1.png")
    masks = touch(tmp_path / "masks", "a/1.png", "b/1.png")
    assert find_masks(images, tmp_path / "images", tmp_path / "masks") == {images[0]: [masks[0]]}
    with pytest.raises(UserError, match="two masks fit"):
        find_masks(images, None, tmp_path / "masks")


def test_one_mask_for_two_images_is_refused(tmp_path: Path) -> None:
    images = touch(tmp_path / "images", "a/1.png", "b/1.png")
    (mask,) = touch(tmp_path / "masks", "1.png")
    with pytest.raises(UserError) as caught:
        find_masks(images, tmp_path / "images", tmp_path / "masks")
    assert all(str(path) in caught.value.problem for path in [*images, mask])


def test_a_folder_without_masks_is_refused(tmp_path: Path) -> None:
    images = touch(tmp_path / "images", "1.png")
    with pytest.raises(UserError, match="no such folder: give the folder of the masks"):
        find_masks(images, None, tmp_path / "masks")
    touch(tmp_path / "masks", "1.txt")
    with pytest.raises(UserError, match="holds no mask"):
        find_masks(images, None, tmp_path / "masks")
    touch(tmp_path / "masks", "7.png")
    with pytest.raises(UserError, match=r"any of the 1 images: name the masks like the images \(1.png, not 7.png\)"):
        find_masks(images, None, tmp_path / "masks")


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
@pytest.mark.parametrize("value", [1, 7, 255])
def test_any_value_but_zero_is_region(tmp_path: Path, suffix: str, value: int) -> None:
    path = save(tmp_path / f"mask.{suffix}", corner(value=value))
    assert np.array_equal(read_mask(path, SIZE, 4), small_corner())


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("value", [1, 65535])
def test_sixteen_bit_labels_are_not_lost(tmp_path: Path, suffix: str, value: int) -> None:
    path = save(tmp_path / f"mask.{suffix}", corner(np.uint16, value))
    assert np.array_equal(read_mask(path, SIZE, 4), small_corner())


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_whole_and_real_numbers(tmp_path: Path, dtype: type) -> None:
    path = save(tmp_path / "mask.tif", corner(dtype, 1))
    assert np.array_equal(read_mask(path, SIZE, 4), small_corner())


def test_undefined_numbers_are_no_region(tmp_path: Path) -> None:
    pixels = corner(np.float32, 1)
    pixels[8:] = np.nan
    assert np.array_equal(read_mask(save(tmp_path / "mask.tif", pixels), SIZE, 4), small_corner())


@pytest.mark.parametrize("channel", [0, 1, 2])
@pytest.mark.parametrize("alpha", [255, 0])
def test_any_channel_counts_but_alpha(tmp_path: Path, channel: int, alpha: int) -> None:
    pixels = np.zeros((16, 20, 4), np.uint8)
    pixels[..., channel], pixels[..., 3] = corner(value=9), alpha
    assert np.array_equal(read_mask(save(tmp_path / "mask.png", pixels), SIZE, 4), small_corner())


def test_alpha_of_grey_does_not_count(tmp_path: Path) -> None:
    path = save(tmp_path / "mask.png", np.dstack([corner(), np.full((16, 20), 255, np.uint8)]))
    with Image.open(path) as image:
        assert image.mode == "LA"
    assert np.array_equal(read_mask(path, SIZE, 4), small_corner())


def test_bits_and_palettes(tmp_path: Path) -> None:
    bits = save(tmp_path / "bits.png", corner() > 0)
    assert np.array_equal(read_mask(bits, SIZE, 4), small_corner())
    image = Image.fromarray(np.where(corner() > 0, 0, 1).astype(np.uint8)).convert("P")
    image.putpalette([200, 0, 0, 0, 0, 0])  # index 0 is red and index 1 black
    image.save(tmp_path / "palette.png")
    assert np.array_equal(read_mask(tmp_path / "palette.png", SIZE, 4), small_corner())


def test_noise_of_jpeg_is_no_region(tmp_path: Path) -> None:
    pixels = np.zeros((64, 64), np.uint8)
    pixels[:21, :21] = 255
    path = save(tmp_path / "mask.jpg", pixels, quality=60)
    with Image.open(path) as image:
        assert (np.asarray(image) > 0).sum() > 1.1 * 21**2
    assert read_mask(path, (64, 64), 64).sum() == pytest.approx(21**2, rel=0.02)


def test_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn: the upper left comes to the upper right
    path = save(tmp_path / "mask.png", exif=exif)
    assert np.array_equal(read_mask(path, (16, 20), 4), small_corner()[:, ::-1])


def test_masks_have_the_geometry_of_their_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    coarse = rng.random((23, 35)) < 0.5
    pixels = np.kron(coarse, np.ones((20, 20))).astype(np.uint8) * 255  # 460 x 700, as BreakHis
    path = save(tmp_path / "mask.png", pixels)
    as_image = decode(path, 224).pixels[..., 0] > 127
    mask = read_mask(path, (700, 460), 224)
    assert mask.shape == (224, 224)
    assert mask.dtype == bool
    assert (mask == as_image).mean() > 0.98
    assert (mask != as_image.T).mean() > 0.3


def test_half_covered_pixels_are_region(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:, 0] = pixels[:8, 5] = 255  # half of the first column's width; a quarter of a pixel further on
    expected = np.zeros((8, 8), bool)
    expected[:, 0] = expected[:4, 2] = True
    path = save(tmp_path / "mask.png", pixels)
    assert np.array_equal(read_mask(path, (16, 16), 8), expected)
    pixels[::2, 0] = 0
    assert not read_mask(save(path, pixels), (16, 16), 8)[:, 0].any()


def test_parts_of_pixels_count_by_their_area(tmp_path: Path) -> None:
    # Three columns to two: each output column takes one and a half, so the middle one alone is a third, not a half.
    middle, edge = np.zeros((2, 30, 30), np.uint8)
    middle[:, 1::3], edge[:, ::3] = 1, 1
    with pytest.raises(MaskProblem, match="too small"):
        read_mask(save(tmp_path / "middle.png", middle), (30, 30), 20)
    mask = read_mask(save(tmp_path / "edge.png", edge), (30, 30), 20)
    assert np.array_equal(mask, np.tile([True, False], (20, 10)))


def test_small_masks_are_enlarged(tmp_path: Path) -> None:
    assert np.array_equal(read_mask(save(tmp_path / "mask.png"), SIZE, 80), small_corner(80))


@pytest.mark.parametrize("size", [(16, 20), (40, 32), (20, 17)])
def test_another_size_is_a_problem(tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(MaskProblem, match=f"the mask has 20x16 pixels, its image {size[0]}x{size[1]}") as caught:
        read_mask(save(tmp_path / "mask.png"), size, 4)
    assert caught.value.kind == "mismatched"


def test_a_mask_without_region_is_a_problem(tmp_path: Path) -> None:
    with pytest.raises(MaskProblem, match="no pixel") as caught:
        read_mask(save(tmp_path / "mask.png", corner(value=0)), SIZE, 4)
    assert caught.value.kind == "empty"
    dot = np.zeros((16, 20), np.uint8)
    dot[3, 3] = 255
    with pytest.raises(MaskProblem, match="too small to be seen at 4 pixels") as caught:
        read_mask(save(tmp_path / "mask.png", dot), SIZE, 4)
    assert caught.value.kind == "empty"
    assert read_mask(tmp_path / "mask.png", SIZE, 20).sum() == 1


@pytest.mark.parametrize("kind", ["text", "truncated", "frames", "cmyk", "folder"])
def test_unreadable_masks_are_a_problem(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("mask.tif" if kind in ("frames", "cmyk") else "mask.png")
    if kind == "text":
        path.write_text("not an image")
    elif kind == "truncated":
        save(path, np.random.default_rng(0).integers(0, 255, (60, 60), np.uint8))
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "frames":
        Image.new("L", SIZE).save(path, save_all=True, append_images=[Image.new("L", SIZE)])
    elif kind == "cmyk":
        Image.new("CMYK", SIZE).save(path)
    else:
        path.mkdir()
    with pytest.raises(MaskProblem) as caught:
        read_mask(path, SIZE, 4)
    assert caught.value.kind == "unreadable"
    assert str(caught.value)


def test_load_masks_sorts_out_what_cannot_be_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ("good", "none", "large", "empty", "broken", "late")
    images = [tmp_path / "images" / f"{name}.png" for name in names]  # the masks alone are read
    folder = tmp_path / "masks"
    save(folder / "good_mask.png")
    save(folder / "large_mask.png", np.ones((32, 40), np.uint8))
    save(folder / "empty_mask.png", corner(value=0))
    touch(folder, "broken_mask.png")
    save(folder / "late_mask.png", np.ones((30, 30), np.uint8))
    with caplog.at_level(logging.WARNING):
        found = load_masks(images, [SIZE] * 5 + [(30, 30)], tmp_path / "images", folder, 4)
    assert found.index.tolist() == [0, 5]
    assert found.index.dtype == np.int64
    assert np.array_equal(found.masks, [small_corner(), np.ones((4, 4), bool)])
    assert found.missing == (str(images[1]),)
    assert found.mismatched == (str(images[2]),)
    assert found.empty == (str(images[3]),)
    assert found.unreadable == (str(images[4]),)
    assert "large_mask.png: the mask has 40x32 pixels, its image 20x16" in caplog.text
    facts = json.loads(json.dumps(found.to_json()))
    assert facts["num_masks"] == 2
    assert facts["unreadable"] == [str(images[4])]


def test_load_masks_without_a_usable_one_is_empty(tmp_path: Path) -> None:
    save(tmp_path / "masks" / "1.png")
    found = load_masks([tmp_path / "1.png"], [(9, 9)], None, tmp_path / "masks", 8)
    assert found.masks.shape == (0, 8, 8)
    assert found.masks.dtype == bool
    assert len(found.mismatched) == 1


@pytest.mark.real
def test_real_nuclei_masks(real_data: Path) -> None:
    root = real_data / "tnbc_nuclei"
    images = sorted((root / "images").glob("*.png"))
    found = load_masks(images, [(512, 512)] * len(images), root / "images", root / "masks", 224)
    assert found.index.tolist() == list(range(30))
    shares = found.masks.mean(axis=(1, 2))
    assert 0.005 < shares.min() < 0.02  # 0.85 % of 04_5
    assert 0.3 < shares.max() < 0.6
    full = np.array([read_mask(root / "masks" / image.name, (512, 512), 512).mean() for image in images])
    assert shares == pytest.approx(full, rel=0.02)
    # Nuclei are darker than what surrounds them, if image and mask belong together.
    for image, mask in zip(images, found.masks, strict=True):
        grey = decode(image, 224).pixels.mean(axis=2)
        assert grey[mask].mean() < grey[~mask].mean() - 10
