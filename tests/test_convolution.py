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
    """Σ over the taps in float64."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    _, height, width, _ = x.shape
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(
        x[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3)
    )


@pytest.fixture(params=[True, False], ids=["products", "convolutions"])
def form(request, monkeypatch):
    monkeypatch.setattr(hardware, "prefers_products", lambda: request.param)
    return request.param


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


def test_products_take_the_place_of_convolutions(form):
    x, kernel = arrays((1, 4, 4, WIDTH), (3, 3, WIDTH, WIDTH))
    for function in (winograd.convolve, winograd.convolve_upsampled):
        # A function of its own: what was traced is kept by the function.
        text = str(jax.make_jaxpr(lambda x, k, f=function: f(x, k))(x, kernel))
        assert ("conv_general_dilated" in text) != form
    low = kernel.astype(jnp.bfloat16)
    text = str(jax.make_jaxpr(winograd.convolve)(x.astype(jnp.bfloat16), low))
    assert "conv_general_dilated" in text  # the sums would cost precision


def test_derivatives_are_those_of_a_convolution():
    """Forwards, backwards, and backwards through forwards as the Jacobian penalty needs it."""
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
def test_a_module_is_linens(form, width):
    """Its parameters too; and the decoder's input is joined without being laid out."""
    below, beside = arrays((2, 5, 3, width), (2, 10, 6, 2))
    joined = jnp.concatenate([upsample(below), beside], -1)
    theirs = nn.Conv(WIDTH, (3, 3), kernel_init=nn.initializers.he_normal())
    ours = Convolution3x3(WIDTH)
    variables = theirs.init(jax.random.key(0), joined)
    jax.tree.map(
        np.testing.assert_array_equal, variables, ours.init(jax.random.key(0), beside, below)
    )
    np.testing.assert_allclose(
        ours.apply(variables, beside, below), theirs.apply(variables, joined), atol=1e-5
    )
