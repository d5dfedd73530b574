"""A source that draws its images: two textures with three kinds of defect, no files needed.

For smoke tests and first runs. Every image is a pure function of (category, split, type,
index). A pattern is a function of continuous coordinates, so that a defect either bends the
coordinates or is laid over the colours, and its mask is exact: outside of it the image equals,
bit for bit, the normal image that would have been drawn.
"""

import functools
import io
import zlib
from collections.abc import Callable

import numpy as np

from data_pipelines.errors import BadInput
from data_pipelines.items import GOOD, Item

SIZE = 128  # height and width of every image
TRAIN, TEST_GOOD, TEST_DEFECT = 96, 24, 12  # images: train, test/good, test/each defect
_NOISE = 0.01  # standard deviation of the sensor noise, of full scale 1


def training_items(root: str, category: str) -> list[Item]:
    """96 normal images. `root` is not read; `category` names a pattern ("" is "weave")."""
    _pattern(category)
    return [_item(category, "train", GOOD, index) for index in range(TRAIN)]


def test_items(root: str, category: str) -> list[Item]:
    """24 normal images and 12 of each type of `DEFECTS`, those with masks."""
    _pattern(category)
    return [
        _item(category, "test", type_, index)
        for type_ in (GOOD, *DEFECTS)
        for index in range(TEST_GOOD if type_ == GOOD else TEST_DEFECT)
    ]


