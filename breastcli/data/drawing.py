"""Draw one field of stained tissue and its nuclei: the procedural stand-in for a photographed biopsy.

Nothing here is a model of disease. Both classes share stains, cell density and white space by design, so that what
tells them apart is how nuclei are shaped and arranged, and not how much of which colour a field holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# Optical density of haematoxylin and eosin: Ruifrok and Johnston, Anal. Quant. Cytol. Histol. 23, 2001, table 1.
STAIN_VECTORS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105]])
REFERENCE_HEIGHT_PX = 184
# The ratio from 40X to 400X is narrower than a microscope's, so that nuclei survive a resize to 64 px.
NUCLEUS_DIAMETER_PX = {"40X": 7.0, "100X": 9.5, "200X": 13.5, "400X": 20.0}
SMALLEST_NUCLEUS_PX = 3.5

STROMA, CYTOPLASM, MYXOID, MUCIN, LUMEN = range(5)
EOSIN = np.array([1.0, 0.80, 0.55, 0.30, 0.02], dtype=np.float32)
HAEMATOXYLIN = np.array([0.06, 0.20, 0.12, 0.12, 0.0], dtype=np.float32)
FIBRES = np.array([1.0, 0.25, 0.9, 0.5, 0.0], dtype=np.float32)

# A nucleus is a row of ten: x, y, direction, half axes, bend, taper, lobes, darkness and paleness of its middle.
CENTRE, HALF_AXES = slice(0, 2), slice(3, 5)


@dataclass(frozen=True)
class Look:
    """What the fields of one slide have in common."""

    stain_vectors: np.ndarray  # (2, 3) optical density of haematoxylin and eosin in R, G, B
    concentration: tuple[float, float]  # of haematoxylin and eosin
    lamp: np.ndarray  # (3,) R, G, B of empty glass, 0-255
    blur_px: float  # standard deviation of the lens blur at the reference height
    noise: float  # standard deviation of the sensor noise, grey levels
    atypia: float  # how irregular epithelial nuclei are, 0 (uniform) to 1
    coverage: float  # wanted share of the field that nuclei cover
    myxoid: float  # share of fields whose stroma is pale
    nucleus_scale: float  # nuclear diameter relative to the average slide's


def draw_field(
    look: Look, subtype: str, magnification: str, height_px: int, width_px: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a field of view.

    Args:
        look: the slide.
        subtype, magnification: codes of BreakHis, such as "PT" and "100X".
        height_px, width_px: size, 32 or more.
        rng: source of everything that varies from field to field.

    Returns:
        (H, W, 3) uint8 RGB and (H, W) uint8, 255 on every pixel whose centre lies in a nucleus and 0 elsewhere.
    """
    field = _Field(look, magnification, height_px, width_px, rng)
    ARCHITECTURES[subtype](field)
    field.scatter_fat()
    haematoxylin, mask = _stamp(
        field.finish_nuclei(), _noise(rng, height_px, width_px, max(1.2, 0.16 * field.diameter_px))
    )
    return _stain(field, haematoxylin), mask.astype(np.uint8) * 255


