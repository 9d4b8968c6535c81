"""Finding and reading the masks that say where in an image the region of interest lies."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from breastcli.data.datasets import IMAGE_SUFFIXES, image_files
from breastcli.data.images import SIXTEEN_BIT_MODES, RejectedImageError, hash_pixels, open_image, read_rgb
from breastcli.errors import UserError

logger = logging.getLogger(__name__)

MASK_ENDING = re.compile(r"[ _-](?:masks?|seg|segmentation|gt|annotation)(?:[ _-]?\d+)?$", re.IGNORECASE)
COLOUR_MODES = ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "YCbCr")
GREY_MODES = ("1", "L", "I", "F", *SIXTEEN_BIT_MODES)
LOSSY_FORMATS = ("JPEG", "MPO")
HALF = 0.5 - 1e-5  # rounding must not decide over a pixel that is covered by exactly half

ProblemKind = Literal["mismatched", "empty", "unreadable"]


class MaskProblem(Exception):
    """A mask that cannot be used; the message is the reason.

    Attributes:
        kind: "mismatched" (not as large as its image), "empty" (without a region) or "unreadable".
    """

    def __init__(self, kind: ProblemKind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class MaskSet:
    """The masks of some of N images, and what is wrong with the others'.

    Attributes:
        masks: (n, S, S) bool, True in the region.
        index: (n,) int64, increasing: the row of each mask's image among the N.
        missing: images without a mask.
        mismatched: images whose mask has another width or height.
        empty: images whose mask holds no region.
        unreadable: images whose mask cannot be read.
    """

    masks: np.ndarray
    index: np.ndarray
    missing: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return how many masks can be used, and the images whose mask cannot."""
        lists = {name: list(getattr(self, name)) for name in ("missing", "mismatched", "empty", "unreadable")}
        return {"num_masks": len(self.index), **lists}


def find_masks(
    images: Sequence[Path], image_root: Path | None, masks: Path, pixel_hashes: Mapping[Path, str] | None = None
) -> dict[Path, list[Path]]:
    """Match the files of a folder of masks with images.

    A mask belongs to the image with the same path below ``image_root`` as the mask has below ``masks``. Where no mask
    has an image's path, file names alone decide; never for some images only, because the mask of an image that was not
    asked for could then fall to another of its name. Suffixes do not count, nor does an ending such as ``_mask``,
    ``_Mask``, ``-seg`` or ``_mask_1``. Masks may lie among the images. Masks that differ by the number at their end
    (``_Mask``, ``_Mask2``) are the several regions of one image.

    Args:
        images: files.
        image_root: the folder that the images' paths are compared from; None compares file names alone.
        masks: folder of PNG, TIFF, JPEG or BMP files.
        pixel_hashes: of images whose files may be anywhere, also below ``masks``: a file with an image's own name and
            its very pixels is that image, not its mask.

    Returns:
        the masks of each image that has any, in the order of ``images``.

    Raises:
        UserError: the folder is missing or holds no mask of any image; two masks of other names fit one image, or one
            mask two images.
    """
    if not masks.is_dir():
        raise UserError(f"{masks}: no such folder", fix="give the folder of the masks")
    files = image_files(masks)
    if not files:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"{masks} holds no mask", fix=f"give a folder of files that end in {suffixes}")
    hashes = pixel_hashes or {}
    found = _without_images(_candidates({image: _below(image, image_root) for image in images}, files, masks), hashes)
    if not found:
        found = _without_images(_candidates({image: image.stem for image in images}, files), hashes)
    if images and not found:
        raise UserError(
            f"no mask in {masks} belongs to any of the {len(images)} images",
            fix=f"name the masks like the images ({images[0].name}, not {files[0].name})",
        )
    _refuse_ambiguity(found)
    return {image: sorted(found[image]) for image in images if image in found}


def read_mask(path: Path | Sequence[Path], size_px: tuple[int, int], out_px: int) -> np.ndarray:
    """Read a mask and give it the geometry of its prepared image.

    A pixel belongs to the region where any channel is not zero. Alpha never counts, and a palette counts by its
    colours. JPEG blurs edges, so there half of the full brightness is needed. EXIF orientation is applied, as to
    images. Resizing is that of images (to a square, aspect ratio not kept) but by area: an output pixel is region where
    at least half of what it covers is.

    Args:
        path: file, or several of one image, whose regions are joined.
        size_px: width and height of the image before resizing.
        out_px: side S of the result.

    Returns:
        (S, S) bool with at least one True.

    Raises:
        MaskProblem: it cannot be read, its width or height differs from the image's (another resolution of the same
            shape too), or no region is left.
    """
    width, height = size_px
    region = np.zeros((height, width), dtype=bool)
    for file in [path] if isinstance(path, Path) else path:
        part = _read_region(file)
        if part.shape != region.shape:
            found = f"{part.shape[1]}x{part.shape[0]}"
            raise MaskProblem("mismatched", f"the mask has {found} pixels, its image {width}x{height}")
        region |= part
    if not region.any():
        raise MaskProblem("empty", "no pixel of the mask is set")
    # Pillow's box filter takes whole pixels only, and nearest neighbours lose thin regions.
    covered = _area_weights(height, out_px) @ region.astype(np.float32) @ _area_weights(width, out_px).T
    resized = covered >= HALF
    if not resized.any():
        raise MaskProblem("empty", f"its region is too small to be seen at {out_px} pixels")
    return resized


