"""Batched stain normalisation: Macenko in optical density, Reinhard in Ruderman's l-alpha-beta."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from breastcli.data.store import read_chunks, write_header
from breastcli.errors import UserError
from breastcli.files import writing

TRANSMITTED = 240.0  # grey level of light that met no tissue (Io)
DENSITY_FLOOR = 0.15  # optical density that tissue reaches in every channel (beta)
ANGLE_PERCENT = 1  # share of tissue pixels beyond each stain's angle (alpha)
MAXIMA_PERCENT = 99  # percentile of the concentrations that counts as their maximum

# What hardly any real field reaches. With less tissue than this the 99th percentile would measure background; the
# others lie far outside what 111 BreakHis fields show: 12-32 degrees, maxima of 0.37-1.83, spreads of 0.051, 0.010
# and 0.0012 or more.
TISSUE_SHARE_FLOOR = 0.01
ANGLE_FLOOR_DEG = 3.0
MAXIMA_RANGE = (0.1, 10.0)
SPREAD_FLOORS = (1e-2, 2e-3, 3e-4)  # standard deviations of l, alpha and beta

RGB_TO_LMS = ((0.3811, 0.5783, 0.0402), (0.1967, 0.7244, 0.0782), (0.0241, 0.1288, 0.8444))

# Small enough for the float copies to stay in a processor's cache, large enough to hide the cost of a call.
PIXELS_AT_ONCE = 2**18
SAMPLED_PIXELS = 20_000  # of an image, to measure its stain on
IMAGES_AT_ONCE = 32  # of an array file


@dataclass(frozen=True)
class StainReference:
    """The stain that images are normalised to, as plain values.

    Attributes:
        method: "macenko" or "reinhard".
        source: "published", "training images" or the name of a file.
        matrix: Macenko: 3 x 2, unit stain vectors in optical density, columns haematoxylin and eosin.
        maxima: Macenko: 99th percentile of the two concentrations.
        mean: Reinhard: mean of l, alpha and beta (decimal logarithms).
        std: Reinhard: standard deviation of l, alpha and beta.
        max_pixels: the own stain of an image to normalise is measured on at most this many of its pixels; None for all.
    """

    method: str
    source: str
    matrix: tuple[tuple[float, float], ...] = ()
    maxima: tuple[float, float] | tuple[()] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    max_pixels: int | None = SAMPLED_PIXELS

    def to_json(self) -> dict[str, Any]:
        """Return what ``from_json`` reads back to an equal reference."""
        values = asdict(self)
        if self.max_pixels == SAMPLED_PIXELS:  # the same images keep the fingerprint that they had without this field
            del values["max_pixels"]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StainReference:
        """Read what ``to_json`` returned, also after a trip through a JSON file.

        Raises:
            UserError: a key is missing, or a list has the wrong length for the method.
        """
        try:
            plain = {name: tuple(float(value) for value in values[name]) for name in ("maxima", "mean", "std")}
            matrix = tuple(tuple(float(value) for value in row) for row in values["matrix"])
            max_pixels = values.get("max_pixels", SAMPLED_PIXELS)
            reference = cls(
                str(values["method"]),
                str(values["source"]),
                matrix,
                max_pixels=None if max_pixels is None else int(max_pixels),
                **plain,  # type: ignore[arg-type]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"stain reference cannot be read ({error!r})", fix="run prepare again") from error
        lengths = ([len(row) for row in matrix], len(reference.maxima), len(reference.mean), len(reference.std))
        if lengths != {"macenko": ([2, 2, 2], 2, 0, 0), "reinhard": ([], 0, 3, 3)}.get(reference.method):
            raise UserError(f"stain reference does not suit method {reference.method!r}", fix="run prepare again")
        return reference


PUBLISHED_MACENKO = StainReference(
    "macenko", "published", matrix=((0.5626, 0.2159), (0.7201, 0.8012), (0.4062, 0.5581)), maxima=(1.9705, 1.0308)
)


def fit_reference(images: Tensor, method: str, *, source: str) -> StainReference:
    """Measure the stain of one image, or the typical stain of several.

    Several images give the component-wise median over those with enough stained tissue, so that a few odd ones among
    them do no harm; stain vectors are brought back to unit length afterwards. Every pixel is read.

    Args:
        images: (B, 3, H, W) uint8 RGB.
        method: "macenko" or "reinhard".
        source: where the images come from, kept in the reference.

    Raises:
        UserError: no image has enough stained tissue.
    """
    statistics = {"macenko": _macenko_statistics, "reinhard": _reinhard_statistics}[method]
    measured = [statistics(image.flatten(2).contiguous()) for image in images.split(1)]  # one by one bounds the memory
    first, second, usable = (torch.cat(parts) for parts in zip(*measured, strict=True))
    if not usable.any():
        raise UserError(
            f"no image has enough stained tissue to fit a {method} reference on ({source})",
            fix="choose an image that shows stained tissue, or --stain none",
        )
    first, second = (part[usable].quantile(0.5, dim=0) for part in (first, second))
    if method == "reinhard":
        return StainReference(method, source, mean=tuple(first.tolist()), std=tuple(second.tolist()))
    first = first / first.norm(dim=0)
    return StainReference(
        method, source, matrix=tuple(tuple(row) for row in first.tolist()), maxima=tuple(second.tolist())
    )


def normalise_stain(images: Tensor, reference: StainReference) -> tuple[Tensor, Tensor]:
    """Give every image the stain of the reference; images without measurable stain stay as they are.

    An image falls back to itself where less than 1 % of its pixels are tissue (optical density of at least 0.15 in
    every channel), or where its stain cannot be told apart: Macenko, stain vectors less than 3 degrees apart or maxima
    outside 0.1-10; Reinhard, hardly any spread in l, alpha or beta. That takes in empty, pale, black, single-coloured
    and grey fields. Nothing is computed across images, so an image's result does not depend on the rest of the batch.

    Source: Macenko et al., A method for normalizing histology slides for quantitative analysis, ISBI 2009; Reinhard et
    al., Color transfer between images, IEEE CG&A 21(5), 2001, eq. 2-11.

    Differs from the paper: Macenko, optical density is -ln((grey level + 1) / 240) and results are cut off to whole
    grey levels, as in the common implementations. Reinhard, grey levels are taken plus one (black has no logarithm).

    Args:
        images: (B, 3, H, W) uint8 RGB, on any device.
        reference: the stain to reach, and on how many of its pixels each image's own stain is measured.

    Returns:
        (B, 3, H, W) uint8 and, (B,) bool, which images fell back.
    """
    normalise = {"macenko": _normalise_macenko, "reinhard": _normalise_reinhard}[reference.method]
    height, width = images.shape[2:]
    stride = _stride(height * width, width, reference.max_pixels)
    results, flags = [], []
    for chunk in images.split(max(1, PIXELS_AT_ONCE // (height * width))):
        pixels = chunk.flatten(2).contiguous()  # (b, 3, N); sums over another layout would round otherwise
        result, usable = normalise(pixels, pixels[:, :, ::stride], reference)
        result[~usable] = pixels[~usable]
        results.append(result.unflatten(2, (height, width)))
        flags.append(~usable)
    return torch.cat(results), torch.cat(flags)


def normalise_file(
    source: Path,
    target: Path,
    num_images: int,
    size_px: int,
    reference: StainReference,
    device: torch.device,
    on_chunk: Callable[[int], None] = lambda count: None,
) -> list[bool]:
    """Write the images of one array file, normalised, to another, in chunks so that memory use stays flat.

    Args:
        source: file of (N, size, size, 3) uint8, as ``decode_into`` leaves it.
        target: file to write, of the same shape.
        num_images: N.
        size_px: side of the images.
        reference: the stain to reach.
        device: where to compute.
        on_chunk: called with the number of images of every finished chunk.

    Returns:
        For each image whether it fell back to itself, see ``normalise_stain``.
    """
    fell_back: list[bool] = []
    with writing(target), target.open("wb") as file:
        write_header(file, num_images, size_px)
        for chunk in read_chunks(source, num_images, size_px, IMAGES_AT_ONCE):
            images = torch.tensor(chunk, device=device).permute(0, 3, 1, 2)
            normalised, failed = normalise_stain(images, reference)
            file.write(normalised.permute(0, 2, 3, 1).contiguous().cpu().numpy().tobytes())
            fell_back += failed.tolist()
            on_chunk(len(chunk))
    return fell_back


def _normalise_macenko(pixels: Tensor, sample: Tensor, reference: StainReference) -> tuple[Tensor, Tensor]:
    """Swap stain vectors and concentration maxima for the reference's.

    Unmixing, scaling and mixing are linear in optical density, hence one 3 x 3 matrix per image.

    Args:
        pixels: (B, 3, N) uint8.
        sample: (B, 3, n) uint8, the pixels to measure the stain on.

    Returns:
        (B, 3, N) uint8, meaningless where the stain could not be measured, and (B,) bool: it could.
    """
    vectors, maxima, usable = _macenko_statistics(sample)
    scaled = vectors.new_tensor(reference.matrix) * (vectors.new_tensor(reference.maxima) / maxima)[:, None]
    matrix = _combine(scaled, _unmixing(vectors))  # (B, 3, 3)
    offset = math.log(TRANSMITTED) * (1 - matrix.sum(dim=2, keepdim=True))  # (B, 3, 1)
    density = _combine(matrix, pixels.float().add_(1).log_())
    return _to_bytes(density.add_(offset).exp_()), usable & _all_finite(matrix + offset)


def _macenko_statistics(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Measure stain vectors and maxima.

    Args:
        pixels: (B, 3, N) uint8.

    Returns:
        (B, 3, 2) unit stain vectors, (B, 2) maxima, and (B,) bool: whether they can be relied on.
    """
    density = math.log(TRANSMITTED) - pixels.float().add_(1).log_()
    tissue = (density >= DENSITY_FLOOR).all(dim=1)  # (B, N)
    vectors = _stain_vectors(density, tissue)
    num_pixels = pixels.shape[2]
    concentrations = _combine(_unmixing(vectors), density)  # (B, 2, N)
    num_above = num_pixels - _nearest_rank(num_pixels, MAXIMA_PERCENT)
    maxima = concentrations.topk(num_above, dim=2).values[:, :, -1]
    low, high = MAXIMA_RANGE
    usable = tissue.sum(dim=1) >= TISSUE_SHARE_FLOOR * num_pixels
    usable &= _sine_squared(vectors) >= math.sin(math.radians(ANGLE_FLOOR_DEG)) ** 2
    usable &= ((maxima >= low) & (maxima <= high)).all(dim=1)
    return vectors, maxima, usable


