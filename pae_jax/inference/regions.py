"""The regions of an anomaly map: connected pixels above a threshold."""

from typing import NamedTuple

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float

from pae_jax.metrics.regions import label_regions
from pae_jax.report.pictures import strips


class Region(NamedTuple):
    """A region of the map.

    Attributes:
      left: the first column of its box, in pixels from the left edge.
      top: the first row of its box.
      width: the columns of its box.
      height: the rows of its box.
      area: the number of its pixels.
      peak: the largest value of the map in it.
      mean: the mean value of the map in it.
    """

    left: int
    top: int
    width: int
    height: int
    area: int
    peak: float
    mean: float


def find_regions(values: Float[np.ndarray, "h w"], mask: Bool[np.ndarray, "h w"]) -> list[Region]:
    """Returns the 8-connected regions of a mask, the one with the highest peak first.

    Args:
      values: the anomaly map.
      mask: the pixels above the threshold.
    """
    labels = label_regions(mask)
    boxes = scipy.ndimage.find_objects(labels)
    count = len(boxes)
    areas, sums, peaks = np.zeros(count, int), np.zeros(count), np.full(count, -np.inf)
    for rows in strips(*mask.shape):
        inside, weights = labels[rows][mask[rows]] - 1, values[rows][mask[rows]]
        areas += np.bincount(inside, minlength=count)
        sums += np.bincount(inside, weights, minlength=count)
        np.maximum.at(peaks, inside, weights)
    regions = [
        Region(
            left=columns.start,
            top=rows.start,
            width=columns.stop - columns.start,
            height=rows.stop - rows.start,
            area=int(areas[i]),
            peak=float(peaks[i]),
            mean=float(sums[i] / areas[i]),
        )
        for i, (rows, columns) in enumerate(boxes)
    ]
    # The sort is stable: equal peaks stay in the order of their first rows.
    return sorted(regions, key=lambda region: -region.peak)
