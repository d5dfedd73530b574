"""The method `discrepancy`: its targets, its loss, and that g does not train f."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from data_pipelines.errors import BadInput
from pae_jax import config, detection, methods
from pae_jax.corruption import CorruptedBatch, Pair
from pae_jax.methods import discrepancy

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
SIDE = 16
SMALL = {
    "method": "discrepancy",
    "data": {"size": SIDE, "texture_size": SIDE},
    "model": {"widths": (8,), "convs_per_stage": 1, "branch_width": 4, "dilation_rates": (1,)},
    "head": {"widths": (8, 8), "dilation_rates": (1,)},
    "eval": {"anomaly_map": "learned"},
}
CONFIG = config.from_config_dict(SMALL)
PROJECTION = dataclasses.replace(
    CONFIG, method="projection", eval=dataclasses.replace(CONFIG.eval, anomaly_map="ssim")
)


def examples(count: int = 2) -> CorruptedBatch:
    clean = RNG.random((count, SIDE, SIDE, 3), np.float32)
    mask = np.zeros((count, SIDE, SIDE, 1), np.float32)
    mask[:, 2:9, 4:12] = 0.7
    pattern = RNG.random(clean.shape, np.float32)
    return CorruptedBatch(*map(jnp.asarray, (mask * pattern + (1 - mask) * clean, clean, mask)))


@pytest.fixture(scope="module")
def params():
    return methods.METHODS["discrepancy"].init(CONFIG, KEY)


def test_targets_follow_the_change_inside_the_mask():
    batch = examples()
    corrupted, clean, mask = (np.float64(a) for a in batch)
    change = 255 * np.abs(corrupted - clean).mean(-1)
    mean = scipy.ndimage.uniform_filter(change, (0, 5, 5), mode="reflect")
    expected = np.where(mask[..., 0] > 0, 1 / (1 + np.exp(-(mean - 7) / 3)), 0)
    np.testing.assert_allclose(discrepancy.head_target(batch, 7.0), expected, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_loss_by_hand(gamma):
    logit, target = RNG.normal(0, 2, (2, 3, 4)), RNG.random((2, 3, 4))
    p = 1 / (1 + np.exp(-logit))
    entropy = -target * np.log(p) - (1 - target) * np.log(1 - p)
    expected = np.abs(p - target) ** gamma * entropy + np.abs(p - target) / 2
    value = discrepancy.head_loss(*map(jnp.float32, (logit, target)), gamma)
    np.testing.assert_allclose(value, expected.mean((1, 2)), rtol=1e-5)


def test_the_loss_is_least_at_the_target():
    target = jnp.full((1, 1, 1), 0.3)
    slope = jax.grad(lambda p: discrepancy.head_loss(jnp.log(p / (1 - p)), target, 2.0).sum())
    assert slope(jnp.full((1, 1, 1), 0.25)).item() < 0 < slope(jnp.full((1, 1, 1), 0.35)).item()


def test_g_does_not_train_f(params):
    """f's gradient is that of the projection; g's is that of its own term."""
    batch, keys = examples(), jax.random.split(KEY, 2)

    def loss(params, method, run_config):
        value, terms = methods.METHODS[method].loss(params, batch, keys, run_config, 0)
        return value.mean(), terms

    gradient, terms = jax.grad(loss, has_aux=True)(params, "discrepancy", CONFIG)
    alone, _ = jax.grad(loss, has_aux=True)(params["f"], "projection", PROJECTION)
    assert set(terms) == {"reconstruction", "head"}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), gradient["f"], alone
    )
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient["g"])) > 0


def test_g_alone_is_trained_on_reserved_images(params):
    """f's gradient is that of its own examples, and g's that of the reserved ones."""
    batch, other, keys = examples(), examples(), jax.random.split(KEY, 2)

    def gradient(batch):
        loss = methods.METHODS["discrepancy"].loss
        return jax.grad(lambda p: loss(p, batch, keys, CONFIG, 0)[0].mean())(params)

    mixed = gradient(Pair(batch, other))
    for network, expected in (("f", gradient(batch)), ("g", gradient(other))):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8),
            mixed[network],
            expected[network],
        )


def test_maps(params):
    x = examples().corrupted
    learned = detection.detect_float(params, x, CONFIG)
    logit = discrepancy.head_logit(params, x, learned.reconstruction, CONFIG)
    plain = dataclasses.replace(CONFIG, eval=dataclasses.replace(CONFIG.eval, smoothing="none"))
    probability = 1 / (1 + np.exp(-np.float64(logit)))
    np.testing.assert_allclose(detection.detect_float(params, x, plain).map, probability, rtol=1e-5)
    # The paper's Δ of the same f stays available.
    ssim = dataclasses.replace(CONFIG, eval=PROJECTION.eval)
    ours, theirs = (
        detection.detect_float(p, x, c) for p, c in [(params, ssim), (params["f"], PROJECTION)]
    )
    np.testing.assert_array_equal(ours.map, theirs.map)
    np.testing.assert_array_equal(learned.reconstruction, theirs.reconstruction)


def test_g_sees_windows_of_the_training_size(params):
    """Its norm takes the statistics of a window, whatever lies elsewhere in the image."""
    small = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, crop_size=8))
    x, reconstruction = (jnp.float32(RNG.random((2, SIDE, SIDE, 3))) for _ in range(2))
    logit = discrepancy.head_logit(params, x, reconstruction, small)
    # The expected map is a loop over windows that start at 0, 4 and 8.
    weight = 1 - np.abs(np.arange(8) - 3.5) / 4
    total, weights = np.zeros((2, SIDE, SIDE)), np.zeros((SIDE, SIDE))
    for top in (0, 4, 8):
        for left in (0, 4, 8):
            part = np.s_[:, top : top + 8, left : left + 8]
            alone = discrepancy.head_logit(params, x[part], reconstruction[part], small)
            total[part] += np.outer(weight, weight) * np.asarray(alone)
            weights[part[1:]] += np.outer(weight, weight)
    np.testing.assert_allclose(logit, total / weights, rtol=1e-4, atol=1e-5)
    # The first corner lies in windows that do not see the opposite quarter.
    changed = discrepancy.head_logit(params, x.at[:, 8:, 8:].set(1), reconstruction, small)
    np.testing.assert_allclose(changed[:, :4, :4], logit[:, :4, :4], atol=1e-6)
    assert np.abs(changed - logit).max() > 1e-3


def test_the_mean_map_over_symmetries(params):
    """It is the mean of the maps that are turned back, so a turned image has the turned map."""
    x = examples().corrupted
    data = dataclasses.replace(CONFIG.data, augmentation="quarter_turns")
    settings = dataclasses.replace(CONFIG.eval, symmetries=True)
    averaged = dataclasses.replace(CONFIG, data=data, eval=settings)
    turns = [jnp.rot90(x, k, axes=(1, 2)) for k in range(4)]
    maps = [detection.detect_float(params, turn, CONFIG).map for turn in turns]
    expected = np.mean([np.rot90(m, -k, axes=(1, 2)) for k, m in enumerate(maps)], axis=0)
    result = detection.detect_float(params, x, averaged)
    np.testing.assert_allclose(result.map, expected, rtol=1e-4)
    turned = detection.detect_float(params, turns[1], averaged)
    np.testing.assert_allclose(turned.map, np.rot90(result.map, axes=(1, 2)), rtol=1e-4)
    np.testing.assert_allclose(
        result.reconstruction, detection.detect_float(params, x, CONFIG).reconstruction, rtol=1e-4
    )


def test_other_methods_have_no_learned_map():
    with pytest.raises(BadInput, match=r"eval\.anomaly_map: learned needs method=discrepancy"):
        config.from_config_dict({**SMALL, "method": "projection"})
