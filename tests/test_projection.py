"""The penalties of appendix A.3 against exact Jacobians in float64 and finite differences."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from pae_jax import fixed_point as fixed_point_module
from pae_jax import projection
from pae_jax.projection import idempotency, identity, jacobian_identity

KEY = jax.random.key(3)
SHAPE = (3, 2, 3, 2)  # (b, h, w, c): 12 values per image
WIDTH = 8


def _parameters(seed=0):
    random = np.random.default_rng(seed)
    d = int(np.prod(SHAPE[1:]))
    sizes = ((d, WIDTH), (WIDTH,), (WIDTH, d))
    return [jnp.asarray(random.normal(size=s) / np.sqrt(s[0])) for s in sizes]


def _network(parameters, x):
    first, bias, second = parameters
    hidden = jnp.tanh(x.reshape(x.shape[0], -1) @ first + bias[None])
    return (hidden @ second).reshape(x.shape)


def _images(seed=1):
    return jnp.asarray(np.random.default_rng(seed).random(SHAPE))


def _exact(parameters, x):
    """‖J − I‖²_F of every image, from the full Jacobian."""
    d = x[0].size

    def f_flat(image):
        return _network(parameters, image.reshape(1, *SHAPE[1:])).ravel()

    jacobians = jax.vmap(jax.jacfwd(f_flat))(x.reshape(-1, d))
    return jnp.sum((jacobians - jnp.eye(d)[None]) ** 2, axis=(1, 2))


def test_the_tangent_projection_of_a_linear_map(float64):
    """f(x) = Ax gives 2Ax − A²x."""
    d = int(np.prod(SHAPE[1:]))
    matrix, x = np.random.default_rng(0).normal(size=(d, d)), np.asarray(_images())
    flat = x.reshape(-1, d)
    expected = flat @ (2 * matrix - matrix @ matrix).T
    result = projection.tangent_projection(
        lambda x: (x.reshape(-1, d) @ jnp.asarray(matrix).T).reshape(x.shape), jnp.asarray(x)
    )
    np.testing.assert_allclose(np.reshape(result, (-1, d)), expected, rtol=1e-10)


def test_the_tangent_projection_of_a_projection_is_the_projection(float64):
    """On the unit sphere the residual x − f(x) is normal, so nothing is added."""
    x = _images() - 0.5

    def f(x):
        return x / jnp.sqrt(jnp.sum(x**2, axis=(1, 2, 3), keepdims=True))

    np.testing.assert_allclose(projection.tangent_projection(f, x), f(x), rtol=1e-10)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("probes", [1, 4])
def test_the_mean_over_probes_is_the_exact_norm(float64, distribution, probes):
    parameters, x = _parameters(), _images()

    @jax.jit
    @jax.vmap
    def estimate(key):
        return jacobian_identity(
            lambda x: _network(parameters, x),
            x,
            key,
            probes=probes,
            form="squared",
            distribution=distribution,
        )[1]

    estimates = estimate(jax.random.split(KEY, 8_000))
    standard_error = jnp.std(estimates, axis=0) / np.sqrt(len(estimates))
    exact = _exact(parameters, x)
    assert np.all(np.abs(np.mean(estimates, axis=0) - exact) < 3 * standard_error)
    assert np.all(standard_error < 0.02 * exact)


def test_one_rademacher_probe_is_exact_for_a_diagonal_jacobian(float64):
    x = _images()
    value, penalty = jacobian_identity(jnp.square, x, KEY, form="squared")
    np.testing.assert_array_equal(value, x**2)
    np.testing.assert_allclose(penalty, np.sum((2 * np.asarray(x) - 1) ** 2, axis=(1, 2, 3)))


@pytest.mark.parametrize("probes", [1, 5])
def test_frobenius_is_the_root_of_squared(float64, probes):
    def f(x):
        return _network(_parameters(), x)

    x, d = _images(), _images()[0].size
    squared = jacobian_identity(f, x, KEY, probes=probes, form="squared")[1]
    frobenius = jacobian_identity(f, x, KEY, probes=probes, form="frobenius")[1]
    np.testing.assert_allclose(frobenius**2, squared)
    for form, scale in (("squared", d), ("frobenius", np.sqrt(d))):
        plain = jacobian_identity(f, x, KEY, probes=probes, form=form)[1]
        divided = jacobian_identity(f, x, KEY, probes=probes, form=form, normalize=True)[1]
        np.testing.assert_allclose(divided * scale, plain)


def test_gradients_against_finite_differences(float64):
    active = jnp.asarray(True)
    cases = [
        {"probes": 1, "form": "squared"},
        {"probes": 1, "form": "frobenius", "distribution": "gaussian", "normalize": True},
        {"probes": 3, "form": "frobenius"},
        {"probes": 3, "form": "squared", "active": active},
    ]

    def losses(arguments):
        parameters, x = arguments
        results = [
            jacobian_identity(lambda x: _network(parameters, x), x, KEY, **case) for case in cases
        ]
        return jnp.stack([jnp.sum(penalty) + jnp.sum(value**2) for value, penalty in results])

    _check_gradients(losses, (_parameters(), _images()))


def _check_gradients(losses, arguments, step=1e-5):
    """Derivatives along random directions: reverse mode against central differences."""
    flat, unravel = jax.flatten_util.ravel_pytree(arguments)
    run = jax.jit(lambda flat: losses(unravel(flat)))
    jacobian = jax.jit(jax.jacrev(lambda flat: losses(unravel(flat))))(flat)
    for seed in range(4):
        direction = jnp.asarray(np.random.default_rng(seed).normal(size=flat.shape))
        difference = run(flat + step * direction) - run(flat - step * direction)
        np.testing.assert_allclose(jacobian @ direction, difference / (2 * step), rtol=1e-6)


@pytest.mark.parametrize("form", ["frobenius", "squared"])
@pytest.mark.parametrize("probes", [1, 3])
def test_the_identity_has_no_penalty_and_a_finite_gradient(form, probes):
    x = _images().astype(jnp.float32)

    def loss(scale):
        return jacobian_identity(lambda x: scale * x, x, KEY, probes=probes, form=form)[1].sum()

    value, gradient = jax.value_and_grad(loss)(1.0)
    assert value == 0
    assert gradient == 0


def test_an_inactive_penalty_is_zero_and_f_is_still_evaluated(float64):
    parameters, x = _parameters(), _images()

    @jax.jit
    def run(active):
        f = lambda x: _network(parameters, x)  # noqa: E731
        return jacobian_identity(f, x, KEY, probes=2, active=active)

    on, off = run(jnp.asarray(True)), run(jnp.asarray(False))
    np.testing.assert_array_equal(off[1], 0)
    np.testing.assert_array_equal(on[0], off[0])
    without = jacobian_identity(lambda x: _network(parameters, x), x, KEY, probes=2)
    np.testing.assert_allclose(on[0], without[0])
    np.testing.assert_allclose(on[1], without[1])


def test_probes_are_drawn_per_image():
    parameters, x = _parameters(), _images().astype(jnp.float32)
    run = lambda x: jacobian_identity(lambda x: _network(parameters, x), x, KEY)[1]  # noqa: E731
    np.testing.assert_allclose(run(x[:1]), run(x)[:1], rtol=1e-5)
    assert run(jnp.stack([x[0], x[0]]))[0] != run(jnp.stack([x[0], x[0]]))[1]


def test_unknown_options_are_refused():
    x = _images()
    with pytest.raises(ValueError, match="form"):
        jacobian_identity(jnp.square, x, KEY, form="nuclear")
    with pytest.raises(ValueError, match="distribution"):
        jacobian_identity(jnp.square, x, KEY, distribution="uniform")
    with pytest.raises(ValueError, match="gradient"):
        idempotency(jnp.square, x, gradient="none")


def _residual(outer, inner, x):
    """‖f_outer(f_inner(x)) − f_inner(x)‖², summed over the batch: two sets of parameters."""
    fx = _network(inner, x)
    return jnp.sum((_network(outer, fx) - fx) ** 2)


def test_idempotency_and_its_three_gradients(float64):
    parameters, x = _parameters(), _images()
    _check_gradients(lambda p: _residual(p, p, x)[None], parameters)
    outer, inner = jax.grad(_residual, (0, 1))(parameters, parameters, x)
    both = jax.tree.map(jnp.add, outer, inner)

    for gradient, expected in (("both", both), ("outer", outer), ("inner", inner)):

        @jax.jit
        @jax.value_and_grad
        def loss(parameters, gradient=gradient):
            f = lambda x: _network(parameters, x)  # noqa: E731
            return jnp.sum(idempotency(f, f(x), gradient=gradient))

        value, actual = loss(parameters)
        np.testing.assert_allclose(value, _residual(parameters, parameters, x))
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-10, err_msg=gradient)
            assert np.any(e != 0)


def test_a_projection_is_idempotent():
    clip = lambda x: jnp.clip(x, 0.2, 0.7)  # noqa: E731
    x = _images()
    np.testing.assert_array_equal(idempotency(clip, clip(x)), 0)
    np.testing.assert_array_equal(identity(clip(clip(x)), clip(x)), 0)


def test_identity_is_the_squared_bias(float64):
    x = _images()
    np.testing.assert_allclose(
        identity(x + 0.1 * jnp.ones_like(x), x), np.full(len(x), 0.01 * x[0].size)
    )


def test_the_module_exports_the_fixed_point():
    assert projection.fixed_point is fixed_point_module.fixed_point
