"""pae_jax.unet: shapes, ranges, initial values, and its building blocks against references."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from data_pipelines.errors import BadInput
from pae_jax.config import ModelConfig, from_config_dict
from pae_jax.devices import hardware
from pae_jax.image_ops import depth_to_space, pad_to_multiple, space_to_depth
from pae_jax.unet import (
    EDGE,
    OUTPUTS,
    GroupNorm,
    UNet,
    bind,
    max_pool,
    parameter_count,
    upsample,
)

TINY = ModelConfig(
    widths=(4, 8), branch_width=4, dilation_rates=(1, 2), dilated_kernel_size=3, bottleneck_layers=1
)


def build(config, shape=(2, 16, 16, 3)):
    x = jax.random.uniform(jax.random.key(1), shape)
    net = UNet(config)
    return net, net.init(jax.random.key(0), x), x


@pytest.mark.parametrize("skip", ["concatenate", "convex", "none"])
@pytest.mark.parametrize("norm", ["group", "none"])
def test_shape_range_and_purity(skip, norm):
    net, variables, x = build(dataclasses.replace(TINY, skip=skip, norm=norm))
    assert set(variables) == {"params"}  # nothing but parameters
    y = jax.jit(net.apply)(variables, x)
    assert y.shape == x.shape and y.dtype == jnp.float32
    assert float(y.min()) > 0 and float(y.max()) < 1
    # Without skips the output still depends on the input, through the bottleneck.
    assert float(jnp.abs(y - net.apply(variables, 1 - x)).max()) > 1e-4


@pytest.mark.parametrize("output", ["sigmoid", "residual_logit"])
def test_grey_images_stay_grey(output):
    net, variables, x = build(dataclasses.replace(TINY, grey=True, output=output))
    # The last layer of a residual output starts at zero.
    variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)
    grey = jnp.broadcast_to(x[..., :1], x.shape)
    y = net.apply(variables, grey)
    assert y.shape == x.shape and float(jnp.abs(y - grey).max()) > 1e-3
    # One logit serves three channels; vector and scalar code may round its sigmoid differently.
    np.testing.assert_allclose(y, jnp.broadcast_to(y[..., :1], y.shape), rtol=2.5e-7)


def test_a_high_pass_input_hides_slow_changes():
    """f is blind to a constant and to a slow wave; in float32 up to rounding."""
    config = dataclasses.replace(TINY, input="high_pass")
    net, variables, x = build(config, (2, 64, 64, 3))
    x = 0.25 + x / 2
    # A cosine about the middles of the border pixels continues smoothly by reflection.
    wave = 0.2 * jnp.cos(2 * jnp.pi * (jnp.arange(64) + 0.5) / 64)[None, :, None, None]
    first = net.apply(variables, x)
    np.testing.assert_allclose(net.apply(variables, x + 0.2), first, atol=1e-5)
    detail = 0.2 * jnp.sin(2 * jnp.pi * jnp.arange(64) / 4)[None, :, None, None]
    slow, fast = (jnp.abs(net.apply(variables, x + v) - first).mean() for v in (wave, detail))
    assert float(slow) < 0.1 * float(fast)


@pytest.mark.parametrize("size", [(1, 1), (7, 30), (5, 4), (17, 16)])
def test_any_size(size):
    net, variables, _ = build(TINY)
    x = jax.random.uniform(jax.random.key(2), (1, *size, 3))
    y = jax.jit(net.apply)(variables, x)
    assert y.shape == x.shape and bool(jnp.isfinite(y).all())


def test_padding_is_symmetric_reflection():
    x = jnp.arange(15.0).reshape(1, 3, 5, 1)
    expected = np.pad(np.asarray(x), ((0, 0), (0, 1), (0, 3), (0, 0)), mode="symmetric")
    np.testing.assert_array_equal(pad_to_multiple(x, 4), expected)
    assert pad_to_multiple(x[:, :, :4], 1) is not None


def test_pool_and_upsample_against_numpy():
    x = np.asarray(jax.random.normal(jax.random.key(0), (2, 6, 4, 3)))
    blocks = np.stack([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)])
    np.testing.assert_array_equal(max_pool(jnp.asarray(x)), blocks.max(0))
    np.testing.assert_array_equal(upsample(jnp.asarray(x)), x.repeat(2, axis=1).repeat(2, axis=2))


def with_extremes(x):
    """Returns images of which a third of the values are 0 or 1."""
    chosen = jax.random.uniform(jax.random.key(9), x.shape)
    return jnp.where(chosen < 1 / 6, 0.0, jnp.where(chosen > 5 / 6, 1.0, x))


def test_a_residual_output_starts_as_the_identity():
    net, variables, x = build(dataclasses.replace(TINY, output="residual_logit"))
    x = with_extremes(x)
    tangent = jax.random.normal(jax.random.key(3), x.shape)
    value, product = jax.jvp(lambda z: net.apply(variables, z), (x,), (tangent,))
    np.testing.assert_array_equal(value, x)
    np.testing.assert_array_equal(product, tangent)


def residual_logit(y, x):
    """Applies the output layer to arrays of two axes."""
    return OUTPUTS["residual_logit"](*(jnp.asarray(a)[None, ..., None] for a in (y, x)))[0, ..., 0]


def scaled_logit(y, x):
    """Returns (σ(y + logit s) − e) / (1 − 2e) with s = e + (1 − 2e)x, in numpy."""
    s = EDGE + (1 - 2 * EDGE) * x
    return (1 / (1 + np.exp(-y - np.log(s / (1 - s)))) - EDGE) / (1 - 2 * EDGE)


def test_a_residual_output_has_its_derivative_everywhere(float64):
    """Against finite differences of the formula, at 0, 1 and between."""
    values, h = np.array([0.0, 1e-4, 0.25, 0.5, 1 - 1e-4, 1.0]), 1e-6
    y, x = np.meshgrid([-6.0, -1.0, 0.0, 0.5, 4.0], values)
    value, dx = jax.jvp(lambda z: residual_logit(y, z), (x,), (np.ones_like(x),))
    dy = jax.jvp(lambda z: residual_logit(z, x), (y,), (np.ones_like(y),))[1]
    np.testing.assert_allclose(value, scaled_logit(y, x), atol=1e-13)
    expected = (scaled_logit(y, x + h) - scaled_logit(y, x - h)) / (2 * h)
    np.testing.assert_allclose(dx, expected, rtol=1e-5)
    np.testing.assert_array_equal(dx[y == 0], 1)
    h = 1e-4  # of y, whose curvature is smaller
    expected = (scaled_logit(y + h, x) - scaled_logit(y - h, x)) / (2 * h)
    np.testing.assert_allclose(dy, expected, rtol=1e-6)
    assert dy.min() > 0


def test_a_residual_output_is_exact_in_float32():
    """Near 0 and 1 as well, and for corrections of a whole image; with a bounded range."""
    x = np.linspace(0, 1, 256, dtype=np.float32)
    y, x = np.meshgrid(np.linspace(-14, 14, 57, dtype=np.float32), x)
    value = residual_logit(y, x)
    exact = scaled_logit(y.astype(float), x.astype(float))
    np.testing.assert_allclose(value, exact, atol=4e-7)
    for extreme in (-1e4, 1e4):
        bound = (np.sign(extreme) * (0.5 + EDGE / (1 - 2 * EDGE))) + 0.5
        value = residual_logit(np.full_like(x, extreme), x)
        np.testing.assert_allclose(value, bound, atol=4e-7)


def test_a_residual_output_of_any_value_is_finite():
    """Noise and iterates leave [0, 1]; gradients have no NaN there either."""
    x = np.array([-3.0, -0.1, -EDGE, -0.001, 1.001, 1 + EDGE, 1.2, 4.0], np.float32)
    y, x = np.meshgrid(np.array([-200.0, -20.0, -1.0, 0.0, 1.0, 20.0, 200.0], np.float32), x)
    np.testing.assert_array_equal(residual_logit(jnp.zeros_like(x), x), x)
    for argument in (0, 1):
        gradient = jax.grad(lambda *a: residual_logit(*a).sum(), argnums=argument)(y, x)
        assert np.isfinite(gradient).all()
    # Repeated application at the end of the range stays there.
    z = jnp.zeros((1, 1))
    for _ in range(50):
        z = residual_logit(jnp.full((1, 1), -1e3), z)
    np.testing.assert_allclose(z, -EDGE / (1 - 2 * EDGE), atol=0.007)


def test_patches_keep_size_and_position():
    x = jax.random.uniform(jax.random.key(0), (2, 6, 4, 3))
    blocks = space_to_depth(x, 2)
    np.testing.assert_array_equal(blocks[:, 1, 0].reshape(2, 2, 2, 3), x[:, 2:4, 0:2])
    np.testing.assert_array_equal(depth_to_space(blocks, 2), x)
    net, variables, x = build(dataclasses.replace(TINY, patch_size=2), (1, 18, 13, 3))
    assert jax.jit(net.apply)(variables, x).shape == x.shape


@pytest.mark.parametrize(
    ("norm", "size", "tolerance"),
    [
        ("none", 16, 1e-6),
        ("group", 64, 1e-6),
        # A variance over the 4 × 4 values of the last map, one channel a group, magnifies the
        # rounding of its mean.
        ("group", 16, 1e-5),
    ],
)
def test_an_image_has_the_same_bits_in_any_batch(norm, size, tolerance):
    net, variables, x = build(dataclasses.replace(TINY, norm=norm), (4, size, size, 3))
    f = jax.jit(net.apply)
    others = jax.random.uniform(jax.random.key(5), x.shape).at[2].set(x[2])
    np.testing.assert_array_equal(f(variables, x)[2], f(variables, others)[2])
    # Another batch size is another program, whose sums round differently.
    np.testing.assert_allclose(f(variables, x)[2:3], f(variables, x[2:3]), rtol=0, atol=tolerance)


def test_remat_changes_memory_not_values():
    net, variables, x = build(TINY)
    same = UNet(dataclasses.replace(TINY, remat=True))
    assert jax.tree.structure(variables) == jax.tree.structure(same.init(jax.random.key(0), x))

    def loss(n):
        return jax.jit(jax.value_and_grad(lambda v: jnp.mean(n.apply(v, x) ** 2)))

    value, gradient = loss(net)(variables)
    value2, gradient2 = loss(same)(variables)
    np.testing.assert_allclose(value, value2, rtol=1e-6)
    chex.assert_trees_all_close(gradient, gradient2, rtol=1e-4, atol=1e-7)


def test_bfloat16_computes_low_and_returns_float32():
    net, variables, x = build(dataclasses.replace(TINY, dtype="bfloat16"))
    exact = UNet(TINY).apply(variables, x)
    y = net.apply(variables, x)
    assert y.dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    np.testing.assert_allclose(y, exact, atol=0.03)


def test_the_last_layer_is_not_rounded_to_bfloat16():
    net, variables, x = build(dataclasses.replace(TINY, dtype="bfloat16", output="logit"))
    logit = np.asarray(net.apply(variables, x))
    rounded = np.float32(jnp.asarray(logit, jnp.bfloat16))
    assert np.mean(logit[logit != 0] == rounded[logit != 0]) < 0.01
    # The parameters and their names do not depend on the type.
    chex.assert_trees_all_equal(variables, build(TINY)[1])


def test_f_is_one_function_for_all_parameters():
    traced = []

    @jax.jit
    def measure(f, x):
        traced.append(None)
        return f(x).sum()

    _, variables, x = build(TINY)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, variables)
    values = [measure(bind(TINY, params), x) for params in (variables, doubled)]
    assert len(traced) == 1
    assert values[0] != values[1]
    np.testing.assert_allclose(values[1], UNet(TINY).apply(doubled, x).sum(), rtol=1e-5)
    measure(bind(dataclasses.replace(TINY, output="residual_logit"), variables), x)
    assert len(traced) == 2


def product_precisions(jaxpr):
    """Returns the precisions of all products and convolutions in the text of a program."""
    return set(re.findall(r"\bprecision=(None|\(.*\)|\w+)", str(jaxpr)))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_every_product_has_the_precision_of_the_configuration(platform):
    wide = dataclasses.replace(TINY, widths=(24, 24), skip="convex", remat=True)
    _, variables, x = build(wide)

    def precisions(config):
        def loss(variables):
            f = bind(config, variables)
            value, tangent = jax.jvp(f, (x,), (x,))
            return jnp.sum(value + tangent)

        with hardware.building_for(platform):
            return product_precisions(jax.make_jaxpr(jax.grad(loss))(variables))

    def both(name):
        return {f"(Precision.{name}, Precision.{name})"}

    assert precisions(wide) == {"None"}
    assert precisions(dataclasses.replace(wide, precision="high")) == both("HIGH")
    assert precisions(dataclasses.replace(wide, precision="highest")) == both("HIGHEST")
    with jax.default_matmul_precision("high"):
        assert precisions(wide) == both("HIGH")  # the user's own setting stays


def test_dilation_widens_the_receptive_field():
    wide = dataclasses.replace(TINY, norm="none", dilation_rates=(1, 4))
    net, variables, x = build(wide, (1, 64, 64, 3))
    touched = jax.grad(lambda z: net.apply(variables, z)[0, 32, 32].sum())(x)
    near = UNet(dataclasses.replace(wide, dilation_rates=(1,)))
    near_variables = near.init(jax.random.key(0), x)
    touched_near = jax.grad(lambda z: near.apply(near_variables, z)[0, 32, 32].sum())(x)

    def extent(gradient):
        return int((jnp.abs(gradient).sum((0, 2, 3)) > 0).sum())

    assert extent(touched) > extent(touched_near)


@pytest.mark.parametrize("groups", [1, 3, 6])
def test_group_norm_against_linen(groups):
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (2, 5, 4, 6))
    variables = {"params": {"scale": jnp.arange(1.0, 7.0), "bias": jnp.arange(6.0)}}
    expected = nn.GroupNorm(groups).apply(variables, x)
    np.testing.assert_allclose(GroupNorm(groups).apply(variables, x), expected, atol=1e-4)
    flat = GroupNorm(groups).apply(variables, jnp.full_like(x, 0.3))
    np.testing.assert_allclose(flat, jnp.broadcast_to(jnp.arange(6.0), x.shape), atol=1e-2)


def test_default_size_and_bad_values():
    variables = jax.eval_shape(
        UNet(ModelConfig()).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3))
    )
    assert 4_000_000 < parameter_count(variables) < 8_000_000
    with pytest.raises(BadInput, match=r"model\.dilated_kernel_size: an odd size, not 4"):
        from_config_dict({"model": {"dilated_kernel_size": 4}})
    with pytest.raises(BadInput, match=r"model\.widths"):
        from_config_dict({"model": {"widths": ()}})
