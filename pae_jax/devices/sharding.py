"""Placement of arrays on devices: meshes, shardings, and the compilation of a step for a mesh.

The mesh of a run has two axes: "data", over which batches are split, and "model", over which
parameters and optimizer state may be split. The mesh of a population has the axis "member"
(population.py). The compiled function is a call of one or several steps,

    (state, resident, batches, key) → (state, metrics),

where `batches` and `metrics` have a leading axis of steps, and `resident` holds arrays that stay
on the device and are read by index (batches.py). The transforms jit, shard_map and pmap give the
same numbers; `sharding.transform` selects one, and nothing else in a run depends on it.
"""

import bisect
import collections
import contextvars
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from data_pipelines.errors import BadInput
from data_pipelines.pipeline import source
from data_pipelines.rows import Stored
from pae_jax.config import Config
from pae_jax.devices import hardware

DATA, MODEL, MEMBER = "data", "model", "member"

Step = Callable[..., tuple[Any, Any]]


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh of `sharding.data_parallel` × `sharding.model_parallel` devices.

    `data_parallel` = -1 takes the largest number of devices that divides the batch. If several
    processes train together, each has the same number of devices in the mesh.

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
    hosts = collections.Counter(device.process_index for device in devices)
    if len(hosts) > 1 and config.sharding.transform == "pmap":
        raise BadInput(
            f"sharding.transform: pmap trains in one process, not in {len(hosts)}; "
            "take jit or shard_map"
        )
    if model > 1 and config.sharding.transform != "jit":
        raise BadInput(f"sharding.model_parallel: {model} needs sharding.transform=jit")
    if batch_size % parts:
        raise BadInput(
            f"train.batch_size: {batch_size} is not divisible by "
            f"train.grad_accumulation_steps={parts}"
        )
    # Every part of an accumulated gradient is split over the devices.
    rows, largest = batch_size // parts, available // model

    def divides_hosts(data: int) -> bool:
        # A process without a device in the mesh could not take part in the step.
        return data * model % len(hosts) == 0 and data * model // len(hosts) <= min(hosts.values())

    if data == -1:
        fitting = [n for n in range(1, largest + 1) if rows % n == 0 and divides_hosts(n)]
        if not fitting:
            raise BadInput(
                f"train.batch_size: {rows} cannot be divided among the devices of "
                f"{len(hosts)} processes"
            )
        data = fitting[-1]
    if not 1 <= data <= largest:
        raise BadInput(f"sharding.data_parallel: {data} devices asked for, {largest} available")
    if rows % data:
        raise BadInput(f"train.batch_size: {rows} is not divisible by {data} devices")
    if not divides_hosts(data):
        raise BadInput(
            f"sharding.data_parallel: {data} x {model} devices (data x model) cannot be divided "
            f"equally among {len(hosts)} processes"
        )
    return ordered_mesh((data, model), (DATA, MODEL), _first_of_each_host(devices, data * model))


def ordered_mesh(shape: Sequence[int], axes: Sequence[str], devices: Sequence[Any]) -> Mesh:
    """Returns a mesh of these devices, in the order that suits the network between them.

    The order need not be that of `devices`: on a TPU v5e 2×2 it is 0, 1, 3, 2.
    """
    # With Auto axes the compiler partitions the step; the default of jax.make_mesh is Explicit.
    axis_types = (AxisType.Auto,) * len(axes)
    try:
        return jax.make_mesh(tuple(shape), tuple(axes), axis_types, devices=devices)
    except (AssertionError, ValueError, NotImplementedError):
        # jax.make_mesh knows no order for some parts of a TPU slice, and none for several slices.
        return Mesh(np.asarray(devices).reshape(shape), tuple(axes), axis_types=axis_types)


def _first_of_each_host(devices: Sequence[Any], count: int) -> list[Any]:
    """Returns `count` devices, the same number from each process, in their order."""
    per_host = count // len({device.process_index for device in devices})
    taken: collections.Counter[int] = collections.Counter()
    selected = []
    for device in devices:
        taken[device.process_index] += 1
        if taken[device.process_index] <= per_host:
            selected.append(device)
    return selected


def idle_devices(mesh: Mesh) -> list[Any]:
    """Returns the devices of all processes that are not in the mesh."""
    used = set(mesh.devices.flat)
    return [device for device in jax.devices() if device not in used]


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


