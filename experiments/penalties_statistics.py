"""The statistics of experiments/penalties.py: paired differences and rank correlations."""

import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import rankdata

RESAMPLES = 1_000
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
    u, v = (_centred_ranks(values, strata) for values in (x, y))
    norm = math.sqrt(float(u @ u) * float(v @ v))
    return float(u @ v) / norm if norm > 0 else math.nan


def _centred_ranks(values: np.ndarray, strata: Sequence[Hashable] | None) -> np.ndarray:
    codes = np.zeros(len(values), int) if strata is None else _codes(strata)
    ranks = np.zeros(len(values))
    for code in np.unique(codes):
        rows = codes == code
        count = int(rows.sum())
        ranks[rows] = (rankdata(values[rows]) - (count + 1) / 2) / count
    return ranks


def _codes(labels: Sequence[Hashable]) -> np.ndarray:
    numbers = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return np.array([numbers[label] for label in labels])


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
      x: (n,); rows where x or y is NaN are left out.
      y: (n,)
      clusters: (n,) the variant of each member.
      strata: see `spearman`.
      resamples: the number of resamples.
      seed: that of the resamples.
    """
    kept = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if len(kept) < MIN_POINTS:
        return Correlation(math.nan, math.nan, math.nan)
    x, y = x[kept], y[kept]
    codes = _codes([clusters[int(i)] for i in kept])
    of_strata = None if strata is None else _codes([strata[int(i)] for i in kept])
    members = [np.flatnonzero(codes == code) for code in range(codes.max() + 1)]
    random = np.random.default_rng(seed)

    def statistic(rows: Any) -> float:
        return spearman(x[rows], y[rows], None if of_strata is None else of_strata[rows].tolist())

    draws = _draws(statistic, members, random, resamples)
    if not len(draws):
        return Correlation(statistic(slice(None)), math.nan, math.nan)
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Correlation(statistic(slice(None)), float(low), float(high))


def _draws(
    statistic: Callable[[np.ndarray], float],
    members: Sequence[np.ndarray],
    random: np.random.Generator,
    resamples: int,
) -> np.ndarray:
    """Returns the statistic of each resample for which it is defined."""
    if len(members) < 2:
        return np.zeros(0)
    chosen = random.integers(len(members), size=(resamples, len(members)))
    values = np.array([statistic(np.concatenate([members[i] for i in row])) for row in chosen])
    return values[np.isfinite(values)]