def _stain_vectors(density: Tensor, tissue: Tensor) -> Tensor:
    """Find the two extreme directions of the plane that holds most of the tissue's optical density.

    Source: Macenko et al., ISBI 2009, section 2.2. As in the common implementations, the plane is that of the centred
    covariance and haematoxylin is the vector with more red; where both have nearly the same red, which one comes first
    hangs on the choice of pixels.

    Args:
        density: (B, 3, N).
        tissue: (B, N) bool.

    Returns:
        (B, 3, 2) unit vectors, haematoxylin and eosin; anything, NaN included, where tissue is too little or uniform.
    """
    num_tissue = tissue.sum(dim=1)
    weight = tissue[:, None].float()
    mean = (density * weight).sum(dim=2) / num_tissue.clamp(min=1)[:, None]  # (B, 3)
    centred = (density - mean[:, :, None]) * weight
    scatter = (centred[:, :, None] * centred[:, None]).sum(dim=3)  # the covariance up to a factor
    plane = torch.linalg.eigh(scatter).eigenvectors[:, :, 1:]  # (B, 3, 2), the largest last
    # An eigenvector's sign is arbitrary: with tissue in the first quadrant its angles stay clear of the jump at pi.
    plane = plane * torch.where((plane * mean[:, :, None]).sum(dim=1, keepdim=True) < 0, -1.0, 1.0)
    across, along = _combine(plane.transpose(1, 2), density).unbind(dim=1)
    angle = torch.atan2(along, across)  # (B, N)

    # Both percentiles lie within the first or last hundredth, which is much quicker to pick out than to sort all.
    most = min(_nearest_rank(tissue.shape[1], ANGLE_PERCENT) + 2, tissue.shape[1])
    lowest = angle.masked_fill(~tissue, math.inf).topk(most, largest=False).values
    highest = angle.masked_fill(~tissue, -math.inf).topk(most).values
    from_below = _nearest_rank(num_tissue, ANGLE_PERCENT).clamp(min=0)[:, None]
    from_above = (num_tissue - 1 - _nearest_rank(num_tissue, 100 - ANGLE_PERCENT)).clamp(min=0)[:, None]
    extremes = torch.cat((lowest.gather(1, from_below), highest.gather(1, from_above)), dim=1)  # (B, 2)
    vectors = _combine(plane, torch.stack((extremes.cos(), extremes.sin()), dim=1))
    return torch.where(vectors[:, :1, :1] > vectors[:, :1, 1:], vectors, vectors.flip(2))


