"""Batches of images and textures: the batch of step s is a pure function of (seed, s).

So there is no iterator state to save: a run resumed at step s, on any number of processes and
threads, reads exactly the examples of an uninterrupted run. Every process computes the indices of
the whole batch, which is cheap, and reads only the rows that its devices need.
"""

import functools
import sys
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging

from data_pipelines.rows import Stored

# At its import, with jaxlib before 0.11, Grain warns that its worker processes cannot be profiled.
# Here it reads with threads alone.
logging.get_absl_logger().addFilter(lambda record: "worker profiling" not in record.getMessage())

import grain  # noqa: E402 - after the filter


def source(entry: str) -> str:
    """Returns the name of the array that holds the rows of an entry of a batch."""
    return "image" if entry == "reserved" else entry


def index_batch(
    n_images: int, n_textures: int, *, seed: int, batch_size: int, step: int, reserved: int = 0
) -> dict[str, np.ndarray]:
    """Returns the indices of the images and textures in the batch of `step`.

    Example i of step s has the position p = s·batch_size + i in endless sequences, one of images
    and one of textures. A sequence consists of epochs. Every epoch contains every image (texture)
    once, in a random order that differs between epochs.

    Args:
      n_images: the number of images.
      n_textures: the number of textures.
      seed: the seed of the order; non-negative.
      batch_size: the size of the whole batch, over all processes.
      step: the step, from 0.
      reserved: the number of images at the end that have a sequence of their own.

    Returns:
      int64 (batch_size,) arrays of indices: "image" below `n_images` − `reserved`, "texture" below
      `n_textures`, and, if any image is reserved, "reserved" among the last `reserved` images.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    shared = n_images - reserved
    indices = {
        "image": _sequence("image", shared, seed, positions),
        "texture": _sequence("texture", n_textures, seed, positions),
    }
    if reserved:
        indices["reserved"] = shared + _sequence("reserved", reserved, seed, positions)
    return indices


def batches(
    images: Stored,
    textures: Stored,
    *,
    seed: int,
    batch_size: int,
    start_step: int = 0,
    steps: int = 1,
    by_index: bool = False,
    num_threads: int = 4,
    rows: Sequence[int] | np.ndarray | None = None,
    reserved: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches without end from `start_step` on, gathered ahead by threads.

    Args:
      images: uint8 (n, h, w, c); read only where a batch needs it.
      textures: uint8 (m, t, t, c').
      seed: the seed of the order; non-negative.
      batch_size: the size of the whole batch, over all processes.
      start_step: the step of the first batch.
      steps: the number of steps in one element, which is the length of its leading axis.
      by_index: yields the indices of images and textures instead of their pixels.
      num_threads: the number of threads; up to twice as many elements are prepared ahead.
      rows: the examples of each batch that this process needs, below `batch_size`; None for all.
      reserved: the number of images at the end that only the entry "reserved" shows.

    Yields:
      {"image": uint8 (steps, b, h, w, c), "texture": uint8 (steps, b, t, t, c')} with b rows, and
      "reserved" like "image" if any image is reserved; with `by_index` all are int32 (steps, b).
    """
    arrays = {"image": images, "texture": textures}
    local = slice(None) if rows is None else np.asarray(rows)

    def element(number: int) -> dict[str, np.ndarray]:
        # An element holds the batches of all steps of one compiled call, gathered at once,
        # because per-example elements would cost a Python call each.
        first = start_step + number * steps
        draws = [
            index_batch(
                len(images),
                len(textures),
                seed=seed,
                batch_size=batch_size,
                step=step,
                reserved=reserved,
            )
            for step in range(first, first + steps)
        ]
        indices = {name: np.stack([draw[name] for draw in draws])[:, local] for name in draws[0]}
        if by_index:
            return {name: index.astype(np.int32) for name, index in indices.items()}
        return {name: arrays[source(name)][index] for name, index in indices.items()}

    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    # Grain has no endless range; this one is longer than any run.
    numbers = grain.MapDataset.range(sys.maxsize // steps - start_step)
    return iter(numbers.map(element).to_iter_dataset(options))


def _sequence(stream: str, n: int, seed: int, positions: range) -> np.ndarray:
    """Returns the elements of an endless sequence of epochs at these positions."""
    first, last = positions.start // n, (positions.stop - 1) // n
    epochs = [_epoch(stream, n, seed, epoch) for epoch in range(first, last + 1)]
    return np.concatenate(epochs)[positions.start - first * n : positions.stop - first * n]


@functools.lru_cache(maxsize=16)
def _epoch(stream: str, n: int, seed: int, epoch: int) -> np.ndarray:
    """Returns a random order of range(n), the same with every version of NumPy.

    `MapDataset.shuffle` is not used for two reasons: it takes 75 µs per index with a few hundred
    images (measured), and seed 1 has the epochs of seed 0, delayed by one.
    """
    # Only the raw bits are used, because NumPy guarantees them for all versions.
    bits = np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(stream.encode()), epoch]))
    return np.argsort(bits.random_raw(n), kind="stable")
