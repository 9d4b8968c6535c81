"""Which images were made from one original: their recipe is undone, and what then looks the same is one group."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from breastcli.data.datasets import Recipe
from breastcli.data.duplicates import Duplicate
from breastcli.data.images import RejectedImageError, read_rgb
from breastcli.errors import UserError
from breastcli.progress import SILENT, Progress
from breastcli.records import ImageRecord

THUMBNAIL_PX = 64
SUBSAMPLES = 4  # along each axis of a pixel of a view, so that strongly zoomed images are averaged, not sampled
FAINTEST = 1.0  # grey levels of contrast below which detail fades instead of being raised
NEAREST = 40  # candidates of an image; of 250 equally likely originals none gets more than about 40 of 5,000 images
# Of siblings simulated from real fields 99.9 % reach 0.79, of likely pairs of other fields 99.9 % stay below 0.66
# (docs/results.md). A pair missed costs nothing while its images have other siblings.
ALIKE = 0.75
SHARED = 0.5  # of the siblings of the image that has fewer, those that a pair must have in common
BLOCK = 256


@dataclass(frozen=True)
class View:
    """How closely the centre of an original is looked at.

    Attributes:
        side_px: diameter of the disc that is compared, in pixels.
        num_turns: how many turns are tried, evenly apart, the largest to either side among them.
        neighbourhood: standard deviation of the Gaussian that says what is local, as a share of the diameter.
    """

    side_px: int
    num_turns: int
    neighbourhood: float


PROPOSE = View(side_px=8, num_turns=9, neighbourhood=0.25)
CONFIRM = View(side_px=16, num_turns=26, neighbourhood=0.1)


def find_siblings(
    records: Sequence[ImageRecord], recipe: Recipe, raw: Path, workers: int, progress: Progress
) -> list[ImageRecord]:
    """Return the images with their group of siblings as exam, named after its first image.

    An image shows a part of its original, turned, stretched and mirrored. For every turn that the recipe allows, the
    disc about the centre that all siblings show is brought back to the original's frame; of two siblings, one pair of
    such discs agrees up to a mirroring. Coarse discs propose each image's likeliest siblings within its class, fine
    ones confirm them by their correlation, and groups are what confirmed pairs connect.

    Args:
        records: N images.
        recipe: how they were made.
        raw: folder that the records' paths start from; the files are read again, JPEG ones at a fraction of their size.
        workers: threads that read.
        progress: told how far the search is.

    Raises:
        UserError: a file changed while it was worked on.
    """
    classes: dict[str, list[int]] = defaultdict(list)
    for number, record in enumerate(records):
        classes[record.subtype or record.label].append(number)
    exams = [""] * len(records)
    progress.begin("siblings", len(records), "images")
    for members in classes.values():
        thumbnails = _read_thumbnails([raw / records[number].path for number in members], workers)
        for number, first in zip(members, group_thumbnails(thumbnails, recipe, progress), strict=True):
            exams[number] = records[members[first]].image_id
    return [dataclasses.replace(record, exam=exam) for record, exam in zip(records, exams, strict=True)]


def group_thumbnails(thumbnails: np.ndarray, recipe: Recipe, progress: Progress = SILENT) -> np.ndarray:
    """Return for each of N thumbnails, (N, 4096) grey levels, the number of the first of its group."""
    pairs = propose(undo(thumbnails, recipe, PROPOSE), progress)
    return group_pairs(len(thumbnails), pairs[likenesses(undo(thumbnails, recipe, CONFIRM), pairs) >= ALIKE])


def join_duplicates(records: Sequence[ImageRecord], duplicates: Sequence[Duplicate]) -> list[ImageRecord]:
    """Return the images with those exams joined that near-duplicates link: two originals may show one place."""
    names = list(dict.fromkeys(record.exam for record in records))
    number_of = {name: number for number, name in enumerate(names)}
    exam_of = {record.image_id: record.exam for record in records}
    links = [tuple(number_of[exam_of[one.image_id]] for one in (pair.first, pair.second)) for pair in duplicates]
    first = _connected(len(names), np.array(links, dtype=int).reshape(-1, 2))
    return [dataclasses.replace(record, exam=names[first[number_of[record.exam]]]) for record in records]


def describe_groups(records: Sequence[ImageRecord]) -> str:
    """Return what a user should know of groups that were found."""
    sizes = np.unique([record.exam for record in records], return_counts=True)[1]
    return (
        f"exams are groups of siblings, found by what the images look like: {len(sizes):,} groups of at most "
        f"{sizes.max():,} images, {int((sizes == 1).sum()):,} of one image alone; patients stay unknown, so originals "
        "of one patient may be on two sides"
    )


def group_pairs(num_images: int, pairs: np.ndarray) -> np.ndarray:
    """Return for each image the number of the first image of its group.

    A pair counts where the two have at least half of the siblings of one of them in common, so that a single false
    pair does not chain two groups together.

    Args:
        num_images: N.
        pairs: (P, 2) numbers of images that were made from one original.
    """
    both = np.concatenate([pairs, pairs[:, ::-1]])
    kin = sparse.csr_matrix((np.ones(len(both)), both.T), shape=(num_images, num_images))
    kin.setdiag(1)  # an image belongs to its own siblings, so that two with no others have all in common
    num_kin = np.asarray(kin.sum(axis=1)).ravel()
    first, second = pairs.T
    common = np.asarray((kin @ kin)[first, second]).ravel()
    return _connected(num_images, pairs[common >= SHARED * np.minimum(num_kin[first], num_kin[second])])


def _connected(number: int, pairs: np.ndarray) -> np.ndarray:
    """Return for each of ``number`` things the first of those that pairs (P, 2) connect it with."""
    graph = sparse.coo_matrix((np.ones(len(pairs)), pairs.T), shape=(number, number))
    labels = connected_components(graph, directed=False)[1]
    return np.unique(labels, return_index=True)[1][labels]


def _read_thumbnails(files: Sequence[Path], workers: int) -> np.ndarray:
    """Return (N, 4096) uint8 grey levels."""
    with ThreadPoolExecutor(workers) as pool:
        return np.stack(list(pool.map(read_thumbnail, files)))


def read_thumbnail(path: Path) -> np.ndarray:
    """Return the (4096,) uint8 grey levels of an image file, resized to a small square.

    Raises:
        UserError: it can no longer be read.
    """
    try:
        image = read_rgb(path, least_px=2 * THUMBNAIL_PX)
    except (RejectedImageError, OSError) as error:
        again = "start again with --overwrite"
        raise UserError(f"{path} changed while it was worked on ({error})", fix=again) from error
    return np.asarray(image.convert("L").resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BICUBIC)).ravel()


def undo(thumbnails: np.ndarray, recipe: Recipe, view: View) -> np.ndarray:
    """Return (T, N, D) float32: the centres of the originals, had the images been made by each of T turns.

    Each has mean 0 and norm 1 (0 where it shows nothing). What is larger than the neighbourhood is taken away, and all
    neighbourhoods are brought to one contrast: one edge across an empty centre looks like any other.
    """
    sampling, smoothing = _sampling(recipe, view), _smoothing(view)
    num_pixels = len(smoothing)
    undone = np.empty((view.num_turns, len(thumbnails), num_pixels), np.float32)
    for rows in _blocks(len(thumbnails)):
        centres = (sampling @ thumbnails[rows].T.astype(np.float32)).reshape(view.num_turns, num_pixels, -1)
        fine = centres.transpose(0, 2, 1)
        fine = fine - fine @ smoothing
        local = fine / (np.sqrt(np.square(fine) @ smoothing) + FAINTEST)
        local -= local.mean(axis=2, keepdims=True)
        undone[:, rows] = local / np.maximum(np.linalg.norm(local, axis=2, keepdims=True), 1e-6)
    return undone


def _sampling(recipe: Recipe, view: View) -> sparse.csr_matrix:
    """Return the (T * D, 4096) matrix that takes a thumbnail to the centre of its original, for each of T turns."""
    disc, fine = _disc(view.side_px), view.side_px * SUBSAMPLES
    pixels = np.kron(np.cumsum(disc).reshape(disc.shape) * disc, np.ones((SUBSAMPLES, SUBSAMPLES), int)).ravel()
    inside = pixels > 0
    radius = min(recipe.kept(recipe.max_degrees)) / 2
    places = ((np.arange(fine) + 0.5) / fine * 2 - 1) * radius
    right, down = (one.ravel()[inside] for one in np.meshgrid(places, places))
    parts = []
    for turn in np.radians(np.linspace(-recipe.max_degrees, recipe.max_degrees, view.num_turns)):
        width, height = recipe.kept(math.degrees(turn))
        x = (right * math.cos(turn) + down * math.sin(turn)) / width  # turns are counterclockwise
        y = (down * math.cos(turn) - right * math.sin(turn)) / height
        parts.append(_bilinear(x, y, pixels[inside] - 1, int(disc.sum())))
    return sparse.vstack(parts, format="csr")


def _bilinear(x: np.ndarray, y: np.ndarray, pixels: np.ndarray, num_pixels: int) -> sparse.csr_matrix:
    """Return the (num_pixels, 4096) matrix that averages a thumbnail at places -0.5 to 0.5 into the pixels named."""
    left, top = ((one + 0.5) * THUMBNAIL_PX - 0.5 for one in (x, y))
    column, row = (np.clip(np.floor(one), 0, THUMBNAIL_PX - 2).astype(int) for one in (left, top))
    across, down = left - column, top - row
    corners = [(0, (1 - down) * (1 - across)), (1, (1 - down) * across)]
    corners += [(THUMBNAIL_PX, down * (1 - across)), (THUMBNAIL_PX + 1, down * across)]
    weights = np.concatenate([weight for _, weight in corners]) / SUBSAMPLES**2
    sources = np.concatenate([row * THUMBNAIL_PX + column + offset for offset, _ in corners])
    shape = (num_pixels, THUMBNAIL_PX**2)
    return sparse.csr_matrix((weights.astype(np.float32), (np.tile(pixels, 4), sources)), shape=shape)


def _disc(side_px: int) -> np.ndarray:
    """Return (side, side) bool: the pixels whose centres lie in the largest disc."""
    places = (np.arange(side_px) + 0.5) / side_px * 2 - 1
    return np.square(places)[:, None] + np.square(places) <= 1


def _smoothing(view: View) -> np.ndarray:
    """Return the (D, D) matrix that, from the right, gives the average of each pixel's neighbourhood in the disc."""
    places = np.argwhere(_disc(view.side_px)) / view.side_px
    weights = np.exp(-np.square(places[:, None] - places).sum(axis=2) / (2 * view.neighbourhood**2))
    return (weights / weights.sum(axis=1, keepdims=True)).T.astype(np.float32)


