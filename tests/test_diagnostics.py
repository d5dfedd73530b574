"""The diagnostics on linear maps and on known manifolds, where each has a known value."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pae_jax.corruption import CorruptedBatch
from pae_jax.diagnostics import Diagnostic, diagnose, errors, geometry, summarise
from pae_jax.known_manifolds import Plane, Sphere, slice_contraction

KEY = jax.random.key(2)
SHAPE = (3, 2, 3, 1)

pytestmark = pytest.mark.usefixtures("float64")


def _linear(matrix):
    return lambda x: (x.reshape(x.shape[0], -1) @ matrix.T).reshape(x.shape)


def _batch(shape=SHAPE, seed=0):
    random = np.random.default_rng(seed)
    clean, other = random.random((2, *shape))
    mask = random.random((*shape[:3], 1))
    return CorruptedBatch(*map(jnp.asarray, (mask * other + (1 - mask) * clean, clean, mask)))


def _flat(x):
    return np.asarray(x).reshape(len(x), -1)


def _values(diagnostics):
    return {name: diagnostic.value for name, diagnostic in diagnostics.items()}


def _errors(f, batch):
    return _values(jax.jit(functools.partial(errors, f))(batch))


def _geometry(f, clean, batch, **options):
    return _values(jax.jit(functools.partial(geometry, f, **options))(clean, batch, KEY))


def test_errors_of_a_linear_map():
    matrix = np.random.default_rng(1).normal(size=(6, 6)) / 3
    batch = _batch()
    measured = _errors(_linear(jnp.asarray(matrix)), batch)
    corrupted, x, mask = map(_flat, batch)
    fx, ffx, fffx = (
        corrupted @ matrix.T,
        corrupted @ (matrix @ matrix).T,
        corrupted @ (matrix @ matrix @ matrix).T,
    )
    rms = lambda v, w: np.sqrt((w * v**2).sum(axis=1) / w.sum(axis=1))  # noqa: E731
    ones = np.ones_like(x)
    np.testing.assert_allclose(measured["on_manifold_bias"], rms(x @ matrix.T - x, ones))
    np.testing.assert_allclose(measured["idempotency"], rms(ffx - fx, ones))
    np.testing.assert_allclose(measured["error_outside_mask"], rms(fx - x, 1 - mask))
    np.testing.assert_allclose(measured["error_inside_mask"], rms(fx - x, mask))
    distances = [np.linalg.norm(v - x, axis=1) for v in (corrupted, fx, ffx, fffx)]
    for n in (1, 2, 3):
        np.testing.assert_allclose(measured[f"contraction_{n}"], distances[n] / distances[n - 1])


def test_quantities_that_are_undefined_for_an_uncorrupted_image():
    _, x, mask = _batch()
    batch = CorruptedBatch(x, x, jnp.zeros_like(mask))
    measured = _errors(lambda x: x / 2, batch)
    for name in ("error_inside_mask", "contraction_1", "contraction_2", "contraction_3"):
        assert np.all(np.isnan(measured[name])), name
    assert np.all(np.isfinite(measured["error_outside_mask"]))
    measured = _geometry(lambda x: x / 2, x, batch)
    assert np.all(np.isnan(measured["corruption_suppression"]))
    assert np.all(np.isnan(measured["normal_dominance"]))


def test_geometry_of_a_linear_map():
    """Jacobian products against the matrix; the spectral radius of a rotating spectrum."""
    random = np.random.default_rng(3)
    turn = np.array([[np.cos(0.7), -np.sin(0.7)], [np.sin(0.7), np.cos(0.7)]])
    blocks = np.diag([0.0, 0.0, 0.5, -0.4, 0.3, 0.1])
    blocks[:2, :2] = 0.9 * turn
    base = random.normal(size=(6, 6))
    matrix = base @ blocks @ np.linalg.inv(base)
    assert np.isclose(np.abs(np.linalg.eigvals(matrix)).max(), 0.9)
    batch = _batch()
    clean = jnp.concatenate([batch.clean, _batch(seed=4).clean])
    measured = _geometry(
        _linear(jnp.asarray(matrix)), clean, batch, neighbours=3, explained=0.8, power_steps=400
    )
    np.testing.assert_allclose(measured["spectral_radius"], 0.9, rtol=0.01)
    corrupted, x, _ = map(_flat, batch)
    change = matrix - np.eye(6)
    shift = (corrupted - x) / np.linalg.norm(corrupted - x, axis=1, keepdims=True)
    np.testing.assert_allclose(
        measured["corruption_suppression"], np.linalg.norm(shift @ change.T, axis=1)
    )
    for i in range(len(x)):
        others = np.delete(_flat(clean), i, axis=0) - x[i]
        order = np.argsort(np.linalg.norm(others, axis=1))
        nearest = others[order[0]] / np.linalg.norm(others[order[0]])
        np.testing.assert_allclose(
            measured["tangent_distortion"][i], np.linalg.norm(change @ nearest)
        )
        directions, lengths, _ = np.linalg.svd(others[order[:3]].T, full_matrices=False)
        explained = np.cumsum(lengths**2) / np.sum(lengths**2)
        basis = directions[:, : 1 + np.sum(explained < 0.8)]
        assert basis.shape[1] in (1, 2)
        tangent = basis @ (basis.T @ (corrupted[i] - x[i]))
        expected = np.linalg.norm(tangent) / np.linalg.norm(corrupted[i] - x[i] - tangent)
        np.testing.assert_allclose(measured["normal_dominance"][i], expected)


def test_a_projection_onto_a_sphere():
    """Bias and residual 0; J keeps tangents, removes normals, has spectral radius 1."""
    sphere = Sphere(3)
    x = sphere.sample(KEY, 4)
    clean = sphere.sample(jax.random.key(9), 4_000)  # dense: neighbours give tangents
    normal = (x - 0.5) / sphere.radius
    ones = jnp.ones_like(x)
    batch = CorruptedBatch(x + 0.05 * normal, x, ones)
    early, late = _errors(sphere.project, batch), _geometry(sphere.project, clean, batch)
    for name in ("on_manifold_bias", "idempotency", "error_inside_mask"):
        np.testing.assert_allclose(early[name], 0, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(late["tangent_distortion"], 0, atol=0.05)
    np.testing.assert_allclose(late["corruption_suppression"], 1, rtol=1e-6)
    np.testing.assert_allclose(late["spectral_radius"], 1, rtol=1e-6)
    np.testing.assert_array_equal(late["fixed_point_steps"], 2)  # one to get there, one to see it
    np.testing.assert_array_equal(late["fixed_point_converged"], 1)
    np.testing.assert_allclose(late["fixed_point_error"], 0, atol=1e-12)
    assert np.all(late["normal_dominance"] < 0.1)


@pytest.mark.parametrize("ratio", [0.3, 0.8])
def test_the_contraction_of_theorem_2(ratio):
    """ρ per application on a circle, from corruptions of one column towards the same slice."""
    circle = Sphere(2)
    x = circle.sample(KEY, 8)
    region = jnp.broadcast_to(jnp.array([False, True])[None, :, None], (4, 2, 1))
    corrupted = jnp.where(region[None], x + 0.1 * jnp.sign(x - 0.5), x)
    mask = jnp.broadcast_to(region[None].astype(x.dtype), x.shape)
    batch = CorruptedBatch(corrupted, x, mask)
    measured = diagnose(
        slice_contraction(circle, region, ratio), x, batch, KEY, tolerance=1e-6, max_steps=80
    )
    for n in (1, 2, 3):
        assert np.isclose(measured[f"contraction_{n}"], ratio, rtol=1e-6)
    assert measured["error_outside_mask"] < 1e-12
    assert measured["on_manifold_bias"] < 1e-12
    assert np.isclose(measured["error_inside_mask"], ratio * 0.1)
    assert measured["fixed_point_converged"] == 1
    assert measured["fixed_point_error"] < 1e-5
    # The n-th residual is (1−ρ)ρⁿ⁻¹·0.2, against 1e-6·‖x‖.
    limits = 1e-6 * np.linalg.norm(_flat(x), axis=1) / (0.2 * (1 - ratio))
    assert measured["fixed_point_steps"] == np.mean(1 + np.ceil(np.log(limits) / np.log(ratio)))


@pytest.mark.parametrize("eta", [0.0, 0.2, 3.0])
def test_normal_dominance_on_a_plane(eta):
    """Eq. 14's ratio of a corruption with known tangential and normal parts."""
    random = np.random.default_rng(5)
    basis = np.linalg.qr(random.normal(size=(24, 4)))[0].T.reshape(4, 4, 6, 1)
    plane = Plane(jnp.asarray(basis[:3]))
    x, clean = plane.sample(KEY, 5), plane.sample(jax.random.key(8), 40)
    tangent = jnp.asarray(random.normal(size=3))
    tangent = jnp.tensordot(tangent / jnp.linalg.norm(tangent), plane.basis, 1)
    shift = 0.1 * (eta * tangent + jnp.asarray(basis[3]))
    batch = CorruptedBatch(x + shift[None], x, jnp.ones_like(x))
    # More neighbours than the plane has directions: the span is the plane all the same.
    measured = _geometry(
        plane.project, jnp.concatenate([clean, x]), batch, neighbours=6, explained=1.0
    )
    np.testing.assert_allclose(measured["normal_dominance"], eta, atol=1e-6)
    np.testing.assert_allclose(measured["tangent_distortion"], 0, atol=1e-9)


