"""Compares equal forms of the network's parts as the compiler of a platform counts them.

    python benchmarks/forms.py --topology v5e:1x1 [--only decoder pooling]
    python benchmarks/forms.py --topology h100
    python benchmarks/forms.py --topology cpu

For an accelerator the forms are compiled ahead of time, without the device (`pae compile`).
GFLOP and GB are XLA's counts of the arithmetic and of the operands and results of all operations;
MiB are the temporaries. On a TPU "Mcycles" is the sum of the compiler's estimates for all
operations. On a CPU the forms run, and "ms" is the shortest of five times. Counts and estimates
are not times: measure on the device where a difference matters.

"gradient" is the forward pass with all derivatives. The shapes are those of configs/default.py
and configs/tpu_v5e.py on one chip.
"""

import argparse
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import SingleDeviceSharding

from pae_jax import image_ops, population, train_step, unet
from pae_jax.config import ModelConfig, from_config_dict
from pae_jax.devices import hardware, hlo, sharding, topology, winograd
from pae_jax.workdir import provenance

Form = Callable[..., Any]
LAYOUT = ("NHWC", "HWIO", "NHWC")


class Comparison(NamedTuple):
    """Equal forms of one part.

    Attributes:
      title: the part and its shapes.
      forms: functions by name.
      arguments: their arguments, or the shapes of them.
      loops: how often the loop body of a form runs, by name; 1 if it is not here.
    """

    title: str
    forms: dict[str, Form]
    arguments: tuple[Any, ...]
    loops: dict[str, int] = {}  # noqa: RUF012


class Figures(NamedTuple):
    """The cost of a form; None for a figure that is not known."""

    gflop: float | None
    gigabytes: float | None
    mebibytes: float
    megacycles: float | None
    milliseconds: float | None


# ---- the forms ----


