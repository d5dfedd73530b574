"""Corruption x̂ = M⊙y + (1−M)⊙x of normal images (§2.1, eq. 13), and the choices of y and M.

`KINDS` holds the ways to draw the pattern y and the mask M of one example; `corrupt` maps them over
a batch. Two kinds take M from `masks`. To try another, add a function to the registry and its name
to `config.CorruptionConfig`.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from jaxtyping import Key as KeyArray

from pae_jax import image_ops, masks, rng
from pae_jax.config import CorruptionConfig

DARKEST = 1 / 255  # the darkest value of the object in a suppressed image
SEAM = 1 / 24  # σ of the blur that defines slow changes, as a fraction of the shorter side

Image = Float[Array, "h w 3"]
Texture = Float[Array, "th tw 3"]
Mask = Float[Array, "h w"]
Key = KeyArray[Array, ""]
Keys = KeyArray[Array, "*keys"]  # () for the batch, or (b,), one per example


class CorruptedBatch(NamedTuple):
    """Corrupted and clean images with the masks that relate them, float32 in [0, 1].

    Attributes:
      corrupted: x̂.
      clean: x.
      mask: M, opacity included; 0 where x̂ = x.
    """

    corrupted: Float[Array, "b h w c"]
    clean: Float[Array, "b h w c"]
    mask: Float[Array, "b h w 1"]


class Pair(NamedTuple):
    """Holds equally many examples for two networks; f never sees the images of the second.

    Attributes:
      first: the examples of f.
      second: examples of the images that are reserved for the second network.
    """

    first: CorruptedBatch
    second: CorruptedBatch


Examples = CorruptedBatch | Pair


def corrupt(
    key: Keys,
    images: Float[Array, "b h w 3"],
    textures: Float[Array, "b th tw 3"],
    config: CorruptionConfig,
) -> CorruptedBatch:
    """Corrupts each image with a random pattern y under a random mask M (eq. 13).

    Args:
      key: one key, or (b,) keys. Example i depends on `key` and i, or on `key[i]`, alone.
      images: x, (b, h, w, 3) in [0, 1].
      textures: (b, th, tw, 3) in [0, 1], of any size. Equal channels stay equal, so pass grey
        textures with grey images.
      config: the kind, the mask family, the opacity and their ranges.

    Returns:
      x̂, x and M; y and M are drawn separately for each example. A fraction
      `config.clean_fraction` of the examples has M = 0 and x̂ = x.
    """

    def corrupt_example(key: Key, image: Image, texture: Texture) -> tuple[Image, Mask]:
        clean_key, kind_key = jax.random.split(key)
        y, mask = KINDS[config.kind](kind_key, image, texture, config)
        # A selection rather than a branch, because under vmap both branches would run.
        mask = jnp.where(jax.random.bernoulli(clean_key, config.clean_fraction), 0.0, mask)
        return mask[..., None] * y + (1 - mask[..., None]) * image, mask

    corrupted, mask = jax.vmap(corrupt_example)(
        rng.example_keys(key, len(images)), images, textures
    )
    return CorruptedBatch(corrupted, images, mask[..., None])


def spare_background(batch: CorruptedBatch) -> CorruptedBatch:
    """Returns the examples of suppressed images without corruption of the background.

    M becomes 0 where x is background. Where the object is corrupted, x̂ is at least 1/255, so that
    black patterns do not turn it into background; no pattern is changed by more than that.

    Args:
      batch: examples whose x has a suppressed background (`image_ops.foreground`).
    """
    mask = batch.mask * image_ops.foreground(batch.clean)
    corrupted = jnp.where(mask > 0, jnp.maximum(batch.corrupted, DARKEST), batch.clean)
    return CorruptedBatch(corrupted, batch.clean, mask)


# Kinds: (key, x, texture, config) -> (y, M), all in [0, 1].


def paste_texture(
    key: Key, image: Image, texture: Texture, config: CorruptionConfig
) -> tuple[Image, Mask]:
    """Draws the paper's corruption (§2.1): a transformed texture under a `config.mask`."""
    mask_key, pattern_key = jax.random.split(key)
    y = random_pattern(pattern_key, texture, (image.shape[0], image.shape[1]), config)
    return y, masks.MASKS[config.mask](mask_key, image, config)


