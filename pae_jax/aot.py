"""Ahead-of-time compilation for accelerators that are not here, and the cost of each program.

It compiles what a run executes: the training call with its transform, shardings, donation and its
scan of several steps over resident data, validation, the diagnostics of the evaluation, and
prediction. The arguments are shapes instead of arrays, so nothing is executed. The memory is the
compiler's figure. The time is an estimate from the figures of the chip (devices/hardware.py).
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from data_pipelines import published
from data_pipelines.errors import BadInput
from pae_jax import detection, diagnostics, evaluate, image_ops, objective, population, train_step
from pae_jax.anomaly_map import Calibration
from pae_jax.config import Config
from pae_jax.corruption import CorruptedBatch
from pae_jax.devices import costs, hardware, sharding, topology
from pae_jax.devices.batches import MEMORY_FRACTION, steps_per_call
from pae_jax.devices.costs import Program, Report, format_report
from pae_jax.methods import METHODS
from pae_jax.workdir import validation

__all__ = ["Program", "Report", "compile_programs", "format_report", "make_programs", "start"]


def start() -> None:
    """Prepares this process; call it before the process touches a device."""
    topology.start()


def compile_programs(configs: Sequence[Config], name: str) -> Iterator[Report]:
    """Compiles the programs of a run, or of several runs that train as one program.

    The process has to call `start` first.

    Args:
      configs: the configurations of the runs; of several programs the first is compiled. Their
        images and textures are counted if they are here, but not decoded.
      name: the accelerators, see `topology.devices`.

    Yields:
      A report for each program: training, validation, the diagnostics of the evaluation (these
      two only for methods that have them), and prediction.

    Raises:
      BadInput: the accelerators do not exist, their compiler is missing, or the run cannot be
        divided among them.
    """
    devices = topology.devices(name)
    chip = hardware.chip(devices[0].device_kind)
    if chip is None:
        raise BadInput(f"--topology: no figures are known for {devices[0].device_kind}")
    with hardware.building_for(devices[0].platform):
        mesh, programs = make_programs(configs, devices, name, chip)
    for program in programs:
        # The context is closed while the caller works with a report.
        with hardware.building_for(devices[0].platform):
            report = _measure(program, mesh, chip, configs[0])
        yield report


def _measure(program: Program, mesh: Mesh, chip: hardware.Chip, config: Config) -> Report:
    """Compiles a program for the platform that is being built for."""
    flops = None
    if hardware.platform() == "gpu":
        # XLA's compiler for GPUs counts nothing without a device, but XLA counts the operations
        # of the same program before it is compiled.
        alone = [jax.devices("cpu")[0]]
        cpu = sharding.ordered_mesh([1] * len(mesh.axis_names), mesh.axis_names, alone)
        flops = (program.lower(cpu).cost_analysis() or {}).get("flops", 0) / program.shares
    options = hardware.compiler_options(deterministic=config.train.deterministic)
    lowered = program.lower(mesh)
    return Report(
        program,
        chip,
        *costs.measure(lowered, repeats=program.repeats, flops=flops, options=options),
    )


def make_programs(
    configs: Sequence[Config], devices: Sequence[Any], name: str, chip: hardware.Chip
) -> tuple[Mesh, list[Program]]:
    """Returns the mesh of the training and all programs of a run.

    Args:
      configs: see `compile_programs`.
      devices: the devices of the slice.
      name: the name of the slice, for messages.
      chip: its figures.
    """
    config = configs[0]
    members = _members_of_one_program(configs, len(devices))
    if len(members) > 1:
        mesh, training = _population_training(members, devices, chip)
    else:
        mesh = slice_mesh(config, devices, name)
        training = _training(config, mesh, chip)
    programs = [training, _validation(config, training)]
    if METHODS[config.method].reconstruct is not None and config.eval.diagnostics:
        programs.append(_evaluation(config))
    return mesh, [*programs, _prediction(config)]


def slice_mesh(config: Config, devices: Sequence[Any], name: str) -> Mesh:
    """Returns the run's mesh on a slice; every chip of the slice is in it.

    Args:
      config: the configuration of the run.
      devices: the devices of the slice.
      name: the name of the slice, for messages.

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
                f"{len(devices)} chips of {name}"
            )
        raise BadInput(
            f"sharding.data_parallel: {data_parallel} would leave chips of {name} without "
            f"work; -1 or {groups}"
        )
    return mesh


