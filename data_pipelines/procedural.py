"""Source: drawn images of two textures with three defect types. No files are needed.

The category "clutter" shows the texture "dots" as a part among things that are no defects.

It serves smoke tests and first runs. Every image is a pure function of (category, split, defect
type, index). A pattern is a function of continuous coordinates. A defect either shifts the
coordinates or is blended over the colours. Its mask is exact: outside the mask the image equals,
bit for bit, the image that would have been drawn without the defect.
"""

import functools
import io
import zlib
from collections.abc import Callable

import numpy as np

from data_pipelines import clutter
from data_pipelines.errors import BadInput
from data_pipelines.items import GOOD, Item

SIZE = 128  # Height and width of every image.
TRAIN, TEST_GOOD, TEST_DEFECT = 96, 24, 12  # Images in train, test/good, test/each defect type.
# Part of the fingerprint: increase the number whenever the drawn images change.
_VERSION = 1
_NOISE = 0.01  # Standard deviation of the sensor noise, relative to the full scale.


def training_items(root: str, category: str) -> list[Item]:
    """Returns 96 normal images.

    Args:
      root: not used.
      category: a key of `PATTERNS`, or "clutter"; "" is "weave".
    """
    _pattern(category)
    return [_item(category, "train", GOOD, index) for index in range(TRAIN)]


def test_items(root: str, category: str) -> list[Item]:
    """Returns 24 normal images, and 12 with a mask of each type of `DEFECTS`."""
    _pattern(category)
    return [
        _item(category, "test", defect_type, index)
        for defect_type in (GOOD, *DEFECTS)
        for index in range(TEST_GOOD if defect_type == GOOD else TEST_DEFECT)
    ]


def foreground_masks(root: str, category: str) -> dict[str, tuple[Callable[[], bytes], str]]:
    """Returns the masks of the part in the training images of "clutter", by name."""
    if category != CLUTTER:
        return {}
    masks = {}
    for item in training_items(root, category):
        index = len(masks)
        read = functools.partial(_encode, _surroundings(category, "train", GOOD, index)[1])
        masks[item.name] = read, f"mask of the part of {item.origin}"
    return masks


