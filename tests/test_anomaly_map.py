"""Maps against scikit-image, dm-pix and float64 numpy oracles; smoothing and scores."""

import dataclasses
from functools import partial

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import skimage.data
import skimage.metrics

from pae_jax import anomaly_map
from pae_jax.anomaly_map import IMAGE_SCORES, MAPS, SMOOTHINGS
from pae_jax.config import EvalConfig
from pae_jax.config_schema import COMPARISONS, LEARNED_MAPS

SIZES = [(1, 1), (2, 1), (7, 300), (255, 257)]


def pair(height, width, channels=3, batch=2, seed=0):
    """Two float32 batches: a smooth, bright image with faint texture, and the same disturbed."""
    rng = np.random.default_rng(seed)
    shape = (batch, height, width, channels)
    waves = 0.7 + 0.25 * np.sin(np.arange(height) / 9)[:, None, None] * np.ones(shape)
    x = waves + rng.uniform(-0.05, 0.05, shape)
    y = waves + rng.uniform(-0.05, 0.05, shape)
    y[:, height // 2 :] = rng.uniform(0, 1, y[:, height // 2 :].shape)
    return tuple(np.clip(v, 0, 1).astype(np.float32) for v in (x, y))


def ssim_oracle(x, y):
    """scikit-image in float64, whose borders are reflected in the same way."""
    _, similarity = skimage.metrics.structural_similarity(
        x.astype(np.float64),
        y.astype(np.float64),
        gaussian_weights=True,
        use_sample_covariance=False,
        data_range=1.0,
        channel_axis=-1,
        full=True,
    )
    return np.clip(1 - similarity.mean(axis=-1), 0, 1)


def gms_oracle(x, y):
    """Equations 2–4 of Xue et al. as written, in float64; (h, w, c) → (h, w)."""
    horizontal = np.array([[1, 0, -1]] * 3)[..., None] / 3

    def gradient(v):
        along, across = (
            scipy.ndimage.convolve(v.astype(np.float64), k, mode="reflect")
            for k in (horizontal, horizontal.swapaxes(0, 1))
        )
        return np.hypot(along, across)

    c = 170 / 255**2
    a, b = gradient(x), gradient(y)
    return (1 - (2 * a * b + c) / (a**2 + b**2 + c)).mean(axis=-1)


def msgms_oracle(x, y):
    """Uses strided sums where the module reshapes, np.interp where it resizes."""

    def pool(v):
        v = np.pad(v, ((0, v.shape[0] % 2), (0, v.shape[1] % 2), (0, 0)), mode="symmetric")
        return (v[::2, ::2] + v[1::2, ::2] + v[::2, 1::2] + v[1::2, 1::2]) / 4

    def upsample(values, size, factor, axis):
        at = (np.arange(size) + 0.5) / factor - 0.5
        return np.apply_along_axis(
            lambda line: np.interp(at, np.arange(line.size), line), axis, values
        )

    height, width = x.shape[:2]
    x, y = x.astype(np.float64), y.astype(np.float64)
    total, count = np.zeros((height, width)), 0
    for scale in range(4):
        if scale:
            x, y = pool(x), pool(y)
        if scale and min(x.shape[:2]) < 3:
            break
        small = gms_oracle(x, y)
        total += upsample(upsample(small, height, 2**scale, 0), width, 2**scale, 1)
        count += 1
    return total / count


ORACLES = {
    "mse": lambda x, y: ((x.astype(np.float64) - y) ** 2).mean(axis=-1),
    "ssim": ssim_oracle,
    "gms": gms_oracle,
    "msgms": msgms_oracle,
}


# scikit-image wants images at least as large as the window.
@pytest.mark.parametrize("size", [(11, 12), (64, 61), (255, 257)])
@pytest.mark.parametrize("name", MAPS)
def test_map_matches_its_oracle(name, size):
    x, y = pair(*size)
    expected = [ORACLES[name](a, b) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(MAPS[name](x, y), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 9), (7, 300)])