def _unmixing(vectors: Tensor) -> Tensor:
    """Return the pseudo-inverse (B, 2, 3) of unit stain vectors (B, 3, 2)."""
    cosine = (vectors[:, :, 0] * vectors[:, :, 1]).sum(dim=1)[:, None, None]
    transposed = vectors.transpose(1, 2)
    return (transposed - cosine * transposed.flip(1)) / _sine_squared(vectors)[:, None, None]


def _sine_squared(vectors: Tensor) -> Tensor:
    """Return (B,) the squared sine of the angle between two unit vectors (B, 3, 2), precise for small angles."""
    return torch.linalg.cross(vectors[:, :, 0], vectors[:, :, 1]).square().sum(dim=1)


def _normalise_reinhard(pixels: Tensor, sample: Tensor, reference: StainReference) -> tuple[Tensor, Tensor]:
    """Swap mean and standard deviation in l-alpha-beta for the reference's.

    Args:
        pixels: (B, 3, N) uint8.
        sample: (B, 3, n) uint8, the pixels to measure the colour on.

    Returns:
        (B, 3, N) uint8, meaningless where the colour could not be measured, and (B,) bool: it could.
    """
    mean, std, usable = _reinhard_statistics(sample)
    to_lms, to_lab = _ruderman(mean)
    scale = mean.new_tensor(reference.std) / std
    shift = mean.new_tensor(reference.mean) - scale * mean
    # l-alpha-beta is an orthonormal basis, so that the way back is the transpose.
    matrix = _combine(to_lab.mT * scale[:, None], to_lab)
    offset = math.log(10) * _combine(to_lab.mT, shift[:, :, None])  # (B, 3, 1)
    logs = _combine(to_lms, pixels.float().add_(1)).div_(256).log_()
    cones = _combine(matrix, logs).add_(offset).exp_()
    to_rgb = torch.linalg.inv(torch.tensor(RGB_TO_LMS))[None].to(mean)
    levels = _combine(to_rgb, cones).mul_(256).sub_(0.5)  # minus the one, plus a half to round
    return _to_bytes(levels), usable & _all_finite(matrix + offset)


