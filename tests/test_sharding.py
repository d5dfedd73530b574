import functools

import jax
import numpy as np
import pytest

from data_pipelines.errors import BadInput
from pae_jax import config, sharding, train_step

SETTINGS = {
    "data": {"size": 12, "texture_size": 12, "augmentation": "flips"},
    "model": {
        "widths": (4,),
        "convolutions": 1,
        "bottleneck_layers": 0,
        "branch_width": 4,
        "rates": (1,),
        "kernel": 3,
        # Adam turns the rounding errors of a gradient that a norm makes zero into full steps.
        "norm": "none",
    },
    "corruption": {"kind": "cutpaste"},
    "objective": {"noise": 0.05, "jacobian": {"weight": 0.1}},
    "optimizer": {"learning_rate": 1e-3},
    "train": {"batch_size": 8},
}
PLACES = [("jit", 1), ("jit", 2), ("jit", 8), ("pmap", 8)]


def make_config(**section) -> config.Config:
    return config.from_config_dict({**SETTINGS, "sharding": section})


@functools.cache
def history(wrapper: str, devices: int):
    """Metrics of four steps, and the parameters after them."""
    settings = make_config(wrapper=wrapper, data=devices)
    mesh = sharding.make_mesh(settings)
    key = jax.random.key(0)
    state = train_step.init_state(settings, key)
    state = jax.device_put(state, sharding.replicated(mesh))
    step = sharding.compile_step(
        lambda *args, axis=None: train_step.train_step(*args, config=settings, axis=axis),
        mesh,
        wrapper,
    )
    random = np.random.default_rng(0)
    metrics = []
    for _ in range(4):
        batch = {
            "image": random.integers(0, 256, (8, 12, 12, 1), dtype=np.uint8),
            "texture": random.integers(0, 256, (8, 12, 12, 3), dtype=np.uint8),
        }
        placed = sharding.place_batch(batch, mesh)
        assert len(placed["image"].sharding.device_set) == devices
        state, values = step(state, placed, key)
        metrics.append({name: float(value) for name, value in values.items()})
    return metrics, jax.device_get(state.params)


@pytest.mark.usefixtures("compilation_cache")
@pytest.mark.parametrize(("wrapper", "devices"), PLACES[1:])
def test_the_step_is_the_same_on_any_devices(wrapper, devices):
    metrics, params = history(wrapper, devices)
    expected_metrics, expected_params = history(*PLACES[0])
    for values, expected in zip(metrics, expected_metrics, strict=True):
        assert values.keys() == expected.keys() >= {"loss", "reconstruction", "jacobian"}
        for name in values:
            np.testing.assert_allclose(values[name], expected[name], rtol=1e-5, err_msg=name)
    for leaf, expected in zip(
        jax.tree.leaves(params), jax.tree.leaves(expected_params), strict=True
    ):
        np.testing.assert_allclose(leaf, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("batch", "count"), [(8, 8), (4, 4), (6, 2), (1, 1), (16, 8)])
def test_all_devices_that_divide_the_batch(batch, count):
    settings = config.from_config_dict({"train": {"batch_size": batch}})
    assert sharding.make_mesh(settings).size == count


@pytest.mark.parametrize(
    ("devices", "line"),
    [
        (9, "sharding.data: 9 devices asked for, 8 available"),
        (0, "sharding.data: 0 devices asked for, 8 available"),
        (3, "train.batch_size: 8 is not divisible by 3 devices"),
    ],
)
def test_devices_that_are_not_there(devices, line):
    with pytest.raises(BadInput, match=line):
        sharding.make_mesh(make_config(data=devices))