def load_masks(
    images: Sequence[Path],
    sizes_px: Sequence[tuple[int, int]],
    image_root: Path | None,
    masks: Path,
    out_px: int,
    pixel_hashes: Mapping[Path, str] | None = None,
) -> MaskSet:
    """Find and read the masks of N images, sorting out those that cannot be used.

    Args:
        images: files; they need not be there any more.
        sizes_px: (N,) width and height of each before resizing.
        image_root: see ``find_masks``.
        masks: folder.
        out_px: side S of the prepared images.
        pixel_hashes: see ``find_masks``.

    Raises:
        UserError: see ``find_masks``.
    """
    matched = find_masks(images, image_root, masks, pixel_hashes)
    names: dict[str, list[str]] = {"missing": [], "mismatched": [], "empty": [], "unreadable": []}
    index: list[int] = []
    regions: list[np.ndarray] = []
    for row, (image, size_px) in enumerate(zip(images, sizes_px, strict=True)):
        if image not in matched:
            names["missing"].append(str(image))
            continue
        try:
            regions.append(read_mask(matched[image], size_px, out_px))
            index.append(row)
        except MaskProblem as problem:
            names[problem.kind].append(str(image))
            logger.warning("left out mask %s: %s", matched[image][0], problem)
    stack = np.stack(regions) if regions else np.zeros((0, out_px, out_px), dtype=bool)
    lists = {kind: tuple(found) for kind, found in names.items()}
    return MaskSet(stack, np.array(index, dtype=np.int64), **lists)


def _below(image: Path, root: Path | None) -> str | None:
    """Return the image's path below ``root`` without its suffix, or None where it lies elsewhere."""
    if root is None or not image.absolute().is_relative_to(root.absolute()):
        return None
    return image.absolute().relative_to(root.absolute()).with_suffix("").as_posix()


def _candidates(
    keys: dict[Path, str | None], files: Sequence[Path], masks: Path | None = None
) -> dict[Path, list[Path]]:
    """Return the masks that fit each image's key: as they are called or, where no image is called so, less the ending.

    Args:
        keys: image to the name that its mask must have, None where it looks for none.
        files: masks.
        masks: folder that the masks' names are paths below; None for file names.
    """
    owners: dict[str, list[Path]] = defaultdict(list)
    for image, key in keys.items():
        if key is not None:
            owners[key].append(image)
    are_images = {image.absolute() for image in keys}
    found: dict[Path, list[Path]] = defaultdict(list)
    for file in files:
        name = file.stem if masks is None else file.relative_to(masks).with_suffix("").as_posix()
        shortened = MASK_ENDING.sub("", name)
        # An image can be the mask of another one only if its name says that it is a mask.
        wanted = [shortened] if file.absolute() in are_images else [name, shortened]
        if wanted == [name]:
            continue
        for image in next((owners[one] for one in wanted if one in owners), []):
            found[image].append(file)
    return found


def _without_images(found: dict[Path, list[Path]], pixel_hashes: Mapping[Path, str]) -> dict[Path, list[Path]]:
    """Leave out files that are the images themselves."""
    left = {
        image: [file for file in files if file.stem != image.stem or not _shows(file, pixel_hashes.get(image))]
        for image, files in found.items()
    }
    return {image: files for image, files in left.items() if files}


def _shows(file: Path, pixel_hash: str | None) -> bool:
    """Whether a file holds the very pixels that an image's hash was taken of."""
    if pixel_hash is None:
        return False
    try:
        return hash_pixels(read_rgb(file)) == pixel_hash
    except RejectedImageError:
        return False


def _refuse_ambiguity(found: dict[Path, list[Path]]) -> None:
    owner: dict[Path, Path] = {}
    for image, files in found.items():
        if len(files) > 1 and not _are_regions(files):
            raise UserError(
                f"two masks fit {image}: {files[0]} and {files[1]}",
                fix="merge them into one file, number them at the end of their names, or arrange the masks in folders "
                "as the images are",
            )
        for file in files:
            if file in owner:
                raise UserError(
                    f"mask {file} fits two images: {owner[file]} and {image}",
                    fix="arrange the masks in folders as the images are",
                )
            owner[file] = image


def _are_regions(files: Sequence[Path]) -> bool:
    """Whether the files are numbered masks of one image: alike but for the number at the end."""
    stems = [file.stem for file in files]
    if len(set(stems)) < len(stems) or not all(map(MASK_ENDING.search, stems)):
        return False
    return len({(file.parent, re.sub(r"[ _-]?\d+$", "", file.stem)) for file in files}) == 1


def _read_region(path: Path) -> np.ndarray:
    """Return (H, W) bool at the file's own size."""
    try:
        with open_image(path) as file:
            image, lossy = ImageOps.exif_transpose(file), file.format in LOSSY_FORMATS
    except RejectedImageError as rejection:
        raise MaskProblem("unreadable", str(rejection)) from None
    return _region(image, lossy=lossy)


def _area_weights(size_px: int, out_px: int) -> np.ndarray:
    """Return (out, size) shares: how much of each output pixel each input pixel covers."""
    edges = np.linspace(0, size_px, out_px + 1)[:, None]
    pixels = np.arange(size_px)
    shared = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    return (np.maximum(shared, 0) * out_px / size_px).astype(np.float32)


def _region(image: Image.Image, *, lossy: bool) -> np.ndarray:
    if image.mode in ("LA", "La"):
        image = image.getchannel("L")
    if image.mode in COLOUR_MODES:
        pixels = np.asarray(image.convert("RGB")).max(axis=2)
    elif image.mode in GREY_MODES:
        pixels = np.asarray(image)
    else:
        raise MaskProblem("unreadable", f"{image.mode} colours")
    return pixels >= 128 if lossy else np.nan_to_num(pixels) != 0
