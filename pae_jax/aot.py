"""Ahead-of-time compilation for a TPU slice, without a TPU, and the cost of the programs per chip.

XLA's TPU compiler is a library, libtpu, that needs no TPU. It compiles the programs that a run
executes on a slice: the training step with its transform, shardings and donation, and prediction
on one chip. The arguments are shapes instead of arrays, so nothing is executed. The memory is the
compiler's figure. The time is an estimate from the figures of the chip (devices/hardware.py).
"""

import functools
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from data_pipelines.errors import BadInput
from pae_jax import detection, image_ops, train_step
from pae_jax.config import Config
from pae_jax.devices import hardware, hlo, sharding
from pae_jax.devices.batches import MEMORY_FRACTION, steps_per_call

# Without these variables libtpu asks the metadata server of a cloud which machine this is, and
# waits for the answer. The values are not used, because the caller names the topology.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile, as no device is taken
}
GIB, MIB = 2**30, 2**20


class Memory(NamedTuple):
    """The memory of a program on one chip, in bytes.

    Attributes:
      arguments: the arguments.
      outputs: the results.
      aliased: the part of the outputs that takes the place of donated arguments.
      temporaries: the intermediate values.
      code: the program itself.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """The memory that the chip needs while the program runs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


class Roofline(NamedTuple):
    """Lower bounds of the time of a step, in seconds.

    Attributes:
      arithmetic: the time of the arithmetic at the chip's peak.
      traffic: the time of the memory traffic at the chip's bandwidth.
    """

    arithmetic: float
    traffic: float

    @property
    def step(self) -> float:
        """The larger of the two bounds."""
        return max(self.arithmetic, self.traffic)


class Costs(NamedTuple):
    """The cost of a step on one chip, as XLA counts it.

    The body of a loop counts once, except that of the loop over parts of the batch
    (`train.grad_accumulation_steps`).

    Attributes:
      memory: the memory while the program runs.
      flops: the floating-point operations.
      bytes: the size of the operands and results of all operations. It exceeds the traffic with
        the chip's memory, because some operands and results stay in registers and caches.
      collectives: the exchange between chips, by kind.
    """

    memory: Memory
    flops: float
    bytes: float
    collectives: dict[str, hlo.Collective]


class Report(NamedTuple):
    """The cost of a program and the figures of the chip.

    Attributes:
      title: the program and the assumptions.
      images: the number of images in one step, on all chips together.
      chip: the figures of the chip.
      costs: the cost, or None if the compiler could not place the program in the memory.
      complaint: the compiler's message in this case.
    """

    title: str
    images: int
    chip: hardware.Chip
    costs: Costs | None
    complaint: str = ""

    @property
    def fits(self) -> bool:
        """True if the chip's memory is large enough for the program."""
        return self.costs is not None and self.costs.memory.total <= self.chip.memory


def start() -> None:
    """Prepares this process; call it before the process touches a device."""
    for name, value in ENVIRONMENT.items():
        # A value that the user has set takes precedence.
        os.environ.setdefault(name, value)
    # Otherwise JAX would look for a TPU in this machine.
    jax.config.update("jax_platforms", "cpu")
    # JAX can write a program for absent devices to its cache, but cannot read it again.
    jax.config.update("jax_enable_compilation_cache", False)


