"""The sheet F/sheet.png: the pictures to look at before a foreground network is trusted.

A row shows an image, its label if it has one, the mask of the network, and the image that a
detector will see. The first rows are labelled images on which the network was not trained, if there
are any; the others are drawn evenly from all training images.
"""

from collections.abc import Sequence

import numpy as np

from pae_jax.report import pictures
from pae_jax.workdir.suppression import Foreground, find, suppress

ROWS = 12
_UNLABELLED = 96  # the grey of a label that does not exist


def choose(count: int, held_out: Sequence[int]) -> list[int]:
    """Returns the indices of the images of the sheet.

    Args:
      count: the number of training images.
      held_out: the indices of labelled images on which the network was not trained.
    """
    first = list(held_out[: ROWS // 2])
    rest = [int(i) for i in np.linspace(0, count - 1, ROWS) if int(i) not in first]
    return first + list(dict.fromkeys(rest))[: ROWS - len(first)]


def draw(
    images: np.ndarray, labels: Sequence[np.ndarray | None], foreground: Foreground
) -> pictures.Picture:
    """Draws the sheet.

    Args:
      images: uint8 (n, h, w, c), those of the rows.
      labels: their labels, bool (h, w), or None.
      foreground: the trained network.
    """
    rows = []
    for image, label in zip(images, labels, strict=True):
        grey = np.full((*image.shape[:2], 3), _UNLABELLED, np.uint8)
        rows.append(
            [
                _picture(image),
                grey if label is None else _picture(255 * label[..., None].astype(np.uint8)),
                _picture(255 * find(image, foreground)[..., None].astype(np.uint8)),
                _picture(suppress(image, foreground)),
            ]
        )
    return pictures.grid(rows)


def _picture(image: np.ndarray) -> pictures.Picture:
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))
