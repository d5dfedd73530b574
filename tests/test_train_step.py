"""The training step: learning, metrics, moving average, examples and hyperparameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pae_jax import config, train_step
from pae_jax.objective import Hyperparameters

KEY = jax.random.key(3)
CONFIG = config.from_config_dict(
    {
        "data": {"size": 16, "texture_size": 16, "crop_size": 12, "augmentation": "flips"},
        "model": {
            "widths": (4,),
            "convs_per_stage": 1,
            "bottleneck_layers": 1,
            "branch_width": 4,
            "dilation_rates": (1,),
            "dilated_kernel_size": 3,
        },
        "corruption": {"mask": "boxes"},
        "optimizer": {"learning_rate": 1e-2, "ema_decay": 0.75},
        "train": {"steps": 40, "batch_size": 8},
    }
)

pytestmark = pytest.mark.usefixtures("compilation_cache")


@functools.cache
def batch(channels=1):
    """Returns similar smooth images, and noise as textures."""
    random = np.random.default_rng(0)
    ramp = np.linspace(40, 200, 16).astype(np.uint8)
    images = np.broadcast_to(ramp[:, None, None], (16, 16, channels))
    images = np.stack([images + random.integers(0, 20, dtype=np.uint8) for _ in range(8)])
    return {
        "image": jnp.asarray(images),
        "texture": jnp.asarray(random.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)),
    }


@functools.cache
def steps(count):
    """Returns the states and metrics of the first `count` steps."""
    step = jax.jit(train_step.make_step(CONFIG))
    states, metrics = [jax.jit(functools.partial(train_step.init_state, CONFIG))(KEY)], []
    for _ in range(count):
        state, values = step(states[-1], batch(), KEY)
        states.append(state)
        metrics.append({name: float(value) for name, value in values.items()})
    return states, metrics


def test_it_learns():
    _, metrics = steps(40)
    losses = [values["loss"] for values in metrics]
    assert np.all(np.isfinite([list(values.values()) for values in metrics]))
    assert np.mean(losses[-5:]) < 0.3 * np.mean(losses[:5])


def test_metrics_and_counters():
    states, metrics = steps(40)
    assert [int(state.step) for state in states] == list(range(41))
    for values in metrics:
        assert set(values) == {
            "loss",
            "reconstruction",
            "learning_rate",
            "gradient_norm",
            "update_norm",
            "parameter_norm",
        }
        assert values["loss"] == values["reconstruction"]  # no penalties in this config
    np.testing.assert_allclose(metrics[-1]["parameter_norm"], norm(states[-1].params), rtol=1e-5)
    update = jax.tree.map(np.subtract, states[-1].params, states[-2].params)
    np.testing.assert_allclose(metrics[-1]["update_norm"], norm(update), rtol=1e-4)


def norm(tree) -> float:
    leaves = jax.tree.leaves(tree)
    return np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in leaves))


def test_the_learning_rate_is_that_of_the_update():
    """The first update of a warm-up has the rate 0 and changes nothing."""
    section = {"learning_rate": 1e-2, "warmup_steps": 4}
    step = jax.jit(
        train_step.make_step(config.from_config_dict({**CONFIG.to_dict(), "optimizer": section}))
    )
    state = jax.jit(functools.partial(train_step.init_state, CONFIG))(KEY).replace(ema=None)
    rates, updates = [], []
    for _ in range(6):
        state, values = step(state, batch(), KEY)
        rates.append(float(values["learning_rate"]))
        updates.append(float(values["update_norm"]))
    np.testing.assert_allclose(rates, [0, 0.0025, 0.005, 0.0075, 0.01, 0.01], rtol=1e-6)
    assert updates[0] == 0 < min(updates[1:])


def test_the_moving_average_of_the_parameters():
    """The decay is (1 + n) / (10 + n) in the n-th update until that exceeds 0.75, at n = 26."""
    states, _ = steps(40)
    average = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(states[0].params)]
    decays = []
    for n, state in enumerate(states[1:], start=1):
        decays.append(min(0.75, (1 + n) / (10 + n)))
        leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(state.params)]
        average = [
            decays[-1] * old + (1 - decays[-1]) * new
            for old, new in zip(average, leaves, strict=True)
        ]
        for got, want in zip(jax.tree.leaves(state.ema), average, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    assert decays[0] == 2 / 11
    assert [decay == 0.75 for decay in decays].index(True) == 25
    assert states[3].eval_params is states[3].ema


def test_hyperparameters_are_arguments():
    """Traced values give the step of a config that holds them; None takes those of the config."""
    section = {"learning_rate": 3e-3}
    other = config.from_config_dict(
        {**CONFIG.to_dict(), "optimizer": section, "objective": {"mask_weight": 0.2}}
    )
    values = jax.tree.map(jnp.float32, Hyperparameters.from_config(other))
    state = jax.jit(functools.partial(train_step.init_state, other))(KEY)
    plain = config.from_config_dict({**CONFIG.to_dict(), "optimizer": {}})
    passed = jax.jit(train_step.make_step(plain))(state, batch(), KEY, values)
    held = jax.jit(train_step.make_step(other))(state, batch(), KEY)
    default = jax.jit(train_step.make_step(plain))(state, batch(), KEY)
    for name in ("loss", "learning_rate", "update_norm"):
        np.testing.assert_allclose(passed[1][name], held[1][name], rtol=1e-5)
        assert abs(passed[1][name] / default[1][name] - 1) > 0.01, name


def test_without_an_average_the_parameters_are_evaluated():
    plain = config.from_config_dict({**CONFIG.to_dict(), "optimizer": {}})
    state = jax.eval_shape(functools.partial(train_step.init_state, plain), KEY)
    assert state.ema is None
    assert state.eval_params is state.params


def test_examples_depend_only_on_step_and_position():
    make = jax.jit(functools.partial(train_step.make_examples, config=CONFIG))
    whole = make(batch(), KEY, 5)
    half = {name: array[4:] for name, array in batch().items()}
    part = make(half, KEY, 5, first=4)
    assert whole.clean.shape == (8, 12, 12, 3)
    for array, whole_array in zip(part, whole, strict=True):
        np.testing.assert_allclose(array, whole_array[4:], atol=1e-6)
    other_step = make(batch(), KEY, 6)
    assert np.abs(other_step.mask - whole.mask).max() > 0.1
    # Grey images stay grey under colour textures.
    np.testing.assert_array_equal(whole.corrupted[..., 0], whole.corrupted[..., 2])
    for array in whole:
        assert array.min() >= 0
        assert array.max() <= 1
    # Eq. 13: outside the mask nothing is changed.
    outside = np.broadcast_to(np.asarray(whole.mask) == 0, whole.clean.shape)
    np.testing.assert_array_equal(whole.corrupted[outside], whole.clean[outside])
    assert 0 < outside.mean() < 1


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, {0: 1.0, 50: 1.0, 99: 1.0}),
        ("constant", 10, {0: 0.0, 5: 0.5, 10: 1.0, 99: 1.0}),
        ("cosine", 0, {0: 1.0, 25: 0.5 + 0.5**1.5, 50: 0.5, 100: 0.0}),
        ("cosine", 20, {0: 0.0, 10: 0.5, 20: 1.0, 60: 0.5, 100: 0.0}),
    ],
)
def test_learning_rate(schedule, warmup, expected):
    section = config.OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_steps=warmup)
    rate = train_step.learning_rate(section, 100)
    for step, value in expected.items():
        np.testing.assert_allclose(rate(step), 2 * value, atol=1e-6)


def test_clipping_by_the_global_norm():
    clipped = config.from_config_dict({"optimizer": {"clip_norm": 1.0}})
    gradient = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}  # of norm 5
    for settings, scale in ((clipped, 1 / 5), (config.Config(), 1.0)):
        transform = train_step.optimizer(settings)
        _, state = transform.update(gradient, transform.init(gradient))
        mean = next(
            leaf.mu
            for leaf in jax.tree.leaves(state, is_leaf=lambda node: hasattr(node, "mu"))
            if hasattr(leaf, "mu")
        )
        np.testing.assert_allclose(mean["a"], [0.1 * 3 * scale, 0], rtol=1e-6)
        np.testing.assert_allclose(mean["b"], [[0.1 * 4 * scale]], rtol=1e-6)
