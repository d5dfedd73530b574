"""Geometric augmentation of normal images (§4), by policy names joined by "+".

A policy is a function (key, image) -> image of the same shape. They run in the order in which
they are written, then a random crop. `resample` is the one place that interpolates.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from jaxtyping import Key as KeyArray

from data_pipelines.errors import BadInput
from pae_jax import rng

Image = Float[Array, "h w c"]
Key = KeyArray[Array, ""]
Keys = KeyArray[Array, "*keys"]  # of the batch, or one for each example

# The share of the side by which `shift` moves an image at most.
MAX_SHIFT = 1 / 16

# The range of the gain of `exposure`. Wider below 1, where nothing saturates.
GAINS = (0.4, 1.25)


def augment(
    key: Keys, images: Float[Array, "b h w c"], policy: str, shape: tuple[int, int]
) -> Float[Array, "b height width c"]:
    """Each image under its own random transforms.

    Args:
      key: one key, or (b,) keys: example i depends on `key` and i, or on `key[i]`, alone.
      images: (b, h, w, c) in [0, 1].
      policy: names of `POLICIES` joined by "+", for example "quarter_turns+horizontal_flip".
      shape: (height, width) of the random crop that follows; at most (h, w).

    Returns:
      (b, height, width, c), in the range of `images`.
    """
    check_policy(policy, (images.shape[1], images.shape[2]))
    transforms = [POLICIES[name] for name in policy.split("+")]

    def one(key: Key, image: Image) -> Float[Array, "height width c"]:
        *keys, crop_key = jax.random.split(key, len(transforms) + 1)
        for transform, transform_key in zip(transforms, keys, strict=True):
            image = transform(transform_key, image)
        return crop(crop_key, image, shape)

    return jax.vmap(one)(rng.per_example(key, len(images)), images)


def check_policy(policy: str, shape: tuple[int, int]) -> None:
    """Raises `BadInput` for an unknown name, or one that images of (h, w) cannot keep.

    Args:
      policy: the value of `data.augmentation`.
      shape: (h, w) of the images before the random crop (`data.shape`).
    """
    for name in policy.split("+"):
        if name not in POLICIES:
            known = ", ".join(POLICIES)
            raise BadInput(f"data.augmentation: no policy {name!r}; {known}, joined by '+'")
        if name == "quarter_turns" and shape[0] != shape[1]:
            raise BadInput(
                f"data.augmentation: quarter_turns needs square images, not {shape[0]}×{shape[1]};"
                " half_turns keeps the shape"
            )


def crop(key: Key, image: Image, shape: tuple[int, int]) -> Float[Array, "height width c"]:
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


def _none(key: Key, image: Image) -> Image:
    del key
    return image


def _horizontal_flip(key: Key, image: Image) -> Image:
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def _vertical_flip(key: Key, image: Image) -> Image:
    return jnp.where(jax.random.bernoulli(key), image[::-1], image)


def _flips(key: Key, image: Image) -> Image:
    horizontal, vertical = jax.random.split(key)
    return _vertical_flip(vertical, _horizontal_flip(horizontal, image))


def _half_turns(key: Key, image: Image) -> Image:
    return jnp.where(jax.random.bernoulli(key), image[::-1, ::-1], image)


def _quarter_turns(key: Key, image: Image) -> Image:
    # Selects instead of a gather or four branches: under vmap every branch would run.
    half, quarter = jax.random.split(key)
    image = _half_turns(half, image)
    return jnp.where(jax.random.bernoulli(quarter), jnp.rot90(image), image)


def _rotation(key: Key, image: Image) -> Image:
    return rotate(image, jax.random.uniform(key, maxval=2 * math.pi))


def _shift(key: Key, image: Image) -> Image:
    height, width, _ = image.shape
    reach = math.ceil(height * MAX_SHIFT), math.ceil(width * MAX_SHIFT)
    padding = ((reach[0], reach[0]), (reach[1], reach[1]), (0, 0))
    return crop(key, jnp.pad(image, padding, mode="symmetric"), (height, width))


def _exposure(key: Key, image: Image) -> Image:
    """Another exposure: a gain, log-uniform in `GAINS`, that leaves no value above 1."""
    low, high = map(math.log, GAINS)
    gain = jnp.exp(jax.random.uniform(key, minval=low, maxval=high))
    return jnp.clip(gain * image, 0, 1)


POLICIES: dict[str, Callable[[Key, Image], Image]] = {
    "none": _none,
    "horizontal_flip": _horizontal_flip,
    "vertical_flip": _vertical_flip,
    "flips": _flips,
    "half_turns": _half_turns,
    "quarter_turns": _quarter_turns,
    "rotation": _rotation,
    "shift": _shift,
    "exposure": _exposure,
}
