"""What the tests of random sampling share: programs that compile soon, and numbers to feed them."""

import functools

import jax
import numpy as np

KEY = jax.random.key(0)

# Many programs, each run once or twice: spend less on compiling them.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def uniform(seed: int, *shape: int) -> np.ndarray:
    """Numbers in [0, 1)."""
    return np.random.default_rng(seed).random(shape, np.float32)
