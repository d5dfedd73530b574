"""Images that are reserved for the second network, from the split to the trained parameters."""

import json
import shutil

import jax
import numpy as np
import pytest

import runs
from pae_jax import population, train, train_step
from pae_jax.workdir import record, trained_model
from pae_jax.workdir import run as workdir_run

SETTINGS = {
    "method": "discrepancy",
    "head__widths": (4,),
    "head__dilation_rates": (1,),
    "head__reserved_fraction": 0.4,
    "model__norm": "none",
    "optimizer__learning_rate": 1e-3,
    "train__steps": 6,
    "train__validate_every": 6,
    "train__checkpoint_every": 3,
}


def load(root, **changes):
    return runs.load_config(root, **(SETTINGS | changes))


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    assert train.train_and_evaluate(load(trained.root), workdir).outcome == train.FINISHED
    return workdir


def assert_close(workdir, other):
    """f's parameters and the losses of g are close.

    Adam turns rounding errors of g's gradient, which its norm makes zero, into full steps.
    """

    def read(folder):
        step, state = trained_model.restore(folder, record.read_config(folder))
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        losses = [line["train/head"] for line in lines if "train/head" in line]
        return step, jax.tree.leaves(state.params["f"]), losses

    (step, leaves, losses), (other_step, others, other_losses) = read(workdir), read(other)
    assert step == other_step
    np.testing.assert_allclose(losses, other_losses, rtol=1e-4)
    for leaf, another in zip(leaves, others, strict=True):
        np.testing.assert_allclose(leaf, another, rtol=1e-6, atol=1e-6)


def test_only_a_second_network_has_reserved_images(trained):
    assert workdir_run.open_images(load(trained.root)).reserved == 4  # of 8
    assert workdir_run.open_images(load(trained.root, method="projection")).reserved == 0
    assert workdir_run.open_images(load(trained.root, head__reserved_fraction=0)).reserved == 0


def test_f_never_sees_them(trained):
    """Other reserved images change g and nothing of f, which is trained as if there were none."""
    config = load(trained.root)
    key = jax.random.key(0)
    draw = np.random.default_rng(0).integers
    pixels = [draw(0, 256, (4, 16, 16, 3), dtype=np.uint8) for _ in range(4)]
    batch = dict(zip(("image", "texture", "reserved"), pixels, strict=False))
    step = jax.jit(train_step.make_step(config))
    state = train_step.init_state(config, key)
    first, other, without = (
        step(state, b, key)[0].params
        for b in (
            batch,
            batch | {"reserved": pixels[3]},
            {name: batch[name] for name in ("image", "texture")},
        )
    )
    jax.tree.map(np.testing.assert_array_equal, first["f"], other["f"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        first["f"],
        without["f"],
    )
    different = jax.tree.map(lambda a, b: bool((a != b).any()), first["g"], other["g"])
    assert any(jax.tree.leaves(different))


def test_examples_of_both_networks_have_random_numbers_of_their_own(trained):
    config = load(trained.root)
    image = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    batch = {"image": image, "texture": image, "reserved": image}
    first, second = train_step.make_examples(jax.device_put(batch), jax.random.key(0), 0, config)
    np.testing.assert_array_equal(first.clean, second.clean)
    assert (np.asarray(first.mask) != np.asarray(second.mask)).any(axis=(1, 2, 3)).all()
    del batch["reserved"]
    alone = train_step.make_examples(jax.device_put(batch), jax.random.key(0), 0, config)
    jax.tree.map(np.testing.assert_array_equal, first, alone)


@pytest.mark.parametrize(
    "changes",
    [
        {"data__on_device": "yes", "train__steps_per_call": 3},
        {"train__grad_accumulation_steps": 2},
        {"sharding__data_parallel": 4},
        {"sharding__data_parallel": 2, "sharding__transform": "pmap"},
    ],
)
def test_the_same_on_any_device(trained, alone, tmp_path, changes):
    config = load(trained.root, **changes)
    assert train.train_and_evaluate(config, tmp_path).outcome == train.FINISHED
    assert_close(tmp_path, alone)


def test_resumed_bit_for_bit(trained, alone, tmp_path):
    config, resumed = load(trained.root), tmp_path / "run"
    shutil.copytree(alone, resumed)
    shutil.rmtree(resumed / "checkpoints/6")
    assert runs.read_state(resumed)[0] == 3
    assert train.train_and_evaluate(config, resumed).outcome == train.FINISHED
    runs.assert_same_state(resumed, alone)


def test_members_of_a_population(trained, alone, tmp_path, monkeypatch):
    """Two seeds, hence two splits, on one device, resident there."""
    devices = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    members = [
        (load(trained.root, train__seed=seed, data__on_device="yes"), tmp_path / str(seed))
        for seed in (1, 0)
    ]
    population.train_population(members)
    assert_close(tmp_path / "0", alone)


def test_the_start_names_them(trained, tmp_path, messages):
    train.train_and_evaluate(load(trained.root), tmp_path)
    expected = "images: 8 (4 of them for the second network alone) for training, 4 held out"
    assert any(message.startswith(expected) for message in messages), messages
