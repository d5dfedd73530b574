"""The bootstrap against the exact metrics of its draws."""

import time

import numpy as np
import pytest
import scipy.ndimage

from data_pipelines.errors import BadInput
from pae_jax import metrics
from pae_jax.metrics import bootstrap


def smooth_images(count, size, seed=0):
    """Yields smooth, heavy-tailed random maps; every other image has one to three weak defects."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        scores = 20 * scipy.ndimage.gaussian_filter(rng.standard_normal((size, size)), 4)
        mask = np.zeros((size, size), bool)
        for _ in range(rng.integers(1, 4) if i % 2 else 0):
            (y, x), (h, w) = rng.integers(0, size - 8, 2), rng.integers(2, size // 4, 2)
            mask[y : y + h, x : x + w] = True
        yield np.exp(scores + 4 * rng.random() * mask).astype(np.float32), mask


def exact(pairs):
    result = metrics.pixel_metrics(pairs)
    return result.auroc, result.average_precision, result.aupro


def draws(pairs, resamples, seed):
    """Returns the exact metrics of each draw that the bootstrap makes."""
    pairs = list(pairs)
    anomalous = np.array([mask.any() for _, mask in pairs])
    times = bootstrap._multiplicity(anomalous, resamples, np.random.default_rng(seed))
    assert (times @ anomalous == anomalous.sum()).all()
    assert (times @ ~anomalous == (~anomalous).sum()).all()
    return np.array(
        [
            exact([p for p, n in zip(pairs, row, strict=True) for _ in range(int(n))])
            for row in times
        ]
    )


def test_pixel_intervals_follow_the_exact_metrics_of_the_draws():
    pairs = list(smooth_images(30, 64))
    result = bootstrap.bootstrap_pixels(pairs, resamples=40, level=0.8, seed=3)
    assert tuple(i.point for i in result) == exact(pairs)
    low, high = np.quantile(draws(pairs, 40, 3), [0.1, 0.9], axis=0)
    for i, tolerance in enumerate((5e-5, 2e-4, 5e-5)):
        np.testing.assert_allclose(result[i][1:], (low[i], high[i]), atol=tolerance, rtol=0)
    assert (high - low > 0.01).all()


def test_few_distinct_scores_are_exact():
    pairs = [(np.round(2 * np.log(m)), k) for m, k in smooth_images(10, 24)]
    result = bootstrap.bootstrap_pixels(iter(pairs), resamples=20, level=0.5, seed=0)
    low, high = np.quantile(draws(pairs, 20, 0), [0.25, 0.75], axis=0)
    np.testing.assert_allclose([i.low for i in result], low, atol=1e-12)
    np.testing.assert_allclose([i.high for i in result], high, atol=1e-12)


def test_image_intervals_are_exact():
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 3 == 0
    scores = rng.standard_normal(40).round(1) + labels
    result = bootstrap.bootstrap_images(scores, labels, resamples=50, level=0.9, seed=1)
    assert result.auroc.point == metrics.auroc(scores, labels)
    assert result.average_precision.point == metrics.average_precision(scores, labels)
    pairs = [(s[None, None], k[None, None]) for s, k in zip(scores, labels, strict=True)]
    low, high = np.quantile(draws(pairs, 50, 1)[:, :2], [0.05, 0.95], axis=0)
    np.testing.assert_allclose([i.low for i in result], low, atol=1e-12)
    np.testing.assert_allclose([i.high for i in result], high, atol=1e-12)


def test_interval_of_the_auroc_agrees_with_theory():
    """The interval has the width of Hanley and McNeil's standard error of the AUROC."""
    rng = np.random.default_rng(0)
    labels = np.arange(400) < 200
    scores = rng.standard_normal(400) + labels
    auroc, _ = bootstrap.bootstrap_images(scores, labels)
    a, n = auroc.point, 200
    q1, q2 = a / (2 - a), 2 * a**2 / (1 + a)
    error = np.sqrt((a * (1 - a) + (n - 1) * (q1 - a**2 + q2 - a**2)) / n**2)
    assert auroc.high - auroc.low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_seed_and_order_of_calls():
    pairs = list(smooth_images(8, 16))
    first = bootstrap.bootstrap_pixels(pairs, resamples=200, seed=5)
    assert bootstrap.bootstrap_pixels(pairs, resamples=200, seed=5) == first
    assert bootstrap.bootstrap_pixels(pairs, resamples=200, seed=6) != first
    assert all(i.low <= i.point <= i.high for i in first)


