"""Corruption x̂ = M⊙y + (1−M)⊙x (§2.1, eq. 13): masks, opacity, textures.

`MASKS` holds families of smooth random masks, opacity included; `KINDS` holds ways to choose
(y, M). To try another, add a function to either registry and its name to
`config.CorruptionConfig`. All of them see one example; `corrupt` maps over the batch.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from pae_jax import augmentation, rng
from pae_jax.config import CorruptionConfig

Image = Float[Array, "h w 3"]
Texture = Float[Array, "th tw 3"]
Mask = Float[Array, "h w"]
Scalar = Float[Array, ""]
Key = PRNGKeyArray


class CorruptedBatch(NamedTuple):
    """x̂, x and M of one batch, float32 in [0, 1]."""

    corrupted: Float[Array, "b h w c"]
    clean: Float[Array, "b h w c"]
    mask: Float[Array, "b h w 1"]


def corrupt(
    key: Key,
    images: Float[Array, "b h w 3"],
    textures: Float[Array, "b th tw 3"],
    config: CorruptionConfig,
) -> CorruptedBatch:
    """Corrupts each image by its own random mask and pattern.

    Args:
      key: example i's corruption depends on `key` and i alone.
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
    mask_key, view_key, colour_key = jax.random.split(key, 3)
    shape = image.shape[0], image.shape[1]
    y = change_colour(
        colour_key,
        random_view(view_key, texture, shape),
        brightness=config.brightness,
        contrast=config.contrast,
    )
    return y, MASKS[config.mask](mask_key, shape, config)


KINDS: dict[str, Callable[[Key, Image, Texture, CorruptionConfig], tuple[Image, Mask]]] = {
    "texture": paste_texture,
}


# Patterns.


def random_view(key: Key, texture: Texture, shape: tuple[int, int]) -> Float[Array, "h w 3"]:
    """A random window on a texture, rotated, mirrored and scaled by a factor of 1/2 to 2.

    The texture is continued by reflection, so one of any size fills any `shape` at its own
    scale. Larger steps than two pixels would alias, since `resample` does not low-pass.
    """
    place_key, scale_key, angle_key, flip_key = jax.random.split(key, 4)
    size = jnp.array(texture.shape[:2], jnp.float32)
    top, left = jax.random.uniform(place_key, (2,)) * size - 0.5
    step = 2 ** jax.random.uniform(scale_key, minval=-1.0, maxval=1.0)
    angle = jax.random.uniform(angle_key, maxval=2 * math.pi)
    cos, sin = step * jnp.cos(angle), step * jnp.sin(angle)
    mirror = jax.random.rademacher(flip_key, (), jnp.float32)
    y = (jnp.arange(shape[0]) - (shape[0] - 1) / 2)[:, None]
    x = mirror * (jnp.arange(shape[1]) - (shape[1] - 1) / 2)[None, :]
    return augmentation.resample(texture, top + cos * y + sin * x, left + cos * x - sin * y)


def change_colour(
    key: Key,
    image: Image,
    *,
    brightness: float,
    contrast: float,
    saturation: float = 0.5,
    hue: float = 0.5,
) -> Image:
    """Random hue, saturation, contrast and brightness, clipped to [0, 1].

    Hue turns a colour about the grey axis, saturation scales its distance from it. Both leave
    grey alone, and the other two act on all channels alike: equal channels stay equal.

    Args:
      image: (h, w, 3) in [0, 1].
      brightness: the largest offset added.
      contrast, saturation: the factor lies in 1 ± this.
      hue: the largest turn, as a share of the full circle.
    """
    offset, gain, chroma, turn = jax.random.uniform(key, (4,), minval=-1.0)
    gain, chroma = 1 + contrast * gain, 1 + saturation * chroma
    cos, sin = (
        chroma * jnp.cos(2 * math.pi * hue * turn),
        chroma * jnp.sin(2 * math.pi * hue * turn),
    )
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    grey = (red + green + blue) / 3
    lightness = gain * (grey - 0.5) + 0.5 + brightness * offset

    def channel(this: Array, following: Array, preceding: Array) -> Array:
        return cos * (this - grey) + sin / math.sqrt(3) * (preceding - following)

    turned = (
        channel(red, green, blue),
        channel(green, blue, red),
        channel(blue, red, green),
    )
    return jnp.clip(jnp.stack([lightness + gain * t for t in turned], axis=-1), 0.0, 1.0)


