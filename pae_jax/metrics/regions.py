"""The connected regions of a mask: one definition for all modules."""

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Int

# Pixels that touch at a corner are connected, as in the official AUPRO.
_EIGHT_CONNECTED = np.ones((3, 3), bool)


def label_regions(mask: Bool[np.ndarray, "h w"]) -> Int[np.ndarray, "h w"]:
    """Returns the number of the region of each pixel, int32, from 1 on; 0 outside of them."""
    labels = np.zeros(mask.shape, np.int32)
    scipy.ndimage.label(mask, _EIGHT_CONNECTED, output=labels)
    return labels
