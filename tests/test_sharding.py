"""Meshes and transforms: the step gives the same numbers on any devices."""

import functools
import types

import jax
import numpy as np
import pytest

from data_pipelines.errors import BadInput
from pae_jax import config, train_step
from pae_jax.devices import sharding

SETTINGS = {
    "data": {"size": 12, "texture_size": 12, "augmentation": "flips"},
    "model": {
        "widths": (4,),
        "convs_per_stage": 1,
        "bottleneck_layers": 0,
        "branch_width": 4,
        "dilation_rates": (1,),
        "dilated_kernel_size": 3,
        # Adam turns the rounding errors of a gradient that a norm makes zero into full steps.
        "norm": "none",
    },
    "corruption": {"kind": "cutpaste"},
    "objective": {"noise": 0.05, "jacobian": {"weight": 0.1, "directions": "both"}},
    "optimizer": {"learning_rate": 1e-3},
    "train": {"batch_size": 8},
}
PLACES = [
    ("jit", 1, 1),
    ("jit", 2, 1),
    ("jit", 8, 1),
    ("jit", 2, 4),
    ("shard_map", 8, 1),
    ("pmap", 8, 1),
]


STEPS = 20


def make_config(**section) -> config.Config:
    return config.from_config_dict({**SETTINGS, "sharding": section})


@functools.cache
def history(transform: str, devices: int, model: int, steps: int = 1):
    """Returns the metrics of twenty steps, and the parameters and state after them."""
    settings = make_config(transform=transform, data_parallel=devices, model_parallel=model)
    mesh = sharding.make_mesh(settings)
    key = jax.random.key(0)
    state = train_step.init_state(settings, key)
    state = jax.device_put(state, sharding.state_sharding(mesh, state))
    step = sharding.compile_step(
        train_step.make_step(settings),
        mesh,
        transform,
        state,
        steps=steps,
    )
    random = np.random.default_rng(0)
    data = {
        "image": random.integers(0, 256, (STEPS, 8, 12, 12, 1), dtype=np.uint8),
        "texture": random.integers(0, 256, (STEPS, 8, 12, 12, 3), dtype=np.uint8),
    }
    metrics = []
    for first in range(0, STEPS, steps):
        batch = {name: values[first : first + steps] for name, values in data.items()}
        placed = sharding.batch_to_global(batch, mesh, 8)
        assert len(placed["image"].sharding.device_set) == devices * model
        state, values = step(state, {}, placed, key)
        metrics.append(sharding.one_copy(values, mesh))
    whole = {name: np.concatenate([m[name] for m in metrics]) for name in metrics[0]}
    return whole, jax.device_get(sharding.one_copy(state.params, mesh)), state


@pytest.mark.usefixtures("compilation_cache")
@pytest.mark.parametrize("place", PLACES[1:])
def test_the_step_does_not_depend_on_the_devices(place):
    metrics, params, _ = history(*place)
    expected_metrics, expected_params, _ = history(*PLACES[0])
    assert metrics.keys() == expected_metrics.keys() >= {"loss", "reconstruction", "jacobian"}
    for name, values in metrics.items():
        assert values.shape == (STEPS,)
        np.testing.assert_allclose(values, expected_metrics[name], rtol=1e-5, err_msg=name)
    for leaf, expected in zip(
        jax.tree.leaves(params), jax.tree.leaves(expected_params), strict=True
    ):
        np.testing.assert_allclose(leaf, expected, rtol=1e-3, atol=1e-5)


def test_the_axis_model_splits_parameters_and_optimizer_state():
    _, _, state = history("jit", 2, 4)
    kernel = state.params["params"]["encoder_0"]["Conv_0"]["kernel"]
    assert kernel.shape[-1] == 4
    for leaf in (kernel, state.opt_state[0].mu["params"]["encoder_0"]["Conv_0"]["kernel"]):
        assert leaf.addressable_shards[0].data.shape == (*kernel.shape[:-1], 1)


@pytest.mark.usefixtures("compilation_cache")
def test_several_steps_in_one_call():
    metrics, params, _ = history("jit", 1, 1, steps=5)
    expected_metrics, expected_params, _ = history("jit", 1, 1)
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), params, expected_params
    )


def test_a_step_is_never_compiled_again():
    step = sharding.CompiledOnce(jax.jit(lambda x: 2 * x))
    assert step(np.ones(3, np.float32)).shape == (3,)
    assert step.flops == 3
    with pytest.raises(TypeError, match="compiled"):
        step(np.ones(4, np.float32))


