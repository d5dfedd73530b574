"""Where arrays live: the meshes, and the wrappers that compile the one pure step for them.

A run's mesh has the axes "data", over which batches are split, and "model", over which
parameters and optimiser state may be; a population's has the axis "member" (population.py).
What is compiled is a call of one or several steps,

    (state, store, batches, key) → (state, metrics),

where `batches` and `metrics` have a leading axis of steps, and `store` holds what lives on the
device and is drawn from by index (batches.py). The wrappers give the same numbers: an ablation or
a benchmark names one in the config and nothing else changes.
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
    """`sharding.data_parallel` × `sharding.model_parallel` devices; data = -1: all that divide the batch.

    `devices`: of which the mesh is made, by default all there are.
    """
    devices = jax.devices() if devices is None else devices
    available, batch = len(devices), config.train.batch_size
    model, data = config.sharding.model_parallel, config.sharding.data_parallel
    if available % model:
        raise BadInput(f"sharding.model_parallel: {model} does not divide {available} devices")
    if model > 1 and config.sharding.transform != "jit":
        raise BadInput(f"sharding.model_parallel: {model} needs the wrapper jit")
    places = available // model
    # Every micro-batch of an accumulated gradient is split over the devices.
    if batch % config.train.grad_accumulation_steps:
        raise BadInput(
            f"train.batch_size: {batch} is not divisible by train.grad_accumulation_steps="
            f"{config.train.grad_accumulation_steps}"
        )
    rows = batch // config.train.grad_accumulation_steps
    if data == -1:
        data = max(n for n in range(1, places + 1) if rows % n == 0 and places % n == 0)
    if not 1 <= data <= places:
        raise BadInput(f"sharding.data_parallel: {data} devices asked for, {places} available")
    if rows % data:
        raise BadInput(f"train.batch_size: {rows} is not divisible by {data} devices")
    if data * model < available and jax.process_count() > 1:
        raise BadInput(
            f"sharding.data_parallel: {data} would leave devices of a process without work"
        )
    # Auto axes: the compiler partitions the step (jax.make_mesh defaults to Explicit ones).
    axes, kinds = (DATA, MODEL), (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((data, model), axes, kinds, devices=devices[: data * model])


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches (steps, batch, …): the examples of every step over the axis "data"."""
    return NamedSharding(mesh, PartitionSpec(None, DATA))


def state_sharding(mesh: Mesh, state: Any) -> Any:
    """Of every array of the state: its output channels over "model", where that divides them."""
    model = mesh.shape[MODEL]

    def of(leaf: Any) -> NamedSharding:
        if model > 1 and leaf.ndim and leaf.shape[-1] % model == 0:
            return NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), MODEL))
        return replicated_sharding(mesh)

    return jax.tree.map(of, state)


def to_global(arrays: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """This process's part of host arrays → global arrays."""
    return {
        name: jax.make_array_from_process_local_data(sharding, np.ascontiguousarray(array))
        for name, array in arrays.items()
    }


def one_copy(tree: Any, mesh: Mesh) -> Any:
    """A whole copy of global arrays on one device of this process."""
    if mesh.shape.get(MODEL, 1) > 1:
        tree = _gather(mesh)(tree)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


@functools.lru_cache
def _gather(mesh: Mesh) -> Any:
    return jax.jit(lambda tree: tree, out_shardings=replicated_sharding(mesh))


def gather_resident(store: Mapping[str, Any], batch: Mapping[str, Any]) -> dict[str, Any]:
    """What lives in the store was given by index: looks it up."""
    return {name: store[name][x] if name in store else x for name, x in batch.items()}


def scan_steps(step: Step, count: int) -> Step:
    """`count` steps (state, batch, key) → (state, metrics) as one call, see above."""

    def call(state: Any, store: Any, batches: Any, key: jax.Array, **axis: Any) -> tuple[Any, Any]:
        def one(state: Any, batch: Any) -> tuple[Any, Any]:
            return step(state, gather_resident(store, batch), key, **axis)

        if count > 1:
            return jax.lax.scan(one, state, batches, length=count)
        state, metrics = one(state, jax.tree.map(lambda x: x[0], batches))
        return state, jax.tree.map(lambda x: x[None], metrics)

    return call


def _jit(call: Step, mesh: Mesh, state: Any) -> Any:
    same, rows, placed = (
        replicated_sharding(mesh),
        batch_sharding(mesh),
        state_sharding(mesh, state),
    )
    return jax.jit(
        call,
        in_shardings=(placed, same, rows, same),  # state, store, batches, key
        out_shardings=(placed, same),  # state, metrics
        donate_argnums=0,  # the old state's memory holds the new state
    )


def _shard_map(call: Step, mesh: Mesh, state: Any) -> Any:
    same = PartitionSpec()
    mapped = jax.shard_map(
        functools.partial(call, axis=DATA),
        mesh=mesh,
        in_specs=(same, same, PartitionSpec(None, DATA), same),
        out_specs=(same, same),
        check_vma=False,  # gradients and metrics are averaged in the step
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

    def run(state: Any, store: Any, batches: Any, key: jax.Array) -> tuple[Any, Any]:
        return mapped(state, store, jax.tree.map(by_device, batches), key)

    return run


TRANSFORMS = {"jit": _jit, "shard_map": _shard_map, "pmap": _pmap}


class CompiledOnce:
    """A function compiled ahead of its first call, for its arguments' shapes alone.

    Any other shape, type or placement raises: a run cannot recompile its step unnoticed.
    """

    def __init__(self, function: Any):
        self._function = function
        self._program: Any = None
        self.flops: float | None = None

    def __call__(self, *args: Any) -> Any:
        if not hasattr(self._function, "lower"):  # a pmap, which cannot be compiled ahead
            return self._function(*args)
        if self._program is None:
            self._program = self._function.lower(*args).compile()
            # On one device; the body of a loop counts once, whatever it repeats.
            self.flops = (self._program.cost_analysis() or {}).get("flops")
        return self._program(*args)

    def hlo(self) -> str:
        """The compiled program as text, after the first call."""
        return self._program.as_text()

    def memory(self) -> Any:
        """XLA's account of the program's memory on one device, after the first call."""
        return self._program.memory_analysis()


def compile_step(
    step: Step, mesh: Mesh, wrapper: str, state: Any, *, steps: int = 1
) -> CompiledOnce:
    """`step(state, batch, key, *, axis=None)` → compiled calls of `steps` steps; see `WRAPPERS`."""
    return CompiledOnce(TRANSFORMS[wrapper](scan_steps(step, steps), mesh, state))