def test_too_few_neighbours_are_no_neighbours():
    batch = _batch()
    measured = _geometry(lambda x: x, batch.clean[:1], batch, neighbours=3)
    # The first image has no other; the second has one, which spans a line.
    assert np.isnan(measured["tangent_distortion"][0])
    assert measured["normal_dominance"][0] == 0
    line, shift = _flat(batch.clean[:1] - batch.clean[1:2])[0], _flat(batch[0] - batch[1])[1]
    along = abs(line @ shift) / np.linalg.norm(line)
    across = np.sqrt(shift @ shift - along**2)
    np.testing.assert_allclose(measured["normal_dominance"][1], along / across)


def test_diagnose_averages_over_all_images_and_compiles_once_for_all_parameters():
    traced = []

    def apply(scale, x):
        traced.append(None)
        return scale * x

    batches = [_batch(seed=0), _batch(seed=1)]
    clean = batches[0].clean
    measured = diagnose(jax.tree_util.Partial(apply, jnp.asarray(0.5)), clean, batches, KEY)
    calls = len(traced)
    other = diagnose(jax.tree_util.Partial(apply, jnp.asarray(0.25)), clean, batches, KEY)
    assert len(traced) == calls
    biases = np.concatenate(
        [_errors(lambda x: x / 2, batch)["on_manifold_bias"] for batch in batches]
    )
    assert np.isclose(measured["on_manifold_bias"], biases.mean())
    ratios = np.concatenate([_errors(lambda x: x / 2, batch)["contraction_1"] for batch in batches])
    assert np.isclose(measured["contraction_1"], np.median(ratios))
    assert np.isclose(measured["spectral_radius"], 0.5)
    assert np.isclose(other["jacobian_identity"], 0.75)
    assert np.isclose(other["tangent_distortion"], 0.75)
    assert all(isinstance(value, float) for value in measured.values())


def test_a_diagnostic_says_how_it_is_summarised():
    first, second = np.array([1.0, np.nan, 2.0]), np.array([9.0])
    options = {"mean": {}, "median": {"reduce": "median"}}
    options |= {f"{name} of defined": {**o, "skip_nan": True} for name, o in options.items()}
    batches = [{name: Diagnostic(v, **o) for name, o in options.items()} for v in (first, second)]
    # The settings are static: they pass through jit, and the values alone are traced.
    batches = [jax.device_get(jax.jit(lambda batch: batch)(batch)) for batch in batches]
    summary = summarise(batches)
    assert np.isnan(summary["mean"])
    assert np.isnan(summary["median"])
    assert summary["mean of defined"] == 4
    assert summary["median of defined"] == 2
    assert np.isnan(summarise([{"x": Diagnostic(first[1:2], skip_nan=True)}])["x"])


def test_a_broken_f_is_not_averaged_away():
    batch = _batch()
    broken = lambda x: jnp.where(x > jnp.quantile(x, 0.9), jnp.nan, x)  # noqa: E731
    measured = diagnose(broken, batch.clean, batch, KEY)
    assert np.isnan(measured["on_manifold_bias"])
    assert measured["fixed_point_converged"] < 1
