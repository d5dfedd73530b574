"""The exact metrics against their definitions, other implementations, and the legacy variants."""

import itertools

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import scipy.ndimage
import skimage.measure
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.errors import BadInput
from pae_jax import metrics
from pae_jax.metrics import exact, legacy

property_test = settings(deadline=None, max_examples=40, database=None)


def oracle(maps, masks, limit=0.3):
    """Returns AUROC, AP, AUPRO and F1-max by their definitions, threshold by threshold."""
    scores = np.concatenate([np.ravel(m).astype(np.float64) for m in maps])
    labels = np.concatenate([np.ravel(m) != 0 for m in masks])
    regions = []
    for scores_of_image, mask in zip(maps, masks, strict=True):
        numbered = skimage.measure.label(np.asarray(mask) != 0, connectivity=2)
        regions += [scores_of_image[numbered == n] for n in range(1, numbered.max() + 1)]
    positives, negatives = labels.sum(), (~labels).sum()
    points, f1 = [(0.0, 0.0, 0.0)], []
    average_precision = 0.0
    for threshold in np.unique(scores)[::-1]:
        detected = scores >= threshold
        true, false = (detected & labels).sum(), (detected & ~labels).sum()
        overlap = np.mean([np.mean(r >= threshold) for r in regions])
        points.append((false / max(negatives, 1), true / positives, overlap))
        average_precision += (points[-1][1] - points[-2][1]) * true / (true + false)
        f1.append(2 * true / (true + false + positives))
    rate, recall, overlap = np.transpose(points)
    below = rate <= limit
    aupro = np.trapezoid(
        np.append(overlap[below], np.interp(limit, rate, overlap)), np.append(rate[below], limit)
    )
    if not negatives:
        return np.nan, average_precision, np.nan, max(f1)
    return np.trapezoid(recall, rate), average_precision, aupro / limit, max(f1)


def values(result):
    return result.auroc, result.average_precision, result.aupro, result.f1.value


@st.composite
def images(draw):
    """Draws one to four small (map, mask) with many ties; at least one pixel is anomalous."""
    count = draw(st.integers(1, 4))
    shapes = [draw(st.tuples(st.integers(1, 5), st.integers(1, 5))) for _ in range(count)]
    maps = [draw(hnp.arrays(np.float32, s, elements=st.integers(-3, 3))) for s in shapes]
    masks = [draw(hnp.arrays(np.bool_, s)) for s in shapes]
    masks[0][0, 0] = True
    return maps, masks


# --- values from the tests of other implementations ------------------------------------------


def test_aupro_of_a_ramp():
    ramp = (np.arange(2800) / 2800).reshape(400, 7)
    one_stripe, three_stripes = (
        np.tile(row, (400, 1)) for row in ([0, 0, 0, 1, 0, 0, 0], [0, 1] * 3 + [0])
    )
    third = 1 / 3
    assert metrics.aupro([ramp], [one_stripe], limit=third) == pytest.approx(0.1666656, abs=5e-8)
    assert metrics.aupro([ramp], [three_stripes], limit=third) == pytest.approx(0.1666661, abs=5e-8)
    both = metrics.aupro([ramp, ramp], [one_stripe, three_stripes], limit=third)
    assert both == pytest.approx(0.1666660, abs=5e-8)


def test_aupro_of_random_maps():
    random = np.random.RandomState(1338)
    mask = np.zeros((300, 500), bool)
    mask[:10, :10] = True
    ranks = exact.rank_scores(
        exact.concatenate(
            [exact.split_by_mask(i, random.random((300, 500)), mask) for i in range(200)]
        )
    )
    assert ranks.aupro(0.3) == pytest.approx(0.15101926615521416, rel=1e-12)
    assert ranks.aupro(0.05) == pytest.approx(0.0248666460, abs=5e-11)
    assert ranks.aupro(0.1) == pytest.approx(0.0497306081, abs=5e-11)
    assert ranks.aupro(1.0) == pytest.approx(0.5000184584, abs=5e-11)


def test_aupro_of_the_extremes():
    mask = np.zeros((2, 20, 20))
    mask[1, 3:9, 4:17] = 255
    assert metrics.aupro(mask, mask) == 1
    assert metrics.aupro(-mask, mask) == 0
    assert metrics.aupro(np.full_like(mask, 0.5), mask) == pytest.approx(0.15)


def test_regions_are_eight_connected():
    image = exact.split_by_mask(0, np.zeros((6, 6)), np.eye(6))
    assert image.region_sizes.tolist() == [6]