@pytest.mark.parametrize(
    ("batch", "count"), [(8, 8), (4, 4), (6, 6), (1, 1), (16, 8), (7, 7), (11, 1)]
)
def test_the_mesh_takes_the_most_devices_that_divide_the_batch(batch, count):
    settings = config.from_config_dict({"train": {"batch_size": batch}})
    assert sharding.make_mesh(settings).size == count


@pytest.mark.parametrize(
    ("devices", "line"),
    [
        (9, "sharding.data_parallel: 9 devices asked for, 8 available"),
        (0, "sharding.data_parallel: 0 devices asked for, 8 available"),
        (3, "train.batch_size: 8 is not divisible by 3 devices"),
    ],
)
def test_unavailable_devices_are_refused(devices, line):
    with pytest.raises(BadInput, match=line):
        sharding.make_mesh(make_config(data_parallel=devices))


def hosts(*counts: int) -> list:
    """Returns stand-ins for the devices of several processes."""
    owners = [host for host, count in enumerate(counts) for _ in range(count)]
    return [types.SimpleNamespace(process_index=host, id=i) for i, host in enumerate(owners)]


@pytest.mark.parametrize(
    ("batch", "counts", "ids"),
    [
        (8, (2, 2), [0, 1, 2, 3]),
        (2, (2, 2), [0, 2]),  # not both of the first process
        (6, (4, 4), [0, 1, 2, 4, 5, 6]),
        (12, (2, 4), [0, 1, 2, 3]),
    ],
)
def test_every_process_has_the_same_number_of_devices(batch, counts, ids, monkeypatch):
    seen = []

    def watched(shape, axes, types, *, devices):
        seen.extend(devices)
        return jax.sharding.Mesh(np.asarray(jax.devices()[: len(devices)]).reshape(shape), axes)

    monkeypatch.setattr(jax, "make_mesh", watched)
    settings = config.from_config_dict({"train": {"batch_size": batch}})
    sharding.make_mesh(settings, hosts(*counts))
    assert [device.id for device in seen] == ids


@pytest.mark.parametrize(
    ("batch", "section", "line"),
    [
        (8, {"transform": "pmap"}, "sharding.transform: pmap trains in one process, not in 2"),
        (3, {}, "train.batch_size: 3 cannot be divided among the devices of 2 processes"),
        (9, {"data_parallel": 3}, r"sharding.data_parallel: 3 x 1 devices .* among 2 processes"),
    ],
)
def test_several_processes_refuse(batch, section, line):
    settings = config.from_config_dict({"train": {"batch_size": batch}, "sharding": section})
    with pytest.raises(BadInput, match=line):
        sharding.make_mesh(settings, hosts(2, 2))


@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (1, 8)])
def test_rows_stay_in_order_on_a_permuted_mesh(shape):
    devices = np.asarray(jax.devices())[[0, 4, 1, 5, 7, 3, 6, 2]].reshape(shape)
    mesh = jax.sharding.Mesh(devices, (sharding.DATA, sharding.MODEL))
    data = {"image": np.arange(48).reshape(2, 8, 3), "texture": np.arange(16).reshape(2, 8)}
    placed = sharding.batch_to_global(data, mesh, 8)
    assert sharding.local_rows(mesh, 8) == tuple(range(8))
    for name, array in data.items():
        np.testing.assert_array_equal(placed[name], array)
        assert placed[name].sharding == sharding.batch_sharding(mesh)


def test_a_process_holds_rows_that_are_not_adjacent():
    rows = (1, 2, 5, 6)
    array = np.asarray([[10, 20, 50, 60]])
    part = sharding._part_of(array, rows)
    assert part((slice(None), slice(5, 7))).tolist() == [[50, 60]]
    assert part((slice(0, 1), slice(1, 3, None))).tolist() == [[10, 20]]
    assert sharding._part_of(array, (0, 1, 2, 3))((slice(None), slice(None))).shape == (1, 4)


def test_a_mesh_for_which_jax_knows_no_order_has_the_plain_one(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("not a torus")

    monkeypatch.setattr(jax, "make_mesh", refuse)
    mesh = sharding.ordered_mesh((3, 1), ("data", "model"), jax.devices()[:3])
    assert list(mesh.devices.flat) == jax.devices()[:3]
    assert sharding.idle_devices(mesh) == jax.devices()[3:]
