"""Random masks M with the opacity folded in: families of smooth shapes, and where they lie (A.2).

`MASKS` holds the families, `PLACEMENTS` the places of their blobs. To try another, add a function
to its registry and its name to `config.CorruptionConfig`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from jaxtyping import Key as KeyArray

from pae_jax import rng
from pae_jax.config import CorruptionConfig

Image = Float[Array, "h w 3"]
Mask = Float[Array, "h w"]
Scalar = Float[Array, ""]
Key = KeyArray[Array, ""]

# Knots along either axis of a blob's distortion field.
KNOTS = 9
VISIBLE = 0.1  # a pixel with M above this counts as anomalous where corruptions are to be found
OCTAVES = 3  # of the family "perlin"


# Mask families: (key, x, config) -> M, opacity included.


def ellipses(key: Key, image: Image, config: CorruptionConfig) -> Mask:
    """Rotated ellipses, distorted elastically."""
    return _blobs(key, image, config, _euclidean, turn=math.pi, distortion=config.distortion)


def boxes(key: Key, image: Image, config: CorruptionConfig) -> Mask:
    """Upright rectangles."""
    return _blobs(key, image, config, _maximum, turn=0.0, distortion=0.0)


def perlin(key: Key, image: Image, config: CorruptionConfig) -> Mask:
    """Three octaves of gradient noise above a random level; one opacity for the whole mask.

    The coarsest cells measure half of `max_axis` to twice `max_axis` of the shorter side, so that
    the largest spots are about as wide as the largest ellipses. `config.placement` is not read.
    """
    shape = image.shape[0], image.shape[1]
    largest = 2 * config.max_axis * min(shape)
    lattices = [lattice(shape, largest / 4 / 2**i) for i in range(OCTAVES)]
    number, phases, *turns = rng.uniforms(key, (3,), (OCTAVES, 2), *lattices)
    cell = jnp.broadcast_to(largest / 4 ** number[0], (2,))
    octaves = [
        gradient_noise(turns[i], phases[i], shape, cell / 2**i) / 2**i for i in range(OCTAVES)
    ]
    noise = sum(octaves[1:], start=octaves[0])
    noise /= jnp.maximum(jnp.max(noise), 1e-6)
    level = 0.2 + 0.5 * number[1]
    ramp = (noise - level) / ((1 - level) * config.softness)
    return _opacity(number[2], config) * _smoothstep(ramp)


MASKS: dict[str, Callable[[Key, Image, CorruptionConfig], Mask]] = {
    "ellipses": ellipses,
    "perlin": perlin,
    "boxes": boxes,
}


# Placements of a blob's centre: (u, x) -> (row, column) in pixels, for u ~ U[0, 1)².


def uniformly(u: Float[Array, "2"], image: Image) -> Float[Array, "2"]:
    """Everywhere alike."""
    return u * jnp.array(image.shape[:2], u.dtype)


def on_edges(u: Float[Array, "2"], image: Image) -> Float[Array, "2"]:
    """Half everywhere alike, half with a density in proportion to ‖∇x‖².

    Where a part covers a tenth of the image, nine of ten blobs would fall on empty background, and
    there a window on the image or a warp changes nothing. By the inverse of the distribution
    function, first of the row, then of the column given the row.
    """
    down = jnp.diff(image, axis=0, append=image[-1:])
    right = jnp.diff(image, axis=1, append=image[:, -1:])
    energy = (down**2 + right**2).mean(-1)
    energy /= jnp.maximum(energy.mean(), 1e-12)  # a flat image has none

    def invert(density: Float[Array, " n"], number: Scalar) -> Array:
        below = jnp.cumsum(density)
        index = jnp.searchsorted(below, number * below[-1], side="right")
        return jnp.minimum(index, len(density) - 1)

    density = 1 + energy
    row = invert(density.sum(1), u[0])
    return jnp.stack([row, invert(density[row], u[1])]) + 0.5


PLACEMENTS: dict[str, Callable[[Float[Array, "2"], Image], Float[Array, "2"]]] = {
    "uniform": uniformly,
    "edges": on_edges,
}


def _opacity(number: Scalar, config: CorruptionConfig) -> Scalar:
    """α ~ U(min_opacity, max_opacity] for a number in [0, 1): mass near zero (A.2), never zero."""
    return config.max_opacity - number * (config.max_opacity - config.min_opacity)


def _euclidean(y: Array, x: Array) -> Array:
    return jnp.sqrt(y * y + x * x)


def _maximum(y: Array, x: Array) -> Array:
    return jnp.maximum(jnp.abs(y), jnp.abs(x))


def _blobs(
    key: Key,
    image: Image,
    config: CorruptionConfig,
    norm: Callable[[Array, Array], Array],
    *,
    turn: float,
    distortion: float,
) -> Mask:
    """min_blobs to max_blobs unit balls of `norm`, each with its own axes, angle and opacity.

    Half-axes are log-uniform in [min_axis, max_axis] of the shorter side, at least one pixel.
    M falls from α to 0 smoothly over the outer `softness` of the radius; where blobs overlap
    the larger value holds.
    """
    height, width, _ = image.shape
    side = min(height, width)
    place = PLACEMENTS[config.placement]
    count_key, number_key, field_key = jax.random.split(key, 3)
    count = rng.uniform_int(count_key, config.min_blobs, config.max_blobs + 1)
    numbers = rng.uniform(number_key, config.max_blobs, 6)
    knots = math.sqrt(12) * (rng.uniform(field_key, config.max_blobs, 2, KNOTS, KNOTS) - 0.5)

    def blob(number: Float[Array, "6"], knots: Float[Array, "2 knots knots"]) -> Mask:
        centre = place(number[:2], image)
        y = jnp.arange(height) + 0.5 - centre[0]
        x = jnp.arange(width) + 0.5 - centre[1]
        axes = config.min_axis * (config.max_axis / config.min_axis) ** number[2:4]
        axes = jnp.maximum(axes * side, 1.0)
        cos, sin = jnp.cos(turn * number[4]), jnp.sin(turn * number[4])
        scale = jnp.max(axes) / 2  # between the knots
        field = distortion * scale * _smooth_field(knots, y / scale, x / scale)
        y, x = y[:, None] + field[0], x[None, :] + field[1]
        radius = norm((cos * y + sin * x) / axes[0], (cos * x - sin * y) / axes[1])
        return _opacity(number[5], config) * _smoothstep((1 - radius) / config.softness)

    blobs = jax.vmap(blob)(numbers, knots)
    active = (jnp.arange(config.max_blobs) < count)[:, None, None]
    return jnp.max(jnp.where(active, blobs, 0.0), axis=0)


def gradient_noise(
    turns: Float[Array, "rows columns"],
    phase: Float[Array, "2"],
    shape: tuple[int, int],
    cell: Float[Array, "2"],
) -> Mask:
    """Perlin's gradient noise, in [−1/√2, 1/√2].

    The sum over a cell's corners of fade(y)·fade(x)·(gradient · offset) is separable, thus four
    small matrix products instead of gathers.

    Args:
      turns: directions of the gradients, in turns, on `lattice(shape, n)` points for n ≤ `cell`.
      phase: of the lattice, in cells, in [0, 1).
      shape: (h, w).
      cell: height and width of a cell in pixels. Cells below two pixels count as two: at one
        pixel the lattice falls on the pixels, and there the noise is zero.
    """
    angle = 2 * math.pi * turns

    def corners(axis: int) -> tuple[Array, Array]:
        position = jnp.arange(shape[axis]) / jnp.maximum(cell[axis], 2.0) + phase[axis]
        offset = position[:, None] - jnp.arange(turns.shape[axis])[None, :]
        t = jnp.maximum(1 - jnp.abs(offset), 0.0)
        fade = t**3 * (t * (6 * t - 15) + 10)
        return fade, fade * offset

    (fade_y, ramp_y), (fade_x, ramp_x) = corners(0), corners(1)
    return ramp_y @ jnp.sin(angle) @ fade_x.T + fade_y @ jnp.cos(angle) @ ramp_x.T


def lattice(shape: tuple[int, int], min_cell: float) -> tuple[int, int]:
    """Points along either axis that cells of at least `min_cell` pixels need."""
    height, width = (math.ceil(size / max(min_cell, 2.0)) + 2 for size in shape)
    return height, width


def _smooth_field(
    knots: Float[Array, "2 knots knots"], y: Float[Array, " h"], x: Float[Array, " w"]
) -> Float[Array, "2 h w"]:
    """Two smooth fields with correlation length 1 around the origin, 0 far from it.

    Cubic B-splines on a lattice of random numbers of variance 1: twice differentiable, and
    separable, thus two small matrix products.
    """

    def weights(position: Array) -> Array:
        d = jnp.abs(position[:, None] - (jnp.arange(KNOTS) - KNOTS // 2)[None, :])
        return cubic_spline(d)

    return weights(y) @ knots @ weights(x).T


def cubic_spline(d: Array) -> Array:
    """The cubic B-spline at distance d ≥ 0 from its knot."""
    return jnp.where(d < 1, 2 / 3 - d**2 + d**3 / 2, jnp.maximum(2 - d, 0.0) ** 3 / 6)


def _smoothstep(t: Array) -> Array:
    """0 below 0, 1 above 1, 3t² − 2t³ between."""
    t = jnp.clip(t, 0.0, 1.0)
    return t * t * (3 - 2 * t)