def four_convolutions(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves the upsampled map as four 2×2 convolutions, the form for narrow maps on a CPU."""

    def halves(kernel: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
        a, b, c = jnp.split(kernel, 3, axis)
        return jnp.concatenate([a, b + c], axis), jnp.concatenate([a + b, c], axis)

    maps = [
        [
            lax.conv_general_dilated(
                x, part, (1, 1), ((1 - i, i), (1 - j, j)), dimension_numbers=LAYOUT
            )
            for j, part in enumerate(halves(rows, 1))
        ]
        for i, rows in enumerate(halves(kernel, 0))
    ]
    b, h, w, n = maps[0][0].shape
    rows = [jnp.stack(row, axis=3) for row in maps]
    return jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, n)


def upsample_first(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Stores the upsampled map and convolves it."""
    return lax.conv_general_dilated(
        unet.upsample(x), kernel, (1, 1), "SAME", dimension_numbers=LAYOUT
    )


def transposed(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves the map as one transposed 4×4 convolution of stride 2 (devices/winograd.py)."""
    for axis in (0, 1):
        a, b, c = jnp.split(kernel, 3, axis)
        kernel = jnp.concatenate([a, a + b, b + c, c], axis)
    pad = ((2, 2), (2, 2))
    return lax.conv_general_dilated(
        x, kernel, (1, 1), pad, lhs_dilation=(2, 2), dimension_numbers=LAYOUT
    )


def reshape_pool(x: jax.Array) -> jax.Array:
    """Pools by a maximum over two axes of a reshaped map, the form on a CPU or GPU."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))


def reduce_window(x: jax.Array) -> jax.Array:
    """Pools by a window reduction, the form on a TPU."""
    window = (1, 2, 2, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")


def strided_slices(x: jax.Array) -> jax.Array:
    """Pools by the maximum of four strided slices."""
    a, b, c, d = (x[:, i::2, j::2] for i in (0, 1) for j in (0, 1))
    return jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))


def repeat(x: jax.Array) -> jax.Array:
    """Upsamples by repeating rows and columns."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def products(images: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """Interpolates bilinearly by products with the weights of all rows and columns.

    One product per output row, since all weights at once would fill the memory.
    """
    height, width = images.shape[1:3]

    def weights(position: jax.Array, size: int) -> jax.Array:
        edge = position + 0.5
        folded = jnp.abs(edge - 2 * size * jnp.round(edge / (2 * size))) - 0.5
        folded = jnp.clip(folded, 0, size - 1)
        return jnp.maximum(1 - jnp.abs(folded[..., None] - jnp.arange(size)[None, None]), 0)

    def row(position: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows, columns = weights(position[0], height), weights(position[1], width)
        lines = jnp.einsum("bph,bhwc->bpwc", rows, images, precision=lax.Precision.HIGHEST)
        return jnp.einsum("bpw,bpwc->bpc", columns, lines, precision=lax.Precision.HIGHEST)

    return lax.map(row, (y.swapaxes(0, 1), x.swapaxes(0, 1))).swapaxes(0, 1)


def gathers(images: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """Interpolates bilinearly by four gathers (image_ops.py)."""
    return jax.vmap(image_ops.resample)(images, y, x)


def with_gradient(form: Form) -> Form:
    """Returns the form with its derivatives in direction of a cotangent, its last argument."""

    def both(*arguments: Any) -> Any:
        value, pull_back = jax.vjp(form, *arguments[:-1])
        return value, pull_back(arguments[-1])

    return both


# ---- the comparisons ----


def _shape(*sides: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sides, dtype)


def decoder(batch: int, side: int, channels: int, width: int, dtype: str) -> Comparison:
    """Compares the 3×3 convolution of an upsampled map."""
    forms = {
        "transposed 4×4": transposed,
        "four 2×2 convolutions": four_convolutions,
        "upsample + 3×3": upsample_first,
    }
    shapes = (
        _shape(batch, side, side, channels, dtype=dtype),
        _shape(3, 3, channels, width, dtype=dtype),
        _shape(batch, 2 * side, 2 * side, width, dtype=dtype),
    )
    title = f"decoder, {batch}×{side}²×{channels} → {width}, {dtype}, gradient"
    return Comparison(title, {name: with_gradient(form) for name, form in forms.items()}, shapes)


def pooling(batch: int, side: int, channels: int, dtype: str) -> Comparison:
    """Compares 2×2 pooling."""
    forms = {"reshape": reshape_pool, "reduce_window": reduce_window, "slices": strided_slices}
    shapes = [_shape(batch, n, n, channels, dtype=dtype) for n in (side, side // 2)]
    title = f"pooling, {batch}×{side}²×{channels}, {dtype}, gradient"
    return Comparison(
        title, {name: with_gradient(form) for name, form in forms.items()}, tuple(shapes)
    )


def upsampling(batch: int, side: int, channels: int, dtype: str) -> Comparison:
    """Compares nearest-neighbour upsampling."""
    forms = {"broadcast + reshape": unet.upsample, "repeat": repeat}
    shapes = [_shape(batch, n, n, channels, dtype=dtype) for n in (side, 2 * side)]
    title = f"upsampling, {batch}×{side}²×{channels}, {dtype}, gradient"
    return Comparison(
        title, {name: with_gradient(form) for name, form in forms.items()}, tuple(shapes)
    )


def resampling(batch: int, side: int) -> Comparison:
    """Compares bilinear interpolation at arbitrary positions."""
    position = _shape(batch, side, side)
    return Comparison(
        f"resample, {batch}×{side}²×3, float32",
        {"gathers": gathers, "products": products},
        (_shape(batch, side, side, 3), position, position),
        {"products": side},
    )


def precision(batch: int, side: int, channels: int) -> Comparison:
    """Compares the precisions of a float32 convolution."""

    def form(level: lax.Precision) -> Form:
        return lambda x, kernel: lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT, precision=level
        )

    levels = (lax.Precision.DEFAULT, lax.Precision.HIGH, lax.Precision.HIGHEST)
    return Comparison(
        f"float32 convolution 3×3, {batch}×{side}²×{channels}, gradient",
        {level.name.lower(): with_gradient(form(level)) for level in levels},
        (
            _shape(batch, side, side, channels),
            _shape(3, 3, channels, channels),
            _shape(batch, side, side, channels),
        ),
    )


def network(batch: int, dtype: str, size: int = 256) -> Comparison:
    """Compares the whole network in forms of the decoder's convolutions and of the pooling."""
    config = ModelConfig(dtype=dtype)
    decoders = {"transposed": transposed, "four": four_convolutions}
    pools = {"slices": strided_slices, "reduce_window": reduce_window, "reshape": reshape_pool}

    def form(decoder: str, pool: str) -> Form:
        def loss(variables: Any, x: jax.Array) -> jax.Array:
            with (
                mock.patch.object(winograd, "convolve_upsampled", decoders[decoder]),
                mock.patch.object(unet, "max_pool", pools[pool]),
            ):
                output: Any = unet.UNet(config).apply(variables, x)
                return jnp.mean(output**2)

        return jax.value_and_grad(loss)

    x = _shape(batch, size, size, 3)
    variables = jax.eval_shape(unet.UNet(config).init, jax.eval_shape(jax.random.key, 0), x)
    pairs = [(decoder, pool) for decoder in decoders for pool in pools]
    return Comparison(
        f"network, {batch}×{size}², {dtype}, gradient: decoder, pooling",
        {", ".join(pair): form(*pair) for pair in pairs},
        (variables, x),
    )


def members(count: int, side: int, batch: int, widths: tuple[int, ...], device: Any) -> Comparison:
    """Compares how the members of a population on one device are computed."""
    mesh = sharding.ordered_mesh((1,), (sharding.MEMBER,), [device])

    def form(mapping: str) -> Form:
        config = from_config_dict(
            {
                "data": {"size": side, "texture_size": side},
                "model": {"widths": widths, "branch_width": widths[0]},
                "train": {"batch_size": batch},
                "population": {"mapping": mapping},
            }
        )
        return population.make_call(config, mesh, steps=1)

    config = from_config_dict({"model": {"widths": widths, "branch_width": widths[0]}})
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key: train_step.init_state(config, key), key)
    pixels = _shape(1, batch, side, side, 3, dtype=jnp.uint8)
    values = jax.tree.map(jnp.asarray, population.traced_values(config))
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype),
        (state, {}, {"image": pixels, "texture": pixels}, key, values),
    )
    return Comparison(
        f"training step of {count} members, {batch}×{side}², widths {widths}",
        {mapping: form(mapping) for mapping in ("vmap", "map", "unroll")},
        arguments,
        {"map": count},
    )