def _training(config: Config, mesh: Mesh, chip: hardware.Chip) -> Program:
    """Returns the call of `train.SingleTrainer`."""
    resident, source = _resident([config], chip)
    stride = steps_per_call(config, on_device=bool(resident))
    state, key = _state(config), _key()
    batches = _batches(config, stride, resident)

    def lower(mesh: Mesh) -> Any:
        # A new function in every call, because JAX keeps the trace of a function.
        call = sharding.scan_steps(train_step.make_step(config), stride)
        function = sharding.TRANSFORMS[config.sharding.transform](call, mesh, state)
        return function.lower(state, resident, batches, key)

    replicated = sharding.replicated_sharding(mesh)
    sizes = _state_sizes(state, sharding.state_sharding(mesh, state))
    sizes |= {f"{name}s": _size(leaf, replicated) for name, leaf in resident.items()}
    sizes["batches"] = _size(batches, sharding.batch_sharding(mesh))
    height, width = config.data.shape
    title = (
        f"training: {config.train.batch_size} images of {height}×{width} a step on "
        f"{_chips(mesh)}, steps per call: {stride}\n  {source}"
    )
    return Program(
        title,
        lower,
        sizes,
        images=config.train.batch_size,
        shares=mesh.size,
        repeats=config.train.grad_accumulation_steps,
    )


def _members_of_one_program(configs: Sequence[Config], devices: int) -> Sequence[Config]:
    """Returns the first configs that train as one program, as `pae train` groups them."""
    limit = configs[0].population.members_per_program or devices
    key = population.program_key(configs[0])
    return [config for config in configs if population.program_key(config) == key][:limit]


def _population_training(
    configs: Sequence[Config], devices: Sequence[Any], chip: hardware.Chip
) -> tuple[Mesh, Program]:
    """Returns the mesh and the call of `population.Population`."""
    config, per_device = configs[0], -(-len(configs) // len(devices))
    used = -(-len(configs) // per_device)
    mesh = sharding.ordered_mesh((used,), (sharding.MEMBER,), devices[:used])
    groups = [configs[i : i + per_device] for i in range(0, len(configs), per_device)]
    # All devices hold arrays of the same length, that of the largest.
    resident, source = max(
        (_resident(group, chip) for group in groups),
        key=lambda pair: sum(leaf.shape[0] for leaf in pair[0].values()),
    )
    stride = steps_per_call(config, on_device=bool(resident))
    state, key = _state(config), _key()
    batches = _batches(config, stride, resident)
    values = jax.tree.map(jnp.asarray, population.traced_values(config))

    def lower(mesh: Mesh) -> Any:
        placement = NamedSharding(mesh, PartitionSpec(sharding.MEMBER))

        def stack(tree: Any, count: int) -> Any:
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype, sharding=placement), tree
            )

        count = mesh.size * per_device
        call = jax.jit(population.make_call(config, mesh, steps=stride), donate_argnums=0)
        return call.lower(
            stack(state, count),
            stack(resident, mesh.size),
            *(stack(tree, count) for tree in (batches, key, values)),
        )

    alone = SingleDeviceSharding(devices[0])
    sizes = {name: per_device * size for name, size in _state_sizes(state, alone).items()}
    sizes |= {f"{name}s": _size(leaf, alone) for name, leaf in resident.items()}
    sizes["batches"] = per_device * _size(batches, alone)
    mapping = population.mapping(config)
    height, width = config.data.shape
    title = (
        f"training: {len(configs)} runs, {per_device} a chip ({mapping}), "
        f"{config.train.batch_size} images of {height}×{width} each a step on {_chips(mesh)}, "
        f"steps per call: {stride}\n  {source}"
    )
    repeats = config.train.grad_accumulation_steps * (per_device if mapping == "map" else 1)
    images = len(configs) * config.train.batch_size
    return mesh, Program(title, lower, sizes, images=images, repeats=repeats)