def compile_programs(config: Config, topology: str) -> Iterator[Report]:
    """Compiles the training step for all chips of a slice, then prediction for one of them.

    The process has to call `start` first.

    Args:
      config: the configuration of the run. Its data are not opened.
      topology: the generation and shape of the slice, for example "v5e:2x2".

    Yields:
      A report for each of the two programs.

    Raises:
      BadInput: the slice does not exist, libtpu is missing, or the run cannot be divided among
        the chips.
    """
    devices = slice_devices(topology)
    chip = hardware.chip(devices[0].device_kind)
    if chip is None:
        raise BadInput(f"--topology: no figures are known for {devices[0].device_kind}")
    mesh = slice_mesh(config, devices, topology)
    height, width = config.data.shape
    where = f"{mesh.size} × {devices[0].device_kind}"
    # The data are not opened, so it is unknown whether they would fit on the device.
    stride = steps_per_call(config, on_device=False)
    title = (
        f"training: {config.train.batch_size} images of {height}×{width} a step on {where}; "
        f"streamed, in colour, steps per call: {stride}"
    )
    if config.data.on_device != "no":
        limit = chip.memory * MEMORY_FRACTION / GIB
        at_most = f", at most {limit:.2f} GiB" if config.data.on_device == "auto" else ""
        title += f"\n  not counted     images and textures on the device (data.on_device){at_most}"
    costs = measure(lower_training(config, mesh), parts=config.train.grad_accumulation_steps)
    yield Report(title, config.train.batch_size, chip, *costs)
    title = f"prediction: {config.eval.batch_size} images of {height}×{width} on one of them"
    costs = measure(lower_prediction(config, devices[0]))
    yield Report(title, config.eval.batch_size, chip, *costs)


def slice_devices(topology: str) -> list[Any]:
    """Returns descriptions of the devices of a slice; the devices need not exist.

    Args:
      topology: the generation and shape of the slice.

    Raises:
      BadInput: the slice does not exist, or libtpu is missing.
    """
    match = re.fullmatch(r"v\d+\w*:(\d+)x(\d+)(?:x\d+)?", topology)
    if not match:
        raise BadInput(f"--topology: GENERATION:SHAPE, such as v5e:2x2, not {topology!r}")
    if importlib.util.find_spec("libtpu") is None:
        raise BadInput("libtpu is missing: pip install -c constraints.txt -e '.[tpu]'")
    # A host has 2×2 chips; a smaller slice is a part of a host.
    host = (*(min(int(side), 2) for side in match.groups()), 1)
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, chips_per_host_bounds=host
        )
    except jax.errors.JaxRuntimeError as error:
        raise BadInput(f"--topology: {topology}: {_first_line(error)}") from None
    return list(description.devices)


def slice_mesh(config: Config, devices: Sequence[Any], topology: str) -> jax.sharding.Mesh:
    """Returns the run's mesh on a slice; every chip of the slice is in it.

    Args:
      config: the configuration of the run.
      devices: the devices of the slice.
      topology: the name of the slice, for messages.

    Raises:
      BadInput: the batch or the sharding cannot be divided among the chips.
    """
    if config.sharding.transform == "pmap":
        raise BadInput("sharding.transform: pmap cannot be compiled ahead; jit or shard_map")
    mesh = sharding.make_mesh(config, devices)
    if mesh.size < len(devices):
        data_parallel = config.sharding.data_parallel
        groups = len(devices) // config.sharding.model_parallel
        if data_parallel == -1:
            rows = config.train.batch_size // config.train.grad_accumulation_steps
            raise BadInput(
                f"train.batch_size: {rows} is not divisible by {groups}, for the "
                f"{len(devices)} chips of {topology}"
            )
        raise BadInput(
            f"sharding.data_parallel: {data_parallel} would leave chips of {topology} without "
            f"work; -1 or {groups}"
        )
    return mesh


def lower_training(config: Config, mesh: jax.sharding.Mesh) -> Any:
    """Lowers the training step as `train.SingleTrainer` calls it on streamed batches.

    Args:
      config: the configuration of the run.
      mesh: the mesh to compile for.

    Returns:
      The lowered program, see `jax.stages.Lowered`.
    """
    key = jax.eval_shape(lambda: jax.random.key(config.train.seed))
    # The shapes are enough to compile, so no parameter is drawn.
    state = jax.eval_shape(functools.partial(train_step.init_state, config), key)
    stride = steps_per_call(config, on_device=False)

    call = sharding.scan_steps(train_step.make_step(config), stride)
    function = sharding.TRANSFORMS[config.sharding.transform](call, mesh, state)
    leading, side = (stride, config.train.batch_size), config.data.texture_size
    batches = {
        "image": _pixels(*leading, *config.data.shape),
        "texture": _pixels(*leading, side, side),
    }
    # This process runs on a CPU, and would otherwise trace the forms that suit a CPU.
    with hardware.building_for("tpu"):
        return function.lower(state, {}, batches, key)


