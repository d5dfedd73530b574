"""The geometry of tiles: where they lie in an image, and how their maps are joined."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

from pae_jax import image_ops


class Plan(NamedTuple):
    """How an image is divided.

    Attributes:
      side: (h, w) of a tile in pixels.
      halo: what is not taken at each side of a tile, unless it is the side of the image; None if
        tiles overlap by half and are blended.
      grid: with a halo, positions are multiples of it.
      batch: the number of tiles that are computed at once.
    """

    side: tuple[int, int]
    halo: int | None
    grid: int
    batch: int


class Span(NamedTuple):
    """A tile along one axis: pixels start:stop are computed, and first:last are taken."""

    start: int
    stop: int
    first: int
    last: int


class Differences(NamedTuple):
    """How far the maps of overlapping tiles differ, before the smoothing.

    Attributes:
      largest: the largest absolute difference.
      total: the sum of all.
      pixels: their number.
    """

    largest: float = 0.0
    total: float = 0.0
    pixels: int = 0


def spans_with_halo(size: int, side: int, halo: int, grid: int) -> list[Span]:
    """Returns the tiles along an axis of which each pixel is taken once.

    Args:
      size: that of the image.
      side: that of a tile, a multiple of `grid`. The last tile may be shorter by less than `grid`,
        so that it ends with the image.
      halo: a multiple of `grid`; two of them are less than the side.
      grid: that of the positions.
    """
    spans, start, first = [], 0, 0
    while start + side < size:
        spans.append(Span(start, start + side, first, start + side - halo))
        first = start + side - halo
        start += side - 2 * halo
    start = max(0, math.ceil(size / grid) * grid - side)
    return [*spans, Span(start, size, first, size)]


def overlapping_spans(size: int, side: int) -> list[Span]:
    """Returns tiles along an axis, evenly spaced, that overlap by half of their side or more."""
    side = min(side, size)
    starts = image_ops.window_starts(size, side)
    return [Span(start, start + side, start, start + side) for start in starts]


def stitch(
    start: Callable[[np.ndarray], tuple[Any, Any]], image: UInt8[np.ndarray, "h w c"], plan: Plan
) -> tuple[np.ndarray | None, Float[np.ndarray, "h w"], Differences]:
    """Returns reconstruction and map of an image, joined of its tiles.

    Args:
      start: starts the computation of tiles (b, h, w, c): reconstructions or None, and maps.
      image: of any size.
      plan: how it is divided.
    """
    shape = image.shape[:2]
    pairs = list(zip(shape, plan.side, strict=True))
    if plan.halo is None:
        rows, columns = (overlapping_spans(*pair) for pair in pairs)
    else:
        rows, columns = (spans_with_halo(*pair, plan.halo, plan.grid) for pair in pairs)
    tiles = [(row, column) for row in rows for column in columns]
    values, found = np.zeros(shape, np.float32), None
    weights = np.zeros(shape, np.float32) if plan.halo is None and len(tiles) > 1 else None
    differences = Differences()
    for (row, column), part, tile in _computed(start, image, tiles, plan.batch):
        if part is not None and found is None:
            found = np.zeros((*shape, part.shape[-1]), np.float32)
        taken = np.s_[row.first : row.last, column.first : column.last]
        inside = np.s_[
            row.first - row.start : row.last - row.start,
            column.first - column.start : column.last - column.start,
        ]
        if weights is None:
            values[taken] = tile[inside]
            if found is not None and part is not None:
                found[taken] = part[inside]
            continue
        sides = row.stop - row.start, column.stop - column.start
        weight = np.outer(*map(image_ops.tent, sides))
        before = weights[taken] > 0
        if before.any():
            known = values[taken][before] / weights[taken][before]
            distance = np.abs(known - tile[before])
            differences = Differences(
                max(differences.largest, float(distance.max())),
                differences.total + float(distance.sum(dtype=np.float64)),
                differences.pixels + distance.size,
            )
        values[taken] += weight * tile
        weights[taken] += weight
        if found is not None and part is not None:
            found[taken] += weight[..., None] * part
    if weights is not None:
        values /= weights
        if found is not None:
            found /= weights[..., None]
    return found, values, differences


def _computed(
    start: Callable[[np.ndarray], tuple[Any, Any]],
    image: np.ndarray,
    tiles: Sequence[tuple[Span, Span]],
    size: int,
) -> Iterator[tuple[tuple[Span, Span], np.ndarray | None, np.ndarray]]:
    """Yields each tile with its reconstruction and map; computes the next ones meanwhile."""
    size = min(size, len(tiles))
    running: tuple[Sequence[tuple[Span, Span]], Any] | None = None
    for first in range(0, len(tiles) + size, size):
        started = None
        if batch := tiles[first : first + size]:
            # The last batch is filled up with its last tile, so that one program serves all.
            full = [*batch, *[batch[-1]] * (size - len(batch))]
            parts = [
                image[row.start : row.stop, column.start : column.stop] for row, column in full
            ]
            started = batch, start(np.stack(parts))
        if running:
            parts, maps = jax.device_get(running[1])
            for i, tile in enumerate(running[0]):
                yield tile, None if parts is None else parts[i], maps[i]
        running = started
