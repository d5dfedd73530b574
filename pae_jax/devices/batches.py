"""The input of a call of the compiled step: batches from the host, or indices.

Indices point into arrays that stay on the device. The examples are the same in both cases.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from data_pipelines import pipeline
from data_pipelines.rows import Stored
from pae_jax.config import Config
from pae_jax.devices import hardware

# The largest fraction of the device's memory for resident images and textures.
MEMORY_FRACTION = 0.25
# The largest number of steps per call if `train.steps_per_call` is 0.
MAX_STEPS_PER_CALL = 10


class Batches(NamedTuple):
    """Host arrays for one run.

    Attributes:
      resident: arrays to copy to the device once: uint8 images (n, h, w, c) and textures
        (m, t, t, c'); empty if they are streamed.
      stream: an endless iterator of {"image", "texture"}, and "reserved" where images are, with
        the leading axes (steps, rows), uint8 pixels or int32 indices into `resident`.
    """

    resident: dict[str, Stored]
    stream: Iterator[dict[str, np.ndarray]]


def is_resident(config: Config, *arrays: Stored) -> bool:
    """Returns whether images and textures are kept on the device.

    With `data.on_device` = "auto" they are kept on an accelerator if they and a batch of
    validation examples take at most a quarter of its memory. A CPU would copy them within its own
    memory, where they are memory-mapped now.

    Args:
      config: the run's configuration.
      arrays: all arrays for one device: images and textures of its run, or of its members.
    """
    if config.data.on_device != "auto":
        return config.data.on_device == "yes"
    stored = sum(array.nbytes for array in arrays)
    return stored + _validation_bytes(config) <= MEMORY_FRACTION * _device_memory()


def _device_memory() -> float:
    """Returns the bytes of a local accelerator's memory; 0 for a CPU, and where unknown."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return 0.0
    # Not every platform reports the size of its memory.
    chip = hardware.chip(device.device_kind)
    limit = (device.memory_stats() or {}).get("bytes_limit") or (chip.memory if chip else 0)
    return float(limit)


def _validation_bytes(config: Config) -> int:
    """Returns the bytes of a batch of validation examples: corrupted, clean and mask, float32.

    There is one per device, because its members are validated one after the other.
    """
    height, width = config.data.train_shape
    count = config.train.validation_batch_size
    return count * height * width * (3 + 3 + 1) * np.dtype(np.float32).itemsize


def steps_per_call(config: Config, *, on_device: bool, start: int = 0) -> int:
    """Returns how many steps run per compiled call.

    Without `train.steps_per_call` it is the largest n ≤ 10 that divides the total, the intervals
    of validation and checkpoints, the steps of `profile`, and the step from which the run resumes.
    A run that was stopped on another machine may resume from any step.

    Several steps per call leave the host idle while the data are on an accelerator. On a CPU it is
    one step, because XLA runs convolutions more slowly inside a loop there.

    Args:
      config: the run's configuration.
      on_device: whether images and textures are kept on the device.
      start: the number of steps done.
    """
    train = config.train
    if train.steps_per_call:
        return train.steps_per_call
    if not on_device or hardware.platform() == "cpu":
        return 1
    intervals = (train.steps, train.validate_every, train.checkpoint_every)
    period = math.gcd(*intervals, *config.profile, start)
    return max(n for n in range(1, MAX_STEPS_PER_CALL + 1) if period % n == 0)


def open_batches(
    config: Config,
    images: Stored,
    textures: Stored,
    *,
    start: int,
    steps: int,
    on_device: bool,
    rows: Sequence[int] | np.ndarray | None = None,
    reserved: int = 0,
) -> Batches:
    """Opens the batches of a run.

    Args:
      config: the run's configuration.
      images: uint8 (n, h, w, c).
      textures: uint8 (m, t, t, c').
      start: the step of the first batch.
      steps: the number of batches in an element of the stream.
      on_device: yields indices instead of pixels.
      rows: the rows of each batch that this process needs (`sharding.local_rows`); None for all.
      reserved: the number of images at the end that only the entry "reserved" shows.
    """
    stream = pipeline.batches(
        images,
        textures,
        seed=config.train.seed,
        batch_size=config.train.batch_size,
        start_step=start,
        steps=steps,
        by_index=on_device,
        num_threads=config.data.num_threads,
        rows=rows,
        reserved=reserved,
    )
    return Batches({"image": images, "texture": textures} if on_device else {}, stream)
