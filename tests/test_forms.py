"""benchmarks/forms.py: equal forms of the network's parts give equal values and derivatives."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pae_jax import unet
from pae_jax.devices import hardware, winograd

_path = Path(__file__).parents[1] / "benchmarks" / "forms.py"
_spec = importlib.util.spec_from_file_location("forms", _path)
assert _spec is not None and _spec.loader is not None
forms = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(forms)


def values(shapes):
    """Returns random arguments; positions of `resample` reach beyond the image."""

    def value(i, shape):
        key = jax.random.fold_in(jax.random.key(0), i)
        if shape.dtype == jnp.uint8:
            return jax.random.randint(key, shape.shape, 0, 256).astype(jnp.uint8)
        return jax.random.normal(key, shape.shape, shape.dtype)

    leaves, tree = jax.tree.flatten(shapes)
    return tree.unflatten([value(i, leaf) for i, leaf in enumerate(leaves)])


@pytest.mark.parametrize(
    "comparison",
    [
        forms.decoder(2, 6, 5, 7, dtype="float32"),
        forms.pooling(2, 8, 3, dtype="float32"),
        forms.upsampling(2, 4, 3, dtype="float32"),
        forms.resampling(2, 9),
        forms.precision(1, 4, 3),
    ],
    ids=lambda comparison: comparison.title.split(",")[0],
)
def test_forms_are_equal(comparison):
    arguments = values(comparison.arguments)
    if comparison.title.startswith("resample"):
        arguments = arguments[0], 12 * arguments[1], 12 * arguments[2]
    first, *others = (jax.jit(form)(*arguments) for form in comparison.forms.values())
    assert others
    for other in others:
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(a).max()))


def test_the_platform_selects_the_form():
    x, kernel, _ = forms.decoder(1, 4, 3, 3, dtype="float32").arguments

    def text(function, *arguments):
        # A new function each time, because JAX keeps the trace of a function.
        return str(jax.make_jaxpr(lambda *args, f=function: f(*args))(*arguments))

    for platform, convolutions in (("cpu", 4), ("gpu", 1), ("tpu", 4)):
        with hardware.building_for(platform):
            upsampled = text(winograd.convolve_upsampled, x, kernel)
            assert upsampled.count("conv_general_dilated[") == convolutions
            assert ("lhs_dilation=(2, 2)" in upsampled) == (platform == "gpu")
            assert ("reduce_window" in text(unet.max_pool, x)) == (platform == "tpu")


def test_figures_on_this_cpu():
    comparison = forms.upsampling(1, 4, 2, dtype="float32")
    device = jax.devices()[0]
    for form in comparison.forms.values():
        figures = forms.figures(form, comparison.arguments, device, 1, form)
        assert figures.milliseconds > 0
        assert figures.gigabytes > 0


def test_derivatives_of_both_poolings_are_equal():
    """Checks jvp, and the gradient of a jvp, which the Jacobian penalty needs."""
    x, v = values(2 * (jax.ShapeDtypeStruct((2, 6, 4, 3), jnp.float32),))

    def penalties(pool):
        def penalty(x):
            return jnp.sum(jax.jvp(lambda x: jnp.tanh(pool(x) * pool(x)), (x,), (v,))[1] ** 2)

        return jax.value_and_grad(penalty)(x), jax.vmap(penalty)(x[None])

    def window_pool(x):
        with hardware.building_for("tpu"):
            return unet.max_pool(x)

    first, second = penalties(unet.max_pool), penalties(window_pool)
    assert float(first[0][0]) > 0
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
