"""Finding and reading the masks that say where in an image the region of interest lies."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from breastcli.data.datasets import IMAGE_SUFFIXES, image_files
from breastcli.data.images import SIXTEEN_BIT_MODES, RejectedImageError, open_image
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


def find_masks(images: Sequence[Path], image_root: Path | None, masks: Path) -> dict[Path, Path]:
    """Match the files of a folder of masks with images.

    A mask belongs to the image with the same path below ``image_root`` as the mask has below ``masks``. Where no mask
    has an image's path, file names alone decide; never for some images only, because the mask of an image that was not
    asked for could then fall to another of its name. Suffixes do not count, nor does an ending such as ``_mask``,
    ``_Mask``, ``-seg`` or ``_mask_1``. Masks may lie among the images.

    Args:
        images: files.
        image_root: the folder that the images' paths are compared from; None compares file names alone.
        masks: folder of PNG, TIFF, JPEG or BMP files.

    Returns:
        mask of each image that has one, in the order of ``images``.

    Raises:
        UserError: the folder is missing or holds no mask of any image; two masks fit one image, or one mask two images.
    """
    if not masks.is_dir():
        raise UserError(f"{masks}: no such folder", fix="give the folder of the masks")
    files = image_files(masks)
    if not files:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"{masks} holds no mask", fix=f"give a folder of files that end in {suffixes}")
    found = _candidates({image: _below(image, image_root) for image in images}, files, masks)
    if not found:
        found = _candidates({image: image.stem for image in images}, files)
    if images and not found:
        raise UserError(
            f"no mask in {masks} belongs to any of the {len(images)} images",
            fix=f"name the masks like the images ({images[0].name}, not {files[0].name})",
        )
    _refuse_ambiguity(found)
    return {image: found[image][0] for image in images if image in found}


def read_mask(path: Path, size_px: tuple[int, int], out_px: int) -> np.ndarray:
    """Read a mask and give it the geometry of its prepared image.

    A pixel belongs to the region where any channel is not zero. Alpha never counts, and a palette counts by its
    colours. JPEG blurs edges, so there half of the full brightness is needed. EXIF orientation is applied, as to
    images. Resizing is that of images (to a square, aspect ratio not kept) but by area: an output pixel is region where
    at least half of what it covers is.

    Args:
        path: file.
        size_px: width and height of the image before resizing.
        out_px: side S of the result.

    Returns:
        (S, S) bool with at least one True.

    Raises:
        MaskProblem: it cannot be read, its width or height differs from the image's (another resolution of the same
            shape too), or no region is left.
    """
    region = _read_region(path)
    height, width = region.shape
    if (width, height) != tuple(size_px):
        wanted = f"{size_px[0]}x{size_px[1]}"
        raise MaskProblem("mismatched", f"the mask has {width}x{height} pixels, its image {wanted}")
    if not region.any():
        raise MaskProblem("empty", "no pixel of the mask is set")
    # Pillow's box filter takes whole pixels only, and nearest neighbours lose thin regions.
    covered = _area_weights(height, out_px) @ region.astype(np.float32) @ _area_weights(width, out_px).T
    resized = covered >= HALF
    if not resized.any():
        raise MaskProblem("empty", f"its region is too small to be seen at {out_px} pixels")
    return resized


def load_masks(
    images: Sequence[Path], sizes_px: Sequence[tuple[int, int]], image_root: Path | None, masks: Path, out_px: int
) -> MaskSet:
    """Find and read the masks of N images, sorting out those that cannot be used.

    Args:
        images: files; they need not be there any more.
        sizes_px: (N,) width and height of each before resizing.
        image_root: see ``find_masks``.
        masks: folder.
        out_px: side S of the prepared images.

    Raises:
        UserError: see ``find_masks``.
    """
    matched = find_masks(images, image_root, masks)
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
            logger.warning("left out mask %s: %s", matched[image], problem)
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


def _refuse_ambiguity(found: dict[Path, list[Path]]) -> None:
    owner: dict[Path, Path] = {}
    for image, files in found.items():
        if len(files) > 1:
            raise UserError(
                f"two masks fit {image}: {files[0]} and {files[1]}",
                fix="merge them into one file, or arrange the masks in folders as the images are",
            )
        if files[0] in owner:
            raise UserError(
                f"mask {files[0]} fits two images: {owner[files[0]]} and {image}",
                fix="arrange the masks in folders as the images are",
            )
        owner[files[0]] = image


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
