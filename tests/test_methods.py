"""The baseline methods against their definitions and scikit-learn."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.svm import OneClassSVM

from data_pipelines import procedural
from data_pipelines.errors import BadInput
from pae_jax import config, detection, image_ops, methods, train, train_step, unet
from pae_jax.corruption import CorruptedBatch
from pae_jax.devices import sharding
from pae_jax.methods import deep_svdd, inpainting, one_class_svm, pca

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
SIDE = 16


def settings(method: str, **changes: object) -> config.Config:
    values = {
        "method": method,
        "data": {"size": SIDE, "texture_size": SIDE},
        "model": {
            "widths": (8, 8),
            "convs_per_stage": 1,
            "branch_width": 4,
            "dilation_rates": (1,),
            "dilated_kernel_size": 3,
            "norm": "none",
        },
        "train": {"batch_size": 8, "steps": 40},
        "optimizer": {"learning_rate": 1e-2},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section] = {**values.get(section, {}), name: value}
    return config.from_config_dict(values)


def images(count: int = 20, channels: int = 3, side: int = SIDE) -> np.ndarray:
    """Images so smooth that a few directions hold most of the variance."""
    base = RNG.integers(0, 256, (4, side, side, channels))
    mixed = np.einsum("ni,ihwc->nhwc", RNG.dirichlet(np.ones(4), count), base)
    return np.clip(mixed + RNG.normal(0, 4, mixed.shape), 0, 255).astype(np.uint8)


def fit(run_config: config.Config, stored: np.ndarray) -> dict:
    method = methods.METHODS[run_config.method]
    initial = method.init(run_config, KEY)
    fitted = method.fit(initial, stored, run_config)
    shapes = functools.partial(jax.tree.map, lambda leaf: (leaf.shape, leaf.dtype))
    assert shapes(fitted) == shapes(initial)
    return jax.tree.map(jnp.asarray, fitted)


def float_images(stored: np.ndarray) -> np.ndarray:
    return np.asarray(image_ops.to_float(jnp.asarray(stored)))


def batch(clean: np.ndarray, mask: np.ndarray | None = None) -> CorruptedBatch:
    """Corrupted by black where the mask is."""
    mask = np.zeros((*clean.shape[:3], 1), np.float32) if mask is None else mask
    return CorruptedBatch(*map(jnp.asarray, (clean * (1 - mask), clean, mask)))


def test_the_registry_and_the_config_name_the_same_methods():
    assert tuple(methods.METHODS) == config.METHODS
    with pytest.raises(BadInput, match=r"^method: one of projection, .*, not 'padim'$"):
        config.from_config_dict({"method": "padim"})


def test_steps_are_those_of_methods_that_take_them():
    assert methods.steps(settings("projection")) == methods.steps(settings("deep_svdd")) == 40
    assert methods.steps(settings("pca")) == methods.steps(settings("one_class_svm")) == 0


# PCA


@pytest.mark.parametrize("channels", [1, 3])
def test_pca_against_scikit_learn(channels):
    stored, unseen = images(channels=channels), images(6, channels)
    run_config = settings("pca", baseline__pca_components=5)
    f = pca.bind_pca(fit(run_config, stored), run_config)
    x = float_images(unseen)
    oracle = PCA(5, svd_solver="full").fit(np.float64(float_images(stored)).reshape(20, -1))
    flat = np.float64(x).reshape(6, -1)
    expected = np.clip(oracle.inverse_transform(oracle.transform(flat)), 0, 1).reshape(x.shape)
    projected = f(jnp.asarray(x))
    np.testing.assert_allclose(projected, expected, atol=2e-5)
    assert np.abs(expected - x).max() > 0.01  # not the identity
    # Without clipping it is an orthogonal projection; with clipping, up to this accuracy.
    np.testing.assert_allclose(f(projected), projected, atol=1e-4)


def test_pca_of_more_components_than_images_keeps_the_images():
    stored = images(6)
    run_config = settings("pca", baseline__pca_components=9)
    params = fit(run_config, stored)
    lengths = np.linalg.norm(params["components"], axis=0)
    np.testing.assert_allclose(lengths, [1] * 5 + [0] * 4, atol=1e-5)
    x = jnp.asarray(float_images(stored))
    np.testing.assert_allclose(pca.bind_pca(params, run_config)(x), x, atol=1e-5)


def test_pca_of_equal_images():
    stored = np.repeat(images(1), 3, axis=0)
    run_config = settings("pca")
    x = jnp.asarray(float_images(stored))
    np.testing.assert_allclose(pca.bind_pca(fit(run_config, stored), run_config)(x), x, atol=1e-6)


# One-class SVM


@pytest.mark.parametrize("channels", [1, 3])
def test_svm_against_scikit_learn(channels):
    stored, unseen = images(30, channels), images(9, channels)
    run_config = settings("one_class_svm", baseline__svm_side=8, baseline__svm_nu=0.3)
    params = fit(run_config, stored)
    features = functools.partial(one_class_svm.svm_features, side=8)
    seen = features(jnp.asarray(float_images(stored)))
    oracle = OneClassSVM(nu=0.3, gamma="scale").fit(np.float64(seen))
    new = features(jnp.asarray(float_images(unseen)))
    for x in (seen, new):
        decision = one_class_svm.svm_decision(params, x)
        np.testing.assert_allclose(decision, oracle.decision_function(np.float64(x)), atol=1e-5)

    _, maps = one_class_svm.svm_map(params, jnp.asarray(float_images(unseen)), run_config)
    assert maps.shape == (9, 1, 1)
    order = np.argsort(-oracle.decision_function(np.float64(new)))
    assert list(np.argsort(maps[:, 0, 0])) == list(order)
    assert 0 <= maps.min() < maps.max() < 1


def test_svm_separates_images_far_from_all_training_images():
    stored = np.clip(images(12) // 16 + 100, 0, 255).astype(np.uint8)
    run_config = settings("one_class_svm", baseline__svm_side=4)
    params = fit(run_config, stored)
    levels = np.array([0.6, 0.8, 1.0], np.float32)[:, None, None, None]
    x = jnp.asarray(np.broadcast_to(levels, (3, SIDE, SIDE, 3)))
    assert np.all(np.exp(-params["gamma"] * 3 * 16 * 0.1**2) == 0)  # k in float32
    _, maps = one_class_svm.svm_map(params, x, run_config)
    assert np.all(np.diff(maps[:, 0, 0]) > 0)
    assert maps.max() < 1


def test_svm_draws_from_many_images():
    stored = images(30)
    run_config = settings("one_class_svm", baseline__svm_side=4, baseline__svm_images=10)
    params = fit(run_config, stored)
    features = np.asarray(one_class_svm.svm_features(jnp.asarray(float_images(stored)), 4))
    support = np.asarray(params["vectors"])[np.asarray(params["weights"]) > 0]
    rows = {int(np.abs(features - row).sum(axis=1).argmin()) for row in support}
    assert len(rows) == len(support) <= 10
    assert rows != set(range(len(rows)))  # not the first ones
    # With ν·n ≤ 1 outlier allowed, all weights add up to ν·n.
    np.testing.assert_allclose(params["weights"].sum(), 0.1 * 10, rtol=1e-5)


# Deep SVDD


def test_svdd_centre_and_distance():
    stored = images(70)  # more than one batch, the last one not full
    run_config = settings("deep_svdd", baseline__svdd_dimensions=5)
    params = fit(run_config, stored)
    codes = np.float64(deep_svdd.encode(params, jnp.asarray(float_images(stored)), run_config))
    mean = codes.mean(axis=0)
    expected = np.where(np.abs(mean) < 0.1, np.sign(mean) * 0.1, mean)
    np.testing.assert_allclose(params["centre"], expected, rtol=1e-4, atol=1e-6)
    assert np.abs(params["centre"]).min() >= 0.1 - 1e-7

    x = float_images(stored[:8])
    value, terms = methods.METHODS["deep_svdd"].loss(params, batch(x), KEY, run_config, 0)
    distances = np.square(codes[:8] - expected).sum(axis=1)
    np.testing.assert_allclose(value, distances, rtol=1e-3)
    assert terms == {}
    _, maps = deep_svdd.svdd_map(params, jnp.asarray(x), run_config)
    np.testing.assert_allclose(
        maps[:, 0, 0], distances / (distances + np.square(expected).sum()), rtol=1e-3
    )


def test_svdd_has_no_biases_and_moves_a_value_of_the_centre_away_from_zero():
    run_config = settings("deep_svdd")
    params = methods.METHODS["deep_svdd"].init(run_config, KEY)
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params["encoder"])}
    assert names == {"kernel"}
    grey = np.full((3, SIDE, SIDE, 3), 255 // 2, np.uint8)  # almost 0 after centring
    centre = np.asarray(fit(run_config, grey)["centre"])
    np.testing.assert_allclose(np.abs(centre), 0.1, rtol=1e-6)
    assert len(np.unique(np.sign(centre))) == 2


# Training: a few steps on a drawn pattern


def stream(run_config: config.Config, steps: int):
    drawn = procedural_images()
    rng = np.random.default_rng(1)
    for _ in range(steps):
        rows = rng.integers(len(drawn), size=run_config.train.batch_size)
        texture = rng.integers(0, 256, (len(rows), SIDE, SIDE, 3), np.uint8)
        yield {"image": jnp.asarray(drawn[rows]), "texture": jnp.asarray(texture)}


@functools.cache
def procedural_images() -> np.ndarray:
    drawn = [procedural.draw("", "train", "good", i)[0] for i in range(32)]
    return np.stack([image[:SIDE, :SIDE] for image in drawn])


def initial(run_config: config.Config) -> train_step.TrainState:
    mesh = sharding.make_mesh(run_config, jax.devices()[:1])
    return train.initial_state(run_config, KEY, mesh, procedural_images())


def trained(run_config: config.Config) -> tuple[train_step.TrainState, list[float]]:
    state = initial(run_config)
    step = jax.jit(train_step.make_step(run_config))
    losses = []
    for drawn in stream(run_config, methods.steps(run_config)):
        state, values = step(state, drawn, KEY)
        losses.append(float(values["loss"]))
    return state, losses


def test_svdd_learns_and_leaves_its_centre():
    run_config = settings("deep_svdd", corruption__clean_fraction=1.0, optimizer__ema_decay=0.5)
    state, losses = trained(run_config)
    assert np.mean(losses[-5:]) < 0.2 * np.mean(losses[:5])
    first = initial(run_config)
    np.testing.assert_array_equal(state.params["centre"], first.params["centre"])
    np.testing.assert_array_equal(first.ema["centre"], first.params["centre"])
    np.testing.assert_allclose(state.ema["centre"], first.params["centre"], rtol=1e-5)


def test_segmentation_learns_where_the_corruption_is():
    run_config = settings(
        "segmentation",
        corruption__clean_fraction=0.0,
        corruption__min_opacity=0.9,
        corruption__min_axis=0.2,
        train__steps=80,
    )
    state, losses = trained(run_config)
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    examples = train_step.make_examples(
        next(stream(run_config, 1)), jax.random.key(7), 0, run_config
    )
    detections = detection.detect_float(
        state.params, examples.corrupted, without_smoothing(run_config)
    )
    assert detections.reconstruction is None
    assert 0 <= detections.map.min() < detections.map.max() <= 1
    inside = np.asarray(examples.mask[..., 0]) > 0.1
    assert detections.map[inside].mean() > 2 * detections.map[~inside].mean()


def without_smoothing(run_config: config.Config) -> config.Config:
    return dataclasses.replace(
        run_config, eval=dataclasses.replace(run_config.eval, smoothing="none")
    )


def test_segmentation_loss_by_hand():
    run_config = settings("segmentation")
    params = methods.METHODS["segmentation"].init(run_config, KEY)
    clean = float_images(images(3))
    mask = RNG.random((3, SIDE, SIDE, 1)).astype(np.float32) * 0.2
    value, terms = methods.METHODS["segmentation"].loss(
        params, batch(clean, mask), KEY, run_config, 0
    )
    # The sigmoid output is inverted in float64, independently of the logit that the loss uses.
    output = np.float64(unet.bind(run_config.model, params)(jnp.asarray(clean * (1 - mask))))
    p = 1 / (1 + np.exp(-np.log(output / (1 - output)).mean(axis=-1)))
    t = mask[..., 0] > 0.1
    entropy = -np.where(t, np.log(p), np.log(1 - p)).mean(axis=(1, 2))
    dice = 1 - (2 * (p * t).sum((1, 2)) + 1) / (p.sum((1, 2)) + t.sum((1, 2)) + 1)
    np.testing.assert_allclose(terms["cross_entropy"], entropy, rtol=1e-4)
    np.testing.assert_allclose(terms["dice"], dice, rtol=1e-4)
    np.testing.assert_allclose(value, entropy + dice, rtol=1e-4)


def saturated(params: dict, logit: float) -> dict:
    """The network with this logit at every pixel, for every image."""
    params = jax.tree.map(jnp.zeros_like, params)
    bias = params["params"]["Conv_0"]["bias"]
    params["params"]["Conv_0"]["bias"] = jnp.full_like(bias, logit)
    return params


@pytest.mark.parametrize(("logit", "label"), [(-60.0, 1.0), (60.0, 0.0), (60.0, 1.0)])
def test_segmentation_loss_of_a_saturated_logit(logit, label):
    """A clipped or rounded probability has no gradient; the loss of a logit keeps it."""
    run_config = settings("segmentation")
    method = methods.METHODS["segmentation"]
    params = saturated(method.init(run_config, KEY), logit)
    clean = float_images(images(2))
    examples = batch(clean, np.full((2, SIDE, SIDE, 1), label, np.float32))

    def entropy(params):
        _, terms = method.loss(params, examples, KEY, run_config, 0)
        return terms["cross_entropy"].mean()

    value, gradient = jax.value_and_grad(entropy)(params)
    # −log σ(s) = log(1 + e⁻ˢ) for the right sign s of the logit.
    right = np.float64(logit if label else -logit)
    np.testing.assert_allclose(value, np.log1p(np.exp(-right)), rtol=1e-5)
    slope = np.sum(gradient["params"]["Conv_0"]["bias"])
    sign = -1 if label else 1
    np.testing.assert_allclose(slope, sign / (1 + np.exp(right)), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("method", ["projection", "inpainting"])
@pytest.mark.parametrize("bias", [-1e4, 1e4])
def test_reconstructions_and_maps_stay_in_the_unit_interval(method, bias):
    """A residual output exceeds it by half a grey level; f itself is not clipped."""
    run_config = settings(
        method,
        model__output="residual_logit",
        eval__anomaly_map="mse",
        eval__smoothing="none",
    )
    params = methods.METHODS[method].init(run_config, KEY)
    params["params"]["Conv_0"]["bias"] += bias
    x = image_ops.to_float(jnp.asarray([[0], [255]], jnp.uint8)[:, :, None, None])
    x = jnp.broadcast_to(x, (2, SIDE, SIDE, 3))
    f = unet.bind(run_config.model, params)
    assert np.abs(f(x) - (bias > 0)).max() == pytest.approx(1 / 510, rel=1e-3)
    detections = detection.detect_float(params, x, run_config)
    np.testing.assert_array_equal(detections.reconstruction, bias > 0)
    assert detections.map.min() == 0 and detections.map.max() == 1


def test_the_segmentation_network_has_no_residual_output():
    """With output="residual_logit" an untrained U-Net returns the image; here it must not."""
    run_config = settings("segmentation", model__output="residual_logit")
    plain = settings("segmentation")
    params = methods.METHODS["segmentation"].init(run_config, KEY)
    x = jnp.asarray(float_images(images(2)))
    first, second = (detection.detect_float(params, x, c).map for c in (run_config, plain))
    np.testing.assert_array_equal(first, second)


# Inpainting


@pytest.mark.parametrize("shape", [(16, 16), (17, 30)])
@pytest.mark.parametrize("side", inpainting.CELL_SIDES)
def test_the_sets_are_disjoint_and_cover_the_image(shape, side):
    sets = inpainting.inpainting_sets(shape, side)
    assert sets.shape == (3, *shape)
    np.testing.assert_array_equal(sets.sum(axis=0), 1)
    np.testing.assert_array_equal(sets, inpainting.inpainting_sets(shape, side))
    # Cells are whole: constant on side × side blocks, and equally shared by the sets.
    corners = sets[:, ::side, ::side]
    spread = corners.repeat(side, 1).repeat(side, 2)[:, : shape[0], : shape[1]]
    np.testing.assert_array_equal(sets, spread)
    counts = corners.sum(axis=(1, 2))
    assert counts.max() - counts.min() <= 1


def test_no_pixel_takes_part_in_its_own_reconstruction(monkeypatch):
    """If the network is replaced by the identity, hidden cells are filled in with black."""
    run_config = settings("inpainting", eval__anomaly_map="mse", eval__smoothing="none")
    monkeypatch.setattr(unet, "bind", lambda model, params: lambda x: x)
    x = jnp.asarray(float_images(images(2)))
    detections = detection.detect_float({}, x, run_config)
    np.testing.assert_array_equal(detections.reconstruction, jnp.zeros_like(x))
    np.testing.assert_allclose(detections.map, jnp.mean(x**2, axis=-1), rtol=1e-5)
    # If the network knows the hidden pixels, nothing is anomalous.
    calls = []

    def oracle(seen):
        calls.append(seen.shape)
        return jnp.concatenate([x, x, x])

    monkeypatch.setattr(unet, "bind", lambda model, params: oracle)
    np.testing.assert_allclose(detection.detect_float({}, x, run_config).map, 0, atol=1e-12)
    assert calls == [(6, SIDE, SIDE, 3)] * 3  # at 16², cells of 2, 4 and 8


# All methods


@pytest.mark.parametrize("method", [name for name, m in methods.METHODS.items() if not m.localises])
def test_scores_of_whole_images_are_one_number(method):
    run_config = settings(method)
    params = fit(run_config, images())
    detections = detection.detect(params, jnp.asarray(images(4)), run_config)
    assert detections.map.shape == (4, SIDE, SIDE)
    for score in detections.scores.values():
        np.testing.assert_array_equal(score, detections.map[:, 3, 5])
    assert len(np.unique(detections.scores["sum"])) == 4


@pytest.mark.parametrize("method", [name for name, m in methods.METHODS.items() if m.fixed_size])
def test_crops_are_refused_where_images_must_be_whole(method):
    methods.check(settings(method, data__crop_size=SIDE))
    with pytest.raises(BadInput, match=rf"^data\.crop_size: {method} needs whole images"):
        methods.check(settings(method, data__crop_size=8))


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    methods.check(settings("projection"))
    with pytest.raises(BadInput, match=r"^method: one_class_svm needs the package sklearn: pip"):
        methods.check(settings("one_class_svm"))


@pytest.mark.parametrize("method", ["pca", "deep_svdd"])
def test_fitted_parameters_are_sharded_as_the_state(method):
    run_config = settings(method, sharding__model_parallel=2, sharding__data_parallel=2)
    mesh = sharding.make_mesh(run_config, jax.devices()[:4])
    state = train.initial_state(run_config, KEY, mesh, procedural_images())
    alone = initial(settings(method))
    for leaf, other in zip(jax.tree.leaves(state), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-6)
    wanted = sharding.state_sharding(mesh, state)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == wanted