def test_auroc_of_random_maps():
    scores = np.random.RandomState(1338).random((10_000, 30, 30)).max((1, 2))
    labels = np.random.RandomState(42).randint(2, size=10_000)
    assert metrics.auroc(scores, labels) == pytest.approx(0.496739077956167, rel=1e-14)


@pytest.mark.parametrize(
    ("labels", "scores", "auroc", "average_precision"),
    [
        ([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], 0.75, 0.8333333),
        ([0, 0, 1, 1, 1, 0], [0.2, 0.5, 0.5, 0.5, 0.9, 0.9], 0.611111, 0.566667),
    ],
)
def test_auroc_and_average_precision(labels, scores, auroc, average_precision):
    labels, scores = np.array(labels), np.array(scores)
    assert metrics.auroc(scores, labels) == pytest.approx(auroc, abs=5e-7)
    assert metrics.average_precision(scores, labels) == pytest.approx(average_precision, abs=5e-7)


def test_f1_max():
    labels = np.array([0, 1, 1, 1])
    assert metrics.f1_max(np.array([0.1, 0.5, 0.9, 1.0]), labels) == (1.0, 0.5)
    assert metrics.f1_max(np.array([0.1, 0.5, 0.9, 0.1]), labels) == (
        pytest.approx(0.8571, abs=5e-5),
        0.1,
    )


@pytest.mark.parametrize(
    ("bounds", "first", "second"),
    [
        ((1e-1, 1.0), 0.55, 1.0),
        ((1e-3, 1e-1), 0.03025, 0.3025),
        ((1e-5, 1e-4), 5.5e-5, 5.5e-4),
    ],
)
def test_aupimo(bounds, first, second):
    counts = [1, 9, 90, 900, 9_000, 90_000, 900_000]
    scores = np.repeat(np.arange(7, 0, -1), counts).reshape(1000, 1000)
    masks = np.zeros((3, 10**6), bool)
    masks[1], masks[2, :100_000] = True, True
    result = metrics.aupimo([scores] * 3, masks.reshape(3, 1000, 1000), bounds=bounds)
    assert np.isnan(result.per_image[0])
    np.testing.assert_allclose(result.per_image[1:], [first, second], rtol=1e-9)
    assert result.mean == pytest.approx((first + second) / 2)


# --- properties -------------------------------------------------------------------------------


@property_test
@given(images(), st.sampled_from([0.05, 0.3, 0.5, 1.0]))
def test_equals_the_definition(data, limit):
    maps, masks = data
    result = metrics.pixel_metrics(zip(maps, masks, strict=True), limit=limit)
    np.testing.assert_allclose(values(result), oracle(maps, masks, limit), atol=1e-12)
    assert result.aupro == pytest.approx(
        metrics.aupro(maps, masks, limit=limit), abs=1e-15, nan_ok=True
    )
    flat, labels = (np.concatenate([m.ravel() for m in arrays]) for arrays in data)
    expected = (result.auroc, result.average_precision, result.f1)
    single = (metrics.auroc(flat, labels), metrics.average_precision(flat, labels))
    np.testing.assert_equal((*single, metrics.f1_max(flat, labels)), expected)
    np.testing.assert_equal(metrics.image_metrics(flat, labels)[:3], expected)
    detected = labels[flat >= result.f1.threshold]
    assert result.f1.value == pytest.approx(2 * detected.sum() / (detected.size + labels.sum()))


@property_test
@given(images(), hnp.arrays(np.float64, 7, elements=st.floats(1e-6, 1e6)))
def test_invariant_under_increasing_maps(data, increments):
    maps, masks = data
    expected = metrics.pixel_metrics(zip(maps, masks, strict=True))
    increasing = np.cumsum(increments) - 1e3
    transformed = [increasing[m.astype(int) + 3] for m in maps]
    result = metrics.pixel_metrics(zip(transformed, masks, strict=True))
    np.testing.assert_allclose(values(result), values(expected), atol=1e-15)
    np.testing.assert_equal(
        metrics.aupimo(transformed, masks, bounds=(0.01, 0.5)).per_image,
        metrics.aupimo(maps, masks, bounds=(0.01, 0.5)).per_image,
    )


@property_test
@given(images(), st.randoms(use_true_random=False))
def test_invariant_under_permutation(data, random):
    pairs = list(zip(*data, strict=True))
    expected = metrics.pixel_metrics(pairs)
    random.shuffle(pairs)
    np.testing.assert_allclose(values(metrics.pixel_metrics(pairs)), values(expected), atol=1e-15)