def mixed(key: Key, image: Image, texture: Texture, config: CorruptionConfig) -> tuple[Image, Mask]:
    """Draws y as a texture, a window on the image, a warped image or another tone, equally often.

    The texture is that of `paste_texture`; the other three patterns come from x itself. A defect
    need not be foreign material: to correct a bend or a dent, f must learn which content belongs
    at which position. Eq. 14 asks for y unlike the data; these patterns are unlike x.
    """
    choice_key, mask_key, *keys = jax.random.split(key, 6)
    shape = image.shape[0], image.shape[1]
    patterns = [
        random_pattern(keys[0], texture, shape, config),
        random_pattern(keys[1], image, shape, config),
        warp(keys[2], image),
        change_tone(keys[3], image, brightness=2 * config.brightness, contrast=config.contrast),
    ]
    # All patterns are computed and one is selected, because under vmap every branch would run.
    y = jnp.stack(patterns)[rng.uniform_int(choice_key, 0, len(patterns))]
    return y, masks.MASKS[config.mask](mask_key, image, config)


def varied(
    key: Key, image: Image, texture: Texture, config: CorruptionConfig
) -> tuple[Image, Mask]:
    """Draws y as `mixed` does, or as a window on the image without a seam.

    The slow changes of the window are replaced by those of x, so that neither a step of
    brightness nor an edge shows where it was pasted. NSA (Schlüter et al. 2022) blends patches of
    other images by Poisson's equation to the same end.
    """
    choice_key, mask_key, *keys = jax.random.split(key, 7)
    shape = image.shape[0], image.shape[1]
    window = random_view(keys[4], image, shape)
    patterns = [
        random_pattern(keys[0], texture, shape, config),
        random_pattern(keys[1], image, shape, config),
        warp(keys[2], image),
        change_tone(keys[3], image, brightness=2 * config.brightness, contrast=config.contrast),
        jnp.clip(window + _blur(image - window, min(shape) * SEAM), 0.0, 1.0),
    ]
    # All patterns are computed and one is selected, because under vmap every branch would run.
    y = jnp.stack(patterns)[rng.uniform_int(choice_key, 0, len(patterns))]
    return y, masks.MASKS[config.mask](mask_key, image, config)


def _blur(image: Image, sigma: float) -> Image:
    kernel = image_ops.gaussian_kernel(sigma)
    return jnp.moveaxis(image_ops.filter_axes(jnp.moveaxis(image, -1, 0), kernel), 0, -1)


def warp(key: Key, image: Image) -> Image:
    """Displaces the pixels by a smooth random field of a few per cent of the shorter side.

    The field's correlation length is log-uniform in 3 to 12 % of the side. Its standard deviation
    is at most half the correlation length.
    """
    height, width, _ = image.shape
    scale_key, field_key = jax.random.split(key)
    length = min(height, width) * 0.03 * 4 ** jax.random.uniform(scale_key)
    # Shapes are static, so the knots are always as many as the shortest length needs.
    points = [math.ceil(size / (0.03 * min(height, width))) + 2 for size in (height, width)]
    # U[0, 1) has the mean 1/2 and the variance 1/12; the knots have 0 and 1.
    knots = math.sqrt(12) * (rng.uniform(field_key, 2, *points) - 0.5)

    def weights(size: int, count: int) -> Array:
        d = jnp.abs(jnp.arange(size)[:, None] / length - jnp.arange(count)[None, :])
        return masks.cubic_spline(d)

    field = weights(height, points[0]) @ knots @ weights(width, points[1]).T
    y, x = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    return image_ops.resample(image, y + length / 2 * field[0], x + length / 2 * field[1])


