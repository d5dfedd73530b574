"""Validation on a fixed set of held-out images under held-out corruptions; never on test data."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from pae_jax import diagnostics, metrics, objective, rng
from pae_jax.config import Config
from pae_jax.corruption import CorruptedBatch
from pae_jax.detection import Detection, detect_float
from pae_jax.masks import VISIBLE
from pae_jax.methods import METHODS
from pae_jax.report import pictures
from pae_jax.train_step import make_examples

PANEL_ROWS = 6

Measure = Callable[[Any, Sequence[CorruptedBatch]], tuple[dict[str, float], Detection]]


def fixed_examples(
    images: np.ndarray, textures: np.ndarray, config: Config, *, at_most: int | None = None
) -> list[CorruptedBatch]:
    """`train.validation_examples` corrupted examples, the same at every call for one config.

    Args:
      images: (m, h, w, c) uint8, held out of training; taken in turn.
      textures: (n, t, t, c) uint8, held out of training; drawn by key.
      config: the run's.
      at_most: makes only the first batches, as many as hold this number of examples.

    Returns:
      Whole batches of the training batch's size, or one smaller batch of all examples.
    """
    key = jax.random.key(config.train.seed)
    count = config.train.validation_examples
    size = min(config.train.batch_size, count)
    batch_count = -(-count // size)
    draw_key, shape = rng.stream_key(key, "held-out textures"), (batch_count * size,)
    chosen = np.asarray(jax.random.randint(draw_key, shape, 0, len(textures)))
    validation_key = rng.stream_key(key, "validation")
    batches = []
    for number in range(min(batch_count, -(-(at_most or count) // size))):
        rows = np.arange(number * size, (number + 1) * size)
        batch = {"image": images[rows % len(images)], "texture": textures[chosen[rows]]}
        batches.append(_make_examples(batch, validation_key, number, config=config))
    return batches


_make_examples = jax.jit(make_examples, static_argnames="config")


def make_validate(
    config: Config, examples: Sequence[CorruptedBatch]
) -> Callable[[Any], tuple[dict[str, float], np.ndarray]]:
    """A function of the parameters: `make_measure`'s of the examples, and a picture panel."""
    measure = make_measure(config)

    def validate(params: Any) -> tuple[dict[str, float], np.ndarray]:
        values, found = measure(params, examples)
        return values, _panel(examples[0], found)

    return validate


def make_measure(config: Config) -> Measure:
    """A function of parameters and examples, compiled once for batches of one shape.

    It returns what is found in the first batch, and metrics of all: "loss" (eq. 1, or the method's
    own), "pixel_ap" and "pixel_auroc" of the anomaly map against M > 0.1, and what
    `diagnostics.errors` measures of f as a projection.
    """
    method, key = METHODS[config.method], jax.random.key(config.train.seed)
    plain = dataclasses.replace(config, objective=objective.without_penalties(config.objective))

    @jax.jit
    def one(params: Any, batch: CorruptedBatch) -> tuple[dict[str, Array], Detection]:
        loss, _ = method.loss(params, batch, key, plain, 0)
        reconstruct = method.reconstruct
        f_errors = diagnostics.errors(reconstruct(params, config), batch) if reconstruct else {}
        return {"loss": loss, **f_errors}, detect_float(params, batch.corrupted, config)

    def measure(
        params: Any, examples: Sequence[CorruptedBatch]
    ) -> tuple[dict[str, float], Detection]:
        outputs = [jax.device_get(one(params, batch)) for batch in examples]
        values = diagnostics.summarise([found for found, _ in outputs])
        if method.pixels:
            maps = np.concatenate([found.map for _, found in outputs])
            anomalous = np.concatenate([np.asarray(b.mask[..., 0]) for b in examples]) > VISIBLE
            values["pixel_ap"] = metrics.average_precision(maps, anomalous)
            values["pixel_auroc"] = metrics.auroc(maps, anomalous)
        return values, outputs[0][1]

    return measure


def _panel(batch: CorruptedBatch, found: Detection) -> np.ndarray:
    """Rows of clean, corrupted, mask, reconstruction if there is one, and map; one colour scale
    for the maps."""
    limit = float(found.map.max())
    rows = []
    for i in range(min(PANEL_ROWS, len(found.map))):
        images = [batch.clean[i], batch.corrupted[i], np.repeat(batch.mask[i], 3, axis=-1)]
        images += [] if found.reconstruction is None else [found.reconstruction[i]]
        row = [pictures.to_uint8(np.asarray(image)) for image in images]
        rows.append([*row, pictures.heat_map(found.map[i], limit)])
    return pictures.grid(rows)
