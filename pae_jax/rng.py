"""Named random streams, folded by step and example, and draws that are cheap to compile.

Every random number of a run is a pure function of (seed, stream name, step, example): the
same bits on one machine whatever was interrupted, and on any number of devices.
"""

import itertools
import math
import zlib

import jax
import jax.numpy as jnp
from jax import Array


def stream_key(key: Array, name: str, step: int | Array = 0) -> Array:
    """The key of the stream `name` at `step`.

    Args:
      key: the run's root key, `jax.random.key(seed)`, or keys (batch,), one per example.
      name: the purpose, for example "corruption"; distinct names give independent streams.
      step: the training step, or any other counter; may be traced.
    """
    if key.ndim:
        return jax.vmap(lambda one: stream_key(one, name, step))(key)
    # zlib.crc32, since hash(str) differs between processes.
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(name.encode())), step)


def example_keys(key: Array, batch: int, *, first: int | Array = 0) -> Array:
    """(batch,) keys; example i's depends on `key` and `first + i` alone, not on the batch size.

    Keys that are per example already, shape (batch,), pass through: a caller that holds a part
    of a batch derives them once with `first`, its offset, and hands them down.
    """
    if key.ndim:
        if key.shape != (batch,):
            raise ValueError(f"{key.shape} keys for a batch of {batch}")
        return key
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(batch))


def uniform(key: Array, *shape: int) -> Array:
    """U[0, 1). Drawn flat: XLA on a CPU compiles the same draw in four axes 20 × slower."""
    return jax.random.uniform(key, (math.prod(shape),)).reshape(shape)


def uniforms(key: Array, *shapes: tuple[int, ...]) -> list[Array]:
    """Independent arrays of U[0, 1) from one key.

    Deriving a key for each would hash a handful of numbers at a time, which on a CPU takes longer
    than the arithmetic that follows.
    """
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes))
    numbers = jax.random.uniform(key, (ends[-1],))
    parts = zip([0, *ends], ends, shapes, strict=False)
    return [numbers[start:end].reshape(shape) for start, end, shape in parts]


def uniform_int(key: Array, low: int, high: int, *shape: int) -> Array:
    """low … high − 1, equally likely; a quarter of the code of `jax.random.randint` to compile."""
    return low + ((high - low) * uniform(key, *shape)).astype(jnp.int32)
