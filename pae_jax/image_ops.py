"""Operations on images: conversion, crops and windows, resampling, pixel blocks and padding."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, Shaped

Image = Float[Array, "h w c"]

CHANNELS = 3  # f_θ maps [0,1]^{h×w×3} to itself (§2); a grey image repeats its channel


def to_float(images: Shaped[Array, "b h w c"]) -> Float[Array, "b h w 3"]:
    """Converts uint8 images with one or three channels to float32 in [0, 1] with three."""
    x = images.astype(jnp.float32) / 255
    return jnp.broadcast_to(x, (*x.shape[:3], CHANNELS))


def to_grey(images: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Replaces each channel by the luma (ITU-R BT.601)."""
    # The weights by which Pillow converts stored images to grey, so that both agree.
    luma = images @ jnp.array([0.299, 0.587, 0.114], images.dtype)
    return jnp.broadcast_to(luma[..., None], images.shape)


def foreground(images: Float[Array, "b h w c"]) -> Bool[Array, "b h w 1"]:
    """Returns which pixels of suppressed images belong to the object.

    The background of such an image is 0 in every channel, and no pixel of the object is
    (`workdir.suppression`). Flips, crops, rotations and gains keep this exactly: a pixel is a
    weighted mean of others with weights ≥ 0, which is 0 only if all that it is made of are 0. The
    mask therefore never travels beside its image.
    """
    return jnp.any(images > 0, axis=-1, keepdims=True)


def unit(x: Float[Array, "b *image"]) -> Float[Array, "b *image"]:
    """Divides each image by its Euclidean norm; an image 0 stays 0."""
    norm = jnp.sqrt(jnp.sum(x.reshape(len(x), -1) ** 2, axis=1))
    return x / jnp.where(norm > 0, norm, 1).reshape(-1, *[1] * (x.ndim - 1))


def crop(
    key: Key[Array, ""], image: Image, shape: tuple[int, int]
) -> Float[Array, "height width c"]:
    """Returns a random window of size `shape`; all positions are equally likely."""
    positions = jnp.array([image.shape[0] - shape[0] + 1, image.shape[1] - shape[1] + 1])
    top, left = jax.random.randint(key, (2,), 0, positions)
    # Slices of Python need static positions, and this position is traced.
    return jax.lax.dynamic_slice(image, (top, left, 0), (*shape, image.shape[2]))


