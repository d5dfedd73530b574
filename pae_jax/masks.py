"""Random masks M of eq. 13, (h, w) in [0, 1], with the opacity folded in (appendix A.2).

`MASKS` holds the families of shapes, `PLACEMENTS` the distributions of their positions. To try
another, add a function to the registry and its name to `config.CorruptionConfig`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

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

VISIBLE = 0.1  # a pixel counts as anomalous if M exceeds this, in metrics and as a target

# Along each axis of a blob's distortion field. The knots are half of the longer half-axis apart,
# so that nine of them reach twice as far as the blob.
KNOTS = 9
OCTAVES = 3  # of the family "perlin"


# Mask families: (key, x, config) -> M, opacity included. They read the image for its size, and
# for its edges where `config.placement` asks for them.


def ellipses(key: Key, image: Image, config: CorruptionConfig) -> Mask:
    """Draws rotated ellipses with an elastic distortion."""
    draw = partial(_log_uniform_axes, norm=_euclidean)
    return _blobs(key, image, config, draw, max_angle=math.pi, distortion=config.distortion)


def boxes(key: Key, image: Image, config: CorruptionConfig) -> Mask:
    """Draws rectangles parallel to the axes."""
    draw = partial(_log_uniform_axes, norm=_maximum)
    return _blobs(key, image, config, draw, max_angle=0.0, distortion=0.0)


def shapes(key: Key, image: Image, config: CorruptionConfig) -> Mask:
    """Draws ellipses, strips and bands with distorted edges, each of three forms equally often.

    A strip is a thin rectangle, as a scratch is. A band crosses the whole image; at a border it
    covers a side or a corner, as chips and shadows do. Half-widths are log-uniform in [`min_axis`,
    `max_axis`] of the shorter side. So is the softness of the edge, in [`softness`², 1].
    """
    draw, distortion = _random_form, config.distortion
    return _blobs(key, image, config, draw, max_angle=math.pi, distortion=distortion, extra=3)


def perlin(key: Key, image: Image, config: CorruptionConfig) -> Mask:
    """Draws spots where three octaves of gradient noise exceed a random level.

    The coarsest cells measure between half of `max_axis` and twice `max_axis` of the shorter
    side, so the largest spots are about as wide as the largest ellipses. The whole mask has one
    opacity. `config.placement` is not read.
    """
    shape = image.shape[0], image.shape[1]
    largest = 2 * config.max_axis * min(shape)
    # Shapes are static, so the lattices have as many points as the smallest cells need.
    lattices = [lattice(shape, largest / 4 / 2**i) for i in range(OCTAVES)]
    size, level, opacity, phases, *turns = rng.uniforms(key, (), (), (), (OCTAVES, 2), *lattices)
    cell = jnp.broadcast_to(largest / 4**size, (2,))
    octaves = [
        gradient_noise(turns[i], phases[i], shape, cell / 2**i) / 2**i for i in range(OCTAVES)
    ]
    noise = sum(octaves[1:], start=octaves[0])
    # With a maximum of 1 every level below 1 leaves at least one spot.
    noise /= jnp.maximum(jnp.max(noise), 1e-6)
    level = 0.2 + 0.5 * level
    ramp = (noise - level) / ((1 - level) * config.softness)
    return _opacity(opacity, config) * _smoothstep(ramp)


MASKS: dict[str, Callable[[Key, Image, CorruptionConfig], Mask]] = {
    "ellipses": ellipses,
    "perlin": perlin,
    "boxes": boxes,
    "shapes": shapes,
}


# Placements: (u, x) -> a blob's centre (row, column) in pixels, for u ~ U[0, 1)².


def place_uniformly(u: Float[Array, "2"], image: Image) -> Float[Array, "2"]:
    """Returns a centre with a uniform density over the image."""
    return u * jnp.array(image.shape[:2], u.dtype)


def place_on_edges(u: Float[Array, "2"], image: Image) -> Float[Array, "2"]:
    """Returns a centre whose density is half uniform, half proportional to ‖∇x‖².

    If an object covers a tenth of the image, nine of ten uniform blobs fall on an empty
    background, where another window on the image or a warp changes nothing.
    """
    down = jnp.diff(image, axis=0, append=image[-1:])
    right = jnp.diff(image, axis=1, append=image[:, -1:])
    energy = (down**2 + right**2).mean(-1)
    energy /= jnp.maximum(energy.mean(), 1e-12)  # 0 everywhere in a flat image

    # Inverse transform sampling: first the row, then the column given the row.
    def invert(density: Float[Array, " n"], number: Scalar) -> Array:
        cumulative = jnp.cumsum(density)
        index = jnp.searchsorted(cumulative, number * cumulative[-1], side="right")
        # The product may equal the total by rounding, which gives an index after the last one.
        return jnp.minimum(index, len(density) - 1)

    density = 1 + energy
    row = invert(density.sum(1), u[0])
    return jnp.stack([row, invert(density[row], u[1])]) + 0.5


PLACEMENTS: dict[str, Callable[[Float[Array, "2"], Image], Float[Array, "2"]]] = {
    "uniform": place_uniformly,
    "edges": place_on_edges,
}


def _opacity(number: Scalar, config: CorruptionConfig) -> Scalar:
    """Returns α ~ U(min_opacity, max_opacity] for a number in [0, 1).

    The density does not vanish near zero, as A.2 requires, but α is never zero.
    """
    return config.max_opacity - number * (config.max_opacity - config.min_opacity)


def _euclidean(y: Array, x: Array) -> Array:
    return jnp.sqrt(y * y + x * x)


def _maximum(y: Array, x: Array) -> Array:
    return jnp.maximum(jnp.abs(y), jnp.abs(x))


class _Form(NamedTuple):
    """The form of one blob before it is rotated.

    Attributes:
      axes: half-axes in pixels, at least 1: a smaller blob could lie between the pixel centres and
        leave the mask empty.
      norm: the blob is the unit ball of this function of (y, x), after division by the axes.
      scale: the distance of two knots of the distortion in pixels.
      softness: the width of the soft edge as a fraction of the radius.
    """

    axes: Float[Array, "2"]
    norm: Callable[[Array, Array], Array]
    scale: Scalar
    softness: Scalar | float


def _log_uniform_axes(
    numbers: Float[Array, " n"],
    side: int,
    config: CorruptionConfig,
    *,
    norm: Callable[[Array, Array], Array],
) -> _Form:
    """Draws half-axes log-uniformly in [min_axis, max_axis] of the shorter side."""
    axes = config.min_axis * (config.max_axis / config.min_axis) ** numbers[:2]
    axes = jnp.maximum(axes * side, 1.0)
    return _Form(axes, norm, jnp.max(axes) / 2, config.softness)


def _random_form(numbers: Float[Array, "5"], side: int, config: CorruptionConfig) -> _Form:
    """Draws an ellipse, a strip or a band; see `shapes`."""
    half = side * config.min_axis * (config.max_axis / config.min_axis) ** numbers[:2]
    form, slenderness, softness = numbers[2:]
    is_ellipse, is_band = form < 1 / 3, form >= 2 / 3
    # Three times the shorter side is longer than the diagonal of images up to 1 : 2.
    length = jnp.where(is_ellipse, half[0], jnp.where(is_band, 3.0 * side, 2 * half[0]))
    width = jnp.where(is_ellipse | is_band, half[1], half[1] / 8**slenderness)
    axes = jnp.maximum(jnp.stack([length, width]), 1.0)

    def norm(y: Array, x: Array) -> Array:
        return jnp.where(is_ellipse, _euclidean(y, x), _maximum(y, x))

    # The edge of a long form is distorted over the lengths of a short one.
    scale = jnp.minimum(jnp.max(axes), side / 3) / 2
    return _Form(axes, norm, scale, config.softness ** (2 * softness))


def _blobs(
    key: Key,
    image: Image,
    config: CorruptionConfig,
    draw_form: Callable[[Array, int, CorruptionConfig], _Form],
    *,
    max_angle: float,
    distortion: float,
    extra: int = 0,
) -> Mask:
    """Draws min_blobs to max_blobs forms, rotated and distorted.

    Each blob has its own position, form, angle and opacity α. M falls smoothly from α to 0 over
    the outer fraction `softness` of the radius. Where blobs overlap, M is the maximum.

    Args:
      key: a key.
      image: gives the size, and the edges where `config.placement` asks for them.
      config: the numbers of blobs, their softness, opacity and placement.
      draw_form: (uniform numbers (2 + extra,), shorter side, config) → the form.
      max_angle: the rotation is uniform in [0, max_angle].
      distortion: the strength of the elastic distortion.
      extra: the random numbers that a form needs beyond two.
    """
    height, width, _ = image.shape
    place = PLACEMENTS[config.placement]
    count_key, number_key, field_key = jax.random.split(key, 3)
    count = rng.uniform_int(count_key, config.min_blobs, config.max_blobs + 1)
    numbers = rng.uniform(number_key, config.max_blobs, 6 + extra)
    # U[0, 1) has the variance 1/12; the knots' is 1.
    knots = math.sqrt(12) * (rng.uniform(field_key, config.max_blobs, 2, KNOTS, KNOTS) - 0.5)

    def blob(numbers: Float[Array, " n"], knots: Float[Array, "2 knots knots"]) -> Mask:
        position, sizes, angle, opacity = numbers[:2], numbers[2:4], numbers[4], numbers[5]
        row, column = place(position, image)
        y = jnp.arange(height) + 0.5 - row
        x = jnp.arange(width) + 0.5 - column
        sizes = jnp.concatenate([sizes, numbers[6:]])
        axes, norm, scale, softness = draw_form(sizes, min(height, width), config)
        cos, sin = jnp.cos(max_angle * angle), jnp.sin(max_angle * angle)
        field = distortion * scale * _smooth_field(knots, y / scale, x / scale)
        y, x = y[:, None] + field[0], x[None, :] + field[1]
        radius = norm((cos * y + sin * x) / axes[0], (cos * x - sin * y) / axes[1])
        return _opacity(opacity, config) * _smoothstep((1 - radius) / softness)

    # All blobs are drawn and the surplus is hidden, because shapes must not depend on the key.
    blobs = jax.vmap(blob)(numbers, knots)
    active = (jnp.arange(config.max_blobs) < count)[:, None, None]
    return jnp.max(jnp.where(active, blobs, 0.0), axis=0)


def gradient_noise(
    turns: Float[Array, "rows columns"],
    phase: Float[Array, "2"],
    shape: tuple[int, int],
    cell: Float[Array, "2"],
) -> Mask:
    """Returns Perlin's gradient noise, (h, w) in [−1/√2, 1/√2].

    Args:
      turns: directions of the gradients as fractions of a full turn, on at least
        `lattice(shape, min(cell))` points.
      phase: offset of the lattice in cells, in [0, 1).
      shape: (h, w).
      cell: height and width of a cell in pixels. Cells below two pixels count as two, because
        with one pixel each lattice point falls on a pixel, where the noise is zero.
    """
    # The sum over a cell's corners of fade(y)·fade(x)·(gradient · offset) is separable: four
    # small matrix products instead of gathers.
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
    """Returns the numbers of lattice points that cells of at least `min_cell` pixels need."""
    height, width = (math.ceil(size / max(min_cell, 2.0)) + 2 for size in shape)
    return height, width


def _smooth_field(
    knots: Float[Array, "2 knots knots"], y: Float[Array, " h"], x: Float[Array, " w"]
) -> Float[Array, "2 h w"]:
    """Returns two smooth fields with correlation length 1 near the origin and 0 far from it.

    They are cubic B-splines, thus twice differentiable, on a lattice of random numbers of
    variance 1. A spline is separable, so two small matrix products evaluate it.
    """

    def weights(position: Array) -> Array:
        d = jnp.abs(position[:, None] - (jnp.arange(KNOTS) - KNOTS // 2)[None, :])
        return cubic_spline(d)

    return weights(y) @ knots @ weights(x).T


def cubic_spline(d: Array) -> Array:
    """Returns the cubic B-spline at distance d ≥ 0 from its knot."""
    return jnp.where(d < 1, 2 / 3 - d**2 + d**3 / 2, jnp.maximum(2 - d, 0.0) ** 3 / 6)


def _smoothstep(t: Array) -> Array:
    """Returns 3t² − 2t³ between 0 and 1, 0 below and 1 above."""
    t = jnp.clip(t, 0.0, 1.0)
    return t * t * (3 - 2 * t)
