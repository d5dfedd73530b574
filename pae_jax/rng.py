"""Named random streams, derived per step and per example, and draws that compile quickly.

Every random number of a run is a function of (seed, stream name, step, example) alone. On one
machine the bits are the same after an interruption and on any number of devices.
"""

import itertools
import math
import zlib

import jax
import jax.numpy as jnp
from jax import Array


def stream_key(key: Array, name: str, step: int | Array = 0) -> Array:
    """Returns the key of the stream `name` at `step`.

    Args:
      key: the run's root key, `jax.random.key(seed)`, or keys (batch,), one per example.
      name: the purpose, for example "corruption"; distinct names give independent streams.
      step: the training step, or any other counter; may be traced.
    """
    if key.ndim:
        return jax.vmap(lambda example_key: stream_key(example_key, name, step))(key)
    # Not hash(name), because Python's hash of a string differs between processes.
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(name.encode())), step)


def example_keys(key: Array, batch: int, *, first: int | Array = 0) -> Array:
    """Returns (batch,) keys, one per example.

    Example i's key depends on `key` and `first + i` alone, not on the batch size.

    Args:
      key: one key, or (batch,) keys, which are returned unchanged. A device that holds a part of
        a batch derives the keys once with its offset and passes them on.
      batch: the number of examples.
      first: the position of the first example in the global batch; may be traced.

    Raises:
      ValueError: `key` holds more or fewer than `batch` keys.
    """
    if key.ndim:
        if key.shape != (batch,):
            raise ValueError(f"{key.shape} keys for a batch of {batch}")
        return key
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(batch))


def uniform(key: Array, *shape: int) -> Array:
    """Draws an array of U[0, 1)."""
    # A flat draw, because XLA on a CPU compiles the same draw in four axes 20 times slower.
    return jax.random.uniform(key, (math.prod(shape),)).reshape(shape)


def uniforms(key: Array, *shapes: tuple[int, ...]) -> list[Array]:
    """Draws one array of U[0, 1) per shape, all independent, from one key."""
    # One draw cut into pieces, because deriving a key for each array would hash a handful of
    # numbers at a time. On a CPU that takes longer than the arithmetic on them.
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes))
    numbers = jax.random.uniform(key, (ends[-1],))
    parts = zip([0, *ends], ends, shapes, strict=False)
    return [numbers[start:end].reshape(shape) for start, end, shape in parts]


def uniform_int(key: Array, low: int, high: int, *shape: int) -> Array:
    """Draws integers from low to high − 1, equally likely."""
    # `jax.random.randint` has four times as much code to compile.
    return low + ((high - low) * uniform(key, *shape)).astype(jnp.int32)
