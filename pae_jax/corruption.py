"""Corruption x̂ = M⊙y + (1−M)⊙x (§2.1, eq. 13): masks, opacity, textures.

`MASKS` holds families of smooth random masks, opacity included, `PLACEMENTS` where their blobs lie,
and `KINDS` ways to choose (y, M). To try another, add a function to its registry and its name to
`config.CorruptionConfig`. All of them see one example; `corrupt` maps over the batch.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from jaxtyping import Key as KeyArray

from pae_jax import augmentation, rng
from pae_jax.config import CorruptionConfig

Image = Float[Array, "h w 3"]
Texture = Float[Array, "th tw 3"]
Mask = Float[Array, "h w"]
Scalar = Float[Array, ""]
Key = KeyArray[Array, ""]
Keys = KeyArray[Array, "*keys"]  # of the batch, or one for each example

# Knots along either axis of a blob's distortion field.
KNOTS = 9


class CorruptedBatch(NamedTuple):
    """x̂, x and M of one batch, float32 in [0, 1]."""

    corrupted: Float[Array, "b h w c"]
    clean: Float[Array, "b h w c"]
    mask: Float[Array, "b h w 1"]


def corrupt(
    key: Keys,
    images: Float[Array, "b h w 3"],
    textures: Float[Array, "b th tw 3"],
    config: CorruptionConfig,
) -> CorruptedBatch:
    """Corrupts each image by its own random mask and pattern.

    Args:
      key: one key, or (b,) keys: example i depends on `key` and i, or on `key[i]`, alone.
      images: x, (b, h, w, 3) in [0, 1].
      textures: (b, th, tw, 3) in [0, 1], any size; textures whose three channels are equal keep
        them equal, so pass grey textures with grey images.
      config: kind, mask family, opacity and their ranges.

    Returns:
      x̂, x and M with the opacity folded in; a share `config.clean` of the examples has M = 0
      and x̂ = x.
    """

    def one(key: Key, image: Image, texture: Texture) -> tuple[Image, Mask]:
        clean_key, kind_key = jax.random.split(key)
        y, mask = KINDS[config.kind](kind_key, image, texture, config)
        mask = jnp.where(jax.random.bernoulli(clean_key, config.clean), 0.0, mask)
        return mask[..., None] * y + (1 - mask[..., None]) * image, mask

    corrupted, mask = jax.vmap(one)(rng.per_example(key, len(images)), images, textures)
    return CorruptedBatch(corrupted, images, mask[..., None])


# Kinds: (key, x, texture, config) -> (y, M).


def paste_texture(
    key: Key, image: Image, texture: Texture, config: CorruptionConfig
) -> tuple[Image, Mask]:
    """The paper's corruption (§2.1): a transformed texture under a mask of `config.mask`."""
    mask_key, pattern_key = jax.random.split(key)
    y = random_pattern(pattern_key, texture, (image.shape[0], image.shape[1]), config)
    return y, MASKS[config.mask](mask_key, image, config)


def structural(
    key: Key, image: Image, texture: Texture, config: CorruptionConfig
) -> tuple[Image, Mask]:
    """Textures, and patterns that are wrong by their place alone, a quarter each.

    y is a texture as in `paste_texture`, another window on the same image, the same image warped
    or in another tone. A defect need not be foreign matter: to undo a bend or a dent, f must know
    what belongs where. Eq. 14 asks for y unlike the data; these are unlike x.
    """
    choice_key, mask_key, *keys = jax.random.split(key, 6)
    shape = image.shape[0], image.shape[1]
    patterns = [
        random_pattern(keys[0], texture, shape, config),
        random_pattern(keys[1], image, shape, config),
        warp(keys[2], image),
        change_tone(keys[3], image, brightness=2 * config.brightness, contrast=config.contrast),
    ]
    y = jnp.stack(patterns)[_integer(choice_key, 0, len(patterns))]
    return y, MASKS[config.mask](mask_key, image, config)


