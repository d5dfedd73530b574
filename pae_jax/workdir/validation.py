"""Validation during training, on held-out normal images with fixed corruptions.

No test image is read. The corruptions use textures that training does not use.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, overload

import jax
import numpy as np

from data_pipelines.rows import Stored
from pae_jax import diagnostics, metrics, objective, rng
from pae_jax.config import Config
from pae_jax.corruption import CorruptedBatch
from pae_jax.detection import Detection, detect_float, inference_config
from pae_jax.diagnostics import Diagnostic, Diagnostics
from pae_jax.masks import VISIBLE
from pae_jax.methods import METHODS
from pae_jax.report import pictures
from pae_jax.train_step import make_examples

PANEL_ROWS = 6

# (params, examples) → (metrics of all examples, detections of the first batch)
Measure = Callable[[Any, Sequence[CorruptedBatch]], tuple[dict[str, float], Detection]]


class Examples(Sequence[CorruptedBatch]):
    """Batches of corrupted examples, which are made at each access.

    Only indices are kept: the images and textures are memory-mapped, and float32 examples take
    several times the memory of both.
    """

    def __init__(
        self,
        images: Stored,
        textures: Stored,
        rows: list[tuple[np.ndarray, np.ndarray]],
        key: jax.Array,
        config: Config,
    ):
        self._images, self._textures, self._rows = images, textures, rows
        self._key, self._config = key, inference_config(config)

    def __len__(self) -> int:
        """Returns the number of batches."""
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> CorruptedBatch: ...
    @overload
    def __getitem__(self, index: slice) -> list[CorruptedBatch]: ...
    def __getitem__(self, index: int | slice) -> CorruptedBatch | list[CorruptedBatch]:
        """Makes one batch, or a list of batches."""
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        number = range(len(self))[index]
        image_rows, texture_rows = self._rows[number]
        batch = {"image": self._images[image_rows], "texture": self._textures[texture_rows]}
        batch, step = jax.device_put((batch, np.int32(number)))
        return _make_examples(batch, self._key, step, config=self._config)


def fixed_examples(
    images: Stored, textures: Stored, config: Config, *, at_most: int | None = None
) -> Examples:
    """Returns `train.validation_examples` corrupted examples, the same at every call.

    Args:
      images: (m, h, w, c) uint8, held out of training; used in turn.
      textures: (n, t, t, c) uint8, held out of training; drawn at random.
      config: the config of the run.
      at_most: gives only the first batches, as many as hold this number of examples.

    Returns:
      Whole batches of `train.validation_batch_size` examples.
    """
    count = config.train.validation_examples
    size = config.train.validation_batch_size
    batch_count = -(-count // size)
    # Scalars are put on the device explicitly: as arguments they are no part of the program.
    seed, texture_count = jax.device_put((np.uint32(config.train.seed), np.int32(len(textures))))
    key, texture_rows = _draw(seed, texture_count, count=batch_count * size)
    texture_rows = jax.device_get(texture_rows)
    rows = []
    for number in range(min(batch_count, -(-(at_most or count) // size))):
        examples = np.arange(number * size, (number + 1) * size)
        rows.append((examples % len(images), texture_rows[examples]))
    return Examples(images, textures, rows, key, config)


@functools.partial(jax.jit, static_argnames="count")
def _draw(seed: jax.Array, textures: jax.Array, *, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns the key of the corruptions, and indices of textures."""
    key = jax.random.key(seed)
    draw_key = rng.stream_key(key, "held-out textures")
    return rng.stream_key(key, "validation"), jax.random.randint(draw_key, (count,), 0, textures)


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
        return values, _panel(jax.device_get(examples[0]), detections)

    return validate


def make_measure(config: Config) -> Measure:
    """Returns a function of parameters and examples.

    It is compiled once for all runs of one architecture with batches of one shape.

    It returns the detections of the first batch and metrics of all examples: "loss" (eq. 1, or the
    loss of another method), "pixel_ap" and "pixel_auroc" of the anomaly map against M > 0.1, and
    the quantities of `diagnostics.errors` for a method with an f.
    """
    plain = dataclasses.replace(
        inference_config(config), objective=objective.without_penalties(config.objective)
    )
    localises = METHODS[config.method].localises

    def measure(
        params: Any, examples: Sequence[CorruptedBatch]
    ) -> tuple[dict[str, float], Detection]:
        outputs, anomalous = [], []
        for examples_batch in examples:
            # To the device of the parameters: a member of a population may be on another one.
            batch = jax.device_put(examples_batch, jax.tree.leaves(params)[0].sharding)
            outputs.append(jax.device_get(measure_batch(params, batch, config=plain)))
            anomalous.append(jax.device_get(batch.mask)[..., 0] > VISIBLE)
        values = diagnostics.summarise([quantities for quantities, _ in outputs])
        if localises:
            maps = np.concatenate([detections.map for _, detections in outputs])
            values["pixel_ap"] = metrics.average_precision(maps, np.concatenate(anomalous))
            values["pixel_auroc"] = metrics.auroc(maps, np.concatenate(anomalous))
        return values, outputs[0][1]

    return measure


@functools.partial(jax.jit, static_argnames="config")
def measure_batch(
    params: Any, batch: CorruptedBatch, *, config: Config
) -> tuple[Diagnostics, Detection]:
    """Returns the quantities of a batch of examples, one value per example, and its detections."""
    method = METHODS[config.method]
    # Without noise and penalties the loss draws no random number, so that any key will do.
    loss, _ = method.loss(params, batch, jax.random.key(0), config, 0)
    quantities = {"loss": Diagnostic(loss)}
    if method.reconstruct is not None:
        quantities |= diagnostics.errors(method.reconstruct(params, config), batch)
    return quantities, detect_float(params, batch.corrupted, config)


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