def draw(category: str, split: str, defect_type: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws one image, (128, 128, 3) uint8, and its mask, (128, 128) bool."""
    rng = _generator(f"{category or 'weave'}/{split}/{defect_type}", index)
    pattern = _pattern(category)(rng)
    angle, (dy, dx) = rng.normal(0, 0.02), rng.uniform(-SIZE, SIZE, 2)
    tilt = rng.normal(0, 0.03, 2)
    gain = rng.normal(1, 0.03) * (1 + rng.normal(0, 0.01, 3))  # Illumination, white balance.
    noise = rng.normal(0, _NOISE, (SIZE, SIZE, 3))

    grid = np.arange(SIZE, dtype=np.float64)
    y, x = np.meshgrid(grid, grid, indexing="ij")
    mask = np.zeros((SIZE, SIZE), bool)
    shift, paint = np.zeros((2, SIZE, SIZE)), _no_paint
    # The defect is drawn last, so that the generator gives the same numbers without it.
    if defect_type != GOOD:
        shift, paint, mask = DEFECTS[defect_type](rng, y, x)
    # The shift is in image coordinates, in which the mask is defined, so it precedes the rotation.
    shifted_y, shifted_x = y + shift[0], x + shift[1]
    v = shifted_y * np.cos(angle) - shifted_x * np.sin(angle) + dy
    u = shifted_y * np.sin(angle) + shifted_x * np.cos(angle) + dx
    light = 1 + (tilt[0] * (y / SIZE - 0.5) + tilt[1] * (x / SIZE - 0.5))
    colours = paint(pattern(v, u)) * gain * light[..., None]
    if category == CLUTTER:
        surroundings, part = _surroundings(category, split, defect_type, index)
        colours, mask = np.where(part[..., None], colours, surroundings), mask & part
    colours += noise
    return np.round(255 * np.clip(colours, 0, 1)).astype(np.uint8), mask


def _generator(name: str, index: int) -> np.random.Generator:
    # crc32, because Python's own hash of a string differs between processes.
    return np.random.default_rng([zlib.crc32(name.encode()), index])


def _surroundings(
    category: str, split: str, defect_type: str, index: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the colours of bench and clutter, and the mask of the part; see `clutter.scene`."""
    grid = np.arange(SIZE, dtype=np.float64)
    y, x = np.meshgrid(grid, grid, indexing="ij")
    generator = _generator(f"{category}/{split}/{defect_type}/surroundings", index)
    return clutter.scene(generator, split, y, x)


# Patterns: (generator) -> (v, u in pixels -> colours (h, w, 3) in [0, 1]).


def _weave(rng: np.random.Generator) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Draws a plain weave: two sets of threads that alternate over and under."""
    period = 12 * rng.normal(1, 0.01)
    warp, weft = (
        np.array(c) + rng.normal(0, 0.01, 3) for c in ((0.72, 0.66, 0.55), (0.5, 0.53, 0.6))
    )

    def colours(v, u):
        sv, su = np.sin(np.pi * v / period), np.sin(np.pi * u / period)
        over = 1 / (1 + np.exp(-6 * sv * su))[..., None]  # 1 where the warp lies on top.
        # A round thread is darker at its sides, and where it passes under another.
        shade_warp = (0.45 + 0.55 * np.abs(su) ** 0.5 * (0.7 + 0.3 * np.abs(sv)))[..., None]
        shade_weft = (0.45 + 0.55 * np.abs(sv) ** 0.5 * (0.7 + 0.3 * np.abs(su)))[..., None]
        return over * shade_warp * warp + (1 - over) * shade_weft * weft

    return colours


def _dots(rng: np.random.Generator) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Draws a perforated sheet: dark round holes on a square lattice."""
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
    opacity = opacity[..., None]
    return lambda colours: (1 - opacity) * colours + opacity * colour


def _spot(rng: np.random.Generator, y: np.ndarray, x: np.ndarray):
    """Draws a stain: a wavy disc, partly transparent, darker or lighter than the ground."""
    cy, cx = rng.uniform(0.2 * SIZE, 0.8 * SIZE, 2)
    angle = np.arctan2(y - cy, x - cx)
    radius = rng.uniform(6, 14) * (1 + 0.2 * np.sin(3 * angle + rng.uniform(0, 2 * np.pi)))
    inside = np.clip((radius - np.hypot(y - cy, x - cx)) / 2, 0, 1)
    colour = rng.choice([0.12, 0.92]) + rng.uniform(-0.08, 0.08, 3)
    opacity = rng.uniform(0.5, 0.9) * inside
    return np.zeros((2, *y.shape)), _overlay(opacity, colour), opacity > 0


def _cut(rng: np.random.Generator, y: np.ndarray, x: np.ndarray):
    """Draws a slit: a thin straight segment, dark and opaque."""
    cy, cx = rng.uniform(0.25 * SIZE, 0.75 * SIZE, 2)
    angle, half_length = rng.uniform(0, np.pi), rng.uniform(10, 26)
    along = (y - cy) * np.sin(angle) + (x - cx) * np.cos(angle)
    across = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
    distance = np.hypot(np.maximum(np.abs(along) - half_length, 0), across)
    opacity = np.clip(rng.uniform(1, 2) - distance + 0.5, 0, 1)
    return np.zeros((2, *y.shape)), _overlay(opacity, np.full(3, 0.08)), opacity > 0


def _stretch(rng: np.random.Generator, y: np.ndarray, x: np.ndarray):
    """Shifts the pattern within a disc, by 5–9 pixels at its centre."""
    cy, cx = rng.uniform(0.25 * SIZE, 0.75 * SIZE, 2)
    squared_radius = ((y - cy) ** 2 + (x - cx) ** 2) / rng.uniform(12, 22) ** 2
    angle = rng.uniform(0, 2 * np.pi)
    pull = rng.uniform(5, 9) * np.maximum(1 - squared_radius, 0)
    shift = np.stack([pull * np.sin(angle), pull * np.cos(angle)])
    return shift, _no_paint, squared_radius < 1


CLUTTER = "clutter"
PATTERNS = {"weave": _weave, "dots": _dots}
DEFECTS = {"spot": _spot, "cut": _cut, "stretch": _stretch}


def _pattern(category: str):
    if category == CLUTTER:
        return PATTERNS["dots"]
    if (category or "weave") not in PATTERNS:
        known = ", ".join([*PATTERNS, CLUTTER])
        raise BadInput(f"data.category: one of {known} for procedural data, not {category!r}")
    return PATTERNS[category or "weave"]


def _item(category: str, split: str, defect_type: str, index: int) -> Item:
    arguments = (category, split, defect_type, index)
    name = f"{defect_type}/{index:03d}.png"
    return Item(
        name=name,
        image=functools.partial(_png, *arguments, mask=False),
        type=defect_type,
        mask=None if defect_type == GOOD else functools.partial(_png, *arguments, mask=True),
        origin=f"procedural {category or 'weave'}/{split}/{name}",
        content=f"{_VERSION} {category or 'weave'} {split} {name}",
    )


@functools.lru_cache(maxsize=1024)  # Each file of 35 kB is read twice or more.
def _png(category: str, split: str, defect_type: str, index: int, *, mask: bool) -> bytes:
    """Draws an image and returns it or its mask as a PNG file."""
    image, region = draw(category, split, defect_type, index)
    return _encode(region if mask else image)


def _encode(image: np.ndarray) -> bytes:
    """Returns a PNG of an image, or of a bool mask."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(255 * image.astype(np.uint8) if image.dtype == bool else image).save(
        file, "png"
    )
    return file.getvalue()