@property_test
@given(images(), st.integers(1, 5))
def test_invariant_under_chunking(data, size):
    pairs = list(zip(*data, strict=True))
    expected = metrics.pixel_metrics(pairs)
    chunks = (pairs[i : i + size] for i in range(0, len(pairs), size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "_BLOCK_SIZE", size)
        result = metrics.pixel_metrics(itertools.chain.from_iterable(chunks))
    np.testing.assert_allclose(values(result), values(expected), atol=1e-15)
    rows = [(m[None, i], k[None, i]) for m, k in pairs for i in range(len(m))]
    result = metrics.pixel_metrics(rows)  # Cuts regions, so AUPRO may differ.
    np.testing.assert_equal(result[:2], expected[:2])


@property_test
@given(images())
def test_curve_has_the_areas(data):
    maps, masks = data
    result = metrics.pixel_metrics(zip(maps, masks, strict=True))
    curve = result.curve
    steps = np.diff(curve.true_positive_rate, prepend=0) @ curve.precision
    assert steps == pytest.approx(result.average_precision)
    if not np.isnan(result.auroc):
        area = np.trapezoid(curve.true_positive_rate, curve.false_positive_rate)
        assert area == pytest.approx(result.auroc)
        area = np.trapezoid(curve.region_overlap, curve.false_positive_rate)
        assert area == pytest.approx(metrics.aupro(maps, masks, limit=1.0))
        assert [rates[0] for rates in curve] == [0, 0, 1, 0]
        np.testing.assert_allclose([rates[-1] for rates in curve][:2], 1)


def test_equals_scikit_learn_and_float32_does_not_stall():
    rng = np.random.default_rng(0)
    labels = rng.random(200_000) < 0.03
    scores = (np.exp(3 * rng.standard_normal(labels.size)) + labels).astype(np.float32)
    result = metrics.image_metrics(scores, labels)
    assert result.auroc == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores), abs=1e-12)
    expected = sklearn.metrics.average_precision_score(labels, scores)
    assert result.average_precision == pytest.approx(expected, abs=1e-12)
    assert len(result.curve.precision) == 1000


def test_aupimo_weighs_normal_images_alike():
    # Rates at thresholds 1, 2: (1/4 + 1/1)/2 and (0 + 1/1)/2; the whole region has score 1.
    maps = [np.array([[0.0, 0, 0, 1]]), np.array([[2.0]]), np.array([[1.0, 0]])]
    masks = [np.zeros((1, 4)), np.zeros((1, 1)), np.array([[1, 0]])]
    result = metrics.aupimo(maps, masks, bounds=(0.5, 1.0))
    ramp = np.log(0.625 / 0.5) / 2 + np.log(1 / 0.625)
    assert result.mean == pytest.approx(ramp / np.log(2))


def test_aupimo_below_the_smallest_rate():
    """Below the smallest rate the overlap is that without a false positive: one pixel of two."""
    maps = [np.arange(10.0)[None], np.array([[20.0, 8.5]])]
    masks = [np.zeros((1, 10)), np.ones((1, 2))]
    assert metrics.aupimo(maps, masks, bounds=(0.01, 0.1)).mean == pytest.approx(0.5)
    assert metrics.aupimo(maps, masks, bounds=(0.1, 1.0)).mean == pytest.approx(1.0)


# --- edge cases -------------------------------------------------------------------------------


def test_without_a_class():
    scores, zeros, ones = np.arange(4.0).reshape(1, 2, 2), np.zeros((1, 2, 2)), np.ones((1, 2, 2))
    normal = metrics.pixel_metrics(zip(scores, zeros, strict=True))
    assert np.isnan([*values(normal), normal.f1.threshold]).all()
    anomalous = metrics.pixel_metrics(zip(scores, ones, strict=True))
    np.testing.assert_equal(values(anomalous), (np.nan, 1.0, np.nan, 1.0))
    assert anomalous.f1.threshold == 0
    assert np.isnan(values(metrics.pixel_metrics([]))).all()
    assert np.isnan(metrics.aupimo(scores, zeros).mean)
    assert np.isnan(metrics.aupimo(scores, ones).mean)
    assert np.isnan(metrics.aupimo([], []).mean)


def test_signed_zeros_tie_and_infinities_are_scores():
    scores = np.array([0.0, -0.0, np.inf, -np.inf], np.float32)
    assert metrics.auroc(scores[:2], np.array([1, 0])) == 0.5
    assert metrics.auroc(scores[:2], np.array([0, 1])) == 0.5
    assert metrics.auroc(scores, np.array([0, 1, 1, 0])) == 0.875


