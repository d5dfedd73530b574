"""Placement of arrays on devices: meshes, shardings, and the compilation of a step for a mesh.

The mesh of a run has two axes: "data", over which batches are split, and "model", over which
parameters and optimizer state may be split. The mesh of a population has the axis "member"
(population.py). The compiled function is a call of one or several steps,

    (state, resident, batches, key) → (state, metrics),

where `batches` and `metrics` have a leading axis of steps, and `resident` holds arrays that stay
on the device and are read by index (batches.py). The transforms jit, shard_map and pmap give the
same numbers; `sharding.transform` selects one, and nothing else in a run depends on it.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from data_pipelines.errors import BadInput
from pae_jax.config import Config

DATA, MODEL, MEMBER = "data", "model", "member"

Step = Callable[..., tuple[Any, Any]]


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh of `sharding.data_parallel` × `sharding.model_parallel` devices.

    `data_parallel` = -1 takes the largest number of devices that divides the batch.

    Args:
      config: the run's configuration.
      devices: the devices to choose from; None takes all devices.

    Raises:
      BadInput: the batch or the sharding cannot be divided among the devices.
    """
    devices = jax.devices() if devices is None else devices
    available, batch_size = len(devices), config.train.batch_size
    parts = config.train.grad_accumulation_steps
    model, data = config.sharding.model_parallel, config.sharding.data_parallel
    if available % model:
        raise BadInput(f"sharding.model_parallel: {model} does not divide {available} devices")
    if model > 1 and config.sharding.transform != "jit":
        raise BadInput(f"sharding.model_parallel: {model} needs sharding.transform=jit")
    if batch_size % parts:
        raise BadInput(
            f"train.batch_size: {batch_size} is not divisible by "
            f"train.grad_accumulation_steps={parts}"
        )
    # Every part of an accumulated gradient is split over the devices.
    rows, largest = batch_size // parts, available // model
    if data == -1:
        data = max(n for n in range(1, largest + 1) if rows % n == 0 and largest % n == 0)
    if not 1 <= data <= largest:
        raise BadInput(f"sharding.data_parallel: {data} devices asked for, {largest} available")
    if rows % data:
        raise BadInput(f"train.batch_size: {rows} is not divisible by {data} devices")
    if data * model < available and jax.process_count() > 1:
        raise BadInput(
            f"sharding.data_parallel: {data} would leave devices of a process without work"
        )
    # With Auto axes the compiler partitions the step; the default of jax.make_mesh is Explicit.
    axes, axis_types = (DATA, MODEL), (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((data, model), axes, axis_types, devices=devices[: data * model])


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array with a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of batches (steps, batch, …): axis 1 is split over "data"."""
    return NamedSharding(mesh, PartitionSpec(None, DATA))


def state_sharding(mesh: Mesh, state: Any) -> Any:
    """Returns a sharding per array.

    The last axis, the output channels of a kernel, is split over "model" if divisible; otherwise
    the array is replicated.

    Args:
      mesh: the run's mesh.
      state: a tree of arrays or of their shapes.
    """
    model = mesh.shape[MODEL]

    def leaf_sharding(leaf: Any) -> NamedSharding:
        if model > 1 and leaf.ndim and leaf.shape[-1] % model == 0:
            return NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), MODEL))
        return replicated_sharding(mesh)

    return jax.tree.map(leaf_sharding, state)


def to_global(arrays: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Puts this process's parts of host arrays on the devices; returns the global arrays."""
    return {
        name: jax.make_array_from_process_local_data(sharding, np.ascontiguousarray(array))
        for name, array in arrays.items()
    }


def one_copy(tree: Any, mesh: Mesh) -> Any:
    """Returns a whole copy of global arrays on one device of this process."""
    if mesh.shape.get(MODEL, 1) > 1:
        tree = _replicate(mesh)(tree)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


@functools.lru_cache
def _replicate(mesh: Mesh) -> Any:
    return jax.jit(lambda tree: tree, out_shardings=replicated_sharding(mesh))


def gather_resident(resident: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces indices into resident arrays by the rows; leaves other arrays as they are."""
    return {name: resident[name][x] if name in resident else x for name, x in batch.items()}


def scan_steps(step: Step, count: int) -> Step:
    """Returns `count` steps as one call.

    Args:
      step: (state, batch, key) → (state, metrics).
      count: the number of steps.

    Returns:
      (state, resident, batches, key) → (state, metrics), see the module.
    """

    def call(
        state: Any, resident: Any, batches: Any, key: jax.Array, **axis: Any
    ) -> tuple[Any, Any]:
        def one_step(state: Any, batch: Any) -> tuple[Any, Any]:
            return step(state, gather_resident(resident, batch), key, **axis)

        if count > 1:
            return jax.lax.scan(one_step, state, batches, length=count)
        # Without a loop, in which XLA's convolutions are slow on a CPU.
        state, metrics = one_step(state, jax.tree.map(lambda x: x[0], batches))
        return state, jax.tree.map(lambda x: x[None], metrics)

    return call


def _jit(call: Step, mesh: Mesh, state: Any) -> Any:
    replicated, placement = replicated_sharding(mesh), state_sharding(mesh, state)
    return jax.jit(
        call,
        # state, resident, batches, key
        in_shardings=(placement, replicated, batch_sharding(mesh), replicated),
        out_shardings=(placement, replicated),  # state, metrics
        donate_argnums=0,  # the new state takes the memory of the old one
    )


def _shard_map(call: Step, mesh: Mesh, state: Any) -> Any:
    replicated = PartitionSpec()
    mapped = jax.shard_map(
        functools.partial(call, axis=DATA),
        mesh=mesh,
        in_specs=(replicated, replicated, PartitionSpec(None, DATA), replicated),
        out_specs=(replicated, replicated),
        # JAX cannot see that the step averages gradients and metrics over the axis.
        check_vma=False,
    )
    return _jit(mapped, mesh, state)


def _pmap(call: Step, mesh: Mesh, state: Any) -> Any:
    del state
    mapped = jax.pmap(
        functools.partial(call, axis=DATA),
        axis_name=DATA,
        in_axes=(None, None, 1, None),
        out_axes=None,
        devices=list(mesh.devices.flat),
    )

    def by_device(x: jax.Array) -> jax.Array:
        return x.reshape(len(x), mesh.size, -1, *x.shape[2:])

    def run(state: Any, resident: Any, batches: Any, key: jax.Array) -> tuple[Any, Any]:
        return mapped(state, resident, jax.tree.map(by_device, batches), key)

    return run


TRANSFORMS = {"jit": _jit, "shard_map": _shard_map, "pmap": _pmap}


class CompiledOnce:
    """A function that is compiled before its first call, for the shapes of these arguments only.

    Later calls with another shape, type or placement raise, so that a run cannot recompile its
    step unnoticed.

    Attributes:
      flops: XLA's count for the program on one device, in which the body of a loop counts once;
        None before the first call.
    """

    def __init__(self, function: Any):
        self._function = function
        self._program: Any = None
        self.flops: float | None = None

    def __call__(self, *args: Any) -> Any:
        """Calls the function, and compiles it first if this is the first call."""
        if not hasattr(self._function, "lower"):  # a pmap, which cannot be compiled ahead
            return self._function(*args)
        if self._program is None:
            self._program = self._function.lower(*args).compile()
            self.flops = (self._program.cost_analysis() or {}).get("flops")
        return self._program(*args)

    def hlo(self) -> str:
        """Returns the compiled program as text, after the first call."""
        return self._program.as_text()

    def memory(self) -> Any:
        """Returns XLA's figures of the program's memory on one device, after the first call."""
        return self._program.memory_analysis()


def compile_step(
    step: Step, mesh: Mesh, transform: str, state: Any, *, steps: int = 1
) -> CompiledOnce:
    """Prepares the compiled call of a step on a mesh.

    Args:
      step: step(state, batch, key, *, axis=None) → (state, metrics).
      mesh: the run's mesh.
      transform: a key of `TRANSFORMS`.
      state: the state or its shapes.
      steps: the number of steps per call.
    """
    return CompiledOnce(TRANSFORMS[transform](scan_steps(step, steps), mesh, state))
