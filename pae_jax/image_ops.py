"""Operations on images: conversion, cropping, resampling, blocks of pixels, padding."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Shaped

Image = Float[Array, "h w c"]

CHANNELS = 3  # f_θ: [0,1]^{h×w×3} → [0,1]^{h×w×3} (§2); grey images repeat their channel


def to_float(images: Shaped[Array, "b h w c"]) -> Float[Array, "b h w 3"]:
    """uint8 (b, h, w, 1 or 3) as float32 in [0, 1] with three channels."""
    x = images.astype(jnp.float32) / 255
    return jnp.broadcast_to(x, (*x.shape[:3], CHANNELS))


def to_grey(images: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Luma (ITU-R BT.601) in all three channels."""
    luma = images @ jnp.array([0.299, 0.587, 0.114], images.dtype)
    return jnp.broadcast_to(luma[..., None], images.shape)


def crop(
    key: Key[Array, ""], image: Image, shape: tuple[int, int]
) -> Float[Array, "height width c"]:
    """A window of `shape`, every position equally likely."""
    room = jnp.array([image.shape[0] - shape[0] + 1, image.shape[1] - shape[1] + 1])
    top, left = jax.random.randint(key, (2,), 0, room)
    return jax.lax.dynamic_slice(image, (top, left, 0), (*shape, image.shape[2]))


def resample(
    image: Image, y: Float[Array, "height width"], x: Float[Array, "height width"]
) -> Float[Array, "height width c"]:
    """`image` at real-valued positions, bilinear, continued by reflection at its borders.

    Args:
      image: (h, w, c).
      y, x: positions in pixels, (0, 0) being the centre of the first pixel; any real number.
    """

    def neighbours(position: Array, size: int) -> tuple[Array, Array, Array]:
        # Reflection about the outer edges of the border pixels: a triangle wave.
        edge = position + 0.5
        folded = jnp.abs(edge - 2 * size * jnp.round(edge / (2 * size))) - 0.5
        folded = jnp.clip(folded, 0, size - 1)
        index = folded.astype(jnp.int32)
        return index, jnp.minimum(index + 1, size - 1), (folded - index)[..., None]

    top, bottom, v = neighbours(y, image.shape[0])
    left, right, u = neighbours(x, image.shape[1])
    upper = (1 - u) * image[top, left] + u * image[top, right]
    lower = (1 - u) * image[bottom, left] + u * image[bottom, right]
    return (1 - v) * upper + v * lower


def rotate(image: Image, angle: Float[Array, ""] | float) -> Image:
    """`image` turned counter-clockwise by `angle` (radians) about its centre."""
    height, width, _ = image.shape
    y = (jnp.arange(height) - (height - 1) / 2)[:, None]
    x = (jnp.arange(width) - (width - 1) / 2)[None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return resample(
        image, cos * y + sin * x + (height - 1) / 2, cos * x - sin * y + (width - 1) / 2
    )


def space_to_depth(x: Float[Array, "b h w c"], factor: int) -> Float[Array, "b hh ww cc"]:
    """Blocks of factor × factor pixels become channels: (b, h/factor, w/factor, c·factor²)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // factor, factor, w // factor, factor, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // factor, w // factor, factor**2 * c)


def depth_to_space(x: Float[Array, "b h w c"], factor: int) -> Float[Array, "b hh ww cc"]:
    """The inverse of `space_to_depth`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, factor, factor, c // factor**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * factor, w * factor, c // factor**2)


def pad_to_multiple(x: Float[Array, "b h w c"], multiple: int) -> Float[Array, "b hh ww c"]:
    """Pads bottom and right by symmetric reflection until `multiple` divides h and w."""
    pads = [(0, -size % multiple) for size in x.shape[1:3]]
    return jnp.pad(x, [(0, 0), *pads, (0, 0)], mode="symmetric") if any(map(max, pads)) else x