def to_global(arrays: Mapping[str, Stored], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Puts host arrays on the devices; every process holds them whole."""
    return {
        name: _make_array(array.shape, sharding, _part_of(array)) for name, array in arrays.items()
    }


@functools.lru_cache
def local_rows(mesh: Mesh, batch_size: int) -> tuple[int, ...]:
    """Returns the rows of a batch that the devices of this process hold, in ascending order.

    They need not be adjacent. With the axis "model" across processes, all processes may hold the
    same rows.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((1, batch_size)).values()
    slices = [index[1] for index in indices if index is not None]
    return tuple(sorted({row for part in slices for row in range(batch_size)[part]}))


def batch_to_global(
    arrays: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int
) -> dict[str, jax.Array]:
    """Puts batches on the devices of the mesh.

    Args:
      arrays: arrays (steps, rows, …) with the rows `local_rows(mesh, batch_size)`.
      mesh: the run's mesh.
      batch_size: the size of the whole batch, over all processes.

    Returns:
      Arrays (steps, batch_size, …). Row i is example i wherever it lies, so images, textures and
      random keys of an example stay together.
    """
    rows = local_rows(mesh, batch_size)
    return {
        name: _make_array(
            (len(array), batch_size, *array.shape[2:]), batch_sharding(mesh), _part_of(array, rows)
        )
        for name, array in arrays.items()
    }


def _make_array(
    shape: tuple[int, ...], sharding: NamedSharding, part: Callable[[Any], np.ndarray]
) -> jax.Array:
    # JAX counts what the function returns as implicit transfers, although they are asked for.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_callback(shape, sharding, part)


def _part_of(array: Stored, rows: Sequence[int] | None = None) -> Callable[[Any], np.ndarray]:
    """Returns a function of a device's index into the global array: its part of `array`.

    Args:
      array: the global array, or some rows of it along axis 1.
      rows: which rows these are, in ascending order; None if it is whole.
    """

    def part(index: tuple[slice, ...]) -> np.ndarray:
        if rows is not None:
            # A device's rows are adjacent, and all of them are here.
            first, last, _ = index[1].indices(rows[-1] + 1)
            start = bisect.bisect_left(rows, first)
            index = (index[0], slice(start, start + last - first), *index[2:])
        return np.ascontiguousarray(array[index])

    return part


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
    return {
        name: resident[source(name)][x] if source(name) in resident else x
        for name, x in batch.items()
    }


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

    def __init__(self, function: Any, compiler_options: Mapping[str, Any] | None = None):
        self._function = function
        self._compiler_options = dict(compiler_options) if compiler_options else None
        self._compiling: futures.Future[Any] | None = None
        self._program: Any = None
        self.flops: float | None = None

    def start_compiling(self, *args: Any) -> None:
        """Compiles the function in a thread; the first call waits for it and raises its errors.

        Python and XLA then prepare something else meanwhile. On a GPU nothing is started, because
        XLA times kernels there while it compiles, and other work would disturb the measurement.

        Args:
          args: the arguments of the first call, or `jax.ShapeDtypeStruct`s with their shardings.
        """
        if hasattr(self._function, "lower") and hardware.platform() != "gpu":
            thread = futures.ThreadPoolExecutor(1, "compile")
            # The context holds the platform that programs are built for.
            run = contextvars.copy_context().run
            self._compiling = thread.submit(run, self._compile, *map(_shapes, args))
            thread.shutdown(wait=False)

    def __call__(self, *args: Any) -> Any:
        """Calls the function, and compiles it first if this is the first call."""
        if not hasattr(self._function, "lower"):  # a pmap, which cannot be compiled ahead
            return self._function(*args)
        if self._program is None:
            self._program = self._compiling.result() if self._compiling else self._compile(*args)
            self.flops = (self._program.cost_analysis() or {}).get("flops")
        return self._program(*args)

    def _compile(self, *args: Any) -> Any:
        return self._function.lower(*args).compile(compiler_options=self._compiler_options)

    def hlo(self) -> str:
        """Returns the compiled program as text, after the first call."""
        return self._program.as_text()

    def memory(self) -> Any:
        """Returns XLA's figures of the program's memory on one device, after the first call."""
        return self._program.memory_analysis()


def _shapes(tree: Any) -> Any:
    """Returns a tree in which each array is replaced by its shape, type and sharding.

    A thread that kept the arrays would hold their memory, and the state is donated meanwhile.
    """
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def compile_step(
    step: Step,
    mesh: Mesh,
    transform: str,
    state: Any,
    *,
    steps: int = 1,
    compiler_options: Mapping[str, Any] | None = None,
) -> CompiledOnce:
    """Prepares the compiled call of a step on a mesh.

    Args:
      step: step(state, batch, key, *, axis=None) → (state, metrics).
      mesh: the run's mesh.
      transform: a key of `TRANSFORMS`.
      state: the state or its shapes.
      steps: the number of steps per call.
      compiler_options: options of XLA by name.
    """
    call = TRANSFORMS[transform](scan_steps(step, steps), mesh, state)
    return CompiledOnce(call, compiler_options)
