"""Images that are blank, blurred or of an odd size, and sides of a split whose colours differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from breastcli.data.measures import Measures

BLANK_CONTRAST = 2.0  # grey levels
BLANK_PLAIN = 0.95  # share of pixels at nearly one grey level; BreakHis reaches 0.87
BLURRED_SPREADS = 4.0  # of the logarithm; of 749 fields of BreakHis four of one slide lie beyond, visibly blurred
BLURRED_FACTOR = 10.0
FEWEST = 20  # images that say what is usual
MOST_DRIFT = 1.0  # standard deviations between groups
CHANNELS = ("red", "green", "blue")
HELD_OUT = ("val", "test")


@dataclass(frozen=True)
class Outlier:
    """An image that looks unusable or came from elsewhere.

    Attributes:
        image: its id.
        finding: "blank", "blurred" or "size".
        detail: by what figures.
    """

    image: str
    finding: str
    detail: str


@dataclass(frozen=True)
class Drift:
    """How far the colour of a held-out side is from that of training.

    Attributes:
        side: "val", "test" or the number of a fold, which is compared with the other folds.
        channel: the one of red, green and blue that differs most.
        shift: difference of the mean optical density of groups, in standard deviations between groups.
        by_chance: standard error of that difference for groups divided at random, in the same unit.
        num_groups: groups (exams; patients or images where those are unknown) of this side.
    """

    side: str
    channel: str
    shift: float
    by_chance: float
    num_groups: int

    @property
    def name(self) -> str:
        """The side, with what its number means."""
        return f"fold {self.side}" if self.side.isdigit() else self.side

    @property
    def notable(self) -> bool:
        """Whether the difference is large, and larger than so few groups give by chance."""
        return abs(self.shift) > max(MOST_DRIFT, 2 * self.by_chance)


def find_outliers(
    names: Sequence[str], kinds: Sequence[str], sizes: Sequence[str], measures: Sequence[Measures]
) -> list[Outlier]:
    """Return the images that are blank, blurred or not of the usual size.

    Blank: grey levels that hardly vary, or 95 % of them nearly the same. Blurred: the variance of the Laplacian is less
    than a tenth of the median of its kind, and its logarithm lies below the median's by four times the spread (1.4826
    times the median absolute deviation); a kind with fewer than 20 images is not judged. Odd size: not that of most
    files, where one size is that of most.

    Args:
        names: N image ids.
        kinds: N magnifications, since sharpness differs between them.
        sizes: N sizes as "WxH".
        measures: N.
    """
    found = []
    for name, one in zip(names, measures, strict=True):
        if _is_blank(one):
            found.append(
                Outlier(name, "blank", f"{one.plain:.0%} at one grey level, standard deviation {one.contrast:.1f}")
            )
    for kind in sorted(set(kinds)):
        found += _blurred(
            [pair for pair, own in zip(zip(names, measures, strict=True), kinds, strict=True) if own == kind]
        )
    usual, count = Counter(sizes).most_common(1)[0] if sizes else ("", 0)
    if 2 * count > len(sizes):
        odd = ((name, size) for name, size in zip(names, sizes, strict=True) if size != usual)
        found += [Outlier(name, "size", f"{size}, usually {usual}") for name, size in odd]
    return found


def _is_blank(one: Measures) -> bool:
    return one.contrast < BLANK_CONTRAST or one.plain > BLANK_PLAIN


def _blurred(images: Sequence[tuple[str, Measures]]) -> list[Outlier]:
    """Return the blurred of the images of one kind."""
    known = [(name, one.sharpness) for name, one in images if not _is_blank(one) and one.sharpness > 0]
    if len(known) < FEWEST:
        return []
    logarithms = np.log10([sharpness for _, sharpness in known])
    median = float(np.median(logarithms))
    spread = 1.4826 * float(np.median(np.abs(logarithms - median)))
    limit = 10 ** (median - max(BLURRED_SPREADS * spread, np.log10(BLURRED_FACTOR)))
    return [
        Outlier(name, "blurred", f"variance of the Laplacian {sharpness:.3g}, usually {10**median:.3g}")
        for name, sharpness in known
        if sharpness < limit
    ]


def colour_drift(sides: Sequence[str], groups: Sequence[str], densities: np.ndarray) -> list[Drift]:
    """Compare the mean optical density of every held-out side with that of training.

    Groups are what is compared, since the images of one were stained together. The shift is the difference of the two
    means over groups, in units of the standard deviation between all groups, for the channel that differs most.

    Args:
        sides: N, "train", "val", "test" or fold numbers.
        groups: N names of groups.
        densities: (N, 3) mean optical densities of red, green and blue.

    Returns:
        One per held-out side; none where groups do not differ at all.
    """
    keys = sorted(set(zip(sides, groups, strict=True)))
    places = {key: number for number, key in enumerate(keys)}
    member = np.array([places[key] for key in zip(sides, groups, strict=True)], dtype=int)
    means = np.zeros((len(keys), 3))
    np.add.at(means, member, densities)
    means /= np.bincount(member, minlength=len(keys))[:, None]
    if len(keys) < 3 or not (spread := means.std(axis=0, ddof=1)).any():
        return []
    own = np.array([side for side, _ in keys])
    has_folds = "train" not in sides
    found = []
    for side in sorted(set(sides), key=int) if has_folds else [side for side in HELD_OUT if side in own]:
        held_out, training = own == side, own != side if has_folds else own == "train"
        difference = means[held_out].mean(axis=0) - means[training].mean(axis=0)
        shifts = np.divide(difference, spread, out=np.zeros(3), where=spread > 0)
        channel = int(np.abs(shifts).argmax())
        by_chance = float(np.sqrt(1 / held_out.sum() + 1 / training.sum()))
        found.append(Drift(side, CHANNELS[channel], float(shifts[channel]), by_chance, int(held_out.sum())))
    return found
