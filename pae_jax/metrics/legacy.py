"""LEGACY variants of AUPRO, to explain other papers' numbers. Never reported by default.

They disagree with the definition (`pae_jax.metrics.aupro`) in up to four ways: thresholds on
a linear grid, which a heavy-tailed map leaves almost unused; an area that starts at the
smallest rate on the grid and ends below the limit without interpolation; the rate divided by
the largest one met instead of by the limit; predictions dilated before the overlap, but not
before the false positive rate, is counted.
"""

from collections.abc import Sequence

import numpy as np
import scipy.ndimage
from jaxtyping import Shaped

from pae_jax.metrics.exact import split_by_mask

Maps = Shaped[np.ndarray, "n h w"] | Sequence[np.ndarray]

_LIMIT = 0.3
_DILATION = 5


def aupro_linear_200(maps: Maps, masks: Maps) -> float:
    """LEGACY: AUPRO from 200 linear thresholds, rescaled (the `compute_pro` of many papers).

    Args:
      maps: (n, h, w) or a sequence of (h_i, w_i).
      masks: the same shapes; non-zero = anomalous.

    Returns:
      The legacy value; nan without a region, without a normal pixel, or where no two
      thresholds have different false positive rates below 0.3.

    Raises:
      BadInput: unequal shapes or a NaN score.
    """
    return _linear(maps, masks, maps)


def aupro_dilated(maps: Maps, masks: Maps) -> float:
    """LEGACY: as `aupro_linear_200`, with predictions dilated by 5×5 (SimpleNet, GLASS).

    The dilation enters the overlap and not the false positive rate, which adds up to ten
    points; arguments and result as in `aupro_linear_200`.
    """
    # A pixel of the dilated prediction is one whose neighbourhood exceeds the threshold.
    dilated = [scipy.ndimage.maximum_filter(scores, _DILATION, mode="nearest") for scores in maps]
    return _linear(maps, masks, dilated)


def aupro_mean_of_images(maps: Maps, masks: Maps) -> float:
    """LEGACY: the mean over the anomalous images of each one's `aupro_linear_200` (RD4AD).

    Thresholds and false positive rates are each image's own, and normal images play no part;
    arguments as in `aupro_linear_200`, nan without an anomalous image.
    """
    values = [
        aupro_linear_200([scores], [mask])
        for scores, mask in zip(maps, masks, strict=True)
        if np.any(mask)
    ]
    return float(np.mean(values)) if values else np.nan


def _linear(
    maps: Maps,
    masks: Maps,
    overlapping: Maps,
    count: int = 200,
) -> float:
    """The legacy area: rates from `maps`, overlaps from the maps `overlapping`."""
    pairs = list(enumerate(zip(maps, masks, overlapping, strict=True)))
    normal = np.concatenate(
        [split_by_mask(i, scores, mask).normal for i, (scores, mask, _) in pairs]
    )
    if not normal.size:
        return np.nan
    low, high = min(map(np.min, maps)), max(map(np.max, maps))
    if low == high:
        return np.nan
    thresholds = np.arange(low, high, (high - low) / count)
    rate = _share_above(normal, thresholds)
    overlaps = []
    for i, (_, mask, scores) in pairs:
        part = split_by_mask(i, scores, mask)
        for region in range(len(part.region_sizes)):
            overlaps.append(_share_above(part.anomalous[part.region == region], thresholds))
    below = rate < _LIMIT
    if not overlaps or not below.any() or not rate[below].max():
        return np.nan
    # The rate falls along the thresholds.
    return float(-np.trapezoid(np.mean(overlaps, axis=0)[below], rate[below] / rate[below].max()))


def _share_above(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    return 1 - np.searchsorted(np.sort(scores), thresholds, side="right") / scores.size
