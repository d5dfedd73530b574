"""The statistics of experiments/penalties.py: paired differences and rank correlations."""

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2_000
COVERAGE = 0.95
# Fewer points have a rank correlation, but not one that says anything.
MIN_POINTS = 4


class Mean(NamedTuple):
    """A mean over seeds with its standard error; the error of a single seed is NaN."""

    mean: float
    error: float
    seeds: int


class Correlation(NamedTuple):
    """A rank correlation with its bootstrap interval; NaN where it is undefined."""

    value: float
    low: float
    high: float


def column(values: Sequence[float | None]) -> np.ndarray:
    """Returns the values as float64 (n,), None as NaN."""
    return np.array([math.nan if value is None else value for value in values], float)


def mean_and_error(values: Sequence[float]) -> Mean:
    """Returns the mean of the finite values and its standard error."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return Mean(math.nan, math.nan, 0)
    error = statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return Mean(statistics.fmean(known), error, len(known))


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Mean:
    """Returns the mean difference of two variants over the seeds that both have.

    Members of one seed share held-out images, corruptions and initialisation, so that their
    difference varies less than either of them.

    Args:
      values: those of a variant by seed.
      reference: those of the variant that it is compared to.
    """
    return mean_and_error(
        [values[seed] - reference[seed] for seed in values.keys() & reference.keys()]
    )


def spearman(x: np.ndarray, y: np.ndarray, strata: Sequence[Hashable] | None = None) -> float:
    """Returns Spearman's rank correlation of x and y, each (n,); NaN if one of them is constant.

    Args:
      x: (n,)
      y: (n,)
      strata: (n,) if given, each value is ranked among those of its stratum alone, as a fraction
        of their number less the mean, so that differences between strata have no part in it.
    """
    return float(_weighted_spearman(np.ones((1, len(x))), x, y, strata)[0])


def correlate(
    x: np.ndarray,
    y: np.ndarray,
    clusters: Sequence[Hashable],
    strata: Sequence[Hashable] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Correlation:
    """Returns Spearman's rank correlation with the interval of a cluster bootstrap.

    A resample draws clusters with replacement and takes all their members. The seeds of a variant
    are close to each other, so that an interval from single members would be too narrow.

    Args:
      x: (n,); rows where x or y is not finite are left out.
      y: (n,)
      clusters: (n,) the variant of each member.
      strata: see `spearman`.
      resamples: the number of resamples.
      seed: that of the resamples.
    """
    kept = np.flatnonzero(np.isfinite(x) & np.isfinite(y)).tolist()
    if len(kept) < MIN_POINTS:
        return Correlation(math.nan, math.nan, math.nan)
    x, y = x[kept], y[kept]
    codes = _codes([clusters[i] for i in kept])
    of_strata = None if strata is None else [strata[i] for i in kept]
    value, count = spearman(x, y, of_strata), codes.max() + 1
    draws = np.zeros(0)
    if count > 1:
        # How often each cluster is drawn is the weight of its members.
        probabilities = np.full(count, 1 / count)
        weights = np.random.default_rng(seed).multinomial(count, probabilities, size=resamples)
        draws = _weighted_spearman(weights[:, codes], x, y, of_strata)
        # A resample with a single cluster may have only one value.
        draws = draws[np.isfinite(draws)]
    if not len(draws):
        return Correlation(value, math.nan, math.nan)
    low, high = np.quantile(draws, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Correlation(value, float(low), float(high))


def _weighted_spearman(
    weights: np.ndarray, x: np.ndarray, y: np.ndarray, strata: Sequence[Hashable] | None
) -> np.ndarray:
    """Returns Spearman's rank correlation for each row of weights (draws, n); NaN if undefined.

    A point of weight w counts as w equal points.
    """
    codes = np.zeros(len(x), int) if strata is None else _codes(strata)
    together = codes[:, None] == codes[None, :]
    # The stratum of a point that was not drawn may be empty.
    size = np.maximum(weights @ together, 1)

    def ranks(values: np.ndarray) -> np.ndarray:
        # A rank less the mean rank is half of the points below less half of those above. Ties
        # share the mean of their ranks, because the sign of 0 is 0.
        above = np.sign(values[:, None] - values[None, :]) * together
        return weights @ above.T / (2 * size)

    u, v = ranks(x), ranks(y)
    product, uu, vv = (np.sum(weights * a * b, axis=1) for a, b in ((u, v), (u, u), (v, v)))
    norm = np.sqrt(uu * vv)
    return np.where(norm > 0, product / np.where(norm > 0, norm, 1), np.nan)


def _codes(labels: Sequence[Hashable]) -> np.ndarray:
    numbers = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return np.array([numbers[label] for label in labels])
