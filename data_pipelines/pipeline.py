"""Batches of images and textures: the batch of step s is a pure function of (seed, s).

So there is no iterator state to save: a run resumed at step s, on any number of processes and
threads, sees exactly the examples of an undisturbed run.
"""

import functools
import sys
import zlib
from collections.abc import Iterator

import grain
import numpy as np

from data_pipelines.errors import BadInput


def index_batch(
    n_images: int, n_textures: int, *, seed: int, batch_size: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which images and textures make up the batch of `step`.

    Example i of step s has the position p = s·batch_size + i in two endless sequences, each a
    row of epochs; every epoch holds every image (texture) once, in an order of its own.

    Returns:
      Two int64 (batch_size,) arrays: indices below `n_images`, indices below `n_textures`.
    """
    positions = range(step * batch_size, (step + 1) * batch_size)
    return _sequence("image", n_images, seed, positions), _sequence(
        "texture", n_textures, seed, positions
    )


def batches(
    images: np.ndarray,
    textures: np.ndarray,
    *,
    seed: int,
    batch_size: int,
    start_step: int = 0,
    steps: int = 1,
    by_index: bool = False,
    workers: int = 4,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches from `start_step` on, gathered ahead by threads.

    Args:
      images: uint8 (n, h, w, c); may be memory-mapped.
      textures: uint8 (m, t, t, c').
      seed: of the order; non-negative.
      batch_size: of the whole batch, over all processes.
      start_step: the step of the first batch.
      steps: of one element; its leading axis.
      by_index: yields which images and textures, and leaves it to others to look them up.
      workers: threads; up to twice as many batches lie ready.
      process_index: this process takes its contiguous slice of each batch.
      process_count: divides `batch_size`.

    Yields:
      {"image": uint8 (steps, b, h, w, c), "texture": uint8 (steps, b, t, t, c')}, b = batch_size
      / process_count; or by index int32 (steps, b) each.
    """
    if batch_size % process_count:
        raise BadInput(
            f"train.batch_size: {batch_size} does not divide among {process_count} processes"
        )
    share = batch_size // process_count
    mine = slice(process_index * share, (process_index + 1) * share)

    def element(number: int) -> dict[str, np.ndarray]:
        # Whole batches in one gather: an element of the Grain dataset is what one call takes.
        first = start_step + number * steps
        drawn = [
            index_batch(len(images), len(textures), seed=seed, batch_size=batch_size, step=step)
            for step in range(first, first + steps)
        ]
        which_images, which_textures = (
            np.stack(part)[:, mine] for part in zip(*drawn, strict=True)
        )
        if by_index:
            found = {"image": which_images, "texture": which_textures}
            return {name: which.astype(np.int32) for name, which in found.items()}
        return {"image": images[which_images], "texture": textures[which_textures]}

    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
    numbers = grain.MapDataset.range(sys.maxsize // steps - start_step)
    return iter(numbers.map(element).to_iter_dataset(options))


def _sequence(stream: str, n: int, seed: int, positions: range) -> np.ndarray:
    first, last = positions.start // n, (positions.stop - 1) // n
    epochs = [_epoch(stream, n, seed, epoch) for epoch in range(first, last + 1)]
    return np.concatenate(epochs)[positions.start - first * n : positions.stop - first * n]


@functools.lru_cache(maxsize=16)
def _epoch(stream: str, n: int, seed: int, epoch: int) -> np.ndarray:
    """A random order of range(n).

    Not MapDataset.shuffle, which takes 75 µs an index for a few hundred images (measured) and
    gives seed 1 the epochs of seed 0, one later. NumPy promises the raw bits for all versions.
    """
    bits = np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(stream.encode()), epoch]))
    return np.argsort(bits.random_raw(n), kind="stable")