class _Field:
    """A field being laid out: which tissue is where, and the nuclei on it. Lengths are in nuclear diameters."""

    def __init__(self, look: Look, magnification: str, height_px: int, width_px: int, rng: np.random.Generator) -> None:
        scale = height_px / REFERENCE_HEIGHT_PX
        wanted_px = NUCLEUS_DIAMETER_PX[magnification] * scale * look.nucleus_scale * rng.uniform(0.93, 1.07)
        self.look, self.rng, self.shape_px = look, rng, (height_px, width_px)
        self.diameter_px, self.blur_px = max(SMALLEST_NUCLEUS_PX, wanted_px), look.blur_px * scale
        self.height, self.width = height_px / self.diameter_px, width_px / self.diameter_px
        self.middle = np.array([self.width, self.height]) / 2
        self.grain = rng.uniform(0, math.pi)  # direction of the collagen
        self.stroma = MYXOID if rng.random() < look.myxoid else STROMA
        self.tissue = Image.new("L", (width_px, height_px), self.stroma)
        self._pencil = ImageDraw.Draw(self.tissue)
        self._nuclei = [np.empty((0, 10))]

    def fill(self, outline: np.ndarray, tissue: int) -> None:
        """Fill the (M, 2) outline with one kind of tissue."""
        self._pencil.polygon((outline * self.diameter_px).ravel().tolist(), fill=tissue)

    def tissue_at(self, points: np.ndarray) -> np.ndarray:
        """Return the kind of tissue at (N, 2) points; points outside the field take the nearest border's."""
        column, row = np.clip(points * self.diameter_px, 0, np.array(self.tissue.size) - 1).astype(int).T
        return np.asarray(self.tissue)[row, column]

    def grid(self, spacing: float, jitter: float, margin: float = 1.0) -> np.ndarray:
        """Return (N, 2) points of a hexagonal grid, each moved by up to ``jitter`` spacings."""
        rows = np.arange(-margin, self.height + margin, spacing * 0.866)
        columns = np.arange(-margin - spacing, self.width + margin, spacing)
        y, x = np.meshgrid(rows, columns, indexing="ij")
        x = x + (np.arange(len(rows)) % 2)[:, None] * spacing / 2 + self.rng.uniform(0, spacing)
        points = np.stack([x.ravel(), y.ravel()], axis=1)
        return points + self.rng.uniform(-jitter, jitter, points.shape) * spacing

    def blob(self, centre: np.ndarray, radius: float, wobble: float, squeeze: float = 1.0) -> np.ndarray:
        """Return the (M, 2) outline of a wobbly ellipse."""
        turn = np.linspace(0, 2 * math.pi, max(16, int(6 * radius)), endpoint=False)
        phases = self.rng.uniform(0, 2 * math.pi, 4)
        distance = radius * (1 + wobble * sum(np.cos(k * turn + p) / k for k, p in enumerate(phases, start=2)))
        return centre + _turned(
            distance * np.cos(turn), squeeze * distance * np.sin(turn), self.rng.uniform(0, math.pi)
        )

    def curve(self, start: np.ndarray, length: float, bend: float) -> np.ndarray:
        """Return the (M, 2) points, half a diameter apart, of a line that wanders along the collagen."""
        steps = max(4, int(2 * length))
        knots = self.rng.normal(0, bend, steps // 8 + 3)
        heading = self.grain + np.interp(np.linspace(0, len(knots) - 1, steps), np.arange(len(knots)), knots)
        return start + np.cumsum(np.stack([np.cos(heading), np.sin(heading)], axis=1) * 0.5, axis=0)

    def add(self, points: np.ndarray, angles: np.ndarray | float, breadth: float, atypia: float) -> None:
        """Add epithelial or stromal nuclei.

        Args:
            points: (N, 2) centres.
            angles: (N,) directions of the long axes before disorder.
            breadth: short over long axis.
            atypia: 0 to 1; scales the spread of size, shape, direction and darkness.
        """
        rng, count = self.rng, len(points)
        size = np.exp(np.clip(rng.normal(0, 0.05 + 0.42 * atypia, count), -0.9, 0.8))
        ratio = np.sqrt(np.clip(breadth * np.exp(rng.normal(0, 0.06 + 0.22 * atypia, count)), 0.25, 1.0))
        turned = angles + rng.normal(0, 0.12 + 1.2 * atypia, count)
        uneven = np.clip(rng.normal(0, 0.03 + 0.13 * atypia, (count, 3)), -0.25, 0.25)
        darkness = np.exp(np.clip(rng.normal(0, 0.15 + 0.12 * atypia, count), -0.5, 0.4))
        vesicle = rng.uniform(0.05, 0.5, count)
        self._nuclei.append(
            np.column_stack([points, turned, size / ratio / 2, size * ratio / 2, uneven, darkness, vesicle])
        )

    def line_up(self, path: np.ndarray, spacing: float, jitter: float, breadth: float, across: bool = True) -> None:
        """Add epithelial nuclei along a path, long axes across it or along it."""
        step = np.diff(path, axis=0)
        travelled = np.concatenate([[0], np.cumsum(np.hypot(*step.T))])
        count = max(2, int(travelled[-1] / spacing))
        position = (np.arange(count) + self.rng.uniform(-jitter, jitter, count)) * travelled[-1] / count
        points = np.stack([np.interp(position, travelled, path[:, axis]) for axis in (0, 1)], axis=1)
        nearest = np.clip(np.searchsorted(travelled, position) - 1, 0, len(step) - 1)
        heading = np.arctan2(step[nearest, 1], step[nearest, 0]) + (math.pi / 2 if across else 0.0)
        self.add(points + self.rng.normal(0, jitter * 0.6, points.shape), heading, breadth, self.look.atypia)

    def crowd(self) -> None:
        """Fill the cytoplasm with a disorderly sheet of epithelial nuclei."""
        points = self.grid(1.25, 0.12 + 0.25 * self.look.atypia)
        points = points[self.tissue_at(points) == CYTOPLASM]
        self.add(points, self.rng.uniform(0, math.pi, len(points)), 0.8, self.look.atypia)

    def gland(self, centre: np.ndarray, radius: float, wobble: float) -> None:
        """Draw a ring of epithelium around a lumen."""
        outline = self.blob(centre, radius, wobble, self.rng.uniform(0.8, 1.0))
        self.fill(centre + (outline - centre) * (1 + 0.75 / radius), CYTOPLASM)
        if self.rng.random() < 0.8:
            self.fill(centre + (outline - centre) * max(0.2, 1 - 0.85 / radius), LUMEN)
        self.line_up(np.concatenate([outline, outline[:1]]), 1.12, 0.12, 0.75)

    def strands(self, first: float, last: float, spacing: float) -> Iterator[np.ndarray]:
        """Yield the starts of lines along the collagen, side by side; ``first`` and ``last`` in field widths."""
        for offset in np.arange(first * self.width, last * self.width, spacing):
            yield self.middle + _turned(-0.6 * self.width, offset, self.grain)

    def duct(self, path: np.ndarray, half_width: np.ndarray | float) -> None:
        """Draw a slit along a path with a row of epithelial nuclei on either side."""
        self.fill(_ribbon(path, half_width + 1.4), CYTOPLASM)
        self.fill(_ribbon(path, half_width), LUMEN)
        for side in (-1, 1):
            self.line_up(_beside(path, side * (half_width + 0.65)), 1.12, 0.12, 0.72)

    def scatter_fat(self) -> None:
        """Draw white holes until the field has as much empty space as a field of any subtype may have."""
        wanted = self.rng.uniform(0.02, 0.26)
        middle = self.rng.uniform((0, 0), (self.width, self.height))
        for _ in range(40):
            if (np.asarray(self.tissue) == LUMEN).mean() >= wanted:
                break
            centre = middle + self.rng.normal(0, 0.28 * self.height, 2)
            outline = self.blob(centre, self.rng.uniform(0.04, 0.13) * self.height, 0.08)
            self.fill(centre + (outline - centre) * 1.12, self.stroma)  # a membrane, or neighbours would run together
            self.fill(outline, LUMEN)

    def finish_nuclei(self) -> np.ndarray:
        """Return the (N, 10) nuclei in pixels, matched to the slide's coverage by spindle cells and thinning."""
        target = self.look.coverage * self.rng.uniform(0.8, 1.2)
        missing = target - self._covered(self._on_tissue())
        if missing > 0.02:
            points = self.grid(1.1, 0.4)
            points = self.rng.permutation(points[np.isin(self.tissue_at(points), (STROMA, MYXOID))])
            wanted = int(missing * self.height * self.width / (math.pi / 4 * 0.65))
            self.add(points[:wanted], self.grain, 0.42, 0.25 * self.look.atypia + 0.1)
            self._nuclei[-1][:, HALF_AXES] *= 0.8
        nuclei = self._on_tissue()
        excess = max(0.1, self._covered(nuclei) / target)
        nuclei[:, HALF_AXES] *= np.clip(excess**-0.5, 0.85, 1.15)
        nuclei = nuclei[self.rng.random(len(nuclei)) < 1 / max(1.0, excess * 0.72)]
        nuclei[:, [0, 1, 3, 4]] *= self.diameter_px
        return nuclei

    def _covered(self, nuclei: np.ndarray) -> float:
        return math.pi * float(np.prod(nuclei[:, HALF_AXES], axis=1).sum()) / (self.height * self.width)

    def _on_tissue(self) -> np.ndarray:
        nuclei = np.concatenate(self._nuclei)
        centres = nuclei[:, CENTRE]
        near = ((centres > -0.7) & (centres < (self.width + 0.7, self.height + 0.7))).all(axis=1)
        return nuclei[near & (self.tissue_at(centres) != LUMEN)]


def _adenosis(field: _Field) -> None:
    """Lobules of crowded little glands."""
    lobules = field.grid(20.0, 0.25, margin=4.0)
    radii = field.rng.uniform(6, 12, len(lobules))
    for centre in field.grid(5.2, 0.12):
        if (np.hypot(*(lobules - centre).T) < radii).any():
            field.gland(centre, field.rng.uniform(1.3, 2.3), 0.12)


def _fibroadenoma(field: _Field) -> None:
    """Long bent ducts, pressed flat by the stroma between them."""
    for start in field.strands(-0.7, 0.7, field.rng.uniform(6.5, 8.5)):
        if field.rng.random() < 0.85:
            field.duct(field.curve(start, 1.3 * field.width, 0.45), field.rng.uniform(0.1, 0.8))


def _phyllodes(field: _Field) -> None:
    """Leaf-like clefts in a cellular stroma."""
    for start in field.strands(-0.6, 0.7, field.rng.uniform(0.35, 0.6) * field.width):
        path = field.curve(start, 1.3 * field.width, 0.6)
        phase = np.linspace(0, field.rng.uniform(2, 5) * math.pi, len(path)) + field.rng.uniform(0, 6)
        field.duct(path, 0.3 + field.rng.uniform(0.4, 1.7) * np.sin(phase) ** 2)


def _tubular_adenoma(field: _Field) -> None:
    """Round tubules of one size, close together."""
    radius = field.rng.uniform(1.7, 2.1)
    for centre in field.grid(2 * radius + field.rng.uniform(2.0, 3.0), 0.06):
        if field.rng.random() < 0.85:
            field.gland(centre, radius * field.rng.uniform(0.9, 1.1), 0.05)


def _ductal_carcinoma(field: _Field) -> None:
    """Solid, irregular nests, some of them with holes."""
    for centre in field.grid(field.rng.uniform(9, 12), 0.3, margin=3.0):
        if field.rng.random() < 0.75:
            field.fill(field.blob(centre, field.rng.uniform(2.2, 5.0), 0.4, field.rng.uniform(0.6, 1)), CYTOPLASM)
        if field.rng.random() < 0.5:
            field.fill(field.blob(centre + field.rng.normal(0, 1.2, 2), field.rng.uniform(0.6, 1.9), 0.3), LUMEN)
    field.crowd()


def _lobular_carcinoma(field: _Field) -> None:
    """Single files of cells between the collagen fibres."""
    for start in field.strands(-0.7, 0.7, field.rng.uniform(2.4, 3.2)):
        along = field.rng.uniform(-3, 3)
        while along < 1.3 * field.width:
            length = field.rng.uniform(5, 16)
            path = field.curve(start + _turned(along, field.rng.normal(0, 0.5), field.grain), length, 0.3)
            field.fill(_ribbon(path, 0.7), CYTOPLASM)
            field.line_up(path, 1.2, 0.3, 0.75, across=False)
            along += length + field.rng.uniform(1, 6)


def _mucinous_carcinoma(field: _Field) -> None:
    """Islands of cells afloat in lakes of mucin."""
    for centre in field.grid(field.rng.uniform(13, 17), 0.3, margin=4.0):
        field.fill(field.blob(centre, field.rng.uniform(5, 8.5), 0.25), MUCIN)
    for centre in field.grid(field.rng.uniform(6, 8), 0.3):
        if field.tissue_at(centre[None])[0] == MUCIN and field.rng.random() < 0.85:
            field.fill(field.blob(centre, field.rng.uniform(1.5, 3.2), 0.35, field.rng.uniform(0.6, 1)), CYTOPLASM)
    field.crowd()


def _papillary_carcinoma(field: _Field) -> None:
    """Finger-like fronds with a fibrous core in an open space."""
    centre = field.middle + field.rng.normal(0, 3, 2)
    field.fill(field.blob(centre, field.rng.uniform(0.3, 0.5) * field.width, 0.15), LUMEN)
    for start in field.strands(-0.6, 0.7, field.rng.uniform(6, 8)):
        path = field.curve(start, field.rng.uniform(0.8, 1.3) * field.width, 0.6)
        width = 1.6 + field.rng.uniform(0.5, 1.4) * np.sin(np.arange(len(path)) / 7 + field.rng.uniform(0, 6))
        field.fill(_ribbon(path, width + 1.2), CYTOPLASM)
        field.fill(_ribbon(path, np.maximum(width - 0.9, 0.1)), field.stroma)
    field.crowd()


_BENIGN = {"A": _adenosis, "F": _fibroadenoma, "PT": _phyllodes, "TA": _tubular_adenoma}
_MALIGNANT = {"DC": _ductal_carcinoma, "LC": _lobular_carcinoma, "MC": _mucinous_carcinoma, "PC": _papillary_carcinoma}
ARCHITECTURES = _BENIGN | _MALIGNANT


def _turned(along: np.ndarray | float, across: np.ndarray | float, angle: float) -> np.ndarray:
    """Rotate coordinates by ``angle``; returns (..., 2)."""
    cosine, sine = math.cos(angle), math.sin(angle)
    return np.stack([along * cosine - across * sine, along * sine + across * cosine], axis=-1)


def _beside(path: np.ndarray, distance: np.ndarray | float) -> np.ndarray:
    """Return the (M, 2) path moved sideways by a distance or by (M,) distances."""
    step = np.gradient(path, axis=0)
    normal = np.stack([-step[:, 1], step[:, 0]], axis=1) / np.maximum(np.hypot(*step.T), 1e-9)[:, None]
    return path + normal * np.reshape(distance, (-1, 1))


def _ribbon(path: np.ndarray, half_width: np.ndarray | float) -> np.ndarray:
    """Return the (2M, 2) outline of a band with round ends around a path."""
    from_end = np.minimum(np.arange(len(path)), np.arange(len(path))[::-1])
    half_width = half_width * np.sqrt(np.clip(from_end / 4, 0, 1))
    return np.concatenate([_beside(path, half_width), _beside(path, -half_width)[::-1]])


def _noise(rng: np.random.Generator, height_px: int, width_px: int, grain_px: float) -> np.ndarray:
    """Return (H, W) float32 smooth noise of about unit deviation whose spots are ``grain_px`` wide."""
    coarse = (max(2, round(width_px / grain_px)), max(2, round(height_px / grain_px)))
    values = Image.fromarray(rng.standard_normal(coarse[::-1], dtype=np.float32))
    return np.asarray(values.resize((width_px, height_px), Image.Resampling.BICUBIC))


def _stamp(nuclei: np.ndarray, chromatin: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw (N, 10) nuclei, lengths in pixels, with (H, W) chromatin: noise of unit deviation.

    Returns:
        (H, W) float32 amount of haematoxylin and (H, W) bool, True on pixels whose centre lies in a nucleus.
    """
    height, width = chromatin.shape
    haematoxylin, mask = np.zeros(height * width, dtype=np.float32), np.zeros(height * width, dtype=bool)
    by_size = nuclei[np.argsort(nuclei[:, HALF_AXES].max(axis=1))].astype(np.float32)
    for chunk in np.array_split(by_size, max(1, len(nuclei) // 48)):
        x, y, _, length, breadth, *_, darkness, vesicle = chunk.T[..., None, None]
        reach = int(1.4 * length.max(initial=0)) + 2
        offsets = np.arange(-reach, reach + 1)
        columns, rows = x.astype(int) + offsets, y.astype(int) + offsets[:, None]
        distance = _distance(chunk, columns, rows)
        rim_px = (1 - distance) * np.sqrt(length * breadth)
        inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height) & (rim_px > -0.7)
        index = (rows * width + columns)[inside]
        mask[index[distance[inside] <= 1]] = True
        amount = darkness * (1 - vesicle * np.clip(1.1 - distance**2, 0, 1)) * np.clip(rim_px + 0.6, 0, 1)
        np.maximum.at(haematoxylin, index, amount[inside])
    haematoxylin = haematoxylin.reshape(height, width) * np.clip(1 + 0.22 * chromatin, 0.4, 1.6)
    return haematoxylin, mask.reshape(height, width)


def _distance(nuclei: np.ndarray, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return (N, K, K) float32 distance from the middle of a bent, tapered, three-lobed ellipse, 1 on its outline."""
    x, y, angle, length, breadth, bend, taper, lobes, *_ = nuclei.T[..., None, None]
    right, down = columns.astype(np.float32) - x + np.float32(0.5), rows.astype(np.float32) - y + np.float32(0.5)
    along = (right * np.cos(angle) + down * np.sin(angle)) / length
    across = (down * np.cos(angle) - right * np.sin(angle)) / breadth
    across = (across - bend * 2 * (along * along - 0.3)) / np.clip(1 + taper * along, 0.5, 1.5)
    squared = along * along + across * across + np.float32(1e-6)
    radius = np.sqrt(squared)
    wave = along * (4 * along * along - 3 * squared) / (squared * radius)  # cosine of three times the angle
    return radius / (1 + 0.6 * lobes * wave)


def _stain(field: _Field, nuclear: np.ndarray) -> np.ndarray:
    """Return (H, W, 3) uint8: what is left of the lamp's light after the stains (Beer-Lambert)."""
    look, rng, (height, width) = field.look, field.rng, field.shape_px
    tissue = np.asarray(field.tissue)
    eosin, haematoxylin = (_blurred(share[tissue], 0.09 * field.diameter_px + 0.3) for share in (EOSIN, HAEMATOXYLIN))
    texture = 1 + 0.34 * _fibres(field) * FIBRES[tissue] + 0.10 * _noise(rng, height, width, 0.35 * field.diameter_px)
    eosin = eosin * np.clip(texture, 0.15, 2.0) * np.clip(1 - 0.55 * nuclear, 0.2, 1)
    # Fields of one slide differ too (section thickness), or a network could tell slides apart by colour alone.
    stained = look.stain_vectors * np.multiply(look.concentration, np.exp(rng.normal(0, 0.13, 2)))[:, None]
    blue, pink = stained.astype(np.float32)
    density = (haematoxylin + nuclear)[..., None] * blue + eosin[..., None] * pink
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    slope = rng.uniform(-0.05, 0.05, 2)
    light = look.lamp.astype(np.float32) * (1 + slope[0] * x + slope[1] * y - 0.02 * (x * x + y * y))[..., None]
    sharp = Image.fromarray(np.clip(light * np.exp(-density), 0, 255).astype(np.uint8))
    seen = np.asarray(sharp.filter(ImageFilter.GaussianBlur(field.blur_px)), dtype=np.float32)
    seen = seen + look.noise * rng.standard_normal(seen.shape, dtype=np.float32)
    return np.clip(seen + 0.5, 0, 255).astype(np.uint8)


def _fibres(field: _Field) -> np.ndarray:
    """Return (H, W) float32 wavy streaks along the collagen, about unit deviation."""
    rng, (height, width) = field.rng, field.shape_px
    y, x = np.indices((height, width), dtype=np.float32) / np.float32(field.diameter_px)
    along, across = np.moveaxis(_turned(x, y, -field.grain), -1, 0)
    across = across + 0.9 * _noise(rng, height, width, 4 * field.diameter_px)
    coarse = rng.standard_normal((64, 16), dtype=np.float32)
    tile = np.asarray(Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC))
    tile = np.block([[tile, tile[:, ::-1]], [tile[::-1], tile[::-1, ::-1]]])  # mirrored, so that no seam shows
    bundles = tile[(across * 8).astype(int) % 512, (along * 5).astype(int) % 512]
    threads = tile[(across * 21 + 90).astype(int) % 512, (along * 9).astype(int) % 512]
    return 0.8 * bundles + 0.6 * threads


def _blurred(values: np.ndarray, radius_px: float) -> np.ndarray:
    """Smooth (H, W) values of 0 to 1; returns float32."""
    layer = Image.fromarray((values * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius_px))
    return np.asarray(layer, dtype=np.float32) / 255