def test_integers_and_half_precision():
    maps, masks = np.arange(18).reshape(2, 3, 3) % 7, np.eye(3)[None].repeat(2, 0)
    expected = metrics.aupro(maps, masks)
    assert metrics.aupro(maps.astype(np.uint8), masks) == expected
    assert metrics.aupro(maps.astype(np.float16), masks.astype(bool)) == expected
    assert 0 < expected < 1


def test_inputs_stay_as_they_were():
    scores, masks = np.random.default_rng(0).random((2, 3, 4, 4)).round(1)
    before = scores.copy(), masks.copy()
    metrics.pixel_metrics(zip(scores, masks * 0, strict=True))
    metrics.aupimo(scores, masks > 0.5)
    metrics.auroc(scores, masks > 0.5)
    np.testing.assert_array_equal((scores, masks), before)


def test_errors_name_the_image():
    maps, masks = np.zeros((3, 2, 2)), np.zeros((3, 2, 2))
    maps[1, 0, 1] = np.nan
    for call in (metrics.aupro, metrics.aupimo, metrics.auroc, metrics.f1_max):
        with pytest.raises(BadInput, match=r"^image 1: NaN"):
            call(maps, masks)
    with pytest.raises(BadInput, match=r"^image 2: NaN"):
        metrics.average_precision(np.array([0, 1, np.nan]), np.array([0, 1, 1]))
    with pytest.raises(BadInput, match=r"^image 0: .* \(2, 2\) and \(2, 3\)"):
        metrics.aupro([np.zeros((2, 2))], [np.zeros((2, 3))])
    with pytest.raises(BadInput, match="limit"):
        metrics.aupro(masks, masks, limit=0.0)
    with pytest.raises(BadInput, match="bounds"):
        metrics.aupimo(masks, masks, bounds=(1e-3, 1e-4))
    with pytest.raises(BadInput, match="one shape"):
        exact._as_one_region(np.zeros(3), np.zeros(4))  # `auroc` itself is type-checked.


# --- legacy variants --------------------------------------------------------------------------


def published(maps, masks, dilate):
    """Computes AUPRO by the usual loop over 200 linear thresholds."""
    low, high = maps.min(), maps.max()
    rates, overlaps = [], []
    for threshold in np.arange(low, high, (high - low) / 200):
        predicted = maps > threshold
        rates.append((predicted & ~masks).sum() / (~masks).sum())
        overlap = []
        for image, mask in zip(predicted, masks, strict=True):
            detected = scipy.ndimage.binary_dilation(image, np.ones((5, 5))) if dilate else image
            for region in skimage.measure.regionprops(skimage.measure.label(mask)):
                overlap.append(detected[tuple(region.coords.T)].mean())
        overlaps.append(np.mean(overlap))
    rates, overlaps = np.array(rates), np.array(overlaps)
    below = rates < 0.3
    return sklearn.metrics.auc(rates[below] / rates[below].max(), overlaps[below])


def test_legacy_variants():
    rng = np.random.default_rng(0)
    masks = np.zeros((4, 32, 32), bool)
    masks[0, 3:9, 20:31], masks[0, 20:24, 2:5], masks[2, 0:4, 0:9] = True, True, True
    noise = scipy.ndimage.gaussian_filter(rng.standard_normal(masks.shape), (0, 2, 2))
    maps = (noise + 0.1 * masks).astype(np.float32)
    linear, dilated = published(maps, masks, False), published(maps, masks, True)
    assert legacy.aupro_linear_200(maps, masks) == pytest.approx(linear, abs=1e-12)
    assert legacy.aupro_dilated(maps, masks) == pytest.approx(dilated, abs=1e-12)
    per_image = np.mean([published(maps[[i]], masks[[i]], False) for i in (0, 2)])
    assert legacy.aupro_mean_of_images(maps, masks) == pytest.approx(per_image, abs=1e-12)
    assert dilated > linear + 0.05
    heavy = np.exp(40 * maps)  # The same order of scores, so the definition gives the same value.
    assert metrics.aupro(heavy, masks) == pytest.approx(metrics.aupro(maps, masks), abs=1e-3)
    assert legacy.aupro_linear_200(heavy, masks) < linear - 0.1
    assert np.isnan(legacy.aupro_linear_200(np.zeros_like(maps), masks))
    assert np.isnan(legacy.aupro_mean_of_images(maps, masks & False))
