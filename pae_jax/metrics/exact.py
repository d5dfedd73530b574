"""Exact detection metrics: AUROC, average precision, AUPRO, AUPIMO, F1-max. Host code.

Every distinct score is a threshold, an image or pixel is called anomalous when its score is
at least the threshold, and tied scores are crossed together. So each metric depends on the
order of the scores alone. Counts are integers, sums float64.

All of them follow from one sort. Sort the normal scores; for each anomalous score s count
the normal ones above it, n_>(s), and at or above it, n_≥(s). While the false positive rate
rises from n_>/n to n_≥/n the anomalous pixel enters the detected set along a straight line,
so the area under a curve that is a weighted mean over anomalous pixels (the true positive
rate, the per-region overlap) is the same weighted mean of the areas under these ramps.

A metric that lacks a class is nan: AUROC without both classes, AUPRO without a region or
without a normal pixel, average precision and F1-max without an anomalous score. A NaN score
is an error that names its image; infinite scores are ordinary.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.ndimage
from jaxtyping import Float, Int, Shaped

from data_pipelines.errors import BadInput

_BLOCK = 1 << 20  # Anomalous pixels in float64 at a time.
_EIGHT_CONNECTED = np.ones((3, 3))


class F1Max(NamedTuple):
    """The largest F1 score, and the highest threshold that reaches it."""

    value: float
    threshold: float


class Curve(NamedTuple):
    """Operating points from the strictest to the laxest; (0, 0) and (1, 1) included.

    Straight lines between the points are the ROC curve (false against true positive rate)
    and the PRO curve (false positive rate against region overlap); precision against true
    positive rate is to be drawn as steps. The precision of the first point, 0/0, is 1.
    """

    false_positive_rate: Float[np.ndarray, " points"]
    true_positive_rate: Float[np.ndarray, " points"]
    precision: Float[np.ndarray, " points"]
    region_overlap: Float[np.ndarray, " points"]


class ImageMetrics(NamedTuple):
    auroc: float
    average_precision: float
    f1: F1Max
    curve: Curve


class PixelMetrics(NamedTuple):
    auroc: float
    average_precision: float
    aupro: float
    f1: F1Max
    curve: Curve


class Aupimo(NamedTuple):
    """AUPIMO of each image (nan for an image without anomalous pixels) and their mean."""

    per_image: Float[np.ndarray, " images"]
    mean: float


class ScoredPixels(NamedTuple):
    """The scores of one image or of many: normal ones, and anomalous ones by region."""

    normal: Shaped[np.ndarray, " normal"]
    anomalous: Shaped[np.ndarray, " anomalous"]
    region: Int[np.ndarray, " anomalous"]  # Index into region_sizes.
    region_sizes: Int[np.ndarray, " regions"]


class Ranks(NamedTuple):
    """The anomalous scores in descending order, and their place among the normal ones."""

    scores: Shaped[np.ndarray, " anomalous"]
    region: Int[np.ndarray, " anomalous"]
    above: Int[np.ndarray, " anomalous"]  # Normal scores greater than this one.
    at_least: Int[np.ndarray, " anomalous"]  # Normal scores greater or equal.
    normals: int
    region_sizes: Int[np.ndarray, " regions"]

    @property
    def last_of_ties(self) -> Int[np.ndarray, " thresholds"]:
        """The last index of every distinct anomalous score."""
        last = np.ones(len(self.scores), bool)
        np.not_equal(self.scores[1:], self.scores[:-1], out=last[:-1])
        return np.flatnonzero(last)

    def auroc(self) -> float:
        pairs = len(self.scores) * self.normals
        if not pairs:
            return np.nan
        wrong = int(self.above.sum()) + int(self.at_least.sum())  # Twice the wrong pairs.
        return 1 - wrong / (2 * pairs)

    def average_precision(self) -> float:
        if not self.scores.size:
            return np.nan
        last = self.last_of_ties
        true = last + 1
        precision = true / (true + self.at_least[last])
        return float(np.dot(np.diff(true, prepend=0), precision) / len(self.scores))

    def aupro(self, limit: float) -> float:
        if not 0 < limit <= 1:
            raise BadInput(f"limit: above 0 and at most 1, not {limit}")
        if not self.scores.size or not self.normals:
            return np.nan
        area = np.zeros(len(self.region_sizes))
        for i in range(0, len(self.scores), _BLOCK):
            block = slice(i, i + _BLOCK)
            start, stop = self.above[block] / self.normals, self.at_least[block] / self.normals
            share = ramp_area(start, stop, 0.0, limit) / limit
            area += np.bincount(self.region[block], weights=share, minlength=area.size)
        return float(np.mean(area / self.region_sizes))

    def f1_max(self) -> F1Max:
        # F1 only falls while normal scores alone are crossed: the maximum is at an anomalous one.
        if not self.scores.size:
            return F1Max(np.nan, np.nan)
        last = self.last_of_ties
        true = last + 1
        f1 = 2 * true / (true + self.at_least[last] + len(self.scores))
        best = np.argmax(f1)
        return F1Max(float(f1[best]), float(self.scores[last[best]]))

    def curve(self, points: int) -> Curve:
        """Both ends of every threshold's segment, thinned evenly to at most `points`."""
        last = self.last_of_ties
        true = np.concatenate([[0], last + 1])
        chosen = np.unique(np.linspace(0, 2 * len(last) + 1, points).round().astype(np.int64))
        # Vertex 2k lies below threshold k's first normal, 2k + 1 behind its last.
        before, behind = np.append(self.above[last], self.normals), self.at_least[last]
        false = np.where(chosen % 2, before[chosen // 2], np.append(0, behind)[chosen // 2])
        true = true[chosen // 2]
        weights = 1 / (self.region_sizes * max(len(self.region_sizes), 1))
        overlap = np.append(0.0, np.cumsum(weights[self.region]))[true]
        detected = true + false
        return Curve(
            false / max(self.normals, 1),
            true / max(len(self.scores), 1),
            np.divide(true, detected, out=np.ones(len(chosen)), where=detected > 0),
            overlap,
        )


def auroc(scores: Shaped[np.ndarray, "*shape"], labels: Shaped[np.ndarray, "*shape"]) -> float:
    """Area under the ROC curve; ties count one half.

    Args:
      scores: of images (n,) or of pixels (n, h, w); any real values, higher = more anomalous.
      labels: the same shape; non-zero = anomalous.

    Returns:
      The share of (normal, anomalous) pairs in the right order; nan without both classes.

    Raises:
      BadInput: unequal shapes or a NaN score.
    """
    return rank_scores(_ungrouped(scores, labels)).auroc()


def average_precision(
    scores: Shaped[np.ndarray, "*shape"], labels: Shaped[np.ndarray, "*shape"]
) -> float:
    """Average precision Σ_k (R_k − R_{k−1}) P_k, the step sum; arguments as in `auroc`.

    Returns:
      A value in (0, 1]; nan without an anomalous label, 1 without a normal one.
    """
    return rank_scores(_ungrouped(scores, labels)).average_precision()


def f1_max(scores: Shaped[np.ndarray, "*shape"], labels: Shaped[np.ndarray, "*shape"]) -> F1Max:
    """The largest F1 = 2 TP / (2 TP + FP + FN) over all thresholds; arguments as in `auroc`.

    Returns:
      (value, threshold); (nan, nan) without an anomalous label.
    """
    return rank_scores(_ungrouped(scores, labels)).f1_max()


def image_metrics(
    scores: Shaped[np.ndarray, " n"], labels: Shaped[np.ndarray, " n"], *, points: int = 1000
) -> ImageMetrics:
    """The metrics of image scores from one sort; arguments as in `auroc`.

    In the curve, whose points number at most `points`, the region overlap equals the true
    positive rate.
    """
    ranks = rank_scores(_ungrouped(scores, labels))
    return ImageMetrics(
        ranks.auroc(), ranks.average_precision(), ranks.f1_max(), ranks.curve(points)
    )


def aupro(maps: Iterable[np.ndarray], masks: Iterable[np.ndarray], *, limit: float = 0.3) -> float:
    """Area under the per-region overlap curve, by the definition of MVTec AD.

    The overlap is averaged over the 8-connected regions of all masks, the false positive rate
    is that of the normal pixels of all images; linear interpolation at the limit.
    (Bergmann et al., The MVTec Anomaly Detection Dataset, IJCV 2021, section 6.1.)

    Args:
      maps: (n, h, w), or an iterable of (h_i, w_i); any real values.
      masks: the same shapes; non-zero = anomalous.
      limit: the largest false positive rate, in (0, 1]; the area is divided by it.

    Returns:
      A value in [0, 1]; nan without a region or without a normal pixel.

    Raises:
      BadInput: unequal shapes, a NaN score, or an impossible limit.
    """
    return rank_scores(_collect(zip(maps, masks, strict=True))).aupro(limit)


def pixel_metrics(
    pairs: Iterable[tuple[np.ndarray, np.ndarray]], *, limit: float = 0.3, points: int = 1000
) -> PixelMetrics:
    """AUROC, average precision, AUPRO, F1-max and curves of anomaly maps from one sort.

    Beyond the map at hand, float32 maps take at most about 8 bytes for each normal pixel and
    60 for each anomalous one: below six times the maps while a quarter of the pixels or less
    is anomalous.

    Args:
      pairs: (map, mask) of each image, both (h_i, w_i); a generator will do. Scores are any
        real values, non-zero in the mask = anomalous.
      limit: the largest false positive rate of AUPRO, in (0, 1].
      points: the largest number of points of the curve, at least 2.

    Returns:
      Values as in `auroc`, `average_precision`, `aupro` and `f1_max`.

    Raises:
      BadInput: unequal shapes, a NaN score, or an impossible limit.
    """
    ranks = rank_scores(_collect(pairs))
    return PixelMetrics(
        ranks.auroc(),
        ranks.average_precision(),
        ranks.aupro(limit),
        ranks.f1_max(),
        ranks.curve(points),
    )


def aupimo(
    maps: Iterable[np.ndarray],
    masks: Iterable[np.ndarray],
    *,
    bounds: tuple[float, float] = (1e-5, 1e-4),
) -> Aupimo:
    """Area under the per-image overlap curve against the normal images' false positive rate.

    For every image that has anomalous pixels, its true positive rate is averaged over the
    logarithm of the shared false positive rate, which is the mean over the images without
    anomalous pixels of theirs (Bertoldo et al., AUPIMO, BMVC 2024, section 3). Between
    thresholds the curve is linear in the logarithm; below the smallest rate above 0 it
    stays at the overlap reached without a false positive.

    Args:
      maps, masks: as in `aupro`.
      bounds: the smallest and the largest shared false positive rate, 0 < low < high ≤ 1.

    Returns:
      Values in [0, 1]; all nan without a normal image, the mean nan without an anomalous one.

    Raises:
      BadInput: unequal shapes, a NaN score, or impossible bounds.
    """
    low, high = bounds
    if not 0 < low < high <= 1:
        raise BadInput(f"bounds: 0 < low < high <= 1, not {bounds}")
    images = [split_by_mask(i, *pair) for i, pair in enumerate(zip(maps, masks, strict=True))]
    of_size: dict[int, list[np.ndarray]] = {}
    for image in images:
        if not image.anomalous.size and image.normal.size:
            of_size.setdefault(image.normal.size, []).append(image.normal)
    normals = [(len(scores), np.sort(np.concatenate(scores))) for scores in of_size.values()]
    count = sum(n for n, _ in normals)

    def score(image: ScoredPixels) -> float:
        if not image.anomalous.size or not normals:
            return np.nan
        above, at_least = np.zeros(image.anomalous.size), np.zeros(image.anomalous.size)
        anomalous = np.sort(image.anomalous)
        for n, scores in normals:  # Every image weighs the same, whatever its size.
            more, as_many = _exceeding(scores, anomalous)
            above += more * (n / count / len(scores))
            at_least += as_many * (n / count / len(scores))
        # Rates below `low` matter no more than `low` itself, and log(0) is avoided.
        stop = np.log(np.maximum(at_least, low))
        start = np.where(above > 0, np.log(np.maximum(above, np.finfo(float).tiny)), stop)
        area = ramp_area(start, stop, np.log(low), np.log(high))
        return float(area.mean() / (np.log(high) - np.log(low)))

    per_image = np.array([score(image) for image in images], float)
    defined = per_image[~np.isnan(per_image)]
    return Aupimo(per_image, float(defined.mean()) if defined.size else np.nan)


def split_by_mask(index: int, scores: np.ndarray, mask: np.ndarray) -> ScoredPixels:
    """Copies the pixels of the map `scores` apart by its mask; `index` names it in errors."""
    scores, mask = as_scores(scores), np.asarray(mask) != 0
    if scores.ndim != 2 or scores.shape != mask.shape:
        raise BadInput(
            f"image {index}: a map and a mask of one shape (h, w), not {scores.shape} and "
            f"{mask.shape}"
        )
    if np.isnan(scores).any():
        raise BadInput(f"image {index}: NaN among the scores")
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        none = np.zeros(0, np.int32)
        return ScoredPixels(scores.flatten(), scores[mask], none, none)
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    labels = np.zeros(mask[box].shape, np.int32)
    scipy.ndimage.label(mask[box], _EIGHT_CONNECTED, output=labels)
    region = labels[mask[box]] - 1
    return ScoredPixels(scores[~mask], scores[box][mask[box]], region, np.bincount(region))


def concatenate(parts: Sequence[ScoredPixels]) -> ScoredPixels:
    """A copy of the pixels of several images as those of one; regions are numbered through."""
    if not parts:
        return _ungrouped(np.zeros(0), np.zeros(0))
    first = np.cumsum([0] + [len(part.region_sizes) for part in parts])
    parts = [p._replace(region=p.region + np.int32(n)) for p, n in zip(parts, first, strict=False)]
    return ScoredPixels(*(np.concatenate(field) for field in zip(*parts, strict=True)))


def rank_scores(pixels: ScoredPixels) -> Ranks:
    """The one sort; `pixels.normal` is sorted in place, the rest of `pixels` stays."""
    pixels.normal.sort()
    order = np.argsort(pixels.anomalous)
    scores, region = pixels.anomalous[order], pixels.region[order]
    above, at_least = _exceeding(pixels.normal, scores)
    return Ranks(
        scores[::-1],
        region[::-1],
        above[::-1],
        at_least[::-1],
        pixels.normal.size,
        pixels.region_sizes,
    )


def as_scores(values: np.ndarray) -> np.ndarray:
    """`values` as float32 or float64, without loss for 32-bit integers."""
    values = np.asarray(values)
    return values.astype(np.result_type(values.dtype, np.float32), copy=False)


def ramp_area(
    start: Float[np.ndarray, "*shape"],
    stop: Float[np.ndarray, "*shape"],
    lower: float,
    upper: float,
) -> Float[np.ndarray, "*shape"]:
    """∫ from lower to upper of a ramp: 0 up to start, 1 from stop on, a line between."""

    def integral(x: float) -> np.ndarray:
        width = stop - start
        inside = np.clip(x, start, stop) - start
        rising = np.divide(inside**2, 2 * width, out=np.zeros_like(width), where=width > 0)
        return rising + np.maximum(x - stop, 0)

    return integral(upper) - integral(lower)


def _collect(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> ScoredPixels:
    return concatenate([split_by_mask(index, *pair) for index, pair in enumerate(pairs)])


def _ungrouped(scores: np.ndarray, labels: np.ndarray) -> ScoredPixels:
    """All scores as those of one image whose anomalous ones form one region."""
    scores, labels = np.atleast_1d(as_scores(scores)), np.atleast_1d(labels) != 0
    if scores.shape != labels.shape:
        raise BadInput(f"scores and labels of one shape, not {scores.shape} and {labels.shape}")
    invalid = np.isnan(scores)
    if invalid.any():
        raise BadInput(f"image {np.argwhere(invalid)[0, 0]}: NaN among the scores")
    anomalous = scores[labels]
    region = np.zeros(anomalous.size, np.int32)
    return ScoredPixels(scores[~labels], anomalous, region, np.bincount(region))


def _exceeding(
    ascending: np.ndarray, scores: np.ndarray
) -> tuple[Int[np.ndarray, " anomalous"], Int[np.ndarray, " anomalous"]]:
    """How many of `ascending` are above each score, and how many at or above it."""
    # Quick where `scores` ascend too: each search starts from the last one's result.
    above = len(ascending) - np.searchsorted(ascending, scores, side="right")
    at_least = len(ascending) - np.searchsorted(ascending, scores, side="left")
    return above, at_least