def _reinhard_statistics(pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Measure mean and standard deviation in l-alpha-beta over all pixels, background included.

    Source: Reinhard et al., 2001, eq. 4-6 (decimal logarithm).

    Args:
        pixels: (B, 3, N) uint8.

    Returns:
        (B, 3) mean, (B, 3) standard deviation, and (B,) bool: whether they can be relied on.
    """
    levels = pixels.float().add_(1)
    to_lms, to_lab = _ruderman(levels)
    lab = _combine(to_lab, _combine(to_lms, levels).div_(256).log10_())  # (B, 3, N)
    num_pixels = pixels.shape[2]
    mean = lab.mean(dim=2)
    std = ((lab - mean[:, :, None]).square().sum(dim=2) / max(1, num_pixels - 1)).sqrt()
    tissue = (levels <= TRANSMITTED * math.exp(-DENSITY_FLOOR)).all(dim=1)
    usable = tissue.sum(dim=1) >= TISSUE_SHARE_FLOOR * num_pixels
    return mean, std, usable & (std >= std.new_tensor(SPREAD_FLOORS)).all(dim=1)


def _ruderman(like: Tensor) -> tuple[Tensor, Tensor]:
    """Return (1, 3, 3) twice: RGB to cone responses, and their logarithms to l-alpha-beta.

    Source: Reinhard et al., 2001, eq. 4 and 6, after Ruderman, Cronin and Chiao, JOSA A 15(8), 1998.
    """
    rows = [[value / math.sqrt(n) for value in row] for n, row in ((3, (1, 1, 1)), (6, (1, 1, -2)), (2, (1, -1, 0)))]
    return like.new_tensor(RGB_TO_LMS)[None], like.new_tensor(rows)[None]


def _combine(matrix: Tensor, planes: Tensor) -> Tensor:
    """Multiply matrices (B, I, J) with planes (B, J, N), giving (B, I, N).

    Not a library product, whose rounding may change with the batch size, and drop to TF32 on a GPU.
    """
    combined = matrix[:, :, :1] * planes[:, :1]
    for column in range(1, matrix.shape[2]):
        combined.addcmul_(matrix[:, :, column, None], planes[:, column, None])
    return combined


def _to_bytes(levels: Tensor) -> Tensor:
    """Cut grey levels off to whole numbers of 0-255; overwrites its argument."""
    return levels.clamp_(0, 255).to(torch.uint8)


def _all_finite(matrix: Tensor) -> Tensor:
    """Return (B,) bool for (B, I, J)."""
    return matrix.isfinite().flatten(1).all(dim=1)


def _nearest_rank(count: Any, percent: int) -> Any:
    """Return the rank, from 0, of a percentile without interpolation; -1 or 0 for a count of 0."""
    return (percent * (count - 1) + 50) // 100


def _stride(num_pixels: int, width: int, max_pixels: int | None) -> int:
    """Return the step that leaves at most ``max_pixels``; prime to the width, lest it only ever meets some columns."""
    if max_pixels is None or num_pixels <= max_pixels:
        return 1
    stride = math.ceil(num_pixels / max_pixels)
    while math.gcd(stride, width) > 1:
        stride += 1
    return stride
