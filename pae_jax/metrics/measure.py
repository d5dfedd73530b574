"""Metrics of a test split from its maps, masks and image scores: `pae evaluate`, `pae judge`.

Host code. The maps may come from a network of this package or from another tool.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.dataset import TestSplit
from data_pipelines.items import GOOD
from pae_jax.config import EvalConfig
from pae_jax.metrics import bootstrap, exact

PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_aupro", "pixel_f1_max", "pixel_aupimo")

Pairs = Callable[[Sequence[int]], Iterator[tuple[np.ndarray, np.ndarray]]]


def split_metrics(
    test: TestSplit,
    scores: Mapping[str, np.ndarray],
    pairs: Pairs | None,
    settings: EvalConfig,
) -> dict[str, Any]:
    """Returns the metrics of all images, their intervals, and the metrics of each defect type.

    Args:
      test: the types and labels of n images.
      scores: image scores (n,) by name.
      pairs: the maps with their masks, from `map_mask_pairs`; None leaves the pixel metrics NaN.
      settings: the limit of AUPRO and the bootstrap.

    Returns:
      Values by name; "intervals": [low, high] by name; "per_type": the number of images and the
      values by defect type.
    """

    def measure(
        rows: Sequence[int], resamples: int
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        index = np.asarray(rows)
        of_rows = {name: values[index] for name, values in scores.items()}
        values, intervals = _image_metrics(of_rows, test.labels[index], settings, resamples)
        pixel_values, pixel_intervals = _pixel_metrics(pairs, rows, settings, resamples)
        return values | pixel_values, intervals | pixel_intervals

    values, intervals = measure(range(len(test.names)), settings.bootstrap_resamples)
    good = [i for i, name in enumerate(test.types) if name == GOOD]
    per_type = {}
    for defect_type in defect_types(test):
        # Each type is told from the same normal images.
        defective = [i for i, name in enumerate(test.types) if name == defect_type]
        type_values, _ = measure([*good, *defective], 0)
        per_type[defect_type] = {"images": len(defective), **type_values}
    return {**values, "intervals": intervals, "per_type": per_type}


def all_metrics(
    test: TestSplit,
    scores: Mapping[str, np.ndarray],
    pairs: Pairs | None,
    settings: EvalConfig,
) -> dict[str, float]:
    """Returns the metrics of all images alone.

    Args:
      test: as in `split_metrics`.
      scores: as in `split_metrics`.
      pairs: as in `split_metrics`.
      settings: as in `split_metrics`.
    """
    image_values, _ = _image_metrics(dict(scores), test.labels, settings, 0)
    pixel_values, _ = _pixel_metrics(pairs, range(len(test.names)), settings, 0)
    return image_values | pixel_values


def defect_types(test: TestSplit) -> list[str]:
    """Returns the types of defects, in the order of the images."""
    return [name for name in dict.fromkeys(test.types) if name != GOOD]


def map_mask_pairs(
    test: TestSplit, maps: Sequence[np.ndarray], *, native_size: bool
) -> Pairs | None:
    """Returns a function from image numbers to their maps and masks; None without masks.

    The function passes over defective images whose masks are empty: their pixels have no labels.
    """
    masks = test.masks
    if masks is None:
        return None
    labelled = has_labels(test, native_size)

    def pairs(rows: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for i in rows:
            if not labelled[i]:
                continue
            if native_size:
                yield resize_map(maps[i], test.native_shape(i)), test.native_mask(i)
            else:
                yield maps[i], masks[i]

    return pairs


def has_labels(test: TestSplit, native_size: bool) -> np.ndarray:
    """Returns bool (n,), false for images whose pixels have no labels at this size."""
    return test.has_native_labels if native_size else test.has_pixel_labels


def resize_map(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Returns a map (h, w) resized bilinearly in float32; one of this size stays as it is.

    Masks are never resized.
    """
    from PIL import Image

    if values.shape == shape:
        return values
    height, width = shape
    image = Image.fromarray(values.astype(np.float32, copy=False))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def decision_rates(positive: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns the rates of the decisions on test images; never used to choose the threshold."""

    def rate(members: np.ndarray) -> float:
        return float(positive[members].mean()) if members.any() else math.nan

    return {"test_false_positive_rate": rate(~labels), "test_true_positive_rate": rate(labels)}


def _image_metrics(
    scores: dict[str, np.ndarray], labels: np.ndarray, settings: EvalConfig, resamples: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Returns metrics of the image scores and, with resamples, bootstrap intervals of them."""
    values: dict[str, float] = {}
    intervals: dict[str, list[float]] = {}
    for name, score in scores.items():
        values[f"image_auroc_{name}"] = exact.auroc(score, labels)
        values[f"image_ap_{name}"] = exact.average_precision(score, labels)
        values[f"image_f1_max_{name}"] = exact.f1_max(score, labels).value
        if resamples:
            bounds = bootstrap.bootstrap_images(
                score, labels, resamples=resamples, seed=settings.bootstrap_seed
            )
            intervals[f"image_auroc_{name}"] = [bounds.auroc.low, bounds.auroc.high]
            ap = bounds.average_precision
            intervals[f"image_ap_{name}"] = [ap.low, ap.high]
    return values, intervals


def _pixel_metrics(
    pairs: Pairs | None, rows: Sequence[int], settings: EvalConfig, resamples: int
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Returns the same of the maps' pixels: NaN without masks, as the keys are always there."""
    if pairs is None:
        return dict.fromkeys(PIXEL_METRICS, math.nan), {}
    limit = settings.aupro_limit
    pixels = exact.pixel_metrics(pairs(rows), limit=limit)
    labelled = list(pairs(rows))
    values = (
        pixels.auroc,
        pixels.average_precision,
        pixels.aupro,
        pixels.f1.value,
        exact.aupimo([values for values, _ in labelled], [mask for _, mask in labelled]).mean,
    )
    intervals = {}
    if resamples:
        bounds = bootstrap.bootstrap_pixels(
            pairs(rows), limit=limit, resamples=resamples, seed=settings.bootstrap_seed
        )
        # The bootstrap covers the first three metrics.
        for name, interval in zip(PIXEL_METRICS, bounds, strict=False):
            intervals[name] = [interval.low, interval.high]
    return dict(zip(PIXEL_METRICS, values, strict=True)), intervals
