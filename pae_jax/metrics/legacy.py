"""LEGACY variants of AUPRO, to explain other papers' numbers. None is reported by default.

They differ from the definition (`pae_jax.metrics.aupro`) in up to four ways:
- The thresholds form a linear grid, most of which is unused with a heavy-tailed map.
- The area starts at the smallest rate on the grid and ends below the limit, without
  interpolation.
- The rate is divided by the largest rate on the grid below the limit, not by the limit.
- Predictions are dilated for the overlap but not for the false positive rate.
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
    """Returns LEGACY AUPRO from 200 linear thresholds, rescaled (`compute_pro` of many papers).

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
    """Returns LEGACY AUPRO with predictions dilated by 5×5 (SimpleNet, GLASS).

    The dilation affects the overlap and not the false positive rate, which adds up to ten
    points.

    Args:
      maps: as in `aupro_linear_200`.
      masks: as in `aupro_linear_200`.

    Returns:
      The legacy value, or nan in the cases of `aupro_linear_200`.
    """
    # A maximum filter of the map dilates the prediction at all thresholds at once.
    dilated = [scipy.ndimage.maximum_filter(scores, _DILATION, mode="nearest") for scores in maps]
    return _linear(maps, masks, dilated)


def aupro_mean_of_images(maps: Maps, masks: Maps) -> float:
    """Returns LEGACY AUPRO, computed per anomalous image and averaged (RD4AD).

    Thresholds and false positive rates are those of the single image; normal images are ignored.

    Args:
      maps: as in `aupro_linear_200`.
      masks: as in `aupro_linear_200`.

    Returns:
      The mean of `aupro_linear_200` over the anomalous images; nan without one.
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
    """Returns the legacy area: rates from `maps`, overlaps from the maps `overlapping`."""
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
    rate = _fraction_above(normal, thresholds)
    overlaps = []
    for i, (_, mask, scores) in pairs:
        part = split_by_mask(i, scores, mask)
        for region in range(len(part.region_sizes)):
            overlaps.append(_fraction_above(part.anomalous[part.region == region], thresholds))
    below = rate < _LIMIT
    if not overlaps or not below.any() or not rate[below].max():
        return np.nan
    # The rate falls along the thresholds.
    return float(-np.trapezoid(np.mean(overlaps, axis=0)[below], rate[below] / rate[below].max()))


def _fraction_above(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    return 1 - np.searchsorted(np.sort(scores), thresholds, side="right") / scores.size
