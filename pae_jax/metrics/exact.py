"""Exact detection metrics: AUROC, average precision, AUPRO, AUPIMO, F1-max. Host code.

Every distinct score is a threshold. An image or pixel is detected when its score is at least
the threshold, so tied scores are detected together, and each metric depends on the order of the
scores alone. Counts are integers, sums float64.

All metrics follow from one sort. Sort the normal scores; for each anomalous score s count
the normal ones above it, n_>(s), and at or above it, n_≥(s). While the false positive rate
rises from n_>/n to n_≥/n, the anomalous pixel enters the detected set along a straight line.
So the area under a curve that is a weighted mean over anomalous pixels (the true positive
rate, the per-region overlap) is the same weighted mean of the areas under these ramps.

A metric that lacks a class is nan: AUROC without both classes, AUPRO without a region or
without a normal pixel, average precision and F1-max without an anomalous score. A NaN score
is an error that names its image; infinite scores are valid.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from data_pipelines.errors import BadInput
from pae_jax.metrics.regions import label_regions

_BLOCK_SIZE = 1 << 20  # Anomalous pixels converted to float64 at a time, which bounds memory.


class F1Max(NamedTuple):
    """The largest F1 score, and the highest threshold that reaches it."""

    value: float
    threshold: float


class Curve(NamedTuple):
    """Operating points from the highest threshold to the lowest, with (0, 0) and (1, 1).

    Straight lines between the points are the ROC curve (true against false positive rate) and
    the PRO curve (region overlap against false positive rate). Precision against true positive
    rate is drawn as steps. The precision of the first point, 0/0, is set to 1.
    """

    false_positive_rate: Float[np.ndarray, " points"]
    true_positive_rate: Float[np.ndarray, " points"]
    precision: Float[np.ndarray, " points"]
    region_overlap: Float[np.ndarray, " points"]


class ImageMetrics(NamedTuple):
    """The metrics of image scores."""

    auroc: float
    average_precision: float
    f1: F1Max
    curve: Curve


class PixelMetrics(NamedTuple):
    """The metrics of anomaly maps."""

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
    """The scores of the pixels of one or many images, normal and anomalous ones apart."""

    normal: Shaped[np.ndarray, " normal"]
    anomalous: Shaped[np.ndarray, " anomalous"]
    region: Int[np.ndarray, " anomalous"]  # Index into `region_sizes`.
    region_sizes: Int[np.ndarray, " regions"]  # Pixels of each connected region.


class Ranks(NamedTuple):
    """The anomalous scores in descending order, with their ranks among the normal scores."""

    scores: Shaped[np.ndarray, " anomalous"]
    region: Int[np.ndarray, " anomalous"]
    above: Int[np.ndarray, " anomalous"]  # Normal scores greater than this one.
    at_least: Int[np.ndarray, " anomalous"]  # Normal scores greater or equal.
    num_normal: int
    region_sizes: Int[np.ndarray, " regions"]

    @property
    def last_of_ties(self) -> Int[np.ndarray, " thresholds"]:
        """The last index of each distinct anomalous score."""
        last = np.ones(len(self.scores), bool)
        np.not_equal(self.scores[1:], self.scores[:-1], out=last[:-1])
        return np.flatnonzero(last)

    def auroc(self) -> float:
        """Returns the area under the ROC curve."""
        pairs = len(self.scores) * self.num_normal
        if not pairs:
            return np.nan
        # A tie counts once and a wrong pair twice, so that the count stays an integer.
        twice_wrong = int(self.above.sum()) + int(self.at_least.sum())
        return 1 - twice_wrong / (2 * pairs)

    def average_precision(self) -> float:
        """Returns the step sum of precision over recall."""
        if not self.scores.size:
            return np.nan
        # Tied scores are detected together, so only the last of them is an operating point.
        last = self.last_of_ties
        true = last + 1
        precision = true / (true + self.at_least[last])
        return float(np.dot(np.diff(true, prepend=0), precision) / len(self.scores))

    def aupro(self, limit: float) -> float:
        """Returns the area under the PRO curve up to this false positive rate, divided by it."""
        if not 0 < limit <= 1:
            raise BadInput(f"limit: above 0 and at most 1, not {limit}")
        if not self.scores.size or not self.num_normal:
            return np.nan
        area = np.zeros(len(self.region_sizes))
        for i in range(0, len(self.scores), _BLOCK_SIZE):
            block = slice(i, i + _BLOCK_SIZE)
            start = self.above[block] / self.num_normal
            stop = self.at_least[block] / self.num_normal
            pixel_area = ramp_area(start, stop, 0.0, limit) / limit
            area += np.bincount(self.region[block], weights=pixel_area, minlength=area.size)
        return float(np.mean(area / self.region_sizes))

    def f1_max(self) -> F1Max:
        """Returns the largest F1 score over all thresholds."""
        # Anomalous scores suffice as thresholds, because F1 falls where only normal pixels enter.
        if not self.scores.size:
            return F1Max(np.nan, np.nan)
        last = self.last_of_ties
        true = last + 1
        f1 = 2 * true / (true + self.at_least[last] + len(self.scores))
        best = np.argmax(f1)
        return F1Max(float(f1[best]), float(self.scores[last[best]]))

    def curve(self, points: int) -> Curve:
        """Returns the vertices of the curves, thinned evenly to at most `points`."""
        last = self.last_of_ties
        # Vertex 2k is the operating point at the k-th highest anomalous score, vertex 2k + 1 the
        # one just above the next anomalous score: more normal pixels, the same anomalous ones.
        vertices = np.unique(np.linspace(0, 2 * len(last) + 1, points).round().astype(np.int64))
        threshold = vertices // 2
        false_at = np.append(0, self.at_least[last])[threshold]
        false_before_next = np.append(self.above[last], self.num_normal)[threshold]
        false = np.where(vertices % 2, false_before_next, false_at)
        true = np.append(0, last + 1)[threshold]
        weights = 1 / (self.region_sizes * max(len(self.region_sizes), 1))
        overlap = np.append(0.0, np.cumsum(weights[self.region]))[true]
        detected = true + false
        return Curve(
            false / max(self.num_normal, 1),
            true / max(len(self.scores), 1),
            np.divide(true, detected, out=np.ones(len(vertices)), where=detected > 0),
            overlap,
        )


def auroc(scores: Shaped[np.ndarray, "*shape"], labels: Shaped[np.ndarray, "*shape"]) -> float:
    """Returns the area under the ROC curve; ties count one half.

    Args:
      scores: scores of images (n,) or of pixels (n, h, w); any real values, higher = more
        anomalous.
      labels: the same shape; non-zero = anomalous.

    Returns:
      The fraction of (normal, anomalous) pairs in the right order; nan without both classes.

    Raises:
      BadInput: unequal shapes or a NaN score.
    """
    return rank_scores(_as_one_region(scores, labels)).auroc()


def average_precision(
    scores: Shaped[np.ndarray, "*shape"], labels: Shaped[np.ndarray, "*shape"]
) -> float:
    """Returns the average precision Σ_k (R_k − R_{k−1}) P_k, the step sum.

    Args:
      scores: as in `auroc`.
      labels: as in `auroc`.

    Returns:
      A value in (0, 1]; nan without an anomalous label, 1 without a normal one.
    """
    return rank_scores(_as_one_region(scores, labels)).average_precision()


def f1_max(scores: Shaped[np.ndarray, "*shape"], labels: Shaped[np.ndarray, "*shape"]) -> F1Max:
    """Returns the largest F1 = 2 TP / (2 TP + FP + FN) over all thresholds.

    Args:
      scores: as in `auroc`.
      labels: as in `auroc`.

    Returns:
      (value, threshold); (nan, nan) without an anomalous label.
    """
    return rank_scores(_as_one_region(scores, labels)).f1_max()


def image_metrics(
    scores: Shaped[np.ndarray, " n"], labels: Shaped[np.ndarray, " n"], *, points: int = 1000
) -> ImageMetrics:
    """Returns the metrics of image scores, from one sort.

    Args:
      scores: as in `auroc`.
      labels: as in `auroc`.
      points: the largest number of points of the curve, at least 2. The curve's region overlap
        equals its true positive rate.
    """
    ranks = rank_scores(_as_one_region(scores, labels))
    return ImageMetrics(
        ranks.auroc(), ranks.average_precision(), ranks.f1_max(), ranks.curve(points)
    )


def aupro(maps: Iterable[np.ndarray], masks: Iterable[np.ndarray], *, limit: float = 0.3) -> float:
    """Returns the area under the per-region overlap curve, by the definition of MVTec AD.

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
    """Returns AUROC, average precision, AUPRO, F1-max and curves of anomaly maps, from one sort.

    With float32 maps it uses about 8 bytes of memory for each normal pixel and 60 for each
    anomalous one: less than six times the maps' size if at most a quarter of the pixels is
    anomalous.

    Args:
      pairs: (map, mask) of each image, both (h_i, w_i); may be a generator. Scores are any real
        values; non-zero in the mask = anomalous.
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
    """Returns the area under each image's overlap curve over the shared false positive rate.

    The shared false positive rate is the mean of the false positive rates of the images without
    anomalous pixels. For every image with anomalous pixels, its true positive rate is averaged
    over the logarithm of the shared rate (Bertoldo et al., AUPIMO, BMVC 2024, section 3).
    Between thresholds the curve is linear in the logarithm. Below the smallest rate above 0 it
    stays at the overlap reached without a false positive.

    Args:
      maps: as in `aupro`.
      masks: as in `aupro`.
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
    # Normal images of one size are sorted as one array, because they have equal weights.
    by_size: dict[int, list[np.ndarray]] = {}
    for image in images:
        if not image.anomalous.size and image.normal.size:
            by_size.setdefault(image.normal.size, []).append(image.normal)
    normals = [(len(scores), np.sort(np.concatenate(scores))) for scores in by_size.values()]
    num_images = sum(n for n, _ in normals)

    def mean_overlap(image: ScoredPixels) -> float:
        if not image.anomalous.size or not normals:
            return np.nan
        above, at_least = np.zeros(image.anomalous.size), np.zeros(image.anomalous.size)
        anomalous = np.sort(image.anomalous)
        for n, scores in normals:  # Every normal image has the same weight, whatever its size.
            num_above, num_at_least = _count_above(scores, anomalous)
            above += num_above * (n / num_images / len(scores))
            at_least += num_at_least * (n / num_images / len(scores))
        # The area starts at `low`, so smaller rates can be raised to it, which avoids log(0).
        stop = np.log(np.maximum(at_least, low))
        # A pixel without a false positive above it enters in a step at `stop`, because its ramp
        # would start at log(0). The tiny number avoids a warning, as `where` evaluates both cases.
        start = np.where(above > 0, np.log(np.maximum(above, np.finfo(float).tiny)), stop)
        area = ramp_area(start, stop, np.log(low), np.log(high))
        return float(area.mean() / (np.log(high) - np.log(low)))

    per_image = np.array([mean_overlap(image) for image in images], float)
    defined = per_image[~np.isnan(per_image)]
    return Aupimo(per_image, float(defined.mean()) if defined.size else np.nan)


