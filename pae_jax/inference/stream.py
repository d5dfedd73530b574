"""A stream of images through a model, in bounded memory.

Threads decode the images of the next batches, the device computes one batch, and threads write the
results of the batch before. The order of the images is kept throughout.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8

from data_pipelines.cache import threads
from pae_jax.detection import Detection, unstack

T = TypeVar("T")

Pixels = UInt8[np.ndarray, "h w c"]


def batch_size(images: int, limit: int) -> int:
    """Returns the size of the batches of one stream: a power of two, or the limit.

    All sizes together are few, so that few programs are compiled, and less than half of a batch is
    empty.

    Args:
      images: the number of images of the stream.
      limit: `eval.batch_size`.
    """
    return min(limit, 1 << (max(images, 1) - 1).bit_length())


def ahead(size: int) -> int:
    """Returns how many images are decoded, or results written, before they are asked for.

    Args:
      size: that of a batch.
    """
    return max(2 * size, 2 * threads())


def detect_in_batches(
    start: Callable[[np.ndarray], Detection], images: Iterable[tuple[T, Pixels | None]], size: int
) -> Iterator[tuple[T, Detection | None]]:
    """Yields what belongs to each image with its detection, in order.

    An image that is None, because its file is damaged, has no detection. It has its place in the
    batch all the same, so that the batches depend on the order of the files alone.

    Args:
      start: starts the detection of a batch, uint8 (size, h, w, c), and does not wait for it.
      images: pairs of anything and an image of the network's size.
      size: that of a batch; the last one is filled up with black images.
    """
    running: tuple[list[tuple[T, Pixels | None]], Detection | None] | None = None
    for batch in _batches(images, size):
        started = batch, _start(start, [image for _, image in batch], size)
        if running:
            yield from _finish(*running)
        running = started
    if running:
        yield from _finish(*running)


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _start(
    start: Callable[[np.ndarray], Detection], images: list[Pixels | None], size: int
) -> Detection | None:
    good = [image for image in images if image is not None]
    if not good:
        return None
    stacked = np.zeros((size, *good[0].shape), np.uint8)
    for i, image in enumerate(images):
        if image is not None:
            stacked[i] = image
    return start(stacked)


def _finish(
    batch: list[tuple[T, Pixels | None]], detections: Detection | None
) -> Iterator[tuple[T, Detection | None]]:
    if detections is None:
        yield from ((item, None) for item, _ in batch)
        return
    for (item, image), detection in zip(batch, unstack(detections, len(batch)), strict=True):
        yield item, None if image is None else detection