def window_starts(size: int, side: int) -> list[int]:
    """Returns the first pixels of windows along an axis, evenly spaced, that cover it.

    Neighbours overlap by half of their side or more.

    Args:
      size: that of the axis.
      side: that of a window, at most `size`.
    """
    count = 1 + math.ceil((size - side) / max(1, side // 2))
    return [round(i * (size - side) / max(1, count - 1)) for i in range(count)]


def tent(size: int) -> Float[np.ndarray, " size"]:
    """Returns weights in (0, 1] that fall linearly from the middle to both ends."""
    position = np.arange(size, dtype=np.float32) + 0.5
    return np.minimum(position, size - position) * (2 / size)


def apply_in_windows(
    function: Callable[[Array], Array], images: Float[Array, "b h w c"], shape: tuple[int, int]
) -> Float[Array, "b h w"]:
    """Applies a function to windows of images, and returns the weighted mean of its maps.

    The windows overlap by half of their side or more; a map counts most in the middle of its
    window. An axis that is no longer than a window is taken whole.

    Args:
      function: maps images (n, height, width, c) to maps (n, height, width).
      images: of any size.
      shape: (height, width) of a window.
    """
    sizes = images.shape[1:3]
    shape = min(shape[0], sizes[0]), min(shape[1], sizes[1])
    corners = [
        (top, left)
        for top in window_starts(sizes[0], shape[0])
        for left in window_starts(sizes[1], shape[1])
    ]
    if len(corners) == 1:
        return function(images)
    windows = jnp.stack(
        [images[:, top : top + shape[0], left : left + shape[1]] for top, left in corners]
    )
    # One batch of all windows, so that the network is compiled once.
    maps = function(windows.reshape(-1, *windows.shape[2:])).reshape(*windows.shape[:4])
    weight = np.outer(tent(shape[0]), tent(shape[1]))[np.newaxis]
    total, weights = jnp.zeros(()), np.zeros(())
    for part, (top, left) in zip(maps, corners, strict=True):
        below, right = sizes[0] - top - shape[0], sizes[1] - left - shape[1]
        place = (0, 0), (top, below), (left, right)
        total = total + jnp.pad(weight * part, place)
        weights = weights + np.pad(weight, place)
    return total / weights


def resample(
    image: Image, y: Float[Array, "height width"], x: Float[Array, "height width"]
) -> Float[Array, "height width c"]:
    """Interpolates an image bilinearly at real-valued positions.

    Outside its borders the image is continued by reflection, so every position has a value.

    Args:
      image: (h, w, c).
      y: rows of the positions, in pixels; 0 is the centre of the first row.
      x: columns of the positions, in pixels; 0 is the centre of the first column.
    """

    def neighbours(position: Array, size: int) -> tuple[Array, Array, Array]:
        # A triangle wave: reflection about the outer edges of the border pixels.
        edge = position + 0.5
        folded = jnp.abs(edge - 2 * size * jnp.round(edge / (2 * size))) - 0.5
        # Between the border pixel's centre and its outer edge, the neighbour is that pixel's own
        # mirror image, so the value is constant.
        folded = jnp.clip(folded, 0, size - 1)
        index = folded.astype(jnp.int32)
        return index, jnp.minimum(index + 1, size - 1), (folded - index)[..., None]

    top, bottom, v = neighbours(y, image.shape[0])
    left, right, u = neighbours(x, image.shape[1])
    upper = (1 - u) * image[top, left] + u * image[top, right]
    lower = (1 - u) * image[bottom, left] + u * image[bottom, right]
    return (1 - v) * upper + v * lower


def rotate(image: Image, angle: Float[Array, ""] | float) -> Image:
    """Rotates an image counter-clockwise about its centre by `angle` in radians."""
    height, width, _ = image.shape
    y = (jnp.arange(height) - (height - 1) / 2)[:, None]
    x = (jnp.arange(width) - (width - 1) / 2)[None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return resample(
        image, cos * y + sin * x + (height - 1) / 2, cos * x - sin * y + (width - 1) / 2
    )


def space_to_depth(x: Float[Array, "b h w c"], factor: int) -> Float[Array, "b hh ww cc"]:
    """Turns blocks of factor × factor pixels into channels: (b, h/factor, w/factor, factor²·c)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // factor, factor, w // factor, factor, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // factor, w // factor, factor**2 * c)


def depth_to_space(x: Float[Array, "b h w c"], factor: int) -> Float[Array, "b hh ww cc"]:
    """Inverts `space_to_depth`."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, factor, factor, c // factor**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * factor, w * factor, c // factor**2)


def pad_to_multiple(x: Float[Array, "b h w c"], multiple: int) -> Float[Array, "b hh ww c"]:
    """Pads the bottom and the right by symmetric reflection until `multiple` divides h and w."""
    pads = [(0, -size % multiple) for size in x.shape[1:3]]
    return jnp.pad(x, [(0, 0), *pads, (0, 0)], mode="symmetric") if any(map(max, pads)) else x


def gaussian_kernel(sigma: float, radius: int | None = None) -> Float[np.ndarray, " n"]:
    """Returns the weights of a Gaussian window of 2·radius + 1 pixels, by default cut at 4σ."""
    radius = math.ceil(4 * sigma) if radius is None else radius
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return weights / weights.sum()


def filter_matrix(kernel: Float[np.ndarray, " n"], size: int) -> Float[np.ndarray, "size size"]:
    """Returns the matrix that filters an axis of `size` pixels with reflected ends."""
    radius = kernel.size // 2
    pixel = np.arange(size)[:, None]
    source = (pixel + np.arange(-radius, radius + 1)) % (2 * size)
    source = np.where(source < size, source, 2 * size - 1 - source)
    matrix = np.zeros((size, size))
    # Near a border several weights fall on the same pixel. `matrix[pixel, source] += kernel` would
    # keep only one of them.
    np.add.at(matrix, (pixel, source), kernel)
    return matrix


def filter_axes(
    maps: Float[Array, "*batch h w"], kernel: Float[np.ndarray, " n"]
) -> Float[Array, "*batch h w"]:
    """Filters the last two axes by one symmetric window each, with reflected borders."""
    # A window with reflected borders is a matrix along each axis, exact for every size. On a CPU
    # two matrix products took 4 to 5 ms, shifted sums 18 to 71 ms, convolutions 106 to 403 ms.
    rows, columns = (jnp.asarray(filter_matrix(kernel, n), maps.dtype) for n in maps.shape[-2:])
    # With the default precision accelerators round the factors of a product to fewer bits.
    return jnp.einsum(
        "ij,...jk,lk->...il",
        rows,
        maps,
        columns,
        precision=jax.lax.Precision.HIGHEST,
        optimize=True,
    )
