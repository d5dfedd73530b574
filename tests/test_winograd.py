"""pae_jax.devices.winograd against float64 and linen, in both of its forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from pae_jax.devices import hardware, winograd
from pae_jax.unet import Convolution3x3, upsample

WIDTH = winograd.NARROW  # wide enough for products


def arrays(*shapes):
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


def plain(x, kernel):
    """Sums over the kernel's nine positions in float64."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    _, height, width, _ = x.shape
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(
        x[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3)
    )


@pytest.fixture(params=[True, False], ids=["products", "convolutions"])
def form(request):
    with hardware.building_for("cpu" if request.param else "gpu"):
        yield request.param


@pytest.mark.parametrize("size", [(2, 2), (6, 4), (5, 4), (1, 1)])
@pytest.mark.parametrize("width", [3, WIDTH])
def test_against_float64(form, size, width):
    x, kernel = arrays((2, *size, width), (3, 3, width, WIDTH + 1))
    scale = np.sqrt(9 * width)
    np.testing.assert_allclose(
        winograd.convolve(x, kernel), plain(x, kernel), atol=3e-6 * scale, rtol=0
    )
    np.testing.assert_allclose(
        winograd.convolve_upsampled(x, kernel),
        plain(upsample(x), kernel),
        atol=3e-6 * scale,
        rtol=0,
    )


def test_products_replace_convolutions(form):
    x, kernel = arrays((1, 4, 4, WIDTH), (3, 3, WIDTH, WIDTH))
    for function in (winograd.convolve, winograd.convolve_upsampled):
        # A new function each time, because JAX keeps the trace of a function.
        text = str(jax.make_jaxpr(lambda x, k, f=function: f(x, k))(x, kernel))
        assert ("conv_general_dilated" in text) != form
    low = kernel.astype(jnp.bfloat16)
    text = str(jax.make_jaxpr(winograd.convolve)(x.astype(jnp.bfloat16), low))
    assert "conv_general_dilated" in text  # the sums would cost precision


def test_derivatives_are_those_of_a_convolution():
    """Checks vjp, jvp, and the gradient of a jvp, which the Jacobian penalty needs."""
    x, kernel, v = arrays((1, 4, 6, WIDTH), (3, 3, WIDTH, WIDTH), (1, 4, 6, WIDTH))

    def reference(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)

    def measures(function):
        def nonlinear(x, kernel):
            return jnp.tanh(function(x, kernel) / 20)

        def penalty(kernel):
            return jnp.sum(jax.jvp(lambda x: nonlinear(x, kernel), (x,), (v,))[1] ** 2)

        y, back = jax.vjp(nonlinear, x, kernel)
        return *back(y), penalty(kernel), jax.grad(penalty)(kernel)

    for ours, theirs in zip(
        jax.jit(lambda: measures(winograd.convolve))(),
        jax.jit(lambda: measures(reference))(),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * float(jnp.abs(theirs).max()), rtol=0)


@pytest.mark.parametrize("width", [4, WIDTH])
def test_the_module_agrees_with_linen(form, width):
    """Parameters and values agree; the decoder's concatenation is never stored."""
    coarse, fine = arrays((2, 5, 3, width), (2, 10, 6, 2))
    joined = jnp.concatenate([upsample(coarse), fine], -1)
    theirs = nn.Conv(WIDTH, (3, 3), kernel_init=nn.initializers.he_normal())
    ours = Convolution3x3(WIDTH)
    variables = theirs.init(jax.random.key(0), joined)
    jax.tree.map(
        np.testing.assert_array_equal, variables, ours.init(jax.random.key(0), fine, coarse)
    )
    np.testing.assert_allclose(
        ours.apply(variables, fine, coarse), theirs.apply(variables, joined), atol=1e-5
    )


@pytest.mark.parametrize("row", [(0.5, 1, 0), (2, 0, 1), (0, 0, 0)])
def test_a_transform_of_other_factors_is_refused(row):
    """Only additions and subtractions are written out, so another factor would be lost."""
    algorithm = winograd.UPSAMPLED._replace(input_transform=(row, (0, 1, 0), (0, -1, 1)))
    x, kernel = arrays((1, 2, 2, WIDTH), (3, 3, WIDTH, WIDTH))
    with pytest.raises(ValueError, match="a row of 0, 1 and -1"):
        winograd._apply_bilinear(x, kernel, algorithm)