def _mirrorings(view: View) -> np.ndarray:
    """Return (4, D): where the disc's pixels come from as it is, mirrored either way, and both ways."""
    disc = _disc(view.side_px)
    numbers = np.cumsum(disc).reshape(disc.shape) - 1
    return np.stack([numbers[::down, ::right][disc] for down in (1, -1) for right in (1, -1)])


def propose(undone: np.ndarray, progress: Progress = SILENT) -> np.ndarray:
    """Return the pairs (P, 2) in which one image is among the most alike of the other, first < second, in order.

    Args:
        undone: what ``undo`` gives of the ``PROPOSE`` view.
        progress: told of every image.
    """
    num_turns, num_images, _ = undone.shape
    alike = np.zeros((num_images, NEAREST), np.float32)
    nearest = np.zeros((num_images, NEAREST), int)

    def keep(rows: slice, columns: slice, found: np.ndarray) -> None:
        likeness = np.concatenate([alike[rows], found], axis=1)
        names = np.concatenate([nearest[rows], np.broadcast_to(np.r_[columns], found.shape)], axis=1)
        best = np.argpartition(-likeness, NEAREST - 1, axis=1)[:, :NEAREST]
        alike[rows], nearest[rows] = (np.take_along_axis(one, best, axis=1) for one in (likeness, names))

    mirrorings = _mirrorings(PROPOSE)
    for rows in _blocks(num_images):
        turned = [undone[turn, rows][:, mirroring] for turn in range(num_turns) for mirroring in mirrorings]
        for columns in _blocks(num_images, rows.start):
            others = undone[:, columns].reshape(-1, undone.shape[2]).T
            found = np.full((len(turned[0]), others.shape[1] // num_turns), -1, np.float32)
            for one in turned:
                np.maximum(found, (one @ others).reshape(len(one), num_turns, -1).max(axis=1), out=found)
            if rows == columns:
                np.fill_diagonal(found, -1)
            else:
                keep(columns, rows, found.T)
            keep(rows, columns, found)
        progress.advance("siblings", len(turned[0]))
    first, rank = np.nonzero(alike > 0)
    return np.unique(np.sort(np.stack([first, nearest[first, rank]], axis=1), axis=1), axis=0)


def likenesses(undone: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return the correlation (P,) of pairs (P, 2) in the turns and the mirroring in which they agree best.

    Args:
        undone: what ``undo`` gives of the ``CONFIRM`` view.
        pairs: in order, as ``propose`` gives them.
    """
    mirrorings, num_pixels = _mirrorings(CONFIRM), undone.shape[2]
    starts = np.flatnonzero(np.diff(pairs[:, 0], prepend=-1))
    best = np.empty(len(pairs), np.float32)
    for start, stop in zip(starts, np.append(starts, len(pairs))[1:], strict=True):
        turned = undone[:, pairs[start, 0]][:, mirrorings].reshape(-1, num_pixels)
        others = undone[:, pairs[start:stop, 1]].reshape(-1, num_pixels)
        best[start:stop] = (turned @ others.T).reshape(-1, stop - start).max(axis=0)
    return best


def _blocks(number: int, start: int = 0) -> Iterator[slice]:
    return (slice(first, min(first + BLOCK, number)) for first in range(start, number, BLOCK))