# Mask families: (key, (h, w), config) -> M, opacity included.


def ellipses(key: Key, shape: tuple[int, int], config: CorruptionConfig) -> Mask:
    """Rotated ellipses, distorted elastically."""
    return _blobs(key, shape, config, jnp.hypot, turn=math.pi, distortion=config.distortion)


def boxes(key: Key, shape: tuple[int, int], config: CorruptionConfig) -> Mask:
    """Upright rectangles."""
    return _blobs(key, shape, config, jnp.maximum, turn=0.0, distortion=0.0)


MASKS: dict[str, Callable[[Key, tuple[int, int], CorruptionConfig], Mask]] = {
    "ellipses": ellipses,
    "boxes": boxes,
}


def _opacity(key: Key, config: CorruptionConfig) -> Scalar:
    """α ~ U(min_opacity, max_opacity]: mass near zero (A.2), yet never zero."""
    return config.max_opacity - jax.random.uniform(key) * (config.max_opacity - config.min_opacity)


def _blobs(
    key: Key,
    shape: tuple[int, int],
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
    height, width = shape
    side = min(shape)
    count_key, blob_key = jax.random.split(key)
    count = jax.random.randint(count_key, (), config.min_blobs, config.max_blobs + 1)

    def blob(key: Key) -> Mask:
        place_key, axes_key, angle_key, field_key, opacity_key = jax.random.split(key, 5)
        place = jax.random.uniform(place_key, (2,))
        y = jnp.arange(height) + 0.5 - place[0] * height
        x = jnp.arange(width) + 0.5 - place[1] * width
        low, high = math.log(config.min_axis), math.log(config.max_axis)
        axes = jnp.exp(jax.random.uniform(axes_key, (2,), minval=low, maxval=high))
        axes = jnp.maximum(axes * side, 1.0)
        angle = jax.random.uniform(angle_key, maxval=turn)
        scale = jnp.max(axes) / 2
        field = scale * distortion * _smooth_field(field_key, y / scale, x / scale)
        y, x = y[:, None] + field[0], x[None, :] + field[1]
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        radius = norm(jnp.abs(cos * y + sin * x) / axes[0], jnp.abs(cos * x - sin * y) / axes[1])
        return _opacity(opacity_key, config) * _smoothstep((1 - radius) / config.softness)

    blobs = jax.vmap(blob)(jax.random.split(blob_key, config.max_blobs))
    active = (jnp.arange(config.max_blobs) < count)[:, None, None]
    return jnp.max(jnp.where(active, blobs, 0.0), axis=0)


def _smooth_field(key: Key, y: Float[Array, " h"], x: Float[Array, " w"]) -> Float[Array, "2 h w"]:
    """Two smooth random fields with correlation length 1 around the origin, 0 far from it.

    Cubic B-splines on a lattice of normal numbers: twice differentiable, and separable, thus
    two small matrix products.
    """
    knots = jnp.arange(-4.0, 5.0)

    def weights(position: Array) -> Array:
        d = jnp.abs(position[:, None] - knots[None, :])
        return jnp.where(d < 1, 2 / 3 - d**2 + d**3 / 2, jnp.maximum(2 - d, 0.0) ** 3 / 6)

    values = jax.random.normal(key, (2, len(knots), len(knots)))
    return weights(y) @ values @ weights(x).T


def _smoothstep(t: Array) -> Array:
    """0 below 0, 1 above 1, 3t² − 2t³ between."""
    t = jnp.clip(t, 0.0, 1.0)
    return t * t * (3 - 2 * t)
