"""Random augmentation of normal images (§4), chosen by policy names joined with "+".

A policy is a function (key, image) -> image of the same shape. Policies run in the order in which
they are written; a random crop follows. To try another, add a function to `POLICIES`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from jaxtyping import Key as KeyArray

from data_pipelines.errors import BadInput
from pae_jax import image_ops, rng

Image = Float[Array, "h w c"]
Key = KeyArray[Array, ""]
Keys = KeyArray[Array, "*keys"]  # () for the batch, or (b,), one per example

MAX_SHIFT = 1 / 16  # the largest displacement of "shift", as a fraction of the side
GAINS = (0.4, 1.25)  # the range of "exposure"; wider below 1, where nothing saturates


def augment(
    key: Keys, images: Float[Array, "b h w c"], policy: str, shape: tuple[int, int]
) -> Float[Array, "b height width c"]:
    """Applies random transforms to each image, independently, and crops it.

    Args:
      key: one key, or (b,) keys. Example i depends on `key` and i, or on `key[i]`, alone.
      images: (b, h, w, c) in [0, 1].
      policy: names of `POLICIES` joined with "+", for example "quarter_turns+horizontal_flip".
      shape: (height, width) of the random crop; at most (h, w).

    Returns:
      (b, height, width, c), in the range of `images`.
    """
    check_policy(policy, (images.shape[1], images.shape[2]))
    transforms = [POLICIES[name] for name in policy.split("+")]

    def augment_example(key: Key, image: Image) -> Float[Array, "height width c"]:
        *keys, crop_key = jax.random.split(key, len(transforms) + 1)
        for transform, transform_key in zip(transforms, keys, strict=True):
            image = transform(transform_key, image)
        return image_ops.crop(crop_key, image, shape)

    return jax.vmap(augment_example)(rng.example_keys(key, len(images)), images)


def symmetries(policy: str, shape: tuple[int, int]) -> list[tuple[bool, int]]:
    """Returns the flips and quarter turns that a policy takes for granted, the identity first.

    Args:
      policy: names of `POLICIES` joined with "+".
      shape: (h, w); turns by a quarter are left out if the sides differ.

    Returns:
      The group that the policy's flips and turns generate, as arguments of `transform`.
    """
    found = {(False, 0)}
    generators = [element for name in policy.split("+") for element in _SYMMETRIES.get(name, ())]
    if shape[0] != shape[1]:
        generators = [
            (mirror, 2 * turns) if turns % 2 else (mirror, turns) for mirror, turns in generators
        ]
    while True:
        # First a, then b: a mirror image turns the other way.
        products = {
            (a[0] ^ b[0], (b[1] + (-a[1] if b[0] else a[1])) % 4) for a in found for b in generators
        }
        if products <= found:
            return sorted(found)
        found |= products


def transform(x: Array, mirror: bool, turns: int, *, inverse: bool = False) -> Array:
    """Mirrors images or maps (b, h, w, …) left to right, then turns them by quarters."""
    if inverse:
        x = jnp.rot90(x, -turns, axes=(1, 2))
        return x[:, :, ::-1] if mirror else x
    x = x[:, :, ::-1] if mirror else x
    return jnp.rot90(x, turns, axes=(1, 2))


def motion(key: Key, image: Image) -> Image:
    """Draws a direction in which a small motion of the camera or its exposure changes an image.

    It is a random combination of the policies that have small members: "shift" in both axes,
    "rotation" and "exposure". Each is the derivative of its transform at the unchanged image, by
    differences of neighbouring pixels, so that it needs no second image.

    Args:
      key: for the coefficients, which are normally distributed.
      image: x.

    Returns:
      (h, w, c) a direction in the space of images, of norm 1; 0 for a black image.
    """
    down, right, turn, *weights = jax.random.normal(key, (5,), image.dtype)
    height, width, _ = image.shape
    # Relative to the longer side, so that a turn moves the corners about as far as a shift does.
    row, column = (
        (2 * jnp.arange(n, dtype=image.dtype) - (n - 1)) / max(height, width)
        for n in (height, width)
    )
    along_rows, along_columns = jnp.gradient(image, axis=(0, 1))
    moved = (down + turn * column)[None, :, None] * along_rows
    moved += (right - turn * row)[:, None, None] * along_columns
    # The change by exposure is the image itself. It would outweigh the motion if both kept their
    # norms.
    parts = image_ops.unit(jnp.stack([moved, image]))
    return image_ops.unit(jnp.tensordot(jnp.stack(weights), parts, 1)[None])[0]


def check_policy(policy: str, shape: tuple[int, int]) -> None:
    """Checks that every name is known and keeps the shape of the images.

    Args:
      policy: the value of `data.augmentation`.
      shape: (h, w) of the images before the random crop (`data.shape`).

    Raises:
      BadInput: a name is unknown, or "quarter_turns" is asked of images that are not square.
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


def _none(key: Key, image: Image) -> Image:
    del key
    return image


def _horizontal_flip(key: Key, image: Image) -> Image:
    # A selection rather than a branch, because under vmap both branches would run.
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def _vertical_flip(key: Key, image: Image) -> Image:
    return jnp.where(jax.random.bernoulli(key), image[::-1], image)


def _flips(key: Key, image: Image) -> Image:
    horizontal, vertical = jax.random.split(key)
    return _vertical_flip(vertical, _horizontal_flip(horizontal, image))


def _half_turns(key: Key, image: Image) -> Image:
    return jnp.where(jax.random.bernoulli(key), image[::-1, ::-1], image)


def _quarter_turns(key: Key, image: Image) -> Image:
    # Two selections instead of four branches, because under vmap every branch would run.
    half, quarter = jax.random.split(key)
    image = _half_turns(half, image)
    return jnp.where(jax.random.bernoulli(quarter), jnp.rot90(image), image)


def _rotation(key: Key, image: Image) -> Image:
    return image_ops.rotate(image, jax.random.uniform(key, maxval=2 * math.pi))


def _shift(key: Key, image: Image) -> Image:
    height, width, _ = image.shape
    # A crop of the padded image moves it by whole pixels, so that no value is interpolated.
    reach = math.ceil(height * MAX_SHIFT), math.ceil(width * MAX_SHIFT)
    padding = ((reach[0], reach[0]), (reach[1], reach[1]), (0, 0))
    return image_ops.crop(key, jnp.pad(image, padding, mode="symmetric"), (height, width))


def _exposure(key: Key, image: Image) -> Image:
    """Multiplies by a gain that is log-uniform in `GAINS`, and clips at 1."""
    low, high = map(math.log, GAINS)
    gain = jnp.exp(jax.random.uniform(key, minval=low, maxval=high))
    return jnp.clip(gain * image, 0, 1)


# Generators of each policy's symmetries: (mirrored left to right, then turned by quarters).
_SYMMETRIES: dict[str, tuple[tuple[bool, int], ...]] = {
    "horizontal_flip": ((True, 0),),
    "vertical_flip": ((True, 2),),
    "flips": ((True, 0), (True, 2)),
    "half_turns": ((False, 2),),
    "quarter_turns": ((False, 1),),
    "rotation": ((False, 1),),
}

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
