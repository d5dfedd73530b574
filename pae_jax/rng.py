"""Named random streams, folded by step.

Every random number of a run is a pure function of (seed, stream name, step, example): the
same bits on one machine whatever was interrupted, and on any number of devices.
"""

import zlib

import jax
from jax import Array


def stream(seed: int | Array, name: str, step: int | Array = 0) -> Array:
    """The key of the stream `name` at `step`.

    Args:
      seed: the run's seed, a non-negative integer below 2**31; may be traced.
      name: the purpose, for example "corruption"; distinct names give independent streams.
      step: the training step, or any other counter; may be traced.
    """
    # zlib.crc32, since hash(str) differs between processes.
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.random.fold_in(key, step)


def per_example(key: Array, batch: int) -> Array:
    """(batch,) keys; the i-th depends on `key` and i alone, not on the batch size."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jax.numpy.arange(batch))
