"""Families of drawn texture images: noise, gratings, cells and the like.

Each family is a function (generator, y, x) -> values (h, w) in [0, 1] or colours (h, w, 3). The
coordinates y and x run over [0, 1), so that the picture is the same at any size, apart from
white noise.
"""

import zlib

import numpy as np
from scipy import ndimage, spatial


def draw(family: str, index: int, size: int) -> np.ndarray:
    """Draws image `index` of a family, uint8 (size, size, 3); images of odd index are grey."""
    # crc32, because Python's own hash of a string differs between processes.
    rng = np.random.default_rng([zlib.crc32(family.encode()), index])
    grid = np.arange(size) / size
    y, x = np.meshgrid(grid, grid, indexing="ij")
    values = FAMILIES[family](rng, y, x)
    if values.ndim == 2:
        # The two colours have disjoint ranges of brightness, so that every image has contrast.
        low, high = rng.uniform(0, 0.35, 3), rng.uniform(0.55, 1, 3)
        if rng.random() < 0.5:
            low, high = high, low
        values = low + (high - low) * values[..., None]
    if index % 2:
        values = np.repeat(values.mean(-1, keepdims=True), 3, axis=-1)
    return np.round(255 * np.clip(values, 0, 1)).astype(np.uint8)


def _noise(rng: np.random.Generator, y: np.ndarray, x: np.ndarray, cells: int) -> np.ndarray:
    """Returns smooth noise in [0, 1]: a cubic spline through a lattice of `cells`² values."""
    # Three more values than cells per axis, because a cubic spline needs neighbours on both sides.
    lattice = rng.random((cells + 3, cells + 3))
    values = ndimage.map_coordinates(lattice, [1 + y * cells, 1 + x * cells], order=3)
    return np.clip(values, 0, 1)


def _clouds(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Draws a sum of octaves of smooth noise, each finer and weaker than the previous one."""
    first, decay = rng.integers(2, 6), rng.uniform(0.4, 0.9)
    octaves = [decay**k * _noise(rng, y, x, int(first * 2**k)) for k in range(5)]
    return _rescaled(np.sum(octaves, axis=0))


def _grain(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Draws white noise, blurred by a different width along each axis."""
    # In proportion to the size, so that the grain looks alike at any size. The blur wraps around,
    # so that it is equally strong at the borders.
    blur = y.shape[0] / 256 * np.exp(rng.uniform(np.log(0.3), np.log(6), 2))
    return _rescaled(ndimage.gaussian_filter(rng.random((*y.shape, 3)), (*blur, 0), mode="wrap"))


def _grating(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Draws parallel waves, from sinusoidal to square."""
    u, _ = _rotated(rng, y, x)
    wave = np.sin(2 * np.pi * rng.uniform(4, 40) * u + rng.uniform(0, 2 * np.pi))
    return 0.5 + 0.5 * np.tanh(rng.uniform(0.5, 6) * wave)


def _checkers(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Draws a rotated chequerboard of rectangles."""
    u, v = _rotated(rng, y, x)
    fields = np.floor(u * rng.uniform(3, 20)) + np.floor(v * rng.uniform(3, 20))
    return fields % 2


def _bars(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Draws coloured parallel bars of random widths."""
    u, _ = _rotated(rng, y, x)
    # A wider range than that of rotated coordinates, at most 0.71 from the centre.
    edges = np.sort(rng.uniform(-1.5, 1.5, rng.integers(20, 100)))
    return rng.random((len(edges) + 1, 3))[np.searchsorted(edges, u)]


def _cells(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Draws Voronoi cells, each of one colour."""
    points = rng.random((rng.integers(20, 400), 2))
    _, nearest = spatial.KDTree(points).query(np.stack([y, x], -1))
    return rng.random((len(points), 3))[nearest]


def _cracks(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Draws dark borders of Voronoi cells; each cell becomes darker away from its point."""
    points = rng.random((rng.integers(20, 300), 2))
    distance, _ = spatial.KDTree(points).query(np.stack([y, x], -1), k=2)
    spacing = len(points) ** -0.5
    # On the border between two cells, the two nearest points are equally far away.
    border = np.clip((distance[..., 1] - distance[..., 0]) / (0.15 * spacing), 0, 1)
    return border * (1 - 0.4 * np.clip(distance[..., 0] / spacing, 0, 1))


def _leaves(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Draws dead leaves: discs of random size and colour that occlude each other."""
    colours = np.ones((*y.shape, 3)) * rng.random(3)
    for _ in range(300):
        cy, cx = rng.uniform(-0.1, 1.1, 2)
        # A power law gives many small discs and a few large ones.
        radius = min(0.02 * rng.random() ** -0.6, 0.25)
        rows, columns = (
            slice(*np.searchsorted(axis, (c - radius, c + radius)))
            for axis, c in ((y[:, 0], cy), (x[0], cx))
        )
        inside = (y[rows, columns] - cy) ** 2 + (x[rows, columns] - cx) ** 2 < radius**2
        colours[rows, columns][inside] = rng.random(3)
    return colours


def _rings(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Draws wavy rings around a point, as in cut wood."""
    cy, cx = rng.uniform(-0.5, 1.5, 2)
    radius = np.hypot(y - cy, x - cx) + rng.uniform(0, 0.15) * _noise(rng, y, x, 4)
    return 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(6, 30) * radius)


def _marble(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Draws veins: waves distorted by noise, with narrow valleys."""
    u, _ = _rotated(rng, y, x)
    phase = u * rng.uniform(2, 8) + rng.uniform(0.5, 3) * _clouds(rng, y, x)
    return np.abs(np.sin(np.pi * phase)) ** rng.uniform(0.3, 1)


def _bricks(rng: np.random.Generator, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Draws courses of bricks of varied colour in mortar."""
    u, v = _rotated(rng, y, x)
    rows = rng.uniform(5, 16)
    course, height = np.divmod(v * rows, 1)
    number, length = np.divmod(u * rows / rng.uniform(1.5, 3) + 0.5 * (course % 2), 1)
    mortar = (height < 0.12) | (length < 0.05)
    palette = rng.uniform(0, 0.4, 3) + rng.uniform(0.2, 0.6) * rng.random((97, 1))
    bricks = palette[(31 * course + 17 * number).astype(int) % 97]
    return np.where(mortar[..., None], rng.uniform(0.5, 1), bricks)


def _rotated(
    rng: np.random.Generator, y: np.ndarray, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rotates the coordinates by a random angle around the image's centre."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = y - 0.5, x - 0.5
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _rescaled(values: np.ndarray) -> np.ndarray:
    """Scales the values to the full range [0, 1]."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low)


FAMILIES = {
    "clouds": _clouds,
    "grain": _grain,
    "grating": _grating,
    "checkers": _checkers,
    "bars": _bars,
    "cells": _cells,
    "cracks": _cracks,
    "leaves": _leaves,
    "rings": _rings,
    "marble": _marble,
    "bricks": _bricks,
}