def split_by_mask(index: int, scores: np.ndarray, mask: np.ndarray) -> ScoredPixels:
    """Splits a copy of an anomaly map into normal and anomalous pixels.

    Args:
      index: the number of the image, for error messages.
      scores: the map (h, w); any real values.
      mask: (h, w), non-zero = anomalous; its 8-connected components are the regions.

    Raises:
      BadInput: unequal shapes or a NaN score.
    """
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
        empty = np.zeros(0, np.int32)
        # `flatten` copies, because `rank_scores` sorts the scores in place.
        return ScoredPixels(scores.flatten(), scores[mask], empty, empty)
    # Only the bounding box is labelled, because most defects are small.
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    region = label_regions(mask[box])[mask[box]] - 1
    return ScoredPixels(scores[~mask], scores[box][mask[box]], region, np.bincount(region))


def concatenate(parts: Sequence[ScoredPixels]) -> ScoredPixels:
    """Concatenates the pixels of several images; regions are numbered consecutively."""
    if not parts:
        return _as_one_region(np.zeros(0), np.zeros(0))
    first = np.cumsum([0] + [len(part.region_sizes) for part in parts])
    # A NumPy int64 would turn the regions into int64, twice the memory.
    parts = [p._replace(region=p.region + np.int32(n)) for p, n in zip(parts, first, strict=False)]
    return ScoredPixels(*(np.concatenate(field) for field in zip(*parts, strict=True)))


