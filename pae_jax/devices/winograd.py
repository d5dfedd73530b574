"""3×3 convolutions, in the form that the machine is fast at.

An accelerator has convolutions of its own. On a CPU XLA has a fast matrix product and slow
convolutions, above all the gradient of their kernel; there the same values, up to rounding, come
from fewer multiplications, as matrix products of (pixels, channels) by (channels, channels)
between sums of neighbours: F(2×2, 3×3) of Lavin & Gray 2015 (arXiv 1509.09308), §4.1. It is
written in plain operations, so XLA derives it forwards, backwards and both nested, and nothing
else knows of it. benchmarks/step.py measures.

Maps are (b, h, w, channels), kernels (3, 3, channels in, channels out); zeros lie beyond the
borders, so that maps keep their size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pae_jax.devices import hardware

Matrix = Sequence[Sequence[int | float]]


class Bilinear(NamedTuple):
    """An algorithm for two outputs along an axis: output @ ((inner @ d) · (taps @ k)).

    d are the inputs from the one before a window on, k the three taps; a window is `step` pixels.
    """

    input_transform: Matrix
    kernel_transform: Matrix
    output_transform: Matrix
    step: int


# Four products instead of six for the outputs at a pair of pixels, from the four around it.
WINOGRAD = Bilinear(
    input_transform=((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    kernel_transform=((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1)),
    output_transform=((1, 1, 1, 0), (0, 1, -1, -1)),
    step=2,
)
# Three for the two outputs that a pixel becomes by upsampling, from it and its neighbours.
UPSAMPLED = Bilinear(
    input_transform=((1, -1, 0), (0, 1, 0), (0, -1, 1)),
    kernel_transform=((1, 0, 0), (1, 1, 1), (0, 0, 1)),
    output_transform=((1, 1, 0), (0, 1, 1)),
    step=1,
)
NARROW = 24  # channels below which XLA's convolutions are as fast, and sooner compiled


def convolve(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c n"]
) -> Float[Array, "b h w n"]:
    """The 3×3 convolution of x."""
    if x.shape[1] % 2 or x.shape[2] % 2 or not _by_products_pays(kernel):
        return _correlate(x, kernel, ((1, 1), (1, 1)))
    return _by_products(x, kernel, WINOGRAD)


def convolve_upsampled(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c n"]
) -> Float[Array, "b 2*h 2*w n"]:
    """The 3×3 convolution of x after nearest-neighbour upsampling by two.

    Along an axis the taps a, b, c of an even position fall on the pixels before, here and here,
    those of an odd one on here, here and after: two taps, a and b + c or a + b and c. Thus 4/9
    of the multiplications, as four 2×2 convolutions of x; or a quarter of them, by products.
    """
    if _by_products_pays(kernel):
        return _by_products(x, kernel, UPSAMPLED)

    def halves(kernel: Array, axis: int) -> tuple[Array, Array]:
        a, b, c = jnp.split(kernel, 3, axis)
        return jnp.concatenate([a, b + c], axis), jnp.concatenate([a + b, c], axis)

    return _interleave(
        [
            [
                _correlate(x, part, ((1 - i, i), (1 - j, j)))
                for j, part in enumerate(halves(rows, 1))
            ]
            for i, rows in enumerate(halves(kernel, 0))
        ]
    )


def _by_products_pays(kernel: Array) -> bool:
    """With few channels a product costs less than the sums around it.

    In bfloat16 the sums would lose another bit.
    """
    wide = min(kernel.shape[2:]) >= NARROW
    return hardware.use_winograd() and wide and kernel.dtype == jnp.float32


def _correlate(x: Array, kernel: Array, padding: Sequence[tuple[int, int]]) -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=layout)


def _by_products(x: Array, kernel: Array, algorithm: Bilinear) -> Array:
    """One bilinear algorithm along both axes."""
    taps = jnp.asarray(algorithm.kernel_transform, kernel.dtype)
    kernels = jnp.einsum("iy,jx,yxcn->ijcn", taps, taps, kernel)
    inner, output, step = algorithm.input_transform, algorithm.output_transform, algorithm.step
    reach, (b, h, w, channels) = len(inner[0]), x.shape
    count = h // step, w // step  # windows
    x = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    x = x.reshape(b, (h + 2) // step, step, (w + 2) // step, step, channels)

    def inputs(x: Array, axis: int, windows: int) -> list[Array]:
        """The inputs d₋₁, d₀, … of all windows along `axis`, behind which lies their phase."""
        index: list[slice | int] = [slice(None)] * x.ndim
        found = []
        for i in range(reach):
            index[axis], index[axis + 1] = slice(i // step, i // step + windows), i % step
            found.append(x[tuple(index)])
        return found

    products = []
    for i, rows in enumerate(_combine(inner, inputs(x, 1, count[0]))):
        windows = _combine(inner, inputs(rows, 2, count[1]))
        products.append(
            [
                (window.reshape(-1, channels) @ kernels[i, j]).reshape(b, *count, -1)
                for j, window in enumerate(windows)
            ]
        )
    rows = [_combine(output, row) for row in products]
    columns = [_combine(output, column) for column in zip(*rows, strict=True)]
    return _interleave(list(zip(*columns, strict=True)))


def _combine(matrix: Matrix, parts: Sequence[Array]) -> list[Array]:
    """The sums that the rows of `matrix` ask for, without its zeros."""

    def total(row: Sequence[int | float]) -> Array:
        terms = [(part, factor) for part, factor in zip(parts, row, strict=True) if factor]
        value = terms[0][0] if terms[0][1] == 1 else -terms[0][0]
        for part, factor in terms[1:]:
            value = value + part if factor == 1 else value - part
        return value

    return [total(row) for row in matrix]


def _interleave(parts: Sequence[Sequence[Array]]) -> Array:
    """parts[i][j] (b, h, w, n): the pixels at odd or even rows (i) and columns (j) of one map."""
    b, h, w, n = parts[0][0].shape
    rows = [jnp.stack(row, axis=3) for row in parts]
    return jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, n)