def comparisons(device: Any) -> dict[str, list[Callable[[], Comparison]]]:
    """Returns the comparisons by name, at the shapes of the shipped configs."""
    shapes = ((128, 128, 64), (64, 256, 128), (32, 256, 256))
    return {
        "decoder": [
            *(lambda s=s: decoder(4, *s, dtype="bfloat16") for s in shapes),
            lambda: decoder(8, *shapes[0], dtype="float32"),
        ],
        "pooling": [
            lambda: pooling(4, 256, 64, dtype="bfloat16"),
            lambda: pooling(8, 256, 64, dtype="float32"),
        ],
        "upsampling": [lambda: upsampling(4, 128, 128, dtype="bfloat16")],
        "resample": [lambda: resampling(4, 256)],
        "network": [lambda: network(4, "bfloat16"), lambda: network(8, "float32")],
        "precision": [lambda: precision(8, 64, 128)],
        "population": [lambda: members(4, 64, 8, (16, 32, 64), device)],
    }


# ---- the figures ----


def figures(
    form: Form, arguments: tuple[Any, ...], device: Any, loops: int, counted: Form
) -> Figures:
    """Compiles a form for a device, which need not exist, and reads its figures.

    Args:
      form: the form.
      arguments: the shapes of its arguments.
      device: the device.
      loops: how often the body of its loop runs.
      counted: the same form for a CPU, by which the operations are counted if the compiler does
        not count them.
    """
    placement = SingleDeviceSharding(device)
    lowered = jax.jit(form, in_shardings=placement).lower(*arguments)
    compiled: Any = lowered.compile()
    work = compiled.cost_analysis() or {}
    flops, size, cycles, milliseconds = work.get("flops"), work.get("bytes accessed"), None, None
    if device.platform == "gpu":
        # XLA's compiler for GPUs counts nothing without a device. The operations are counted
        # before compilation, the bytes in the compiled program.
        cpu = SingleDeviceSharding(jax.devices("cpu")[0])
        uncompiled = jax.jit(counted, in_shardings=cpu).lower(*arguments)
        flops = (uncompiled.cost_analysis() or {}).get("flops")
        size = _bytes_of_module(compiled)
    elif device.platform == "tpu":
        found = re.findall(r'"estimated_cycles":"(\d+)"', compiled.as_text())
        cycles = loops * sum(map(int, found)) / 1e6
    else:
        milliseconds = 1e3 * _shortest_time(compiled, arguments)
    scale = loops / 1e9
    return Figures(
        None if flops is None else flops * scale,
        None if size is None else size * scale,
        compiled.memory_analysis().temp_size_in_bytes / 2**20,
        cycles,
        milliseconds,
    )


