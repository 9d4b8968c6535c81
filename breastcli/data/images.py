"""Reading image files of doubtful origin into square RGB arrays, or saying why not."""

from __future__ import annotations

import contextlib
import hashlib
import stat
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from breastcli.data.measures import Measures, measure
from breastcli.errors import first_line, visible
from breastcli.files import is_utf8

MAX_PIXELS = 100_000_000  # a 10,000 x 10,000 field; larger files are slides or decompression bombs
MIN_SIDE_PX = 16
# What data sets come in. Pillow reads dozens of others, one of which (EPS) starts a program.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")


class RejectedImageError(Exception):
    """An image file that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Decoded:
    """One file after decoding.

    Attributes:
        pixels: (size, size, 3) uint8, or None where the file was rejected.
        width_px: width before resizing (0 where unknown).
        height_px: height before resizing (0 where unknown).
        pixel_hash: SHA-256 of the full-size RGB pixels and their shape, or "" where nobody asked.
        reason: why the file was rejected, or "".
        measures: numbers about the full-size pixels; None where the file was rejected or nobody asked.
    """

    pixels: np.ndarray | None
    width_px: int = 0
    height_px: int = 0
    pixel_hash: str = ""
    reason: str = ""
    measures: Measures | None = None


@contextlib.contextmanager
def open_image(path: Path, min_side_px: int = 1, least_px: int | None = None) -> Iterator[Image.Image]:
    """Yield an image file decoded, whatever it may be in truth; what fails while it is used is rejected as well.

    Nothing is decoded of a file that is no PNG, JPEG, TIFF or BMP, holds several frames, or says that it is larger than
    ``MAX_PIXELS``. Links are followed.

    Args:
        path: image file.
        min_side_px: smaller images are rejected.
        least_px: where a smaller image will do, its least side; a JPEG file is then decoded at a fraction of its size.

    Raises:
        RejectedImageError: with the reason.
    """
    size = None
    try:
        known = path.stat()
        if not stat.S_ISREG(known.st_mode):  # a pipe would be waited for
            raise RejectedImageError("not a regular file")
        size = known.st_size
        with warnings.catch_warnings():
            # Pillow warns about large and odd images on its own scale; the checks below have the say.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            with Image.open(path, formats=FORMATS) as image:
                _check_before_decoding(image, min_side_px)
                if least_px is not None:
                    image.draft(image.mode, (least_px, least_px))
                image.load()
                yield image
    except RejectedImageError:
        raise
    except UnidentifiedImageError:
        reason = "empty file" if size == 0 else "not an image"
        raise RejectedImageError(reason) from None
    except Image.DecompressionBombError:
        raise RejectedImageError(f"more than {MAX_PIXELS:,} pixels") from None
    except MemoryError:
        raise RejectedImageError("too large for this machine's memory") from None
    except Exception as error:  # damaged files make Pillow's decoders raise almost anything
        refused = isinstance(error, OSError) and error.strerror  # by the system, such as for want of permission
        reason = f"cannot be read ({error.strerror})" if refused else f"cannot be decoded ({first_line(error, 120)})"
        raise RejectedImageError(reason) from None


def read_rgb(path: Path, least_px: int | None = None) -> Image.Image:
    """Read an image file as 8-bit RGB.

    Grey, palette and opaque RGBA images are converted; transparency is laid on white, the colour of empty slide; 16-bit
    grey is scaled from its full range. EXIF orientation is applied. Colour spaces whose conversion would invent
    colours (CMYK, Lab, floating point) are rejected. With ``least_px`` it may come smaller, as ``open_image`` says.

    Raises:
        RejectedImageError: with the reason.
    """
    with open_image(path, MIN_SIDE_PX, least_px) as image:
        return _to_rgb(ImageOps.exif_transpose(image))


def hash_pixels(image: Image.Image) -> str:
    """Return the SHA-256 of an image's shape and pixels."""
    digest = hashlib.sha256(f"{image.width}x{image.height}:".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def decode(path: Path, size_px: int, *, inspect: bool = True) -> Decoded:
    """Read a file and resize it to a square (bicubic, aspect ratio not kept, as in the papers).

    Args:
        path: image file.
        size_px: side of the square.
        inspect: whether to hash and measure the image too, which only an audit needs.
    """
    if not is_utf8(path):  # could be written to no table
        return Decoded(None, reason="its name is not UTF-8")
    try:
        image = read_rgb(path)
    except RejectedImageError as rejection:
        return Decoded(None, reason=visible(str(rejection)))
    pixels = np.asarray(image.resize((size_px, size_px), Image.Resampling.BICUBIC))
    if not inspect:
        return Decoded(pixels, image.width, image.height)
    return Decoded(pixels, image.width, image.height, hash_pixels(image), measures=measure(image))


def decode_in_order(paths: Iterable[Path], size_px: int, workers: int, *, inspect: bool = True) -> Iterator[Decoded]:
    """Decode files with ``workers`` threads, yielding in order and holding only a few images at a time.

    Threads suffice: Pillow and hashlib release the interpreter while they work.
    """
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        try:
            for path in paths:
                waiting.append(pool.submit(decode, path, size_px, inspect=inspect))
                if len(waiting) > 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _check_before_decoding(image: Image.Image, min_side_px: int) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise RejectedImageError(f"{image.width}x{image.height} is more than {MAX_PIXELS:,} pixels")
    if min(image.width, image.height) < min_side_px:
        raise RejectedImageError(f"{image.width}x{image.height} is smaller than {min_side_px} pixels")
    if getattr(image, "n_frames", 1) > 1:
        raise RejectedImageError(f"holds {image.n_frames} frames")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in SIXTEEN_BIT_MODES:
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("1", "L", "YCbCr"):
        return image.convert("RGB")
    if image.mode in ("P", "PA", "LA", "La", "RGBA", "RGBa", "RGBX"):
        layered = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
    raise RejectedImageError(f"{image.mode} colours; convert the file to 8-bit RGB with its own colour profile")