def warp(key: Key, image: Image) -> Image:
    """The image under a smooth displacement of a few per cent of the shorter side.

    Its correlation length is 3 to 12 % of the side; the displacement's deviation, half of that.
    """
    height, width, _ = image.shape
    scale_key, field_key = jax.random.split(key)
    length = min(height, width) * 0.03 * 4 ** jax.random.uniform(scale_key)
    points = [math.ceil(size / (0.03 * min(height, width))) + 2 for size in (height, width)]
    knots = math.sqrt(12) * (_uniform(field_key, 2, *points) - 0.5)

    def weights(size: int, count: int) -> Array:
        d = jnp.abs(jnp.arange(size)[:, None] / length - jnp.arange(count)[None, :])
        return _cubic_spline(d)

    field = weights(height, points[0]) @ knots @ weights(width, points[1]).T
    y, x = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    return augmentation.resample(image, y + length / 2 * field[0], x + length / 2 * field[1])


def draem(key: Key, image: Image, texture: Texture, config: CorruptionConfig) -> tuple[Image, Mask]:
    """DRAEM's corruption (arXiv 2108.07610, §3.2): a texture under thresholded Perlin noise.

    As published: a hard mask, noise of 1 to 32 cells a side, opacity β ~ U[0.1, 1]; `config.mask`
    and the opacity range are not read. Published too: `clean` = 0.5. Left out: the rotation of
    the noise.
    """
    pattern_key, cells_key, noise_key, opacity_key = jax.random.split(key, 4)
    shape = image.shape[0], image.shape[1]
    y = random_pattern(pattern_key, texture, shape, config)
    cells = 2.0 ** _integer(cells_key, 0, 6, 2)
    noise = gradient_noise(noise_key, shape, jnp.array(shape) / cells, min_cell=min(shape) / 32)
    opacity = jax.random.uniform(opacity_key, minval=0.1, maxval=1.0)
    # DRAEM scales the noise by √2 before it cuts at 0.5.
    return y, opacity * (math.sqrt(2) * noise > 0.5)


def cutpaste(
    key: Key, image: Image, texture: Texture, config: CorruptionConfig
) -> tuple[Image, Mask]:
    """CutPaste (arXiv 2104.04015, §3.1): a piece of the same image, elsewhere, its tone jittered.

    As published: a patch of 2 to 15 % of the area and aspect 0.3 to 3.3, or, half of the time, a
    scar: a thin strip turned by up to 45°; opacity 1, hard edges, brightness and contrast
    changed by up to 0.1. Left out: jitter of saturation and hue, and turning the strip's content
    with its outline. `config` is not read.
    """
    del texture, config
    height, width, _ = image.shape
    side = math.sqrt(height * width)
    form_key, size_key, angle_key, place_key, tone_key = jax.random.split(key, 5)
    scar = jax.random.bernoulli(form_key)
    u, v = jax.random.uniform(size_key, (2,))
    area, aspect = 0.02 + 0.13 * u, 0.3 * (3.3 / 0.3) ** v
    patch = jnp.stack([jnp.sqrt(area * aspect), jnp.sqrt(area / aspect)])
    strip = jnp.stack([10 + 15 * u, 2 + 14 * v]) / 256  # published in pixels of a side of 256
    half = jnp.maximum(side / 2 * jnp.where(scar, strip, patch), 0.5)
    angle = jnp.where(scar, jax.random.uniform(angle_key, minval=-1.0) * math.pi / 4, 0.0)
    cos, sin = jnp.cos(angle), jnp.sin(angle)

    # Both places lie inside the image where the piece fits at all.
    size = jnp.array([height, width], jnp.float32)
    reach = jnp.stack(
        [half[0] * cos + half[1] * jnp.abs(sin), half[1] * cos + half[0] * jnp.abs(sin)]
    )
    reach = jnp.minimum(reach, size / 2)
    low, high = reach, size - reach
    source, target = jax.random.uniform(place_key, (2, 2), minval=low, maxval=high)
    move = jnp.round(target - source).astype(jnp.int32)
    moved = jnp.roll(image, move, axis=(0, 1))
    y = change_tone(tone_key, moved, brightness=0.1, contrast=0.1)
    rows = (jnp.arange(height) + 0.5 - target[0])[:, None]
    columns = (jnp.arange(width) + 0.5 - target[1])[None, :]
    along, across = cos * rows + sin * columns, cos * columns - sin * rows
    inside = (jnp.abs(along) <= half[0]) & (jnp.abs(across) <= half[1])
    return y, inside.astype(image.dtype)


