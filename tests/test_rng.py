"""pae_jax.rng: keys depend on name, step and position alone; draws are one flat draw."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pae_jax import rng

KEY = jax.random.key(7)


def bits(key):
    return np.asarray(jax.random.key_data(key))


def test_a_stream_key_depends_on_name_and_step_alone():
    expected = jax.random.fold_in(jax.random.fold_in(KEY, zlib.crc32(b"probes")), 3)
    np.testing.assert_array_equal(bits(rng.stream_key(KEY, "probes", 3)), bits(expected))
    names, steps = ("init", "corruption", "augmentation", "objective", "noise"), range(4)
    keys = {tuple(bits(rng.stream_key(KEY, name, step))) for name in names for step in steps}
    assert len(keys) == len(names) * len(steps)


def test_stream_of_a_traced_step():
    traced = jax.jit(lambda step: rng.stream_key(KEY, "probes", step))(jnp.asarray(5))
    np.testing.assert_array_equal(bits(traced), bits(rng.stream_key(KEY, "probes", 5)))


def test_stream_maps_over_keys_of_examples():
    keys = rng.example_keys(KEY, 3)
    together = rng.stream_key(keys, "noise", 2)
    for i in range(3):
        np.testing.assert_array_equal(bits(together[i]), bits(rng.stream_key(keys[i], "noise", 2)))


def test_example_keys_depend_on_the_position_alone():
    eight = bits(rng.example_keys(KEY, 8))
    assert len({tuple(row) for row in eight}) == 8
    np.testing.assert_array_equal(bits(rng.example_keys(KEY, 3)), eight[:3])
    for first in (0, 2, 5):
        part = bits(rng.example_keys(KEY, 3, first=first))
        np.testing.assert_array_equal(part, eight[first : first + 3])


def test_keys_of_examples_pass_through():
    keys = rng.example_keys(KEY, 4)
    np.testing.assert_array_equal(bits(rng.example_keys(keys, 4)), bits(keys))
    with pytest.raises(ValueError, match="batch of 5"):
        rng.example_keys(keys, 5)


def test_uniforms_are_one_draw_cut_into_shapes():
    key = jax.random.key(5)
    row, number, matrix = rng.uniforms(key, (3,), (), (2, 4))
    together = jax.random.uniform(key, (12,))
    np.testing.assert_array_equal(row, together[:3])
    np.testing.assert_array_equal(number, together[3])
    np.testing.assert_array_equal(matrix, together[4:].reshape(2, 4))