def _bytes_of_module(compiled: Any) -> float:
    from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]  # not public

    (module,) = compiled.runtime_executable().hlo_modules()
    client, text = jax.devices("cpu")[0].client, compiled.as_text()
    # XLA does not count the custom calls, which are the convolutions and products of libraries.
    sizes = {
        name: hlo.byte_size(re.sub(r"\{[^{}]*\}", "", shape))
        for name, shape in re.findall(r"^\s*(?:ROOT )?(%\S+) = (.+?) [\w-]+\(", text, re.M)
    }
    calls = re.findall(r"^\s*(?:ROOT )?(%\S+) = .+? custom-call\((.*?)\),", text, re.M)
    library = sum(
        sizes[result] + sum(sizes[name] for name in re.findall(r"%[^\s,()]+", operands))
        for result, operands in calls
    )
    return _jax.hlo_module_cost_analysis(client, module)["bytes accessed"] + library


def _shortest_time(program: Any, arguments: tuple[Any, ...]) -> float:
    def values(x: jax.ShapeDtypeStruct) -> jax.Array:
        # The positions of `resample` are spread over the image; other values do not matter.
        return (200 * jax.random.uniform(jax.random.key(0), x.shape)).astype(x.dtype)

    drawn = jax.tree.map(values, arguments)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(program(*drawn))
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="cpu", help=f"cpu, or {topology.EXAMPLES}")
    parser.add_argument("--only", nargs="+", metavar="PART")
    options = parser.parse_args()
    if options.topology == "cpu":
        device = jax.devices("cpu")[0]
    else:
        topology.start()
        device = topology.devices(options.topology)[0]
    print(f"{device.device_kind}; {provenance.line('jax', 'jaxlib', 'libtpu')}")
    columns = ("GFLOP", "GB", "MiB", "Mcycles", "ms")
    print("".join([f"{'':26s}", *(f"{name:>10s}" for name in columns)]))
    with hardware.building_for(device.platform):
        on_cpu = comparisons(jax.devices("cpu")[0])
        for name, parts in comparisons(device).items():
            if options.only and name not in options.only:
                continue
            for part, counted in zip(parts, on_cpu[name], strict=True):
                comparison, counted_forms = part(), counted().forms
                print(comparison.title, flush=True)
                for form_name, form in comparison.forms.items():
                    loops = comparison.loops.get(form_name, 1)
                    row = figures(
                        form, comparison.arguments, device, loops, counted_forms[form_name]
                    )
                    cells = ["-" if x is None else f"{x:.2f}" for x in row]
                    print(
                        "".join([f"  {form_name:24s}", *(f"{cell:>10s}" for cell in cells)]),
                        flush=True,
                    )


if __name__ == "__main__":
    main()
