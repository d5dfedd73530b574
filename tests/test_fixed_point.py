"""Fixed points against a Python loop, optimistix and closed forms; images are independent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest

from pae_jax.config import EvalConfig, ModelConfig
from pae_jax.fixed_point import fixed_point, iterate
from pae_jax.projection import project
from pae_jax.unet import UNet

SOLVERS = ["picard", "damped", "anderson"]


def parabola(p):
    """(x + 0.3y², y/2): every (x, 0) is fixed, and each solver ends at another one."""
    return jnp.stack([p[:, 0] + 0.3 * p[:, 1] ** 2, p[:, 1] / 2], axis=1)


def contraction(seed=0, d=6):
    """A smooth f with one fixed point, and images that need different numbers of steps."""
    weights = np.random.default_rng(seed).normal(size=(d, d))
    weights = jnp.asarray(0.8 * weights / np.linalg.norm(weights, 2))
    return lambda x: jnp.tanh(x @ weights) + 0.1


def starts(d=6):
    return jnp.asarray(np.random.default_rng(1).normal(size=(4, d)) * [[0.01], [1], [10], [0.3]])


@functools.cache
def unet():
    """A contraction with the parts of the real network, and images to start from."""
    config = ModelConfig(
        widths=(4,),
        convs_per_stage=1,
        bottleneck_layers=1,
        branch_width=4,
        dilation_rates=(1, 2),
        dilated_kernel_size=3,
    )
    model = UNet(config)
    x = jax.random.uniform(jax.random.key(0), (4, 16, 16, 3))
    parameters = model.init(jax.random.key(1), x)
    solve = jax.jit(
        lambda x, solver: fixed_point(
            lambda x: 0.1 * model.apply(parameters, x), x, tolerance=1e-5, solver=solver
        ),
        static_argnums=1,
    )
    return solve, x


def test_a_known_fixed_point(float64):
    result = fixed_point(parabola, jnp.array([[0.0, 1.0]]), tolerance=1e-12, max_steps=100)
    np.testing.assert_allclose(result.value, [[0.4, 0.0]], atol=1e-11)
    assert bool(result.converged[0])
    assert result.distance[0] == 0


def test_a_python_loop(float64):
    f, x = contraction(), starts()
    tolerance, max_steps = 1e-6, 60
    result = jax.jit(
        lambda x: fixed_point(f, x, tolerance=tolerance, max_steps=max_steps, absolute=1e-9)
    )(x)
    assert len(np.unique(result.steps)) > 1
    for i in range(len(x)):
        value, trace = np.asarray(x[i]), []
        while len(trace) < max_steps:
            following = np.asarray(f(value[None])[0])
            trace.append(np.linalg.norm(following - value))
            done = trace[-1] <= 1e-9 + tolerance * np.linalg.norm(value)
            value = following
            if done:
                break
        steps = len(trace)
        assert result.steps[i] == steps < max_steps
        np.testing.assert_allclose(result.value[i], value, rtol=1e-12)
        np.testing.assert_allclose(result.trace[i, :steps], trace, rtol=1e-6, atol=1e-14)
        np.testing.assert_array_equal(result.trace[i, steps:], result.residual[i])
        assert result.residual[i] == result.trace[i, steps - 1]
    assert np.all(result.converged)


@pytest.mark.parametrize("solver", SOLVERS)
def test_optimistix(float64, solver):
    f, x = contraction(), starts()
    result = fixed_point(f, x, tolerance=1e-13, max_steps=300, solver=solver)
    assert np.all(result.converged)
    for i in range(len(x)):
        expected = optimistix.fixed_point(
            lambda y, _: f(y[None])[0],
            optimistix.FixedPointIteration(rtol=1e-13, atol=1e-13),
            x[i],
            max_steps=500,
        ).value
        np.testing.assert_allclose(result.value[i], expected, atol=1e-10)
    np.testing.assert_allclose(result.distance, 0, atol=1e-10)


def test_anderson_needs_fewer_steps_where_there_is_one_fixed_point(float64):
    f, x = contraction(), starts()
    solve = functools.partial(fixed_point, f, x, tolerance=1e-10, max_steps=300)
    assert np.all(solve(solver="anderson").steps < solve().steps)
    assert np.all(solve(solver="damped").steps > solve().steps)


@pytest.mark.parametrize("solver", ["damped", "anderson"])
def test_other_solvers_report_how_far_they_end_from_the_plain_fixed_point(float64, solver):
    x = jnp.array([[0.0, 1.0], [0.5, 0.0]])
    result = fixed_point(parabola, x, tolerance=1e-12, max_steps=200, solver=solver)
    assert np.all(result.converged)
    np.testing.assert_allclose(result.value[:, 1], 0, atol=1e-11)  # fixed points both
    expected = np.linalg.norm(result.value - np.array([[0.4, 0.0], [0.5, 0.0]]), axis=1)
    np.testing.assert_allclose(result.distance, expected, atol=1e-11)
    assert result.distance[0] > 0.01
    assert result.distance[1] == 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_result_does_not_depend_on_the_rest_of_the_batch(solver):
    solve, x = unet()
    first = solve(x, solver)
    other = solve(x.at[1:].set(jnp.array([0.0, 1.0, 0.3])[:, None, None, None]), solver)
    for name, a, b in zip(first._fields, first, other, strict=True):
        np.testing.assert_array_equal(a[0], b[0], err_msg=name)
    assert np.any(first.steps != other.steps)
    single = solve(x[:1], solver)
    assert single.steps[0] == first.steps[0]
    np.testing.assert_allclose(single.value[0], first.value[0], atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_nan_image_leaves_the_others_untouched(solver):
    solve, x = unet()
    clean, broken = solve(x, solver), solve(x.at[2, 3, 3, 0].set(jnp.nan), solver)
    for name, a, b in zip(clean._fields, clean, broken, strict=True):
        for i in (0, 1, 3):
            np.testing.assert_array_equal(a[i], b[i], err_msg=name)
    assert not broken.converged[2]
    assert broken.steps[2] == 1
    assert np.isnan(broken.residual[2])


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_map_that_does_not_contract_stops_after_max_steps(solver):
    turn = jnp.array([[0.0, -1.0], [1.0, 0.0]])
    shift = lambda x: x @ turn + jnp.ones((1, 2)) * jnp.sum(x**2)  # noqa: E731
    result = fixed_point(shift, jnp.array([[1.0, 2.0]]), max_steps=3, solver=solver)
    assert result.steps[0] == 3
    assert not result.converged[0]


def test_a_rotation_never_settles():
    result = fixed_point(lambda x: 1 - x, jnp.array([[0.2, 0.9]]), max_steps=7)
    assert result.steps[0] == 7
    assert not result.converged[0]
    np.testing.assert_allclose(result.trace[0], np.full(7, np.sqrt(1.0)), rtol=1e-6)


def test_divergence_to_infinity_stops_early():
    result = fixed_point(lambda x: x**2, jnp.array([[10.0], [1.0]]), max_steps=50)
    assert result.steps[0] < 10
    np.testing.assert_array_equal(result.converged, [False, True])
    np.testing.assert_array_equal(result.steps[1], 1)


def test_the_tolerance_is_relative_unless_an_absolute_one_is_given(float64):
    halve = lambda x: x / 2  # noqa: E731
    x = jnp.array([[1.0], [1000.0]])
    relative = fixed_point(halve, x, tolerance=0.1, max_steps=30)
    np.testing.assert_array_equal(relative.converged, False)  # the residual is always 0.5·‖x‖
    absolute = fixed_point(halve, x, tolerance=0.0, absolute=0.01, max_steps=30)
    # 0.5·2⁻ⁿ·‖x‖ ≤ 0.01 first at n = 6 and n = 16; the step itself is taken too.
    np.testing.assert_array_equal(absolute.steps, [7, 17])
    scaled = fixed_point(lambda x: x, 1000 * x, tolerance=0.1)
    np.testing.assert_array_equal(scaled.steps, 1)


def test_iterate_and_project(float64):
    x = jnp.array([[0.0, 1.0]])
    np.testing.assert_allclose(iterate(parabola, x, 0), x)
    np.testing.assert_allclose(iterate(parabola, x, 2), parabola(parabola(x)))
    np.testing.assert_allclose(project(parabola, x, EvalConfig()), parabola(x))
    np.testing.assert_allclose(
        project(parabola, x, EvalConfig(apply="iterate", iterations=3)), iterate(parabola, x, 3)
    )
    config = EvalConfig(apply="fixed_point", fixed_point_tolerance=1e-12, max_steps=100)
    np.testing.assert_allclose(project(parabola, x, config), [[0.4, 0.0]], atol=1e-11)


def test_bad_options_are_refused():
    x = jnp.zeros((1, 2))
    with pytest.raises(ValueError, match="solver"):
        fixed_point(parabola, x, solver="newton")
    with pytest.raises(ValueError, match="max_steps"):
        fixed_point(parabola, x, max_steps=0)
