"""Eq. 1 against numpy in float64; the assembled objective; the noise form's predicted value."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from pae_jax import rng
from pae_jax.config import (
    Config,
    IdempotencyConfig,
    IdentityConfig,
    JacobianConfig,
    ObjectiveConfig,
    SsimConfig,
)
from pae_jax.corruption import CorruptedBatch
from pae_jax.objective import Hyperparameters, objective, reconstruction_loss, without_penalties

KEY = jax.random.key(0)
SHAPE = (3, 4, 5, 2)


def _batch(shape=SHAPE, seed=0):
    random = np.random.default_rng(seed)
    clean = random.random(shape)
    mask = random.random((*shape[:3], 1))
    corrupted = mask * random.random(shape) + (1 - mask) * clean
    return CorruptedBatch(*(jnp.asarray(a, jnp.float32) for a in (corrupted, clean, mask)))


class Counted:
    """A smooth f that counts how often it is traced."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return jnp.sin(x) + 0.3 * jnp.roll(x, 1, axis=2) ** 2


ALL = ObjectiveConfig(
    jacobian=JacobianConfig(weight=0.5),
    idempotency=IdempotencyConfig(weight=2.0),
    identity=IdentityConfig(weight=3.0),
)
NAMES = ("reconstruction", "jacobian", "idempotency", "identity")


