"""Validation on a fixed set of held-out images under held-out corruptions; never on test data."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pae_jax import metrics, objective, pictures, rng, unet
from pae_jax.config import Config
from pae_jax.corruption import CorruptedBatch
from pae_jax.predict import localise
from pae_jax.train_step import make_examples

PANEL_ROWS = 6
VISIBLE = 0.1  # a pixel with M above this counts as anomalous in the synthetic-mask metrics


def fixed_examples(
    images: np.ndarray, textures: np.ndarray, config: Config
) -> list[CorruptedBatch]:
    """`train.validation_examples` corrupted examples, the same at every call for one config.

    Args:
      images: (m, h, w, c) uint8, held out of training; taken in turn.
      textures: (n, t, t, c) uint8, held out of training; drawn by key.
      config: the run's.

    Returns:
      Batches of the training batch's size (smaller only where there are fewer examples).
    """
    key = jax.random.key(config.train.seed)
    count = config.train.validation_examples
    size = min(config.train.batch_size, count)
    draw = jax.random.randint(rng.stream(key, "held-out textures"), (count,), 0, len(textures))
    chosen = np.asarray(draw)
    make = jax.jit(functools.partial(make_examples, config=config))
    validation_key = rng.stream(key, "validation")
    batches = []
    for number in range(count // size):
        rows = np.arange(number * size, (number + 1) * size)
        batch = {"image": images[rows % len(images)], "texture": textures[chosen[rows]]}
        batches.append(make(batch, validation_key, number))
    return batches


def make_validate(
    config: Config, examples: Sequence[CorruptedBatch]
) -> Callable[[Any], tuple[dict[str, float], np.ndarray]]:
    """A function of the parameters that returns metrics of the examples and a picture panel.

    The metrics: "loss" (eq. 1), "pixel_ap" and "pixel_auroc" of the anomaly map against M > 0.1,
    "preserved" and "corrected", the root mean square of f(x̂)−x outside and inside the mask
    (weighted by 1−M and M), and "bias", that of f(x)−x, the deviation from the identity on ℳ.
    """

    @jax.jit
    def measure(params: Any, batch: CorruptedBatch) -> tuple[dict[str, Array], Array, Array]:
        f = unet.bind(config.model, params)
        corrupted, clean, mask = batch
        reconstruction, maps = localise(f, corrupted, config.eval)
        restored = f(corrupted)
        loss = objective.reconstruction_loss(restored, clean, mask, weight=config.objective.weight)
        values = {
            "loss": jnp.mean(loss),
            "preserved": _weighted_mean(jnp.square(restored - clean), 1 - mask),
            "corrected": _weighted_mean(jnp.square(restored - clean), mask),
            "bias": jnp.mean(jnp.square(f(clean) - clean)),
        }
        return values, reconstruction, maps

    def validate(params: Any) -> tuple[dict[str, float], np.ndarray]:
        outputs = [jax.device_get(measure(params, batch)) for batch in examples]
        values = {k: float(np.mean([v[k] for v, _, _ in outputs])) for k in outputs[0][0]}
        for name in ("preserved", "corrected", "bias"):
            values[name] = values[name] ** 0.5
        maps = np.concatenate([m for _, _, m in outputs])
        anomalous = np.concatenate([np.asarray(b.mask[..., 0]) for b in examples]) > VISIBLE
        values["pixel_ap"] = metrics.average_precision(maps, anomalous)
        values["pixel_auroc"] = metrics.auroc(maps, anomalous)
        return values, _panel(examples[0], outputs[0][1], outputs[0][2])

    return validate


def _weighted_mean(values: Array, weights: Array) -> Array:
    total = values.shape[-1] * jnp.sum(weights)
    return jnp.sum(weights * values) / jnp.where(total > 0, total, 1)


def _panel(batch: CorruptedBatch, reconstruction: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Rows of clean, corrupted, mask, reconstruction and map; one colour scale for the maps."""
    limit = float(maps.max())
    rows = []
    for i in range(min(PANEL_ROWS, len(maps))):
        mask = np.repeat(np.asarray(batch.mask[i]), 3, axis=-1)
        images = (batch.clean[i], batch.corrupted[i], mask, reconstruction[i])
        row = [pictures.to_uint8(np.asarray(image)) for image in images]
        rows.append([*row, pictures.heat_map(maps[i], limit)])
    return pictures.grid(rows)
