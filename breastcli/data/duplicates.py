"""Images of a data set that are identical or nearly so: finding them, and leaving them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from breastcli.data.datasets import Rejection
from breastcli.data.images import RejectedImageError, hash_pixels, read_rgb
from breastcli.data.likeness import ALIKE, detail, likeness
from breastcli.data.perceptual import POSITIONS, inverse, near_pairs
from breastcli.errors import UserError
from breastcli.progress import Progress
from breastcli.records import ImageRecord

DROPPED = "dropped"
IDENTICAL, NEAR = "identical to", "near-duplicate of"  # how the reasons of dropped duplicates begin
DETAILS_KEPT = 4096  # images whose detail is held while candidates are confirmed: 150 MB


@dataclass(frozen=True)
class Duplicate:
    """Two images of which the second shows the first.

    Attributes:
        first: the image whose id comes first.
        second: the other.
        distance: bits in which their hashes differ, of 255; 0 where the pixels are identical.
        position: how the second shows the first (a number of ``perceptual.POSITIONS``), or None for identical pixels.
        likeness: correlation of their details, at most 1.
    """

    first: ImageRecord
    second: ImageRecord
    distance: int
    position: int | None
    likeness: float

    def description(self, *, backwards: bool = False) -> str:
        """Return what the second image is of the first, or backwards the first of the second."""
        other = self.second if backwards else self.first
        if self.position is None:
            return f"{IDENTICAL} {other.image_id}"
        position = POSITIONS[inverse(self.position) if backwards else self.position]
        return f"{NEAR} {other.image_id} (distance {self.distance}, {position})"


def find_duplicates(
    records: Sequence[ImageRecord],
    pixel_hashes: Sequence[str],
    perceptual_hashes: Sequence[str],
    raw: Path,
    progress: Progress,
) -> list[Duplicate]:
    """Return the pairs of images with identical pixels or with hashes and details that are nearly alike.

    Of several images with identical pixels the first by id stands for all: the others are paired with it alone.

    Args:
        records: N images.
        pixel_hashes: N hashes of their exact pixels.
        perceptual_hashes: N hashes of what they look like.
        raw: folder that the records' paths start from; candidates are read again.
        progress: told how far the search is.

    Raises:
        UserError: a file changed while it was worked on.
    """
    first_with: dict[str, ImageRecord] = {}
    found, different = [], []
    ordered = sorted(zip(records, pixel_hashes, perceptual_hashes, strict=True), key=lambda one: one[0].image_id)
    for record, exact, looks in ordered:
        first = first_with.setdefault(exact, record)
        if first is record:
            different.append((record, exact, looks))
        else:
            found.append(Duplicate(first, record, 0, None, 1.0))

    @lru_cache(DETAILS_KEPT)
    def detail_of(number: int) -> np.ndarray:
        return _detail_of_hashed(raw / different[number][0].path, different[number][1])

    progress.begin("comparing", len(different), "images")
    candidates = near_pairs([looks for _, _, looks in different], on_block=lambda n: progress.advance("comparing", n))
    if candidates:
        progress.begin("confirming", len(candidates), "pairs")
    for one, two, distance, position in candidates:
        first, second = different[one][0], different[two][0]
        alike = likeness(detail_of(one), detail_of(two), position)
        if alike >= ALIKE:
            found.append(Duplicate(first, second, distance, position, alike))
        progress.advance("confirming")
    return found


def _detail_of_hashed(path: Path, exact: str) -> np.ndarray:
    """Return the detail of a file whose pixels still have the hash ``exact``.

    Other pixels than those in the array would acquit a copy: after ``--resume`` they may be days younger.

    Raises:
        UserError: they have not.
    """
    again = "start again with --overwrite"
    try:
        image = read_rgb(path)
    except (RejectedImageError, OSError) as error:
        raise UserError(f"{path} changed while it was worked on ({error})", fix=again) from error
    if hash_pixels(image) != exact:
        raise UserError(f"{path} changed while it was worked on", fix=again)
    return detail(image)


def choose_dropped(duplicates: Sequence[Duplicate], rule: str) -> list[Rejection]:
    """Return the files to leave out so that no two of those that stay are duplicates, and why.

    A set is what duplicates link, directly or through others. ``keep-first`` keeps its first image by id, unless its
    labels differ: nobody can tell which of them is right, so that none of the set stays.

    Args:
        duplicates: what was found.
        rule: "none", "keep-first" or "drop-all".
    """
    if rule == "none":
        return []
    linked = _linked(duplicates)
    reasons: dict[str, tuple[str, str]] = {}  # image id to path and reason
    for pair in sorted(duplicates, key=lambda one: (one.first.image_id, one.second.image_id)):
        for record, backwards in ((pair.second, False), (pair.first, True)):
            members = linked[record.image_id]
            conflict = len({member.label for member in members.values()}) > 1
            if rule == "keep-first" and not conflict and record.image_id == min(members):
                continue
            reason = pair.description(backwards=backwards) + (", labels differ" if conflict else "")
            reasons.setdefault(record.image_id, (record.path, reason))
    return [Rejection(path, reason) for path, reason in reasons.values()]


def _linked(duplicates: Sequence[Duplicate]) -> dict[str, dict[str, ImageRecord]]:
    """Return for each image of a pair the set that it belongs to, by id."""
    member_of: dict[str, dict[str, ImageRecord]] = {}
    for pair in duplicates:
        joined: dict[str, ImageRecord] = {}
        for record in (pair.first, pair.second):
            joined |= member_of.get(record.image_id, {record.image_id: record})
        member_of |= dict.fromkeys(joined, joined)
    return member_of