def rank_scores(pixels: ScoredPixels) -> Ranks:
    """Sorts the scores. `pixels.normal` is sorted in place, the other arrays stay unchanged."""
    pixels.normal.sort()
    order = np.argsort(pixels.anomalous)
    scores, region = pixels.anomalous[order], pixels.region[order]
    above, at_least = _count_above(pixels.normal, scores)
    return Ranks(
        scores[::-1],
        region[::-1],
        above[::-1],
        at_least[::-1],
        pixels.normal.size,
        pixels.region_sizes,
    )


def as_scores(values: np.ndarray) -> np.ndarray:
    """Converts the values to float32 or float64, without loss for 32-bit integers."""
    values = np.asarray(values)
    return values.astype(np.result_type(values.dtype, np.float32), copy=False)


def ramp_area(
    start: Float[np.ndarray, "*shape"],
    stop: Float[np.ndarray, "*shape"],
    lower: float,
    upper: float,
) -> Float[np.ndarray, "*shape"]:
    """Returns ∫ from lower to upper of a ramp: 0 up to start, 1 from stop on, linear between."""

    def integral(x: float) -> np.ndarray:
        width = stop - start
        inside = np.clip(x, start, stop) - start
        # A ramp of width 0 is a step, and there is no area under its rise.
        rising = np.divide(inside**2, 2 * width, out=np.zeros_like(width), where=width > 0)
        return rising + np.maximum(x - stop, 0)

    return integral(upper) - integral(lower)