def _validation(config: Config, training: Program) -> Program:
    """Returns the measurement of one batch of validation examples, beside the training's arrays."""
    count = config.train.validation_batch_size
    settings = dataclasses.replace(
        detection.inference_config(config),
        objective=objective.without_penalties(config.objective),
    )
    examples = _examples(config, count)

    def measure(params: Any, batch: CorruptedBatch) -> Any:
        # The traced function itself, because the jitted one keeps its trace of another platform.
        return inspect.unwrap(validation.measure_batch)(params, batch, config=settings)

    params = _state(config).eval_params
    return Program(
        f"validation: {count} examples on one chip",
        lambda mesh: _lower_on_one(measure, mesh, params, examples),
        {"parameters": training.sizes["parameters"], "validation examples": _size(examples)},
        beside={name: size for name, size in training.sizes.items() if name != "parameters"},
    )


def _evaluation(config: Config) -> Program:
    """Returns the diagnostics of one batch, as `evaluate` measures them."""
    count = config.train.validation_batch_size
    found = published.count_images(config.data.spec)
    height, width = config.data.train_shape
    normal = jax.ShapeDtypeStruct(
        (min(found or evaluate.TANGENT_IMAGES, evaluate.TANGENT_IMAGES), height, width, 3),
        jnp.float32,
    )
    examples, params = _examples(config, count), _state(config).eval_params
    settings = detection.inference_config(config)
    reconstruct = METHODS[config.method].reconstruct
    assert reconstruct is not None

    def measure(params: Any, clean: Any, batch: CorruptedBatch, key: Any) -> Any:
        f = reconstruct(params, settings)
        tolerance, max_steps = config.eval.fixed_point_tolerance, config.eval.max_steps
        return {
            **diagnostics.errors(f, batch),
            **diagnostics.geometry(f, clean, batch, key, tolerance=tolerance, max_steps=max_steps),
        }

    return Program(
        f"evaluation: diagnostics of {count} examples on one chip",
        lambda mesh: _lower_on_one(measure, mesh, params, normal, examples, _key()),
        {"parameters": _size(params), "normal images": _size(normal), "examples": _size(examples)},
    )


def _prediction(config: Config) -> Program:
    """Returns the program of `detection.detect_all`."""
    count, (height, width) = config.eval.batch_size, config.data.shape
    params, images = _state(config).eval_params, _pixels(count, height, width)
    if config.eval.calibration != "none":
        parts = len(config.eval.parts)
        shape = (height, width) if parts == 1 else (height, width, parts)
        statistics = jax.ShapeDtypeStruct(shape, jnp.float32)
        params = detection.Calibrated(params, Calibration(statistics, statistics))
    return Program(
        f"prediction, and detection in the evaluation: {count} images of {height}×{width} on "
        "one chip",
        lambda mesh: _lower_on_one(
            functools.partial(detection.detect, config=config), mesh, params, images
        ),
        {"parameters": _size(params), "images": _size(images)},
        images=count,
    )


def _lower_on_one(function: Callable[..., Any], mesh: Mesh, *arguments: Any) -> Any:
    """Lowers a function for the first device of a mesh."""
    placement = SingleDeviceSharding(mesh.devices.flat[0])
    return jax.jit(function, in_shardings=placement).lower(*arguments)


def _state(config: Config) -> train_step.TrainState:
    # The shapes are enough to compile, so no parameter is drawn.
    return jax.eval_shape(functools.partial(train_step.init_state, config), _key())


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _pixels(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*shape, image_ops.CHANNELS), jnp.uint8)


