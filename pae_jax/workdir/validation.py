"""Validation during training, on held-out normal images with fixed corruptions.

No test image is read. The corruptions use textures that training does not use.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from pae_jax import diagnostics, metrics, objective, rng
from pae_jax.config import Config
from pae_jax.corruption import CorruptedBatch
from pae_jax.detection import Detection, detect_float
from pae_jax.diagnostics import Diagnostic, Diagnostics
from pae_jax.masks import VISIBLE
from pae_jax.methods import METHODS
from pae_jax.report import pictures
from pae_jax.train_step import make_examples

PANEL_ROWS = 6

# (params, examples) → (metrics of all examples, detections of the first batch)
Measure = Callable[[Any, Sequence[CorruptedBatch]], tuple[dict[str, float], Detection]]


def fixed_examples(
    images: np.ndarray, textures: np.ndarray, config: Config, *, at_most: int | None = None
) -> list[CorruptedBatch]:
    """Returns `train.validation_examples` corrupted examples, the same at every call.

    Args:
      images: (m, h, w, c) uint8, held out of training; used in turn.
      textures: (n, t, t, c) uint8, held out of training; drawn at random.
      config: the config of the run.
      at_most: makes only the first batches, as many as hold this number of examples.

    Returns:
      Whole batches of the training batch's size, or one smaller batch of all examples.
    """
    key = jax.random.key(config.train.seed)
    count = config.train.validation_examples
    size = min(config.train.batch_size, count)
    batch_count = -(-count // size)
    draw_key, shape = rng.stream_key(key, "held-out textures"), (batch_count * size,)
    texture_rows = np.asarray(jax.random.randint(draw_key, shape, 0, len(textures)))
    validation_key = rng.stream_key(key, "validation")
    batches = []
    for number in range(min(batch_count, -(-(at_most or count) // size))):
        rows = np.arange(number * size, (number + 1) * size)
        batch = {"image": images[rows % len(images)], "texture": textures[texture_rows[rows]]}
        batches.append(_make_examples(batch, validation_key, number, config=config))
    return batches


_make_examples = jax.jit(make_examples, static_argnames="config")


def make_validate(
    config: Config, examples: Sequence[CorruptedBatch]
) -> Callable[[Any], tuple[dict[str, float], np.ndarray]]:
    """Returns a function of the parameters that returns metrics and a panel of images.

    Args:
      config: the config of the run.
      examples: the validation examples.

    Returns:
      params → the metrics of `make_measure`, and a uint8 image of the first examples.
    """
    measure = make_measure(config)

    def validate(params: Any) -> tuple[dict[str, float], np.ndarray]:
        values, detections = measure(params, examples)
        return values, _panel(examples[0], detections)

    return validate


def make_measure(config: Config) -> Measure:
    """Returns a function of parameters and examples, compiled once for batches of one shape.

    It returns the detections of the first batch and metrics of all examples: "loss" (eq. 1, or the
    loss of another method), "pixel_ap" and "pixel_auroc" of the anomaly map against M > 0.1, and
    the quantities of `diagnostics.errors` for a method with an f.
    """
    method, key = METHODS[config.method], jax.random.key(config.train.seed)
    plain = dataclasses.replace(config, objective=objective.without_penalties(config.objective))

    @jax.jit
    def measure_batch(params: Any, batch: CorruptedBatch) -> tuple[Diagnostics, Detection]:
        loss, _ = method.loss(params, batch, key, plain, 0)
        quantities = {"loss": Diagnostic(loss)}
        if method.reconstruct is not None:
            quantities |= diagnostics.errors(method.reconstruct(params, config), batch)
        return quantities, detect_float(params, batch.corrupted, config)

    def measure(
        params: Any, examples: Sequence[CorruptedBatch]
    ) -> tuple[dict[str, float], Detection]:
        outputs = [jax.device_get(measure_batch(params, batch)) for batch in examples]
        values = diagnostics.summarise([quantities for quantities, _ in outputs])
        if method.localises:
            maps = np.concatenate([detections.map for _, detections in outputs])
            anomalous = np.concatenate([np.asarray(b.mask[..., 0]) for b in examples]) > VISIBLE
            values["pixel_ap"] = metrics.average_precision(maps, anomalous)
            values["pixel_auroc"] = metrics.auroc(maps, anomalous)
        return values, outputs[0][1]

    return measure


def _panel(batch: CorruptedBatch, detections: Detection) -> np.ndarray:
    """Returns one image with a row per example.

    A row shows clean image, corrupted image, mask, reconstruction if there is one, and map.
    """
    limit = float(detections.map.max())  # all maps share one colour scale
    rows = []
    for i in range(min(PANEL_ROWS, len(detections.map))):
        images = [batch.clean[i], batch.corrupted[i], np.repeat(batch.mask[i], 3, axis=-1)]
        images += [] if detections.reconstruction is None else [detections.reconstruction[i]]
        row = [pictures.to_uint8(np.asarray(image)) for image in images]
        rows.append([*row, pictures.heat_map(detections.map[i], limit)])
    return pictures.grid(rows)
