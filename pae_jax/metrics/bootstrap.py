"""Confidence intervals by a seeded bootstrap over images. Host code.

Images are drawn with replacement, normal and anomalous ones apart (stratified), so that
every draw holds both classes in the given numbers; percentile intervals.

Each image is reduced once to its counts between fixed scores, the edges, and a draw is a
weighted sum of these counts. Every edge is a threshold of the exact curve of every draw.
Approximated is only the course of the curve between two neighbouring edges: straight for
the true positive rate and the overlap, the value in the middle for the precision. Up to 1000
distinct anomalous scores, as those of images, nothing is approximated; for more, as those of
pixels, a draw of 30 images of 64² is off by up to 4e-5 in AUROC and AUPRO and 2e-4 in average
precision, and less the more pixels there are. `point` is always exact.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped

from data_pipelines.errors import BadInput
from pae_jax.metrics import exact

_DRAWS = 128  # Evaluated at a time.
_EDGES = 1000  # Of each class, at most.


class Interval(NamedTuple):
    """The exact value on all images, and the ends of the interval; nan where undefined."""

    point: float
    low: float
    high: float


class ImageIntervals(NamedTuple):
    auroc: Interval
    average_precision: Interval


class PixelIntervals(NamedTuple):
    auroc: Interval
    average_precision: Interval
    aupro: Interval


class Counts(NamedTuple):
    """Per image and per interval between edges, from the lowest scores up."""

    normal: Float[np.ndarray, "images bins"]
    anomalous: Float[np.ndarray, "images bins"]
    overlap: Float[np.ndarray, "images bins"]  # Pixels weighted by 1 / the region's size.
    regions: Float[np.ndarray, " images"]


def bootstrap_images(
    scores: Shaped[np.ndarray, " n"],
    labels: Shaped[np.ndarray, " n"],
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> ImageIntervals:
    """Intervals of the metrics of image scores.

    Args:
      scores: any real values, higher = more anomalous.
      labels: non-zero = anomalous.
      resamples: draws, at least 1.
      level: the share of the draws within an interval, in (0, 1).
      seed: of the draws; the same seed gives the same intervals.

    Returns:
      Exact up to 1000 distinct scores of anomalous images; nan where a metric is undefined.

    Raises:
      BadInput: unequal shapes, a NaN score, or impossible options.
    """
    maps, masks = (np.reshape(v, (-1, 1, 1)) for v in (scores, labels))
    if maps.shape != masks.shape:
        raise BadInput(f"as many labels as scores, not {len(masks)} and {len(maps)}")
    intervals = bootstrap_pixels(
        zip(maps, masks, strict=True), resamples=resamples, level=level, seed=seed
    )
    return ImageIntervals(intervals.auroc, intervals.average_precision)


def bootstrap_pixels(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    limit: float = 0.3,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> PixelIntervals:
    """Intervals of the metrics of anomaly maps; whole images are drawn, never pixels.

    Memory is about three times that of the maps.

    Args:
      pairs: (map, mask) of each image, both (h_i, w_i), as in `metrics.pixel_metrics`.
      limit: the largest false positive rate of AUPRO, in (0, 1].
      resamples, level, seed: as in `bootstrap_images`.

    Returns:
      Exact points and approximate ends (see above); nan where a metric is undefined.

    Raises:
      BadInput: unequal shapes, a NaN score, or impossible options.
    """
    if resamples < 1 or not 0 < level < 1:
        raise BadInput(f"resamples at least 1 and level in (0, 1), not {resamples} and {level}")
    parts = [exact.split_by_mask(i, *pair) for i, pair in enumerate(pairs)]
    pixels = exact.concatenate(parts)
    ranks = exact.rank_scores(pixels)
    points = ranks.auroc(), ranks.average_precision(), ranks.aupro(limit)
    if np.isnan(points[0]):  # A class is missing.
        return PixelIntervals(*(Interval(point, np.nan, np.nan) for point in points))
    edges, single = _edges(pixels.normal, ranks.scores[::-1])
    counts = _count(parts, edges)
    multiplicity = _multiplicity(counts.regions > 0, resamples, np.random.default_rng(seed))
    values = np.concatenate(
        [
            _evaluate(multiplicity[i : i + _DRAWS], counts, single, limit)
            for i in range(0, resamples, _DRAWS)
        ]
    )
    tails = [(1 - level) / 2, (1 + level) / 2]
    ends = np.array([_quantiles(column, tails) for column in values.T])
    return PixelIntervals(
        *(Interval(point, *map(float, pair)) for point, pair in zip(points, ends, strict=True))
    )


def _edges(
    normal: np.ndarray, anomalous: np.ndarray
) -> tuple[Shaped[np.ndarray, " bins"], Bool[np.ndarray, " bins"]]:
    """Ascending edges out of both sorted classes, and whether a bin holds one distinct score.

    A bin reaches from its edge, included, to the next one. An anomalous score that is an edge
    gets a bin of its own: at the end of a wider one it would bias the ramp.
    """
    own = _spread(anomalous)
    above = np.nextafter(own, np.inf, dtype=own.dtype)
    edges = np.unique(np.concatenate([_spread(normal), own, above]))
    inside = np.zeros(len(edges), np.int64)
    for scores in (normal, anomalous):
        inside -= np.searchsorted(scores, edges, side="right")
        inside += np.append(np.searchsorted(scores, edges[1:], side="left"), scores.size)
    return edges, inside == 0


def _spread(ascending: np.ndarray) -> np.ndarray:
    """All distinct scores where they are few, else one half at even ranks, one at log ranks.

    The latter lie densest at the top, where precision and good detectors' curves change fast.
    """
    distinct = ascending[np.append(True, ascending[1:] != ascending[:-1])]
    if distinct.size <= _EDGES:
        return distinct
    even = np.linspace(0, ascending.size - 1, _EDGES // 2)
    from_top = ascending.size - np.geomspace(1, ascending.size, _EDGES // 2)
    return ascending[np.concatenate([even, from_top]).astype(np.int64)]


def _count(parts: Sequence[exact.ScoredPixels], edges: np.ndarray) -> Counts:
    normal, anomalous, overlap = (np.zeros((len(parts), len(edges))) for _ in range(3))
    counts = Counts(normal, anomalous, overlap, regions=np.zeros(len(parts)))
    for i, part in enumerate(parts):
        # Searching the edges in the sorted scores is much quicker than the reverse.
        below = np.searchsorted(np.sort(part.normal), edges)
        counts.normal[i] = np.diff(below, append=part.normal.size)
        bins = np.searchsorted(edges, part.anomalous, side="right") - 1
        weights = 1 / part.region_sizes[part.region]
        counts.anomalous[i] = np.bincount(bins, minlength=len(edges))
        counts.overlap[i] = np.bincount(bins, weights, minlength=len(edges))
        counts.regions[i] = len(part.region_sizes)
    return counts


def _multiplicity(
    anomalous: Bool[np.ndarray, " images"], resamples: int, rng: np.random.Generator
) -> Float[np.ndarray, "resamples images"]:
    """How often each image is drawn, normal and anomalous images apart."""
    times = np.zeros((resamples, len(anomalous)))
    for stratum in (np.flatnonzero(~anomalous), np.flatnonzero(anomalous)):
        if (size := len(stratum)) > 0:
            times[:, stratum] = rng.multinomial(size, np.full(size, 1 / size), resamples)
    return times


def _evaluate(
    multiplicity: Float[np.ndarray, "draws images"],
    counts: Counts,
    single: Bool[np.ndarray, " bins"],
    limit: float,
) -> Float[np.ndarray, "draws 3"]:
    """AUROC, average precision and AUPRO of each draw; nan without normal pixels."""
    # From the highest bin to the lowest, as the threshold falls.
    normal, anomalous, overlap = (
        (multiplicity @ count)[:, ::-1]
        for count in (counts.normal, counts.anomalous, counts.overlap)
    )
    false, true = np.cumsum(normal, axis=1), np.cumsum(anomalous, axis=1)
    normals = np.where(false[:, -1:] > 0, false[:, -1:], np.nan)
    start, stop = (false - normal) / normals, false / normals
    auroc = np.sum(anomalous * exact.ramp_area(start, stop, 0.0, 1.0), axis=1) / true[:, -1]
    aupro = np.sum(overlap * exact.ramp_area(start, stop, 0.0, limit), axis=1)
    aupro /= limit * (multiplicity @ counts.regions)
    # The k-th of a bin's anomalous pixels has k of them at or above it: (anomalous + 1) / 2 is
    # the mean. One distinct score is crossed at once.
    crossed = single[::-1]
    middle_true = true - np.where(crossed, 0, (anomalous - 1) / 2)
    middle_false = false - np.where(crossed, 0, normal / 2)
    detected = middle_true + middle_false
    precision = np.divide(middle_true, detected, out=np.zeros_like(true), where=detected > 0)
    average_precision = np.sum(anomalous * precision, axis=1) / true[:, -1]
    return np.stack([auroc, average_precision, aupro], axis=1)


def _quantiles(values: np.ndarray, tails: list[float]) -> np.ndarray:
    """Of the draws that define the metric: one of all-anomalous masks alone does not."""
    defined = values[~np.isnan(values)]
    return np.quantile(defined, tails) if defined.size else np.full(2, np.nan)