def test_images_of_several_sizes():
    pairs = [*smooth_images(6, 24), *smooth_images(6, 40)]
    result = bootstrap.bootstrap_pixels(pairs, resamples=10)
    assert tuple(i.point for i in result) == exact(pairs)


def test_undefined_metrics_are_nan():
    for mask in (np.zeros((4, 4)), np.ones((4, 4))):
        result = bootstrap.bootstrap_pixels([(np.arange(16.0).reshape(4, 4), mask)] * 2)
        assert np.isnan([i[1:] for i in result]).all()
        assert np.isnan(result.auroc.point)
        assert np.isnan(result.aupro.point)
    assert np.isnan(bootstrap.bootstrap_pixels([]).auroc.point)


def test_draws_without_normal_pixels_are_left_out():
    scores = np.arange(16.0).reshape(4, 4)
    pairs = [(scores, scores > 7), (scores, scores >= 0)]
    result = bootstrap.bootstrap_pixels(pairs, resamples=100)
    # A draw has the first image alone (1.0), both, or the second alone, without a normal pixel.
    assert result.auroc == (pytest.approx(5 / 6), pytest.approx(5 / 6), 1.0)
    assert result.aupro.high == 1.0


def test_draws_of_the_same_images_are_the_same_whatever_the_scores():
    labels = np.array([0, 1, 1, 0, 1, 0, 0])
    rng = np.random.default_rng(2)
    times = bootstrap._multiplicity(labels > 0, 30, np.random.default_rng(5))
    for scores in (rng.normal(size=7), rng.integers(0, 2, 7)):
        drawn = bootstrap.draw_images(scores, labels, resamples=30, seed=5)
        # The AUROC of one draw: the fraction of its pairs that are in the right order.
        above = scores[labels > 0][:, None] - scores[labels == 0]
        right = (above > 0) + 0.5 * (above == 0)
        pairs = times[:, labels > 0][:, :, None] * times[:, labels == 0][:, None]
        np.testing.assert_allclose(drawn.values[:, 0], (pairs * right).sum((1, 2)) / 12)
        assert drawn.points[0] == pytest.approx(right.mean())
        called = scores > 0
        rates = bootstrap.draw_rates(called, labels, resamples=30, seed=5)
        for column, members in zip(rates.T, (labels > 0, labels == 0), strict=True):
            expected = [
                np.repeat(called[members], row[members].astype(int)).mean() for row in times
            ]
            np.testing.assert_allclose(column, expected)
    one_class = bootstrap.draw_rates(called, labels * 0, resamples=3)
    assert np.isnan(one_class[:, 0]).all() and np.isfinite(one_class[:, 1]).all()


def test_errors():
    scores, labels = np.array([0.0, np.nan]), np.array([0, 1])
    with pytest.raises(BadInput, match=r"^image 1: NaN"):
        bootstrap.bootstrap_images(scores, labels)
    for options in ({"resamples": 0}, {"level": 1.0}):
        with pytest.raises(BadInput, match="resamples"):
            bootstrap.bootstrap_images(labels, labels, **options)


def test_seconds_not_minutes():
    """It takes about 2.5 s on one idle core; a loop over the draws takes minutes."""
    pairs = list(smooth_images(62, 128)) * 12  # 744 maps
    start = time.perf_counter()
    result = bootstrap.bootstrap_pixels(pairs)
    assert time.perf_counter() - start < 20
    assert all(i.low < i.point < i.high for i in result)
