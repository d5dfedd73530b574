"""Where arrays live: one mesh, and the wrappers that compile the one pure step for it.

Batches are split over the axis "data", everything else is replicated. The wrappers have one
signature, (state, batch, key) → (state, metrics), and give the same numbers: an ablation or a
benchmark names one in the config and nothing else changes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from data_pipelines.errors import BadInput
from pae_jax.config import Config

AXIS = "data"

Step = Callable[..., tuple[Any, Any]]


def make_mesh(config: Config) -> Mesh:
    """A mesh over the first `sharding.data` devices (-1: all that divide the batch)."""
    available, batch = jax.device_count(), config.train.batch_size
    count = config.sharding.data
    if count == -1:
        count = max(n for n in range(1, available + 1) if batch % n == 0 and available % n == 0)
    if not 1 <= count <= available:
        raise BadInput(f"sharding.data: {count} devices asked for, {available} available")
    if batch % count:
        raise BadInput(f"train.batch_size: {batch} is not divisible by {count} devices")
    # Auto axes: the compiler partitions the step (jax.make_mesh defaults to Explicit ones).
    return jax.make_mesh((count,), (AXIS,), (AxisType.Auto,), devices=jax.devices()[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """The leading axis of every array over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a host batch → the global batch, split over the devices."""
    place = functools.partial(jax.make_array_from_process_local_data, split(mesh))
    return {name: place(array) for name, array in batch.items()}


def _jit(step: Step, mesh: Mesh) -> Step:
    same, rows = replicated(mesh), split(mesh)
    return jax.jit(
        step,
        in_shardings=(same, rows, same),  # state, batch, key
        out_shardings=(same, same),  # state, metrics
        donate_argnums=0,  # the old state's memory holds the new state
    )


def _pmap(step: Step, mesh: Mesh) -> Step:
    mapped = jax.pmap(
        functools.partial(step, axis=AXIS),
        axis_name=AXIS,
        in_axes=(None, 0, None),
        out_axes=None,
        devices=list(mesh.devices.flat),
    )

    def run(state: Any, batch: Any, key: jax.Array) -> tuple[Any, Any]:
        by_device = jax.tree.map(lambda x: x.reshape(mesh.size, -1, *x.shape[1:]), batch)
        return mapped(state, by_device, key)

    return run


WRAPPERS = {"jit": _jit, "pmap": _pmap}


def compile_step(step: Step, mesh: Mesh, wrapper: str) -> Step:
    """`step(state, batch, key, *, axis=None)` compiled for the mesh; see `WRAPPERS`."""
    return WRAPPERS[wrapper](step, mesh)