def draem(key: Key, image: Image, texture: Texture, config: CorruptionConfig) -> tuple[Image, Mask]:
    """Draws DRAEM's corruption (arXiv 2108.07610, §3.2): a texture under thresholded Perlin noise.

    As published, the mask has hard edges, the noise 1 to 32 cells per side, and the opacity is
    β ~ U[0.1, 1]. The rotation of the noise is left out. `config.mask` and the opacity range are
    not read; the published clean fraction is 0.5.
    """
    pattern_key, noise_key = jax.random.split(key)
    shape = image.shape[0], image.shape[1]
    y = random_pattern(pattern_key, texture, shape, config)
    # Shapes are static, so the lattice has as many points as the smallest cells need.
    exponents, phase, opacity, turns = rng.uniforms(
        noise_key, (2,), (2,), (), masks.lattice(shape, min(shape) / 32)
    )
    cells = 2.0 ** jnp.floor(6 * exponents)
    noise = masks.gradient_noise(turns, phase, shape, jnp.array(shape) / cells)
    # DRAEM scales the noise by √2 before it cuts at 0.5.
    return y, (0.1 + 0.9 * opacity) * (math.sqrt(2) * noise > 0.5)


def cutpaste(
    key: Key, image: Image, texture: Texture, config: CorruptionConfig
) -> tuple[Image, Mask]:
    """Draws CutPaste (arXiv 2104.04015, §3.1): a piece of the image at another position.

    As published, the piece is a patch of 2 to 15 % of the area with an aspect ratio of 0.3 to
    3.3, or, half of the time, a scar: a thin strip rotated by up to 45°. The opacity is 1, edges
    are hard, brightness and contrast change by up to 0.1. The jitter of saturation and hue and the
    rotation of the scar's content are left out. `config` is not read.
    """
    del texture, config
    height, width, _ = image.shape
    side = math.sqrt(height * width)
    form_key, size_key, angle_key, position_key, tone_key = jax.random.split(key, 5)
    scar = jax.random.bernoulli(form_key)
    u, v = jax.random.uniform(size_key, (2,))
    area, aspect = 0.02 + 0.13 * u, 0.3 * (3.3 / 0.3) ** v
    patch = jnp.stack([jnp.sqrt(area * aspect), jnp.sqrt(area / aspect)])
    strip = jnp.stack([10 + 15 * u, 2 + 14 * v]) / 256  # published in pixels of a side of 256
    # At least one pixel wide, because on a small image a strip could fall between two pixels.
    half = jnp.maximum(side / 2 * jnp.where(scar, strip, patch), 0.5)
    angle = jnp.where(scar, jax.random.uniform(angle_key, minval=-1.0) * math.pi / 4, 0.0)
    cos, sin = jnp.cos(angle), jnp.sin(angle)

    # Source and target lie inside the image if the piece fits at all.
    size = jnp.array([height, width], jnp.float32)
    reach = jnp.stack(
        [half[0] * cos + half[1] * jnp.abs(sin), half[1] * cos + half[0] * jnp.abs(sin)]
    )
    reach = jnp.minimum(reach, size / 2)
    low, high = reach, size - reach
    source, target = jax.random.uniform(position_key, (2, 2), minval=low, maxval=high)
    # A whole number of pixels, so that the piece is not interpolated.
    shift = jnp.round(target - source).astype(jnp.int32)
    # The whole image is moved, because a window of random size has no static shape. Pixels that
    # wrap around lie outside the mask if the piece fits.
    moved = jnp.roll(image, shift, axis=(0, 1))
    y = change_tone(tone_key, moved, brightness=0.1, contrast=0.1)
    rows = (jnp.arange(height) + 0.5 - target[0])[:, None]
    columns = (jnp.arange(width) + 0.5 - target[1])[None, :]
    along, across = cos * rows + sin * columns, cos * columns - sin * rows
    inside = (jnp.abs(along) <= half[0]) & (jnp.abs(across) <= half[1])
    return y, inside.astype(image.dtype)


