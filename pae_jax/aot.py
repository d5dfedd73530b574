"""A TPU without a TPU: the programs of a slice, compiled ahead of time, and what they cost a chip.

XLA's TPU compiler is a library, libtpu, that needs no TPU. It is given the programs that a run
executes there, the training step with its wrapper, shardings and donation, and prediction on
one chip, and shapes instead of arrays. Nothing is executed: memory is the compiler's own
account, time is an estimate from the chip's figures (hardware.py).
"""

import contextlib
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

# libtpu would ask a cloud's metadata server what machine this is, and wait for the answer. The
# topology is named by the caller, so whatever stands here is not used.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is taken, so several may compile at once
}
GIB, MIB = 2**30, 2**20


class Memory(NamedTuple):
    """Bytes on one chip; `aliased` of the outputs lie where donated arguments were."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


class Roofline(NamedTuple):
    """Seconds of a step if arithmetic, or traffic with the memory, were all there is to do."""

    arithmetic: float
    traffic: float

    @property
    def step(self) -> float:
        return max(self.arithmetic, self.traffic)


class Costs(NamedTuple):
    """What a step takes of one chip.

    Attributes:
      memory: while the program runs.
      flops, bytes: of one step. As XLA counts them: the operands and results of every operation,
        those too that stay on the chip, so more bytes than pass through its memory. The body of
        a loop counts once, except that of the loop over parts of the batch (`train.grad_accumulation_steps`).
      collectives: by kind.
    """

    memory: Memory
    flops: float
    bytes: float
    collectives: dict[str, hlo.Collective]


class Report(NamedTuple):
    """A program held against a chip.

    Attributes:
      title: which program, and what was assumed.
      images: that one step takes, on all chips together.
      chip: the chip's figures.
      costs: what it takes; or None, where the compiler could not place it in the memory, and
      complaint: what it said of that.
    """

    title: str
    images: int
    chip: hardware.Chip
    costs: Costs | None
    complaint: str = ""

    @property
    def fits(self) -> bool:
        return self.costs is not None and self.costs.memory.total <= self.chip.memory


def start() -> None:
    """What a process sets up before it touches a device."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")  # or JAX would look for a TPU of this machine
    # A program for devices that are not there can be kept, but not read again.
    jax.config.update("jax_enable_compilation_cache", False)


def compile_programs(config: Config, topology: str) -> Iterator[Report]:
    """Compiles the training step for all chips of a slice, then prediction for one of them.

    A process calls `start` first.

    Args:
      config: of the run; its data is not opened.
      topology: generation and shape of the slice, for example "v5e:2x2".

    Raises:
      BadInput: no such slice, no libtpu, or the run does not divide among the chips.
    """
    devices = slice_devices(topology)
    chip = hardware.chip(devices[0].device_kind)
    if chip is None:
        raise BadInput(f"--topology: nothing is known of a {devices[0].device_kind}")
    mesh = slice_mesh(config, devices, topology)
    height, width = config.data.shape
    where = f"{mesh.size} × {devices[0].device_kind}"
    stride = steps_per_call(config, on_device=False)
    title = (
        f"training: {config.train.batch_size} images of {height}×{width} a step on {where}; "
        f"streamed, in colour, steps of a call: {stride}"
    )
    if config.data.on_device != "no":
        share = chip.memory * MEMORY_FRACTION / GIB
        most = f", at most {share:.2f} GiB" if config.data.on_device == "auto" else ""
        title += f"\n  not counted     images and textures on the device (data.on_device){most}"
    costs = measure(lower_training(config, mesh), parts=config.train.grad_accumulation_steps)
    yield Report(title, config.train.batch_size, chip, *costs)
    title = f"prediction: {config.eval.batch_size} images of {height}×{width} on one of them"
    costs = measure(lower_prediction(config, devices[0]))
    yield Report(title, config.eval.batch_size, chip, *costs)


def slice_devices(topology: str) -> list[Any]:
    """The devices of a slice, described but not there.

    Raises:
      BadInput: not a slice, or libtpu is missing.
    """
    found = re.fullmatch(r"v\d+\w*:(\d+)x(\d+)(?:x\d+)?", topology)
    if not found:
        raise BadInput(f"--topology: GENERATION:SHAPE, such as v5e:2x2, not {topology!r}")
    if importlib.util.find_spec("libtpu") is None:
        raise BadInput("libtpu is missing: pip install -c constraints.txt -e '.[tpu]'")
    # A slice smaller than the host's 2×2 chips is a part of a host.
    host = (*(min(int(side), 2) for side in found.groups()), 1)
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, chips_per_host_bounds=host
        )
    except jax.errors.JaxRuntimeError as error:
        raise BadInput(f"--topology: {topology}: {_line(error)}") from None
    return list(described.devices)