def _equation_1(reconstruction, target, mask, weight):
    """Eq. 1, image by image, in float64, with the mask repeated over the channels."""
    losses = []
    arrays = (np.asarray(a, np.float64) for a in (reconstruction, target, mask))
    for f, x, mask_of_pixels in zip(*arrays, strict=True):
        m = np.repeat(mask_of_pixels, x.shape[-1], axis=-1)
        loss = 0.0
        for share, region in ((1 - weight, 1 - m), (weight, m)):
            if np.abs(region).sum() > 0:
                loss += share / np.abs(region).sum() * np.linalg.norm(region * (f - x)) ** 2
        losses.append(loss)
    return np.array(losses)


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
def test_equation_1(weight):
    reconstruction, target, mask = _batch()
    mask = mask.at[0].set(0.0).at[1].set(1.0)  # one region is empty: its term is 0
    loss = jax.jit(reconstruction_loss)(reconstruction, target, mask, weight=weight)
    np.testing.assert_allclose(
        loss, _equation_1(reconstruction, target, mask, weight), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_gradient_of_an_empty_region_is_zero(value):
    reconstruction, target, _ = _batch()
    mask = jnp.full((*SHAPE[:3], 1), value)
    loss, gradient = jax.value_and_grad(lambda r: reconstruction_loss(r, target, mask).sum())(
        reconstruction
    )
    # The other region alone is left: half the mean squared error per value.
    values = SHAPE[1] * SHAPE[2] * SHAPE[3]
    np.testing.assert_allclose(gradient, (reconstruction - target) / values, rtol=1e-4, atol=1e-8)
    assert np.isfinite(loss)


def test_without_penalties_the_objective_is_equation_1_and_calls_f_once():
    f, batch = Counted(), _batch()
    result = objective(f, batch, KEY, ObjectiveConfig(mask_weight=0.3), 0)
    assert f.calls == 1
    assert list(result.terms) == ["reconstruction"]
    expected = _equation_1(Counted()(batch.corrupted), batch.clean, batch.mask, 0.3)
    np.testing.assert_allclose(result.loss, expected, rtol=1e-5)
    np.testing.assert_array_equal(result.terms["reconstruction"], result.loss)


@pytest.mark.parametrize(
    ("config", "calls"),
    [
        (ALL, 3),  # x̂, f(x̂), x
        (dataclasses.replace(ALL, idempotency=IdempotencyConfig()), 2),
        (dataclasses.replace(ALL, identity=IdentityConfig()), 2),
        (dataclasses.replace(ALL, jacobian=JacobianConfig(weight=1.0, at="clean")), 3),
        (ObjectiveConfig(jacobian=JacobianConfig(weight=1.0)), 1),
        (ObjectiveConfig(jacobian=JacobianConfig(weight=1.0, probes=4)), 1),
        (ObjectiveConfig(jacobian=JacobianConfig(weight=1.0, every=2)), 1),
    ],
)
def test_every_point_is_evaluated_once(config, calls):
    f = Counted()
    objective(f, _batch(), KEY, config, 0)
    assert f.calls == calls


def test_the_loss_is_the_weighted_sum_of_its_terms():
    f, batch = Counted(), _batch()
    result = jax.jit(lambda b: objective(f, b, KEY, ALL, 0))(batch)
    t = result.terms
    total = t["reconstruction"] + 0.5 * t["jacobian"] + 2 * t["idempotency"] + 3 * t["identity"]
    np.testing.assert_allclose(result.loss, total, rtol=1e-6)
    np.testing.assert_allclose(result.reconstruction, f(batch.corrupted), rtol=1e-5)
    again = f(result.reconstruction) - result.reconstruction
    np.testing.assert_allclose(t["idempotency"], np.mean(again**2, axis=(1, 2, 3)), rtol=1e-4)
    bias = f(batch.clean) - batch.clean
    np.testing.assert_allclose(t["identity"], np.mean(bias**2, axis=(1, 2, 3)), rtol=1e-4)


def test_weights_replace_the_values_of_the_config_and_may_be_traced():
    f, batch = Counted(), _batch()
    config = dataclasses.replace(ALL, noise=0.1)
    other = dataclasses.replace(
        config,
        mask_weight=0.2,
        noise=0.3,
        jacobian=JacobianConfig(weight=0.7),
        idempotency=IdempotencyConfig(weight=0.1),
        identity=IdentityConfig(weight=4.0),
    )
    weights = Hyperparameters.from_config(Config(objective=other))
    traced = jax.jit(lambda weights: objective(f, batch, KEY, config, 0, weights=weights))
    result, expected = traced(weights), objective(f, batch, KEY, other, 0)
    assert set(result.terms) == set(NAMES)
    for name in NAMES:
        np.testing.assert_allclose(result.terms[name], expected.terms[name], rtol=1e-5)
    np.testing.assert_allclose(result.loss, expected.loss, rtol=1e-5)


def test_the_config_alone_decides_which_terms_are_computed():
    weights = Hyperparameters.from_config(Config(objective=ALL))
    result = objective(Counted(), _batch(), KEY, ObjectiveConfig(), 0, weights=weights)
    assert list(result.terms) == ["reconstruction"]
    everything = dataclasses.replace(ALL, ssim=SsimConfig(weight=1.0))
    result = objective(Counted(), _batch((2, 12, 12, 3)), KEY, everything, 0)
    assert list(result.terms) == [*NAMES, "ssim"]


def test_the_jacobian_term_is_taken_where_the_config_says():
    batch = _batch()
    for at, x in (("corrupted", batch.corrupted), ("clean", batch.clean)):
        config = ObjectiveConfig(
            jacobian=JacobianConfig(weight=1.0, form="squared", at=at, normalize=False)
        )
        result = objective(lambda x: x**2, batch, KEY, config, 0)
        # J − I is diagonal: a Rademacher probe gives its norm exactly.
        expected = np.sum((2 * np.asarray(x) - 1) ** 2, axis=(1, 2, 3))
        np.testing.assert_allclose(result.terms["jacobian"], expected, rtol=1e-5)


def test_the_jacobian_term_acts_at_every_kth_step_k_times_as_strongly():
    batch = _batch()
    always = objective(jnp.square, batch, KEY, ALL, 0).terms["jacobian"]
    config = dataclasses.replace(ALL, jacobian=dataclasses.replace(ALL.jacobian, every=3))
    at = jax.jit(lambda step: objective(jnp.square, batch, KEY, config, step))
    for step in range(7):
        result = at(step)
        expected = 3 * always if step % 3 == 0 else 0 * always
        np.testing.assert_allclose(result.terms["jacobian"], expected, rtol=1e-6)
        np.testing.assert_allclose(result.reconstruction, jnp.square(batch.corrupted), rtol=1e-6)


def test_an_image_does_not_depend_on_the_batch_size():
    config = dataclasses.replace(ALL, noise=0.1)
    batch = _batch()
    whole = objective(Counted(), batch, KEY, config, 0)
    first = objective(Counted(), CorruptedBatch(*(a[:1] for a in batch)), KEY, config, 0)
    for name, term in whole.terms.items():
        np.testing.assert_allclose(first.terms[name], term[:1], rtol=1e-5, err_msg=name)


def test_noise_changes_equation_1_alone():
    batch, config = _batch(), dataclasses.replace(ALL, noise=0.2)
    quiet = objective(Counted(), batch, KEY, ALL, 0)
    noisy = objective(Counted(), batch, KEY, config, 0)
    # The identity penalty is evaluated on the manifold, hence without the noise.
    np.testing.assert_array_equal(noisy.terms["identity"], quiet.terms["identity"])
    assert np.all(noisy.terms["reconstruction"] != quiet.terms["reconstruction"])
    # Input and target get the same noise, which therefore cancels for the identity map.
    for sigma in (0.0, 0.2):
        still = objective(lambda x: x, batch, KEY, ObjectiveConfig(noise=sigma), 0)
        expected = _equation_1(batch.corrupted, batch.clean, batch.mask, 0.5)
        np.testing.assert_allclose(still.loss, expected, rtol=1e-3)


def test_the_noise_forms_predicted_value(float64):
    """E[loss(σ)] − loss(0) = σ² Σ w (‖(J−I)ₚ‖² + (f(x̂)−x)ₚ Δfₚ), w the weights of eq. 1."""
    sigma, copies, shape = 0.03, 100_000, (2, 2, 1)
    random = np.random.default_rng(1)
    d = 4
    weights = random.normal(size=(d, d)) / 2
    curvature = random.normal(size=(d, d)) / 2

    def f_flat(x):
        return weights @ x + (curvature @ x) ** 2

    def f(x):
        return jax.vmap(f_flat)(x.reshape(-1, d)).reshape(x.shape)

    clean, corrupted = jnp.asarray(random.random((2, *shape)))
    mask = jnp.asarray(random.random(shape))

    jacobian = jax.jacfwd(f_flat)(corrupted.ravel())
    laplacian = jnp.trace(jax.hessian(f_flat)(corrupted.ravel()), axis1=1, axis2=2)
    m = mask.ravel()
    w = 0.5 * (1 - m) ** 2 / jnp.sum(1 - m) + 0.5 * m**2 / jnp.sum(m)
    residual = f(corrupted[None]).ravel() - clean.ravel()
    square = sigma**2 * jnp.sum(w * jnp.sum((jacobian - jnp.eye(d)) ** 2, axis=1))
    extra = sigma**2 * jnp.sum(w * residual * laplacian)

    batch = CorruptedBatch(
        *(jnp.broadcast_to(a, (copies, *shape)) for a in (corrupted, clean, mask))
    )

    @jax.jit
    def run():
        config = ObjectiveConfig(noise=sigma)
        # The identity map returns x̂ + σε; this gives the noise for the first-order term below.
        noise = objective(lambda x: x, batch, KEY, config, 0).reconstruction - batch.corrupted
        return objective(f, batch, KEY, config, 0).loss, noise.reshape(copies, d)

    noisy, noise = run()
    quiet = objective(f, CorruptedBatch(*(a[:1] for a in batch)), KEY, ObjectiveConfig(), 0).loss
    # The first-order term has mean 0 and is subtracted to reduce the variance.
    first_order = noise @ (2 * (w * residual) @ (jacobian - jnp.eye(d)))
    gain = noisy - quiet - first_order
    standard_error = jnp.std(gain) / np.sqrt(copies)
    assert standard_error < 0.005 * (square + extra)  # the 2 % below are not noise
    np.testing.assert_allclose(jnp.mean(gain), square + extra, rtol=0.02)
    assert abs(extra) > 0.1 * square  # without its extra term the prediction would be wrong


def test_probes_differ_between_images():
    config = ObjectiveConfig(jacobian=JacobianConfig(weight=1.0, distribution="gaussian"))
    batch = CorruptedBatch(*(jnp.broadcast_to(a[:1], a.shape) for a in _batch()))
    terms = objective(lambda x: 0 * x, batch, KEY, config, 0).terms["jacobian"]
    assert len(np.unique(terms)) == len(terms)


def test_keys_per_image_give_the_same_result_for_a_part_of_the_batch():
    config = dataclasses.replace(ALL, noise=0.1)
    batch, keys = _batch(), rng.example_keys(KEY, SHAPE[0])
    whole = objective(Counted(), batch, keys, config, 0).loss
    part = objective(Counted(), CorruptedBatch(*(a[1:] for a in batch)), keys[1:], config, 0).loss
    np.testing.assert_allclose(part, whole[1:], rtol=1e-5)


def test_the_ssim_term_against_scikit_image():
    """1 − SSIM(f(x̂), x), mean over pixels and channels; λ = 1 and M = 0 leave nothing else."""
    corrupted, clean, _ = _batch((2, 14, 17, 3))
    batch = CorruptedBatch(corrupted, clean, jnp.zeros((2, 14, 17, 1)))
    config = ObjectiveConfig(mask_weight=1.0, ssim=SsimConfig(weight=1.0))

    def loss(scale):
        return objective(lambda x: scale * x, batch, KEY, config, 0).loss

    actual = jax.jit(loss)(0.5)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = [
        1 - structural_similarity(f, x, data_range=1.0, channel_axis=-1, full=True, **options)[1]
        for f, x in zip(np.float64(0.5 * corrupted), np.float64(clean), strict=True)
    ]
    np.testing.assert_allclose(actual, np.mean(expected, axis=(1, 2, 3)), rtol=1e-4)
    step = 1e-2
    slope = (loss(0.5 + step) - loss(0.5 - step)) / (2 * step)
    np.testing.assert_allclose(jax.jacfwd(loss)(0.5), slope, rtol=0.02)
    # The minimum is 0, and its slope is 0 and finite.
    same = CorruptedBatch(clean, clean, batch.mask)
    value, slope = jax.value_and_grad(
        lambda scale: objective(lambda x: scale * x, same, KEY, config, 0).loss.sum()
    )(1.0)
    assert (value, slope) == (0, 0)


def test_without_penalties_keeps_the_terms_that_compare_with_the_target():
    config = dataclasses.replace(ALL, mask_weight=0.3, noise=0.1, ssim=SsimConfig(weight=2.0))
    assert without_penalties(config) == ObjectiveConfig(
        mask_weight=0.3, ssim=SsimConfig(weight=2.0)
    )
