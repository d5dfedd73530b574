"""Helpers of the tests of random sampling: quick compilation, and random inputs."""

import functools

import jax
import numpy as np

KEY = jax.random.key(0)

# There are many programs, each run once or twice, so compile them with little effort.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def uniform(seed: int, *shape: int) -> np.ndarray:
    """Returns numbers in [0, 1)."""
    return np.random.default_rng(seed).random(shape, np.float32)
