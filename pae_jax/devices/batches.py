"""What a call of the compiled step reads: batches from the host, or indices into arrays that
live on the device. The examples are the same."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from data_pipelines import pipeline
from pae_jax.config import Config

MEMORY_FRACTION = 0.25  # of the device's memory, at most, for resident images and textures
MAX_STEPS_PER_CALL = 10  # of a call, at most, where the config leaves it open


class Batches(NamedTuple):
    """Host arrays for one run.

    Attributes:
      resident: goes to the device once: uint8 images (n, h, w, c) and textures (m, t, t, c') that
        live there; empty where they are streamed.
      stream: endless; each {"image", "texture"} with the leading axes (steps, batch), uint8
        pixels or int32 indices into `resident`.
    """

    resident: dict[str, np.ndarray]
    stream: Iterator[dict[str, np.ndarray]]


def is_resident(config: Config, images: np.ndarray, textures: np.ndarray) -> bool:
    """Whether images and textures live on the device.

    "auto" says yes to an accelerator of which they take at most a quarter. On a CPU they would
    be copied from memory to memory, and not memory-mapped any more.
    """
    if config.data.on_device != "auto":
        return config.data.on_device == "yes"
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit", 0) if device.platform != "cpu" else 0
    return images.nbytes + textures.nbytes <= MEMORY_FRACTION * limit


def steps_per_call(config: Config, *, on_device: bool, start: int = 0) -> int:
    """Steps of one call: what divides the steps at which the host has something to do.

    `start` is among them: a run that stopped on another machine may go on from any step.

    With data on an accelerator several steps leave the host idle; a CPU gains nothing, and XLA
    runs convolutions more slowly inside a loop there.
    """
    train = config.train
    if train.steps_per_call:
        return train.steps_per_call
    if not on_device or jax.default_backend() == "cpu":
        return 1
    period = math.gcd(train.steps, train.validate_every, train.checkpoint_every, start)
    return max(n for n in range(1, MAX_STEPS_PER_CALL + 1) if period % n == 0)


def open_batches(
    config: Config,
    images: np.ndarray,
    textures: np.ndarray,
    *,
    start: int,
    steps: int,
    on_device: bool,
) -> Batches:
    """The run's batches from step `start` on, `steps` of them in each element."""
    stream = pipeline.batches(
        images,
        textures,
        seed=config.train.seed,
        batch_size=config.train.batch_size,
        start_step=start,
        steps=steps,
        by_index=on_device,
        workers=config.data.num_threads,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return Batches({"image": images, "texture": textures} if on_device else {}, stream)