def riad(key: Key, image: Image, texture: Texture, config: CorruptionConfig) -> tuple[Image, Mask]:
    """RIAD (Zavrtanik et al. 2021, §3.1): one of three disjoint sets of cells is blacked out.

    Each square cell, of side 2, 4, 8 or 16 pixels (drawn per example), belongs to one of the
    sets with equal probability; the published sets are equally large. `config` is not read.
    """
    del texture, config
    size_key, set_key = jax.random.split(key)
    side = 2 ** _integer(size_key, 1, 5)
    height, width, _ = image.shape
    member = _uniform(set_key, -(-height // 2), -(-width // 2)) < 1 / 3
    mask = member[jnp.arange(height) // side][:, jnp.arange(width) // side]
    return jnp.zeros_like(image), mask.astype(image.dtype)


KINDS: dict[str, Callable[[Key, Image, Texture, CorruptionConfig], tuple[Image, Mask]]] = {
    "texture": paste_texture,
    "structural": structural,
    "draem": draem,
    "cutpaste": cutpaste,
    "riad": riad,
}


# Patterns.


def random_pattern(
    key: Key, texture: Texture, shape: tuple[int, int], config: CorruptionConfig
) -> Float[Array, "h w 3"]:
    """y of eq. 13: a random view of a texture, its colours and tone changed."""
    view_key, colour_key, tone_key = jax.random.split(key, 3)
    y = permute_channels(colour_key, random_view(view_key, texture, shape))
    return change_tone(tone_key, y, brightness=config.brightness, contrast=config.contrast)


def random_view(key: Key, texture: Texture, shape: tuple[int, int]) -> Float[Array, "h w 3"]:
    """A random window on a texture, rotated, mirrored and scaled by a factor of 1/2 to 2.

    The texture is continued by reflection, so one of any size fills any `shape` at its own
    scale. Larger steps than two pixels would alias, since `resample` does not low-pass.
    """
    number = jax.random.uniform(key, (5,))
    top, left = number[0] * texture.shape[0] - 0.5, number[1] * texture.shape[1] - 0.5
    step, angle = 2 ** (2 * number[2] - 1), 2 * math.pi * number[3]
    cos, sin = step * jnp.cos(angle), step * jnp.sin(angle)
    mirror = jnp.where(number[4] < 0.5, -1.0, 1.0)
    y = (jnp.arange(shape[0]) - (shape[0] - 1) / 2)[:, None]
    x = mirror * (jnp.arange(shape[1]) - (shape[1] - 1) / 2)[None, :]
    return augmentation.resample(texture, top + cos * y + sin * x, left + cos * x - sin * y)


def permute_channels(key: Key, image: Image) -> Image:
    """The colours under a random permutation of the channels; grey stays grey.

    Changes of hue or saturation would mix the channels; XLA then repeats the gathers of
    `random_view` for each of them, which is several times slower on a CPU.
    """
    orders = jnp.array(list(itertools.permutations(range(3))))
    return image[..., orders[_integer(key, 0, len(orders))]]


def change_tone(key: Key, image: Image, *, brightness: float, contrast: float) -> Image:
    """Random contrast and brightness, clipped to [0, 1]; alike in all channels.

    Args:
      image: (h, w, 3) in [0, 1].
      brightness: the largest offset.
      contrast: the factor about mid-grey lies in 1 ± this.
    """
    offset, gain = jax.random.uniform(key, (2,), minval=-1.0)
    return jnp.clip((1 + contrast * gain) * (image - 0.5) + 0.5 + brightness * offset, 0.0, 1.0)


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
    number_key, *octave_keys = jax.random.split(key, 4)
    number = jax.random.uniform(number_key, (3,))
    largest = 2 * config.max_axis * min(shape)
    cell = jnp.broadcast_to(largest / 4 ** number[0], (2,))
    octaves = [
        gradient_noise(octave_key, shape, cell / 2**i, min_cell=largest / 4 / 2**i) / 2**i
        for i, octave_key in enumerate(octave_keys)
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


def on_structure(u: Float[Array, "2"], image: Image) -> Float[Array, "2"]:
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
    "structure": on_structure,
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
    count = _integer(count_key, config.min_blobs, config.max_blobs + 1)
    numbers = _uniform(number_key, config.max_blobs, 6)
    knots = math.sqrt(12) * (_uniform(field_key, config.max_blobs, 2, KNOTS, KNOTS) - 0.5)

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
    key: Key, shape: tuple[int, int], cell: Float[Array, "2"], *, min_cell: float
) -> Mask:
    """Perlin's gradient noise with a random phase, in [−1/√2, 1/√2].

    The sum over a cell's corners of fade(y)·fade(x)·(gradient · offset) is separable, thus four
    small matrix products instead of gathers.

    Args:
      cell: height and width of a cell in pixels. Cells below two pixels count as two: at one
        pixel the lattice falls on the pixels, and there the noise is zero.
      min_cell: a lower bound on `cell`; it fixes the size of the lattice.
    """
    angle_key, phase_key = jax.random.split(key)
    points = [math.ceil(size / max(min_cell, 2.0)) + 2 for size in shape]
    angle = 2 * math.pi * _uniform(angle_key, *points)
    phase = jax.random.uniform(phase_key, (2,))

    def corners(axis: int) -> tuple[Array, Array]:
        position = jnp.arange(shape[axis]) / jnp.maximum(cell[axis], 2.0) + phase[axis]
        offset = position[:, None] - jnp.arange(points[axis])[None, :]
        t = jnp.maximum(1 - jnp.abs(offset), 0.0)
        fade = t**3 * (t * (6 * t - 15) + 10)
        return fade, fade * offset

    (fade_y, ramp_y), (fade_x, ramp_x) = corners(0), corners(1)
    return ramp_y @ jnp.sin(angle) @ fade_x.T + fade_y @ jnp.cos(angle) @ ramp_x.T


def _smooth_field(
    knots: Float[Array, "2 knots knots"], y: Float[Array, " h"], x: Float[Array, " w"]
) -> Float[Array, "2 h w"]:
    """Two smooth fields with correlation length 1 around the origin, 0 far from it.

    Cubic B-splines on a lattice of random numbers of variance 1: twice differentiable, and
    separable, thus two small matrix products.
    """

    def weights(position: Array) -> Array:
        d = jnp.abs(position[:, None] - (jnp.arange(KNOTS) - KNOTS // 2)[None, :])
        return _cubic_spline(d)

    return weights(y) @ knots @ weights(x).T


def _cubic_spline(d: Array) -> Array:
    """The cubic B-spline at distance d ≥ 0 from its knot."""
    return jnp.where(d < 1, 2 / 3 - d**2 + d**3 / 2, jnp.maximum(2 - d, 0.0) ** 3 / 6)


def _uniform(key: Key, *shape: int) -> Array:
    """U[0, 1). Drawn flat: XLA on a CPU compiles the same draw in four axes 20 × slower."""
    return jax.random.uniform(key, (math.prod(shape),)).reshape(shape)


def _integer(key: Key, low: int, high: int, *shape: int) -> Array:
    """low … high − 1, equally likely; a quarter of the code of `jax.random.randint` to compile."""
    return low + ((high - low) * _uniform(key, *shape)).astype(jnp.int32)


def _smoothstep(t: Array) -> Array:
    """0 below 0, 1 above 1, 3t² − 2t³ between."""
    t = jnp.clip(t, 0.0, 1.0)
    return t * t * (3 - 2 * t)