@pytest.mark.parametrize("name", ["gms", "msgms"])
def test_small_images_match_the_oracle(name, size):
    x, y = pair(*size, channels=1, batch=1)
    np.testing.assert_allclose(MAPS[name](x, y)[0], ORACLES[name](x[0], y[0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("amplitude", [0.003, 0.03, 0.3])
def test_ssim_is_accurate_on_bright_faintly_textured_images(amplitude, shift):
    rng = np.random.default_rng(3)
    x, y = (1 - amplitude * rng.uniform(size=(2, 2, 64, 61, 3))).astype(np.float32)
    y = np.maximum(y - np.float32(shift), 0)
    expected = [ssim_oracle(a, b) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(anomaly_map.ssim(x, y), expected, rtol=0, atol=5e-6)


def test_ssim_matches_dm_pix_inside_the_border(float64):
    x, y = pair(64, 61)
    # In float64, because dm-pix takes E[x²] − E[x]², good to 1e-4 only in float32.
    similarity = jax.jit(partial(dm_pix.ssim, return_map=True))(
        jnp.asarray(x, jnp.float64), jnp.asarray(y, jnp.float64)
    )
    actual = anomaly_map.ssim(x, y)
    assert actual.dtype == np.float32
    expected = np.clip(1 - similarity.mean(axis=-1), 0, 1)
    np.testing.assert_allclose(actual[:, 5:-5, 5:-5], expected, rtol=0, atol=1e-5)


def test_ssim_of_the_camera_image():
    camera = skimage.data.camera()
    noise = np.random.RandomState(5).randn(*camera.shape)
    noisy = np.clip(camera + 20 * noise, 0, 255).astype(np.uint8)
    x, y = (jnp.asarray(v[None, ..., None], jnp.float32) / 255 for v in (camera, noisy))
    # The peers' number comes from the valid window only, and counts negative values.
    similarity = 1 - np.asarray(anomaly_map.structural_dissimilarity(x, y), np.float64)
    assert similarity[0, 5:-5, 5:-5].mean() == pytest.approx(0.35796, abs=5e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MAPS)
def test_map_is_bounded_symmetric_and_zero_for_equal_images(name, size):
    random, other = np.random.default_rng(1).uniform(size=(2, 1, *size, 1)).astype(np.float32)
    black, white = np.zeros_like(random), np.ones_like(random)
    grey = np.full_like(random, 0.3)
    images = np.concatenate([random, other, black, white, grey])
    first, second = images[[0, 2, 4, 2, 0, 3, 4]], images[[1, 3, 0, 4, 0, 3, 4]]
    forth, back = np.asarray(MAPS[name](first, second)), np.asarray(MAPS[name](second, first))
    assert forth.shape == (7, *size)
    assert np.isfinite(forth).all() and forth.min() >= 0 and forth.max() <= 1
    np.testing.assert_allclose(forth, back, rtol=0, atol=1e-6)
    assert not forth[4:].any()


def test_maps_of_black_against_white():
    black, white = np.zeros((2, 11, 12, 3), np.float32), np.ones((2, 11, 12, 3), np.float32)
    assert np.all(anomaly_map.mse(black, white) == 1)
    np.testing.assert_allclose(anomaly_map.ssim(black, white), 1 - 1e-4 / (1 + 1e-4), rtol=1e-6)
    assert not np.any(anomaly_map.gms(black, white))  # neither has a gradient


def test_map_points_at_the_defect():
    x, _ = pair(64, 61)
    y = x.copy()
    y[:, 20:30, 40:50] = 1 - y[:, 20:30, 40:50]
    for name, function in MAPS.items():
        values = np.asarray(function(x, y))[0]
        assert values[20:30, 40:50].mean() > 10 * values[40:, :20].mean(), name
        assert values[20:30, 40:50].mean() > 0.05, name


def filter_oracle(maps, kernel):
    pad = kernel.size // 2
    maps = np.pad(maps.astype(np.float64), ((0, 0), (pad, pad), (pad, pad)), mode="symmetric")
    for axis in (1, 2):
        maps = np.apply_along_axis(np.convolve, axis, maps, kernel, mode="valid")
    return maps


@pytest.mark.parametrize("size", [(1, 1), (5, 40), (36, 61)])
@pytest.mark.parametrize("fraction", [0.01, 1 / 12, 0.9])
def test_smoothing_matches_its_oracle(size, fraction):
    maps = np.random.default_rng(2).uniform(size=(2, *size)).astype(np.float32)
    width = max(1.0, fraction * min(size))
    radius = np.arange(-200, 201)
    kernels = {
        "mean": np.clip((width + 1) / 2 - abs(radius), 0, 1),
        "gaussian": np.exp(-6 * (radius / width) ** 2),
    }
    kernels["gaussian"][abs(radius) > np.ceil(4 * width / np.sqrt(12))] = 0
    for kind, kernel in kernels.items():
        expected = filter_oracle(maps, kernel / kernel.sum())
        actual = anomaly_map.smooth(maps, kind, fraction)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6, err_msg=kind)
    np.testing.assert_array_equal(anomaly_map.smooth(maps, "none", fraction), maps)


def test_gaussian_and_mean_smoothing_spread_alike():
    point = np.zeros((1, 97, 97), np.float32)
    point[0, 48, 48] = 1
    offsets = np.arange(97) - 48.0
    spread = {}
    for kind in ("mean", "gaussian"):
        smoothed = np.asarray(anomaly_map.smooth(point, kind, 1 / 12), np.float64)
        assert smoothed.sum() == pytest.approx(1, abs=1e-5)
        spread[kind] = (smoothed[0].sum(axis=0) * offsets**2).sum()
    assert spread["mean"] == pytest.approx(spread["gaussian"], rel=0.05)


@pytest.mark.parametrize("size", [(1, 1), (30, 40), (255, 257)])
def test_image_scores(size):
    maps = np.random.default_rng(4).uniform(size=(3, *size)).astype(np.float32)
    exact = maps.reshape(3, -1).astype(np.float64)
    count = max(1, round(0.01 * exact.shape[1]))
    expected = {
        "sum": exact.sum(axis=1),
        "max": exact.max(axis=1),
        "mean": exact.mean(axis=1),
        "topk": np.sort(exact, axis=1)[:, -count:].mean(axis=1),
    }
    assert expected.keys() == IMAGE_SCORES.keys()
    for kind, values in expected.items():
        np.testing.assert_allclose(anomaly_map.image_score(maps, kind, 0.01), values, rtol=2e-6)


def test_unknown_names_are_errors():
    maps = np.zeros((1, 4, 4), np.float32)
    with pytest.raises(KeyError):
        anomaly_map.smooth(maps, "median")
    with pytest.raises(KeyError):
        anomaly_map.image_score(maps, "min")


def test_configuration_offers_what_the_registries_hold():
    choices = {f.name: f.metadata.get("choices") for f in dataclasses.fields(EvalConfig)}
    assert set(COMPARISONS) == set(MAPS)
    assert {*COMPARISONS, *LEARNED_MAPS} == set(anomaly_map.REACH)
    assert set(choices["smoothing"]) == set(SMOOTHINGS)
    assert set(choices["image_score"]) <= set(IMAGE_SCORES)
