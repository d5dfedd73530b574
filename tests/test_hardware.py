"""pae_jax.devices.hardware: the platform that programs are built for, and what follows it."""

import jax
import jax.numpy as jnp
import pytest

from pae_jax import population
from pae_jax.config import from_config_dict
from pae_jax.devices import batches, hardware, winograd


def test_the_platform_is_the_default_backend():
    assert hardware.platform() == jax.default_backend() == "cpu"


def test_contexts_nest_and_end():
    with hardware.building_for("tpu"):
        assert hardware.platform() == "tpu"
        with hardware.building_for("gpu"):
            assert hardware.platform() == "gpu"
        assert hardware.platform() == "tpu"
        assert jax.default_backend() == "cpu"  # JAX itself is left alone
    assert hardware.platform() == "cpu"


def test_an_exception_restores_the_platform():
    with pytest.raises(RuntimeError, match="inside"), hardware.building_for("tpu"):
        raise RuntimeError("inside")
    assert hardware.platform() == "cpu"


def test_every_choice_follows_the_platform():
    config = from_config_dict({"train": {"steps": 100, "validate_every": 100}})

    def choices():
        return (
            hardware.use_winograd(),
            hardware.use_transposed_convolution(),
            hardware.use_window_pooling(),
            hardware.loop_unroll(7),
            population.mapping(config),
            batches.steps_per_call(config, on_device=True),
        )

    assert choices() == (True, False, False, 7, "unroll", 1)
    for platform in ("gpu", "tpu"):
        with hardware.building_for(platform):
            is_gpu = platform == "gpu"
            assert choices() == (False, is_gpu, not is_gpu, 1, "vmap", 10)


def test_the_program_follows_the_platform():
    x, kernel = jnp.zeros((1, 4, 4, 32)), jnp.zeros((3, 3, 32, 32))

    def uses_convolutions():
        # A new function each time, because JAX keeps the trace of a function.
        program = jax.make_jaxpr(lambda: winograd.convolve(x, kernel))()
        return "conv_general_dilated" in str(program)

    assert not uses_convolutions()
    with hardware.building_for("tpu"):
        assert uses_convolutions()