def lower_prediction(config: Config, device: Any) -> Any:
    """Lowers prediction for one device, as `detection.detect_all` calls it.

    Args:
      config: the configuration of the run.
      device: the device to compile for.

    Returns:
      The lowered program, see `jax.stages.Lowered`.
    """
    placement = SingleDeviceSharding(device)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(functools.partial(train_step.init_state, config), key)
    images = _pixels(config.eval.batch_size, *config.data.shape)
    function = jax.jit(functools.partial(detection.detect, config=config), in_shardings=placement)
    with hardware.building_for("tpu"):
        return function.lower(state.eval_params, images)


def _pixels(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*shape, image_ops.CHANNELS), jnp.uint8)


def measure(lowered: Any, *, parts: int = 1) -> tuple[Costs | None, str]:
    """Compiles a lowered program and reads its cost.

    Args:
      lowered: the lowered program.
      parts: the number of parts of its batch that it loops over.

    Returns:
      The cost and an empty string; or None and the reason why the program does not fit.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        # The compiler refuses a program that is too large. Here this is a result, not a failure.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, _first_line(error)
    sizes, work = compiled.memory_analysis(), compiled.cost_analysis()
    memory = Memory(
        arguments=sizes.argument_size_in_bytes,
        outputs=sizes.output_size_in_bytes,
        aliased=sizes.alias_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
        code=sizes.generated_code_size_in_bytes,
    )
    # XLA counts the body of the loop over parts once.
    flops, traffic = work["flops"] * parts, work["bytes accessed"] * parts
    return Costs(memory, flops, traffic, hlo.collectives(compiled.as_text())), ""


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")


def roofline(flops: float, traffic: float, chip: hardware.Chip) -> Roofline:
    """Returns the bounds for the FLOP and bytes of a step on one chip; omits communication."""
    return Roofline(flops / chip.flops, traffic / chip.bandwidth)


def format_report(report: Report) -> str:
    """Formats a report as a few lines of text."""
    limit, costs = f"{report.chip.memory / GIB:.2f} GiB", report.costs
    if costs is None:
        return f"{report.title}\n  memory a chip   of {limit}: does not fit; {report.complaint}"
    memory, time = costs.memory, roofline(costs.flops, costs.bytes, report.chip)
    verdict = "fits" if report.fits else "does not fit"
    kinds = [
        f"{kind}: {collective.count} ({collective.bytes / MIB:.1f} MiB)"
        for kind, collective in sorted(costs.collectives.items())
    ]
    return "\n".join(
        (
            report.title,
            f"  memory a chip   {memory.total / GIB:.2f} GiB of {limit}: {verdict}",
            f"                  arguments {memory.arguments / MIB:.1f} MiB, outputs "
            f"{memory.outputs / MIB:.1f} ({memory.aliased / MIB:.1f} in place of arguments), "
            f"temporaries {memory.temporaries / MIB:.1f}, code {memory.code / MIB:.1f}",
            f"  work a chip     {costs.flops / 1e9:.1f} GFLOP, {costs.bytes / 1e9:.2f} GB accessed",
            f"  collectives     {', '.join(kinds) or 'none'}",
            f"  roofline        arithmetic {time.arithmetic * 1e3:.2f} ms, memory "
            f"{time.traffic * 1e3:.2f} ms: {time.step * 1e3:.2f} ms, "
            f"{report.images / time.step:.0f} images/s",
        )
    )
