"""The Jacobian penalty by direction: exact Jacobians and projections, and how t and n are drawn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.errors import BadInput
from pae_jax import augmentation, projection, rng
from pae_jax.config import JacobianConfig, ObjectiveConfig
from pae_jax.corruption import CorruptedBatch
from pae_jax.known_manifolds import MIDDLE, Plane, Sphere
from pae_jax.objective import objective

KEY = jax.random.key(5)
SHAPE = (3, 4, 5, 2)
D = int(np.prod(SHAPE[1:]))
DIRECTIONS = ("tangent", "normal", "both")


def _draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def _network(parameters, x):
    first, second = parameters
    return (jnp.tanh(x.reshape(len(x), -1) @ first) @ second).reshape(x.shape)


def _parameters():
    return [_draw(D, 6, seed=1) / np.sqrt(D), _draw(6, D, seed=2) / np.sqrt(6)]


def _unit(x):
    x = np.asarray(x).reshape(len(x), -1)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_the_terms_against_the_exact_jacobian(float64):
    parameters, x = _parameters(), 0.5 * _draw(*SHAPE)
    t, n = 7 * _draw(*SHAPE, seed=3), 0.01 * _draw(*SHAPE, seed=4)
    of_one = jax.jacfwd(lambda v: _network(parameters, v.reshape(1, *SHAPE[1:])).ravel())
    jacobians = np.asarray(jax.vmap(of_one)(x.reshape(-1, D)))
    kept = np.einsum("bij,bj->bi", jacobians, _unit(t)) - _unit(t)
    removed = np.einsum("bij,bj->bi", jacobians, _unit(n))
    squares = [np.sum(vector**2, axis=1) for vector in (kept, removed)]
    f = lambda x: _network(parameters, x)  # noqa: E731
    cases = [
        ({"tangents": t}, squares[0]),
        ({"normals": n}, squares[1]),
        ({"tangents": t, "normals": n}, squares[0] + squares[1]),
    ]
    for directions, expected in cases:
        for options, value in (
            ({"form": "squared"}, expected),
            ({}, np.sqrt(expected)),
            ({"normalize": False}, np.sqrt(D * expected)),
            ({"form": "squared", "active": jnp.asarray(True)}, expected),
            ({"active": jnp.asarray(False)}, 0 * expected),
        ):
            fx, penalty = jax.jit(
                lambda x, d=directions, o=options: projection.jacobian_along(f, x, **d, **o)
            )(x)
            np.testing.assert_allclose(penalty, value, rtol=1e-10, atol=1e-300)
            np.testing.assert_allclose(fx, f(x), rtol=1e-12)


def test_gradients_against_finite_differences(float64):
    parameters, x = _parameters(), 0.5 * _draw(*SHAPE)
    t, n = _draw(*SHAPE, seed=3), _draw(*SHAPE, seed=4)

    @jax.jit
    def loss(step, direction):
        moved = jax.tree.map(lambda p, d: p + step * d, parameters, direction)
        f = lambda x: _network(moved, x)  # noqa: E731
        return projection.jacobian_along(f, x, tangents=t, normals=n)[1].sum()

    direction = [_draw(D, 6, seed=7), _draw(6, D, seed=8)]
    slope = (loss(1e-5, direction) - loss(-1e-5, direction)) / 2e-5
    np.testing.assert_allclose(jax.grad(loss)(0.0, direction), slope, rtol=1e-6)


def test_a_direction_0_and_an_exact_projection_have_finite_gradients(float64):
    x = _draw(*SHAPE)

    def loss(scale, t):
        return projection.jacobian_along(lambda x: scale * x, x, tangents=t)[1].sum()

    for t in (jnp.zeros(SHAPE), _draw(*SHAPE, seed=3)):
        value, gradient = jax.value_and_grad(loss)(1.0, t)
        np.testing.assert_allclose([value, gradient], 0, atol=1e-12)
    assert loss(2.0, jnp.zeros(SHAPE)) == 0
    with pytest.raises(ValueError, match="tangents or normals"):
        projection.jacobian_along(jnp.square, x)


@pytest.mark.parametrize("columns", [2, 3])
def test_the_projection_onto_a_sphere_is_the_minimum(float64, columns):
    """At x on ℳ the directions along ℳ are kept and the radius is removed."""
    sphere = Sphere(columns, rows=3)
    x = sphere.sample(KEY, 4)
    n = x - MIDDLE
    t = jax.jvp(sphere.project, (x,), (_draw(*x.shape),))[1]

    def penalty(f):
        return projection.jacobian_along(f, x, tangents=t, normals=n)[1]

    np.testing.assert_allclose(penalty(sphere.project), 0, atol=1e-7)
    np.testing.assert_allclose(penalty(lambda x: x), 1, rtol=1e-12)
    np.testing.assert_allclose(penalty(jnp.zeros_like), 1, rtol=1e-12)
    # The random probes of the same Jacobian are far from 0: d − k directions are removed.
    d = x[0].size
    random = projection.jacobian_identity(sphere.project, x, KEY, probes=400, form="squared")[1]
    np.testing.assert_allclose(random, d - (columns - 1), rtol=0.15)


def _linear_images():
    """Returns the plane of the images a + b·row + c·column, which motions do not leave."""
    rows, columns = np.mgrid[:5, :6]
    functions = np.stack([np.ones((5, 6)), rows, columns]).reshape(3, -1)
    basis = np.linalg.qr(functions.T)[0].T
    return Plane(jnp.asarray(basis).reshape(3, 5, 6, 1))


@pytest.mark.parametrize("at", ["corrupted", "clean"])
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_the_objective_is_smallest_for_the_projection(float64, directions, at):
    plane = _linear_images()
    clean = plane.sample(KEY, 4)
    y = clean + _draw(*clean.shape)
    mask = jnp.asarray([0.0, 0.3, 0.6, 1.0]).reshape(4, 1, 1, 1) * jnp.ones((4, 5, 6, 1))
    normal = y - plane.project(y)
    batch = CorruptedBatch(clean + mask * normal, clean, mask)
    config = ObjectiveConfig(jacobian=JacobianConfig(weight=1.0, directions=directions, at=at))

    def term(f):
        return np.asarray(objective(f, batch, KEY, config, 0).terms["jacobian"])

    corrupted = np.array([0, 1, 1, 1])  # the first example has no direction n
    np.testing.assert_allclose(term(plane.project), 0, atol=1e-7)
    identity = {"tangent": 0 * corrupted, "normal": corrupted, "both": corrupted}[directions]
    np.testing.assert_allclose(term(lambda x: x), identity, atol=1e-7)
    nothing = {"tangent": 1, "normal": 0, "both": 1}[directions]
    np.testing.assert_allclose(term(jnp.zeros_like), nothing, atol=1e-7)


def test_a_motion_is_the_limit_of_small_transforms(float64):
    """On a smooth image it is a combination of shifts, rotation and gain, in closed form."""
    size, e = 64, 1e-4

    def picture(rows, columns):
        return 0.5 + 0.3 * np.sin(3 * rows) * np.cos(2 * columns) + 0.1 * rows * columns

    axis = (2 * np.arange(size) - (size - 1)) / size
    rows, columns = np.meshgrid(axis, axis, indexing="ij")
    image = jnp.asarray(picture(rows, columns))[..., None]

    def moved(down, right, turn):
        at = rows + e * (down + turn * columns), columns + e * (right - turn * rows)
        return (picture(*at) - picture(rows, columns)) / e

    changes = [moved(1, 0, 0), moved(0, 1, 0), moved(0, 0, 1), np.asarray(image[..., 0])]
    basis = np.stack([change.ravel() for change in changes], axis=1)
    for seed in range(3):
        motion = np.asarray(augmentation.motion(jax.random.key(seed), image)).ravel()
        assert np.linalg.norm(motion) == pytest.approx(1)
        weights, *_ = np.linalg.lstsq(basis, motion)
        assert np.linalg.norm(basis @ weights - motion) < 0.03  # differences of whole pixels
        assert np.all(np.abs(weights[:3]) > 1e-4)
    black = augmentation.motion(KEY, jnp.zeros((4, 5, 3)))
    np.testing.assert_array_equal(black, 0)


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_an_example_depends_on_itself_alone(directions):
    config = ObjectiveConfig(
        noise=0.1, jacobian=JacobianConfig(weight=1.0, directions=directions, form="squared")
    )
    parameters = [p.astype(jnp.float32) for p in _parameters()]
    clean = jnp.abs(_draw(*SHAPE).astype(jnp.float32))
    mask = jnp.full((*SHAPE[:3], 1), 0.5, jnp.float32)
    batch = CorruptedBatch(clean / 2, clean, mask)
    keys = rng.example_keys(KEY, len(clean))

    @functools.partial(jax.jit, static_argnums=2)
    def term(batch, keys, config):
        result = objective(lambda x: _network(parameters, x), batch, keys, config, 0)
        return result.terms["jacobian"]

    whole = term(batch, keys, config)
    part = term(CorruptedBatch(*(a[1:] for a in batch)), keys[1:], config)
    np.testing.assert_allclose(part, whole[1:], rtol=1e-5)
    # Without noise the point of the derivative does not depend on the key, and n never does.
    quiet = dataclasses.replace(config, noise=0.0)
    other_keys = rng.example_keys(jax.random.key(6), len(clean))
    first, other = term(batch, keys, quiet), term(batch, other_keys, quiet)
    assert np.all(first == other) if directions == "normal" else np.all(first != other)
    assert np.all(first != whole)


def test_keys_without_a_part_are_refused():
    for key, value in (("probes", 4), ("distribution", "gaussian")):
        with pytest.raises(BadInput, match=f"jacobian.{key}: {value} needs .*directions=random"):
            JacobianConfig(directions="normal", **{key: value})
