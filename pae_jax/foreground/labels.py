"""Pseudo-labels of the object, from a training image alone.

The background is what resembles the border of the image: the distance of each pixel to the median
colour of the border is cut at Otsu's threshold (scikit-image, which the project needs anyway;
GrabCut would need OpenCV). One image is often labelled badly, where clutter touches the object or
has its size. The errors differ from image to image, so that a network which is trained on all of
them learns what they have in common.
"""

import numpy as np
from jaxtyping import Bool, UInt8
from scipy import ndimage
from skimage.filters import threshold_otsu

from pae_jax.workdir.suppression import large_regions

BORDER = 1 / 32  # the width of the border, as a fraction of the shorter side
GAP = 1 / 24  # half the width of the gaps that are closed, as a fraction of the shorter side
PART = 1 / 4  # regions of at least this fraction of the largest one belong to the object
# An object is neither a speck nor the whole image.
LEAST, MOST = 0.02, 0.9

_NEIGHBOURS = np.ones((3, 3), bool)


def otsu_mask(image: UInt8[np.ndarray, "h w c"]) -> Bool[np.ndarray, "h w"] | None:
    """Returns the mask of what differs most from the border; None if nothing usable does.

    Small regions are left out; narrow gaps and holes are closed, because parts of an object may
    have the colour of the background.

    Args:
      image: of 1 or 3 channels.
    """
    pixels = image.astype(np.float32)
    width = max(1, round(BORDER * min(image.shape[:2])))
    border = np.ones(image.shape[:2], bool)
    border[width:-width, width:-width] = False
    distance = np.linalg.norm(pixels - np.median(pixels[border], axis=0), axis=-1)
    if distance.max() == 0:
        return None
    different = ndimage.binary_opening(distance > threshold_otsu(distance), _NEIGHBOURS)
    if not different.any():
        return None
    mask = _close(large_regions(different, PART))
    return mask if LEAST <= mask.mean() <= MOST else None


def _close(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Closes gaps and holes; the mask goes on beyond the borders of the image."""
    radius = max(1, round(GAP * min(mask.shape)))
    padded = np.pad(mask, radius, mode="edge")
    square = np.ones((2 * radius + 1,) * 2, bool)
    closed = ndimage.binary_closing(padded, square)[radius:-radius, radius:-radius]
    return np.asarray(ndimage.binary_fill_holes(closed))
