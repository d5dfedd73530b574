"""The paper's theory where everything has a closed form: Theorems 1 and 2, Proposition 1, eq. 19.

Double precision throughout; distances are in the units of pixels.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pae_jax.fixed_point import fixed_point
from pae_jax.known_manifolds import MIDDLE, Plane, Sphere, slice_contraction
from pae_jax.objective import reconstruction_loss

KEY = jax.random.key(5)
RIGHT = np.arange(6) >= 3

pytestmark = pytest.mark.usefixtures("float64")


def _plane():
    """Three patterns on 4×6 pixels: one left of the middle, one right of it, one on both sides."""
    random = np.random.default_rng(0)
    patterns = random.normal(size=(3, 4, 6, 1))
    patterns[0] *= ~RIGHT[None, :, None]
    patterns[1] *= RIGHT[None, :, None]
    # Orthogonal to the first two on each half apart, so that they keep to their halves.
    for i in (0, 1):
        patterns[i] /= np.linalg.norm(patterns[i])
        patterns[2] -= np.sum(patterns[2] * patterns[i]) * patterns[i]
    patterns[2] /= np.linalg.norm(patterns[2])
    return Plane(jnp.asarray(patterns))


def _case(name):
    """A manifold, and a region whose slices are: a line; two points; a circle."""
    if name == "plane":
        return _plane(), jnp.broadcast_to(jnp.asarray(RIGHT)[None, :, None], (4, 6, 1))
    columns = {"circle": 2, "sphere": 3}[name]
    region = jnp.broadcast_to((jnp.arange(columns) > 0)[None, :, None], (4, columns, 1))
    return Sphere(columns), region


def _norm(x):
    return np.linalg.norm(np.asarray(x).reshape(len(x), -1), axis=1)


def _corrupted(manifold, region, count=16):
    x = manifold.sample(KEY, count)
    noise = 0.1 * jax.random.normal(jax.random.key(6), x.shape)
    return x, jnp.where(region[None], x + noise, x)


NAMES = ["plane", "circle", "sphere"]


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_on_the_manifold_and_projections_are_nearest(name):
    manifold, region = _case(name)
    x, corrupted = _corrupted(manifold, region)
    np.testing.assert_allclose(manifold.project(x), x, atol=1e-12)
    np.testing.assert_allclose(manifold.project_slice(x, region), x, atol=1e-12)
    projected = manifold.project(corrupted)
    np.testing.assert_allclose(manifold.project(projected), projected, atol=1e-12)
    others = manifold.sample(jax.random.key(7), 2_000)
    for point, image in zip(projected, corrupted, strict=True):
        assert _norm((point - image)[None]) <= _norm(others - image[None]).min()
    on_slice = manifold.project_slice(corrupted, region)
    np.testing.assert_allclose(manifold.project(on_slice), on_slice, atol=1e-12)
    np.testing.assert_allclose(jnp.where(region[None], 0, on_slice - corrupted), 0, atol=1e-12)
    # Nearest within the slice: the correction is orthogonal to the directions of the slice.
    step = 1e-6 * jax.random.normal(jax.random.key(8), corrupted.shape)
    nearby = manifold.project_slice(on_slice + jnp.where(region[None], step, 0), region)
    cosine = np.sum(np.asarray((nearby - on_slice) * (corrupted - on_slice)), axis=(1, 2, 3))
    np.testing.assert_allclose(cosine, 0, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ratio", [0.5, 0.9])
def test_theorem_2(name, ratio):
    """Geometric convergence with ratio ρ, to a point of ℳ, that keeps the normal coordinates."""
    manifold, region = _case(name)
    _, corrupted = _corrupted(manifold, region)
    f = slice_contraction(manifold, region, ratio)
    result = jax.jit(
        functools.partial(fixed_point, f, tolerance=0.0, absolute=1e-9, max_steps=300)
    )(corrupted)
    assert np.all(result.converged)
    limit = result.value
    # (a), (b): the limit is fixed, on ℳ, and agrees with x̂ outside S.
    np.testing.assert_allclose(f(limit), limit, atol=1e-9)
    np.testing.assert_allclose(manifold.project(limit), limit, atol=1e-8)
    kept = np.broadcast_to(~np.asarray(region)[None], limit.shape)
    np.testing.assert_array_equal(np.asarray(limit)[kept], np.asarray(corrupted)[kept])
    for i, steps in enumerate(np.asarray(result.steps)):
        trace = np.asarray(result.trace[i, :steps])
        np.testing.assert_allclose(trace[1:] / trace[:-1], ratio, rtol=0.01)
        assert trace[-1] <= 1e-9 < trace[-2]
    # The distance itself shrinks by ρ with every application (eq. 8, on the slice).
    x, distances = corrupted, []
    for _ in range(4):
        distances.append(_norm(manifold.project_slice(x, region) - x))
        x = f(x)
    ratios = np.array(distances[1:]) / np.array(distances[:-1])
    np.testing.assert_allclose(ratios, ratio, rtol=0.01)


def test_theorem_1_on_the_plane():
    """The linear map that minimises the loss is the conditional mean, and keeps what is normal."""
    plane, region = _case("plane")
    inside = np.asarray(region).ravel()
    # Coefficients and corruptions with the exact moments of the population: one least-squares
    # solution is then the population's, without sampling error.
    raw = np.random.default_rng(3).normal(size=(400, 3 + inside.sum()))
    white = np.linalg.qr(raw - raw.mean(axis=0))[0] * np.sqrt(len(raw))
    z, y = plane.scale * white[:, :3], white[:, 3:]
    x = np.asarray(z @ np.asarray(plane.basis).reshape(3, -1))
    corrupted = x.copy()
    corrupted[:, inside] = y
    trained = np.linalg.lstsq(corrupted, x, rcond=1e-10)[0]

    image = lambda flat: jnp.asarray(flat + MIDDLE).reshape(-1, 4, 6, 1)  # noqa: E731
    fresh_x, fresh = _corrupted(plane, region)
    optimum = image((np.asarray(fresh) - MIDDLE).reshape(len(fresh), -1) @ trained)
    expected = plane.conditional_mean(fresh, region)
    np.testing.assert_allclose(optimum, expected, atol=1e-10)
    np.testing.assert_allclose(jnp.where(region[None], 0, expected - fresh), 0, atol=1e-10)
    # What S̄ does not tell is averaged out: the mean is on the plane, and not x.
    assert np.all(_norm(expected - fresh_x) > 1e-3)

    def loss(weights):
        reconstruction = image(corrupted @ weights)
        mask = jnp.broadcast_to(region[None].astype(float), reconstruction.shape)
        return jnp.mean(reconstruction_loss(reconstruction, image(x), mask, weight=0.5))

    # Eq. 1 weights the pixels, yet its optimum is the same: convex, and stationary there.
    gradient = jax.jit(jax.grad(loss))
    np.testing.assert_allclose(gradient(jnp.asarray(trained)), 0, atol=1e-12)
    assert np.abs(gradient(jnp.asarray(trained) * 1.01)).max() > 1e-6


@pytest.mark.parametrize("name", ["circle", "sphere"])
def test_theorem_1_on_curved_manifolds(name):
    """The regression of x on what S̄ shows, by bins: the blurry mean, off the manifold."""
    manifold, region = _case(name)
    x = manifold.sample(KEY, 100_000)
    m = np.asarray(manifold.coordinates(x))
    residual = x - manifold.conditional_mean(x, region)
    errors = np.asarray(manifold.coordinates(residual + MIDDLE))
    bins = np.digitize(m[:, 0], np.linspace(-0.4, 0.4, 9)[1:-1])
    for i in range(8):
        sample = errors[bins == i]
        assert len(sample) > 1_000
        standard_error = sample.std(axis=0) / np.sqrt(len(sample))
        assert np.all(np.abs(sample.mean(axis=0)) <= 3.5 * standard_error)
    mean = manifold.conditional_mean(x[:5], region)
    assert np.all(_norm(manifold.project(mean) - mean) > 1e-3)


@pytest.mark.parametrize("name", ["circle", "sphere"])
@pytest.mark.parametrize("eta", [0.3, 0.8])
def test_the_bayes_optimum_under_normal_dominant_corruption(name, eta):
    """Eq. 12: the closed form against the regression of the source on the corrupted image."""
    manifold, _ = _case(name)
    reach = 0.14
    x = manifold.sample(KEY, 200_000)
    corrupted = manifold.displace(jax.random.key(1), x, eta, reach)
    r = np.linalg.norm(np.asarray(manifold.coordinates(corrupted)), axis=1)
    direction = np.asarray(manifold.coordinates(corrupted)) / r[:, None]
    source = np.asarray(manifold.coordinates(x))
    predicted = np.asarray(manifold.coordinates(manifold.mean_of_compatible(corrupted, eta)))
    error = np.sum((source - predicted) * direction, axis=1)
    angle = np.arccos(np.clip(np.sum(source * direction, axis=1) / manifold.radius, -1, 1))
    largest = np.asarray(manifold.compatible_angle(corrupted, eta))
    assert np.all(angle <= largest + 1e-6)
    # Where the whole cap is within reach, its rim included; in bins of the distance.
    within = r * np.sin(largest) / np.sin(np.arctan(eta)) < reach
    assert within.mean() > 0.5
    edges = np.quantile(r[within], np.linspace(0, 1, 7))
    for low, high in itertools.pairwise(edges):
        in_bin = within & (r >= low) & (r < high)
        sample = error[in_bin]
        assert abs(sample.mean()) < 3 * sample.std() / np.sqrt(len(sample))
        assert (angle[in_bin] / largest[in_bin]).max() > 0.95  # the cap is filled


@pytest.mark.parametrize("name", ["circle", "sphere"])
@pytest.mark.parametrize("eta", [0.3, 0.8])
def test_proposition_1(name, eta):
    """The diameter of the compatible sources shrinks by a constant C < 1 per application.

    So does the distance to ℳ; the direction, the coordinate along ℳ, is kept.
    """
    manifold, _ = _case(name)
    x = manifold.sample(KEY, 64)
    corrupted = manifold.displace(jax.random.key(1), x, eta, 0.1)
    f = functools.partial(manifold.mean_of_compatible, eta=eta)

    def diameter(x):
        return 2 * manifold.radius * np.sin(np.asarray(manifold.compatible_angle(x, eta)))

    def distance(x):
        return _norm(x - manifold.project(x))

    image = corrupted
    for _ in range(2):
        following = f(image)
        for size in (diameter, distance):  # eqs. 18 and 8
            assert np.all(size(following) < 0.2 * size(image))
        image = following
    result = fixed_point(f, corrupted, tolerance=0.0, absolute=1e-12)
    assert np.all(result.converged)
    np.testing.assert_allclose(result.value, manifold.project(corrupted), atol=1e-9)


@pytest.mark.parametrize("bias", [0.0, 0.3])
@pytest.mark.parametrize("jacobian", ["identity", "tangent projection"])
def test_equation_19(jacobian, bias):
    """Idempotency residual less the bias on ℳ, against the reconstruction error: slope 2."""
    circle = Sphere(2, rows=1, radius=0.4)
    x = circle.sample(KEY, 4)
    normal = x - MIDDLE
    tangent = jnp.flip(normal, axis=2) * jnp.array([-1.0, 1.0])[None, None, :, None]

    @jax.jit
    def errors(size):
        def f(x):
            """Moves the distance to ℳ from t to g(t), and everything by the bias."""
            m = circle.coordinates(x)
            r = jnp.linalg.norm(m, axis=1, keepdims=True)
            t = r - circle.radius
            # J_f on ℳ is I for the first, the paper's extreme case, and for the second the
            # projector onto the tangent, as it is for a projection.
            g = {"identity": t - 2 * t**2, "tangent projection": 2 * t**2}[jacobian]
            return circle.image((circle.radius + g) * m / r) + bias * size * tangent

        fx = f(x + size * (normal + 0.5 * tangent))
        return fx - x, (f(fx) - fx) - (f(x) - x)

    sizes = np.geomspace(1e-4, 1e-2, 9)
    reconstruction, residual = np.array(
        [[_norm(error) for error in errors(size)] for size in sizes]
    ).transpose(1, 2, 0)
    for e, r in zip(reconstruction, residual, strict=True):
        slope = np.polyfit(np.log(e), np.log(r), 1)[0]
        np.testing.assert_allclose(slope, 2.0, atol=0.1)