def slice_mesh(config: Config, devices: Sequence[Any], topology: str) -> jax.sharding.Mesh:
    """The run's mesh on a slice, of which every chip has work.

    Raises:
      BadInput: the batch, or the sharding, does not divide among the chips.
    """
    if config.sharding.transform == "pmap":
        raise BadInput("sharding.transform: pmap cannot be compiled ahead; jit or shard_map")
    mesh = sharding.make_mesh(config, devices)
    if mesh.size < len(devices):
        asked, rows = (
            config.sharding,
            config.train.batch_size // config.train.grad_accumulation_steps,
        )
        places = len(devices) // asked.model_parallel
        if asked.data_parallel == -1:
            raise BadInput(
                f"train.batch_size: {rows} is not divisible by {places}, for the "
                f"{len(devices)} chips of {topology}"
            )
        raise BadInput(
            f"sharding.data_parallel: {asked.data_parallel} would leave chips of {topology} without work; "
            f"-1 or {places}"
        )
    return mesh


@contextlib.contextmanager
def _tpu_rules() -> Iterator[None]:
    """Where a choice depends on the platform, the package asks JAX: here that is the slice's."""
    here = jax.default_backend
    jax.default_backend = lambda: "tpu"
    try:
        yield
    finally:
        jax.default_backend = here


def lower_training(config: Config, mesh: jax.sharding.Mesh) -> Any:
    """The call of `train.Single` on streamed batches, lowered for the mesh."""
    key = jax.eval_shape(lambda: jax.random.key(config.train.seed))
    state = jax.eval_shape(functools.partial(train_step.init_state, config), key)
    stride = steps_per_call(config, on_device=False)

    def step(*args: Any, axis: str | None = None) -> tuple[Any, Any]:
        return train_step.train_step(*args, config=config, axis=axis)

    call = sharding.scan_steps(step, stride)
    function = sharding.TRANSFORMS[config.sharding.transform](call, mesh, state)
    lead, side = (stride, config.train.batch_size), config.data.texture_size
    batches = {
        "image": _pixels(*lead, *config.data.shape),
        "texture": _pixels(*lead, side, side),
    }
    with _tpu_rules():
        return function.lower(state, {}, batches, key)


def lower_prediction(config: Config, device: Any) -> Any:
    """The call of `detection.detect_all`, lowered for one device."""
    here = SingleDeviceSharding(device)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(functools.partial(train_step.init_state, config), key)
    images = _pixels(config.eval.batch_size, *config.data.shape)
    function = jax.jit(functools.partial(detection.detect, config=config), in_shardings=here)
    with _tpu_rules():
        return function.lower(state.eval_params, images)


def _pixels(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*shape, image_ops.CHANNELS), jnp.uint8)


def measure(lowered: Any, *, parts: int = 1) -> tuple[Costs | None, str]:
    """Compiles a lowered program that loops over `parts` parts of its batch.

    Returns:
      What it costs, and nothing; or None, and why it does not fit.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, _line(error)
    found, work = compiled.memory_analysis(), compiled.cost_analysis()
    memory = Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        found.temp_size_in_bytes,
        found.generated_code_size_in_bytes,
    )
    flops, traffic = work["flops"] * parts, work["bytes accessed"] * parts
    return Costs(memory, flops, traffic, hlo.collectives(compiled.as_text())), ""


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")


def roofline(flops: float, traffic: float, chip: hardware.Chip) -> Roofline:
    """From FLOP and bytes of a step on one chip; communication is left out."""
    return Roofline(flops / chip.flops, traffic / chip.bandwidth)


def format_report(report: Report) -> str:
    """A few lines of text."""
    limit, costs = f"{report.chip.memory / GIB:.2f} GiB", report.costs
    if costs is None:
        return f"{report.title}\n  memory a chip   of {limit}: does not fit; {report.complaint}"
    memory, time = costs.memory, roofline(costs.flops, costs.bytes, report.chip)
    verdict = "fits" if report.fits else "does not fit"
    kinds = [
        f"{kind}: {found.count} ({found.bytes / MIB:.1f} MiB)"
        for kind, found in sorted(costs.collectives.items())
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