def riad(key: Key, image: Image, texture: Texture, config: CorruptionConfig) -> tuple[Image, Mask]:
    """Draws RIAD's corruption (Zavrtanik et al. 2021, §3.1): a third of the cells becomes black.

    Cells are squares of side 2, 4, 8 or 16 pixels, drawn per example. Each is blacked out with
    probability 1/3, while the publication divides them into three sets of equal size. `config` is
    not read.
    """
    del texture, config
    size_key, set_key = jax.random.split(key)
    side = 2 ** rng.uniform_int(size_key, 1, 5)
    height, width, _ = image.shape
    # Shapes are static, so the cells are always as many as the smallest side needs.
    hidden = rng.uniform(set_key, -(-height // 2), -(-width // 2)) < 1 / 3
    mask = hidden[jnp.arange(height) // side][:, jnp.arange(width) // side]
    return jnp.zeros_like(image), mask.astype(image.dtype)


KINDS: dict[str, Callable[[Key, Image, Texture, CorruptionConfig], tuple[Image, Mask]]] = {
    "texture": paste_texture,
    "mixed": mixed,
    "varied": varied,
    "draem": draem,
    "cutpaste": cutpaste,
    "riad": riad,
}


# Patterns.


def random_pattern(
    key: Key, texture: Texture, shape: tuple[int, int], config: CorruptionConfig
) -> Float[Array, "h w 3"]:
    """Draws y of eq. 13: a random view of a texture in changed colours and tone."""
    view_key, colour_key, tone_key = jax.random.split(key, 3)
    y = permute_channels(colour_key, random_view(view_key, texture, shape))
    return change_tone(tone_key, y, brightness=config.brightness, contrast=config.contrast)


def random_view(key: Key, texture: Texture, shape: tuple[int, int]) -> Float[Array, "h w 3"]:
    """Returns a random window on a texture, rotated, mirrored and scaled by 1/2 to 2.

    The texture is continued by reflection, so a texture of any size fills any `shape`.
    """
    row, column, zoom, angle, mirror = rng.uniforms(key, (), (), (), (), ())
    # Pixel centres have whole coordinates, so the texture extends from −0.5 to h − 0.5.
    row, column = row * texture.shape[0] - 0.5, column * texture.shape[1] - 0.5
    # Steps above two texture pixels would alias, because `resample` has no low-pass filter.
    step, angle = 2 ** (2 * zoom - 1), 2 * math.pi * angle
    cos, sin = step * jnp.cos(angle), step * jnp.sin(angle)
    # One axis is enough, because the random rotation turns it into any other.
    mirror = jnp.where(mirror < 0.5, -1.0, 1.0)
    y = (jnp.arange(shape[0]) - (shape[0] - 1) / 2)[:, None]
    x = mirror * (jnp.arange(shape[1]) - (shape[1] - 1) / 2)[None, :]
    return image_ops.resample(texture, row + cos * y + sin * x, column + cos * x - sin * y)


def permute_channels(key: Key, image: Image) -> Image:
    """Permutes the channels at random; grey images stay grey."""
    # Changes of hue or saturation would mix the channels. XLA then repeats the gathers of
    # `random_view` for each of them, which is several times slower on a CPU.
    orders = jnp.array(list(itertools.permutations(range(3))))
    return image[..., orders[rng.uniform_int(key, 0, len(orders))]]


def change_tone(key: Key, image: Image, *, brightness: float, contrast: float) -> Image:
    """Changes contrast and brightness at random, equally in all channels; clips to [0, 1].

    Args:
      key: a key.
      image: (h, w, 3) in [0, 1].
      brightness: the largest absolute offset.
      contrast: half the range of the gain about mid-grey, which lies in 1 ± `contrast`.
    """
    offset, gain = jax.random.uniform(key, (2,), minval=-1.0)
    return jnp.clip((1 + contrast * gain) * (image - 0.5) + 0.5 + brightness * offset, 0.0, 1.0)