def draw(category: str, split: str, type_: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """One image, (128, 128, 3) uint8, and its mask, (128, 128) bool."""
    name = f"{category or 'weave'}/{split}/{type_}"
    rng = np.random.default_rng([zlib.crc32(name.encode()), index])
    pattern = _pattern(category)(rng)
    turn, (dy, dx) = rng.normal(0, 0.02), rng.uniform(-SIZE, SIZE, 2)
    tilt = rng.normal(0, 0.03, 2)
    gain = rng.normal(1, 0.03) * (1 + rng.normal(0, 0.01, 3))  # illumination, white balance
    noise = rng.normal(0, _NOISE, (SIZE, SIZE, 3))

    grid = np.arange(SIZE, dtype=np.float64)
    y, x = np.meshgrid(grid, grid, indexing="ij")
    mask = np.zeros((SIZE, SIZE), bool)
    bend, paint = np.zeros((2, SIZE, SIZE)), _no_paint
    if type_ != GOOD:
        bend, paint, mask = DEFECTS[type_](rng, y, x)
    # The defect moves with the cloth, so it is bent before the cloth is laid down.
    by, bx = y + bend[0], x + bend[1]
    v = by * np.cos(turn) - bx * np.sin(turn) + dy
    u = by * np.sin(turn) + bx * np.cos(turn) + dx
    light = 1 + (tilt[0] * (y / SIZE - 0.5) + tilt[1] * (x / SIZE - 0.5))
    colours = paint(pattern(v, u)) * gain * light[..., None] + noise
    return np.round(255 * np.clip(colours, 0, 1)).astype(np.uint8), mask


# Patterns: (generator) -> (v, u in pixels -> colours (h, w, 3) in [0, 1]).


def _weave(rng: np.random.Generator) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Plain weave: two sets of threads, over and under in turn."""
    period = 12 * rng.normal(1, 0.01)
    warp, weft = (
        np.array(c) + rng.normal(0, 0.01, 3) for c in ((0.72, 0.66, 0.55), (0.5, 0.53, 0.6))
    )

    def colours(v, u):
        sv, su = np.sin(np.pi * v / period), np.sin(np.pi * u / period)
        over = 1 / (1 + np.exp(-6 * sv * su))[..., None]  # which thread lies on top
        # A round thread is darker at its sides, and towards the end where it dives.
        shade_warp = (0.45 + 0.55 * np.abs(su) ** 0.5 * (0.7 + 0.3 * np.abs(sv)))[..., None]
        shade_weft = (0.45 + 0.55 * np.abs(sv) ** 0.5 * (0.7 + 0.3 * np.abs(su)))[..., None]
        return over * shade_warp * warp + (1 - over) * shade_weft * weft

    return colours


def _dots(rng: np.random.Generator) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A perforated sheet: dark round holes on a square lattice."""
    pitch = 16 * rng.normal(1, 0.01)
    radius = 4.5 * rng.normal(1, 0.02)
    sheet = np.array((0.68, 0.7, 0.72)) + rng.normal(0, 0.01, 3)

    def colours(v, u):
        v, u = ((c + pitch / 2) % pitch - pitch / 2 for c in (v, u))
        hole = np.clip(radius - np.hypot(v, u) + 0.5, 0, 1)[..., None]
        return sheet * (1 - 0.8 * hole)

    return colours


# Defects: (generator, y, x) -> coordinate shift (2, h, w), paint, mask (h, w).


def _no_paint(colours: np.ndarray) -> np.ndarray:
    return colours


def _overlay(opacity: np.ndarray, colour: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    a = opacity[..., None]
    return lambda colours: (1 - a) * colours + a * colour


def _spot(rng: np.random.Generator, y: np.ndarray, x: np.ndarray):
    """A stain: a wavy disc, partly transparent, darker or lighter than the ground."""
    cy, cx = rng.uniform(0.2 * SIZE, 0.8 * SIZE, 2)
    angle = np.arctan2(y - cy, x - cx)
    radius = rng.uniform(6, 14) * (1 + 0.2 * np.sin(3 * angle + rng.uniform(0, 2 * np.pi)))
    inside = np.clip((radius - np.hypot(y - cy, x - cx)) / 2, 0, 1)
    colour = rng.choice([0.12, 0.92]) + rng.uniform(-0.08, 0.08, 3)
    opacity = rng.uniform(0.5, 0.9) * inside
    return np.zeros((2, *y.shape)), _overlay(opacity, colour), opacity > 0


def _cut(rng: np.random.Generator, y: np.ndarray, x: np.ndarray):
    """A slit: a thin straight segment that shows the dark behind."""
    cy, cx = rng.uniform(0.25 * SIZE, 0.75 * SIZE, 2)
    angle, half = rng.uniform(0, np.pi), rng.uniform(10, 26)
    along = (y - cy) * np.sin(angle) + (x - cx) * np.cos(angle)
    across = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
    distance = np.hypot(np.maximum(np.abs(along) - half, 0), across)
    opacity = np.clip(rng.uniform(1, 2) - distance + 0.5, 0, 1)
    return np.zeros((2, *y.shape)), _overlay(opacity, np.full(3, 0.08)), opacity > 0


def _stretch(rng: np.random.Generator, y: np.ndarray, x: np.ndarray):
    """The ground dragged aside within a disc, by up to 5–9 pixels at its centre."""
    cy, cx = rng.uniform(0.25 * SIZE, 0.75 * SIZE, 2)
    r2 = ((y - cy) ** 2 + (x - cx) ** 2) / rng.uniform(12, 22) ** 2
    angle = rng.uniform(0, 2 * np.pi)
    pull = rng.uniform(5, 9) * np.maximum(1 - r2, 0)
    return np.stack([pull * np.sin(angle), pull * np.cos(angle)]), _no_paint, r2 < 1


PATTERNS = {"weave": _weave, "dots": _dots}
DEFECTS = {"spot": _spot, "cut": _cut, "stretch": _stretch}


def _pattern(category: str):
    if (category or "weave") not in PATTERNS:
        known = ", ".join(PATTERNS)
        raise BadInput(f"data.category: one of {known} for procedural data, not {category!r}")
    return PATTERNS[category or "weave"]


def _item(category: str, split: str, type_: str, index: int) -> Item:
    where = (category, split, type_, index)
    name = f"{type_}/{index:03d}.png"
    return Item(
        name=name,
        image=functools.partial(_png, *where, mask=False),
        type=type_,
        mask=None if type_ == GOOD else functools.partial(_png, *where, mask=True),
        origin=f"procedural {category or 'weave'}/{split}/{name}",
    )


@functools.lru_cache(maxsize=1024)  # files of 35 kB, each read twice or more
def _png(category: str, split: str, type_: str, index: int, *, mask: bool) -> bytes:
    from PIL import Image

    image, region = draw(category, split, type_, index)
    file = io.BytesIO()
    Image.fromarray(255 * region.astype(np.uint8) if mask else image).save(file, "png")
    return file.getvalue()