def _collect(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> ScoredPixels:
    return concatenate([split_by_mask(index, *pair) for index, pair in enumerate(pairs)])


def _as_one_region(scores: np.ndarray, labels: np.ndarray) -> ScoredPixels:
    """Returns all scores as those of one image whose anomalous pixels form one region."""
    scores, labels = np.atleast_1d(as_scores(scores)), np.atleast_1d(labels) != 0
    if scores.shape != labels.shape:
        raise BadInput(f"scores and labels of one shape, not {scores.shape} and {labels.shape}")
    invalid = np.isnan(scores)
    if invalid.any():
        raise BadInput(f"image {np.argwhere(invalid)[0, 0]}: NaN among the scores")
    anomalous = scores[labels]
    region = np.zeros(anomalous.size, np.int32)
    return ScoredPixels(scores[~labels], anomalous, region, np.bincount(region))


def _count_above(
    ascending: np.ndarray, scores: np.ndarray
) -> tuple[Int[np.ndarray, " anomalous"], Int[np.ndarray, " anomalous"]]:
    """Counts the values of `ascending` that are above each score, and at or above it."""
    # Fast where `scores` ascend too, because NumPy starts each search at the previous result.
    above = len(ascending) - np.searchsorted(ascending, scores, side="right")
    at_least = len(ascending) - np.searchsorted(ascending, scores, side="left")
    return above, at_least