def _batches(config: Config, stride: int, resident: dict[str, Any]) -> dict[str, Any]:
    """Returns the batches of a call: indices into resident arrays, or pixels."""
    leading = (stride, config.train.batch_size)
    side = config.data.texture_size
    pixels = {
        "image": _pixels(*leading, *config.data.shape),
        "texture": _pixels(*leading, side, side),
    }
    if METHODS[config.method].reserved_fraction(config):
        pixels["reserved"] = pixels["image"]
    if resident:
        return dict.fromkeys(pixels, jax.ShapeDtypeStruct(leading, jnp.int32))
    return pixels


def _examples(config: Config, count: int) -> CorruptedBatch:
    """Returns the shapes of corrupted images, clean images and masks."""

    def shape(channels: int) -> Any:
        return jax.ShapeDtypeStruct((count, *config.data.train_shape, channels), jnp.float32)

    image = shape(image_ops.CHANNELS)
    return CorruptedBatch(image, image, shape(1))


def _resident(configs: Sequence[Config], chip: hardware.Chip) -> tuple[dict[str, Any], str]:
    """Returns the arrays that a chip keeps for these runs, {} if it keeps none, and why."""
    config = configs[0]
    if config.data.on_device == "no":
        return {}, "data: streamed from the host"
    # Equal data are held once.
    images = {(run.data.spec, run.train.seed): run.data for run in configs}
    textures = {(run.data.textures, run.train.seed): run.data.textures for run in configs}
    numbers = [published.count_images(data.spec) for data in images.values()]
    # At most `max_images` of them are trained on.
    images_count = sum(
        min(number or 0, data.max_images or number or 0)
        for number, data in zip(numbers, images.values(), strict=True)
    )
    texture_numbers = [published.count_textures(name) for name in textures.values()]
    if None in numbers or None in texture_numbers:
        return {}, "data: their number is not known, so they are compiled as streamed"
    side = config.data.texture_size
    resident = {
        "image": _pixels(images_count, *config.data.shape),
        "texture": _pixels(sum(n or 0 for n in texture_numbers), side, side),
    }
    counts = f"{images_count} images in colour, {resident['texture'].shape[0]} textures"
    count = config.train.validation_batch_size
    size = _size(resident) + _size(_examples(config, count))
    if config.data.on_device == "auto" and size > MEMORY_FRACTION * chip.memory:
        return {}, f"data: {counts}, too many to be kept on the chip; streamed from the host"
    return resident, f"data: {counts}, held-out ones included; kept on the chip"


def _state_sizes(state: train_step.TrainState, shardings: Any) -> dict[str, int]:
    """Returns the bytes of the parts of a training state on one chip."""
    parts = {
        "parameters": "params",
        "optimizer state": "opt_state",
        "moving average": "ema",
    }
    is_one = not isinstance(shardings, train_step.TrainState)
    sizes = {
        name: _size(getattr(state, part), shardings if is_one else getattr(shardings, part))
        for name, part in parts.items()
    }
    return {name: size for name, size in sizes.items() if size}


def _size(tree: Any, shardings: Any = None) -> int:
    """Returns the bytes of arrays on one device.

    Args:
      tree: arrays or their shapes.
      shardings: a sharding for all or a tree of them; None for arrays on one device.
    """
    leaves = jax.tree.leaves(tree)
    if shardings is None:
        shapes = [leaf.shape for leaf in leaves]
    else:
        placements = jax.tree.leaves(shardings)
        placements = placements * len(leaves) if len(placements) == 1 else placements
        shapes = [s.shard_shape(x.shape) for x, s in zip(leaves, placements, strict=True)]
    pairs = zip(leaves, shapes, strict=True)
    return sum(leaf.dtype.itemsize * int(np.prod(shape)) for leaf, shape in pairs)


def _chips(mesh: Mesh) -> str:
    return f"{mesh.size} × {mesh.devices.flat[0].device_kind}"
