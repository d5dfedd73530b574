"""Validation: fixed examples, and metrics against numpy and scikit-learn."""

import functools

import jax
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

import runs
from data_pipelines.dataset import open_training
from data_pipelines.textures import open_textures
from pae_jax import anomaly_map, rng, train_step, unet
from pae_jax.workdir import trained_model, validation

pytestmark = pytest.mark.usefixtures("compilation_cache")


@functools.cache
def held_out(root):
    data = runs.load_config(root).data
    images = open_training(data.spec, holdout_fraction=data.holdout_fraction, seed=0)
    textures = open_textures(data.textures, size=16, cache_dir=data.cache_dir, seed=0)
    return images.held_out, textures.held_out


def examples(root, **changes):
    return validation.fixed_examples(*held_out(root), runs.load_config(root, **changes))


def stack(batches, name):
    return np.concatenate([getattr(batch, name) for batch in batches])


def test_the_examples_are_fixed_and_held_out(trained):
    first, again = examples(trained.root), examples(trained.root)
    for name in ("corrupted", "clean", "mask"):
        np.testing.assert_array_equal(stack(first, name), stack(again, name))
    clean = stack(first, "clean")
    assert len(clean) == 8
    images, _ = held_out(trained.root)
    for i, image in enumerate(clean):  # taken in turn
        np.testing.assert_allclose(
            image, np.repeat(images[i % len(images)], 3, -1) / 255, atol=1e-6
        )
    masks = stack(first, "mask")
    assert len({mask.tobytes() for mask in masks if mask.any()}) == sum(m.any() for m in masks)


def test_examples_are_made_at_each_access_from_images_and_textures(trained):
    """Their bits are those of `make_examples`; nothing is kept but indices."""
    config = runs.load_config(trained.root)
    images, textures = held_out(trained.root)
    batches = examples(trained.root)
    key = jax.random.key(config.train.seed)
    texture_key = rng.stream_key(key, "held-out textures")
    texture_rows = np.asarray(jax.random.randint(texture_key, (8,), 0, len(textures)))
    make = jax.jit(functools.partial(train_step.make_examples, config=config))
    for number in range(2):
        rows = np.arange(4 * number, 4 * number + 4)
        batch = {"image": images[rows % len(images)], "texture": textures[texture_rows[rows]]}
        expected = make(batch, rng.stream_key(key, "validation"), number)
        for value, expected_value in zip(batches[number], expected, strict=True):
            np.testing.assert_array_equal(value, expected_value)
    assert batches[-1].mask is not batches[-1].mask
    assert len(batches) == len(list(batches)) == len(batches[:]) == 2
    with pytest.raises(IndexError):
        batches[2]
    kept = [leaf for leaf in jax.tree.leaves(vars(batches)) if isinstance(leaf, np.ndarray)]
    owned = [array for array in kept if array is not images and array is not textures]
    assert sum(array.nbytes for array in owned) == 2 * 4 * (8 + 4)  # two indices per example


def test_whole_batches_of_at_least_the_number_asked_for(trained):
    assert len(stack(examples(trained.root, train__validation_examples=5), "clean")) == 8


def test_a_training_batch_for_many_devices_is_divided(trained):
    """One device computes at most 16 examples at once, so that a slice's batch fits into a chip."""
    batches = examples(trained.root, train__batch_size=1024, train__validation_examples=40)
    assert [len(batch.clean) for batch in batches] == [16, 16, 16]


def test_metrics_against_numpy(trained):
    config = runs.load_config(trained.root)
    params = trained_model.load(trained.workdir).params
    batches = examples(trained.root)
    values, panel = validation.make_validate(config, batches)(params)

    f = jax.jit(unet.bind(config.model, params))
    corrupted, clean, mask = (stack(batches, name) for name in batches[0]._fields)
    error = np.square(np.float64(f(corrupted)) - clean)
    bias = np.sqrt(np.square(np.float64(f(clean)) - clean).mean((1, 2, 3)))
    np.testing.assert_allclose(values["on_manifold_bias"], bias.mean(), rtol=1e-3)
    inside, outside = mask.sum((1, 2, 3)), (1 - mask).sum((1, 2, 3))
    loss = (mask**2 * error).sum((1, 2, 3)) / (6 * np.where(inside, inside, 1))
    loss += ((1 - mask) ** 2 * error).sum((1, 2, 3)) / (6 * np.where(outside, outside, 1))
    np.testing.assert_allclose(values["loss"], loss.mean(), rtol=1e-4)

    maps = jax.jit(lambda x: anomaly_map.smoothed_map(x, f(x), config.eval))(corrupted)
    anomalous = mask[..., 0] > 0.1
    scores = np.ravel(maps)
    assert values["pixel_auroc"] == pytest.approx(
        roc_auc_score(anomalous.ravel(), scores), abs=1e-4
    )
    expected = average_precision_score(anomalous.ravel(), scores)
    assert values["pixel_ap"] == pytest.approx(expected, abs=1e-4)

    assert panel.dtype == np.uint8
    assert panel.shape[1] > 5 * 16  # clean, corrupted, mask, reconstruction, map
    assert panel.shape[0] >= 4 * 16
