"""Two prepared folders as one: the real images of a data set, and synthetic ones behind them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from breastcli.data.store import PreparedData


@dataclass(frozen=True)
class JoinedData(PreparedData):
    """A prepared folder with the rows of a second one behind its own.

    Folder, card, fingerprints and splits are those of the first; only training sees the second.

    Attributes:
        real: the first N rows.
        extra: the M rows behind them.
    """

    real: PreparedData
    extra: PreparedData

    @classmethod
    def join(cls, real: PreparedData, extra: PreparedData) -> JoinedData:
        """Put the rows of ``extra`` behind those of ``real``; both have the same classes and size."""
        assert real.classes == extra.classes
        assert real.size_px == extra.size_px
        return cls(real.folder, real.card, [*real.rows, *extra.rows], real, extra)

    @cached_property
    def images(self) -> JoinedImages:
        """(N + M, size, size, 3) uint8: rows are read from whichever memory-mapped array has them."""
        return JoinedImages(self)

    def select(self, split: str, *, fold: int | None = None, magnification: str | None = None) -> np.ndarray:
        """Return the row numbers of one split of the real images; see ``PreparedData``."""
        return self.real.select(split, fold=fold, magnification=magnification)

    def parts(self, rows: np.ndarray) -> list[tuple[PreparedData, np.ndarray, np.ndarray]]:
        """See ``PreparedData``; a folder that has none of the rows is left out."""
        synthetic = self.is_extra(rows)
        both = (
            (self.real, rows[~synthetic], np.flatnonzero(~synthetic)),
            (self.extra, rows[synthetic] - len(self.real.rows), np.flatnonzero(synthetic)),
        )
        return [one for one in both if len(one[1])]

    def is_extra(self, rows: np.ndarray) -> np.ndarray:
        """Return which of the rows (n,) are the second folder's."""
        return rows >= len(self.real.rows)


class JoinedImages:
    """The images of joined data, as far as an array of row numbers asks for them."""

    def __init__(self, data: JoinedData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data.rows)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        size_px = self.data.size_px
        found = np.empty((len(rows), size_px, size_px, 3), dtype=np.uint8)
        for part, own, places in self.data.parts(rows):
            found[places] = part.images[own]
        return found
