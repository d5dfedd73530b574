"""3×3 convolutions in the form that is fast on the platform.

On a GPU or TPU they are XLA's convolutions; docs/gpu.md compares those of an upsampled map. On a
CPU XLA has a fast matrix product but slow convolutions, above all the gradient with respect to the
kernel. There the same values, up to rounding, come from matrix products of (pixels, channels) by
(channels, channels), between sums of neighbouring pixels: F(2×2, 3×3) of Lavin & Gray 2015
(arXiv 1509.09308), §4.1. It needs fewer multiplications. It is written in plain operations, so JAX
differentiates it in both modes and nested. benchmarks/step.py measures it.

Maps are (b, h, w, channels), kernels (3, 3, input channels, output channels). Zeros lie beyond the
borders, so maps keep their size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pae_jax.devices import hardware

Matrix = Sequence[Sequence[int | float]]


class Bilinear(NamedTuple):
    """A bilinear algorithm for two outputs along an axis.

    The outputs are output_transform @ ((input_transform @ d) · (kernel_transform @ k)), where d are
    the inputs of a window and k the three values of the kernel.

    Attributes:
      input_transform: one row per product, one column per input; entries are 0, 1 or −1.
      kernel_transform: one row per product, three columns.
      output_transform: two rows, one column per product; entries are 0, 1 or −1.
      step: the distance of two windows in pixels; a window begins one pixel before its step.
    """

    input_transform: Matrix
    kernel_transform: Matrix
    output_transform: Matrix
    step: int


# Four products instead of six for the outputs at two neighbouring pixels, from four inputs.
WINOGRAD = Bilinear(
    input_transform=((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    kernel_transform=((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1)),
    output_transform=((1, 1, 1, 0), (0, 1, -1, -1)),
    step=2,
)
# Three products for the two outputs of one upsampled pixel, from it and its two neighbours.
UPSAMPLED = Bilinear(
    input_transform=((1, -1, 0), (0, 1, 0), (0, -1, 1)),
    kernel_transform=((1, 0, 0), (1, 1, 1), (0, 0, 1)),
    output_transform=((1, 1, 0), (0, 1, 1)),
    step=1,
)
NARROW = 24  # with fewer channels XLA's convolutions are as fast and compile sooner


def convolve(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c n"]
) -> Float[Array, "b h w n"]:
    """Returns the 3×3 convolution of x."""
    even = x.shape[1] % 2 == 0 and x.shape[2] % 2 == 0
    if even and _products_pay(kernel):
        return _apply_bilinear(x, kernel, WINOGRAD)
    return _correlate(x, kernel, ((1, 1), (1, 1)))


def convolve_upsampled(
    x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c n"]
) -> Float[Array, "b 2*h 2*w n"]:
    """Returns the 3×3 convolution of x after nearest-neighbour upsampling by two.

    The upsampled map is never stored.
    """
    if _products_pay(kernel):
        return _apply_bilinear(x, kernel, UPSAMPLED)
    if hardware.use_transposed_convolution():
        return _convolve_transposed(x, kernel)

    # Along an axis the kernel (a, b, c) at an even position meets the previous pixel once and its
    # own pixel twice: (a, b + c). At an odd position it meets its own pixel twice and the next one
    # once: (a + b, c). Four 2×2 convolutions of x therefore need 4/9 of the multiplications.
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


def _convolve_transposed(x: Array, kernel: Array) -> Array:
    """Returns the convolution of the upsampled map as one transposed convolution of stride 2.

    Its kernel is that of the 3×3 convolution of a 2×2 block: (a, a + b, b + c, c) along an axis.
    It needs the multiplications of the four 2×2 convolutions without storing four maps.
    """
    for axis in (0, 1):
        a, b, c = jnp.split(kernel, 3, axis)
        kernel = jnp.concatenate([a, a + b, b + c, c], axis)
    return _correlate(x, kernel, ((2, 2), (2, 2)), upsampling=2)


def _products_pay(kernel: Array) -> bool:
    """Returns whether the bilinear algorithms are faster than XLA's convolutions."""
    # With few channels the sums cost more than the products they save. In bfloat16 they would
    # lose another bit.
    wide = min(kernel.shape[2:]) >= NARROW
    return hardware.use_winograd() and wide and kernel.dtype == jnp.float32


def _correlate(
    x: Array, kernel: Array, padding: Sequence[tuple[int, int]], upsampling: int = 1
) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        padding,
        lhs_dilation=(upsampling, upsampling),  # zeros between the pixels
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _apply_bilinear(x: Array, kernel: Array, algorithm: Bilinear) -> Array:
    """Applies one bilinear algorithm along both axes."""
    taps = jnp.asarray(algorithm.kernel_transform, kernel.dtype)
    kernels = jnp.einsum("iy,jx,yxcn->ijcn", taps, taps, kernel)
    step, length = algorithm.step, len(algorithm.input_transform[0])
    b, h, w, channels = x.shape
    count = h // step, w // step  # windows along each axis
    x = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    x = x.reshape(b, (h + 2) // step, step, (w + 2) // step, step, channels)

    def inputs(x: Array, axis: int, windows: int) -> list[Array]:
        """Returns the inputs of all windows along `axis`; axis + 1 is the position in a step."""
        index: list[slice | int] = [slice(None)] * x.ndim
        parts = []
        for i in range(length):
            index[axis], index[axis + 1] = slice(i // step, i // step + windows), i % step
            parts.append(x[tuple(index)])
        return parts

    products = []
    for i, rows in enumerate(_combine(algorithm.input_transform, inputs(x, 1, count[0]))):
        windows = _combine(algorithm.input_transform, inputs(rows, 2, count[1]))
        products.append(
            [
                (window.reshape(-1, channels) @ kernels[i, j]).reshape(b, *count, -1)
                for j, window in enumerate(windows)
            ]
        )
    rows = [_combine(algorithm.output_transform, row) for row in products]
    columns = [_combine(algorithm.output_transform, column) for column in zip(*rows, strict=True)]
    return _interleave(list(zip(*columns, strict=True)))


def _combine(matrix: Matrix, parts: Sequence[Array]) -> list[Array]:
    """Returns matrix @ parts by additions and subtractions alone.

    Raises:
      ValueError: a row has an entry other than 0, 1 or −1, or no entry but 0.
    """

    def total(row: Sequence[int | float]) -> Array:
        if not set(row) <= {-1, 0, 1} or not any(row):
            raise ValueError(f"a row of 0, 1 and -1, not all 0, is needed, not {row}")
        terms = [(part, sign) for part, sign in zip(parts, row, strict=True) if sign]
        value = terms[0][0] if terms[0][1] == 1 else -terms[0][0]
        for part, sign in terms[1:]:
            value = value + part if sign == 1 else value - part
        return value

    return [total(row) for row in matrix]


def _interleave(parts: Sequence[Sequence[Array]]) -> Array:
    """Joins four maps (b, h, w, n) into one (b, 2h, 2w, n).

    `parts[i][j]` holds the pixels at rows 2k + i and columns 2l + j.
    """
    b, h, w, n = parts[0][0].shape
    rows = [jnp.stack(row, axis=3) for row in parts]
    return jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, n)
