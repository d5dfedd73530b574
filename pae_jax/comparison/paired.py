"""Metrics of several runs on the same draws of the same test images. Host code.

A difference between two runs varies less than either of them where both find the same images hard.
Its interval therefore comes from the differences of each draw, not from the two intervals.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pae_jax.config import EvalConfig
from pae_jax.metrics import bootstrap

IMAGE_METRICS = ("image_auroc", "image_ap")
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_aupro")
# The names are those of the section threshold of metrics.json.
RATES = ("test_true_positive_rate", "test_false_positive_rate")


class Measured(NamedTuple):
    """One metric of one run: its value on all images and on each draw; nan where undefined."""

    point: float
    draws: np.ndarray  # (resamples,)


def image_metrics(
    scores: Mapping[str, np.ndarray], labels: np.ndarray, settings: EvalConfig
) -> dict[str, Measured]:
    """Returns AUROC and average precision of each image score.

    Args:
      scores: (n,) by name.
      labels: (n,), true for defective images.
      settings: number and seed of the draws.
    """
    measured = {}
    for name, values in scores.items():
        draws = bootstrap.draw_images(values, labels, **_options(settings))
        measured |= _named([f"{metric}_{name}" for metric in IMAGE_METRICS], draws)
    return measured


def pixel_metrics(pairs: Any, settings: EvalConfig) -> dict[str, Measured]:
    """Returns AUROC, average precision and AUPRO of the maps.

    Args:
      pairs: (map, mask) of each image.
      settings: number and seed of the draws, limit of AUPRO.
    """
    draws = bootstrap.draw_pixels(pairs, limit=settings.aupro_limit, **_options(settings))
    return _named(PIXEL_METRICS, draws)


def rates(called: np.ndarray, labels: np.ndarray, settings: EvalConfig) -> dict[str, Measured]:
    """Returns the rates at which defective and good images are called defective.

    Args:
      called: (n,), true for images that are called defective.
      labels: as in `image_metrics`.
      settings: as in `image_metrics`.
    """
    draws = bootstrap.draw_rates(called, labels, **_options(settings))
    points = [called[members].mean() if members.any() else np.nan for members in (labels, ~labels)]
    return {
        name: Measured(float(point), column)
        for name, point, column in zip(RATES, points, draws.T, strict=True)
    }


def compare(runs: Sequence[Mapping[str, Measured]]) -> dict[str, list[dict[str, Any]]]:
    """Returns, for each metric, the entry of each run.

    Args:
      runs: the metrics of each run by name, on the same draws.

    Returns:
      name → for each run the keys value, interval, and for all but the first also difference and
      difference_interval, which are those to the first run. A metric of which a run has no value
      is nan there; one that no run has is left out.
    """
    names = dict.fromkeys(name for run in runs for name in run)
    size = max(len(measured.draws) for run in runs for measured in run.values())
    missing = Measured(np.nan, np.full(size, np.nan))
    table = {}
    for name in names:
        measured = [run.get(name, missing) for run in runs]
        if all(np.isnan(m.point) for m in measured):
            continue
        first, *others = measured
        table[name] = [_entry(first, "value", "interval")]
        for other in others:
            difference = Measured(other.point - first.point, other.draws - first.draws)
            table[name].append(
                _entry(other, "value", "interval")
                | _entry(difference, "difference", "difference_interval")
            )
    return table


def _options(settings: EvalConfig) -> dict[str, int]:
    return {"resamples": settings.bootstrap_resamples, "seed": settings.bootstrap_seed}


def _named(names: Sequence[str], draws: bootstrap.Draws) -> dict[str, Measured]:
    return {
        name: Measured(float(draws.points[i]), draws.values[:, i]) for i, name in enumerate(names)
    }


def _entry(measured: Measured, value: str, ends: str) -> dict[str, Any]:
    interval = bootstrap.interval(measured.point, measured.draws)
    return {value: interval.point, ends: [interval.low, interval.high]}
