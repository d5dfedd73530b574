"""pae_jax.masks: the statistics of each family, Perlin's noise, and where blobs lie."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from pae_jax import masks
from pae_jax.config import CorruptionConfig
from sampling import KEY, jit, uniform

DEFAULT = CorruptionConfig()


@functools.cache
def drawn(**keys) -> np.ndarray:
    """500 masks of 64×64 pixels under the default configuration with some keys replaced."""
    config = dataclasses.replace(DEFAULT, **keys)
    image = jnp.zeros((64, 64, 3))
    draw = functools.partial(masks.MASKS[config.mask], image=image, config=config)
    return np.asarray(jit(jax.vmap(draw))(jax.random.split(KEY, 500)))


@pytest.mark.parametrize("family", masks.MASKS)
def test_opacity_is_uniform_with_mass_near_zero(family):
    # A single blob several pixels wide reaches its opacity on a plateau.
    opacity = drawn(mask=family, max_blobs=1, min_axis=0.1, softness=0.1).max(axis=(1, 2))
    assert scipy.stats.kstest(opacity, "uniform").pvalue > 0.01
    # A fraction of 0.05 ± 4 standard deviations lies below 0.05.
    assert opacity.min() > 0
    assert abs((opacity < 0.05).mean() - 0.05) < 0.04


def test_opacity_limits_and_one_opacity_per_blob():
    result = drawn(min_opacity=0.3, max_opacity=0.6, min_blobs=4, min_axis=0.05)
    peaks = result.max(axis=(1, 2))
    assert peaks.min() >= 0.3 and peaks.max() <= 0.6
    # The largest of four opacities exceeds 0.45 with probability 15/16 ± 4 standard deviations.
    assert abs((peaks > 0.45).mean() - 15 / 16) < 0.045
    plateaus = [len(np.unique(m[m >= 0.3])) > 1 for m in result]
    assert np.mean(plateaus) > 0.9


@pytest.mark.parametrize(("family", "area"), [("ellipses", math.pi * 0.04), ("boxes", 0.16)])
def test_blob_area(family, area):
    exact = {"min_axis": 0.2, "max_axis": 0.2, "distortion": 0.0, "softness": 0.01}
    result = drawn(mask=family, max_blobs=1, min_opacity=1.0, **exact).mean(axis=(1, 2))
    # Blobs that the border does not cut have the exact area, but for the pixel grid.
    assert abs(np.quantile(result, 0.9) - area) < 0.04 * area
    assert result.max() < 1.04 * area


def test_shapes_cover_up_to_half_of_the_image_and_often_touch_the_border():
    result = drawn(mask="shapes", max_blobs=1, max_axis=0.4) > 0
    area = result.mean(axis=(1, 2))
    assert 0.02 < np.median(area) < 0.2 and np.quantile(area, 0.98) > 0.3
    border = np.ones((64, 64), bool)
    border[1:-1, 1:-1] = False
    # Every band reaches the border, and a third of the shapes are bands.
    assert (result & border).any(axis=(1, 2)).mean() > 1 / 3
    # A strip may be a few pixels wide.
    assert area.min() < 0.005


def test_default_mask_areas():
    area = (drawn() > 0).mean(axis=(1, 2))
    # A pixel at least (rarely beyond the border), four discs of a quarter of the side at most;
    # log-uniform half-axes between 1 % and 25 % make most blobs small.
    assert (area > 0).mean() > 0.99
    assert area.max() < 4 * math.pi * 0.25**2
    assert 0.005 < np.median(area) < 0.08


def test_number_of_blobs():
    connected = functools.partial(scipy.ndimage.label, structure=np.ones((3, 3)))
    tiny = {"min_axis": 0.03, "max_axis": 0.03, "distortion": 0.0}
    counts = np.array([connected(m > 0)[1] for m in drawn(min_blobs=2, **tiny)])
    # Few of such small blobs touch.
    assert counts.max() == 4
    assert np.abs(np.bincount(counts, minlength=5)[2:] / 500 - 1 / 3).max() < 0.12


def test_perlin_areas_and_non_emptiness():
    area = (drawn(mask="perlin") > 0).mean(axis=(1, 2))
    assert area.min() > 0 and area.max() < 0.7
    assert 0.03 < np.median(area) < 0.4


WIDE = {"max_blobs": 1, "min_axis": 0.25, "softness": 0.5}


@pytest.mark.parametrize("distortion", [0.0, 0.5])
def test_ellipses_are_smooth(distortion):
    result = drawn(**WIDE, distortion=distortion)
    step = max(np.abs(np.diff(result, axis=axis)).max() for axis in (1, 2))
    # The edge is softness · axis = 8 pixels wide and the smoothstep's steepest slope is 1.5; the
    # distortion compresses it to no less than a third.
    assert step <= 1.5 / 8 * (1.001 if distortion == 0 else 3)


def test_distortion_changes_the_shape_not_the_place():
    plain, bent = (drawn(**WIDE, distortion=d) for d in (0.0, 0.5))
    union = np.maximum(plain, bent).sum(axis=(1, 2))
    overlap = np.minimum(plain, bent).sum(axis=(1, 2)) / union
    assert 0.6 < np.median(overlap) < 0.95


def test_gradient_noise_is_perlins():
    shape, cell = (11, 14), (3.5, 4.25)
    assert masks.lattice(shape, min_cell=3.0) == (6, 7)
    turns, phase = uniform(3, 6, 7), uniform(4, 2)
    ours = jit(functools.partial(masks.gradient_noise, shape=shape))(
        turns, phase, cell=jnp.array(cell)
    )
    angle = 2 * math.pi * turns.astype(np.float64)

    def fade(t):
        return 6 * t**5 - 15 * t**4 + 10 * t**3

    expected = np.zeros(shape)
    for row in range(shape[0]):
        for column in range(shape[1]):
            y, x = row / cell[0] + phase[0], column / cell[1] + phase[1]
            i, j = int(y), int(x)
            v, u = fade(y - i), fade(x - j)
            for di, wi in ((0, 1 - v), (1, v)):
                for dj, wj in ((0, 1 - u), (1, u)):
                    a = angle[i + di, j + dj]
                    slope = math.sin(a) * (y - i - di) + math.cos(a) * (x - j - dj)
                    expected[row, column] += wi * wj * slope
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert np.abs(expected).max() <= 1 / math.sqrt(2)


def test_placement_on_edges_is_half_uniform_half_by_the_squared_gradient():
    image = np.zeros((8, 10, 3), np.float32)
    image[3:, 6:] = 0.5  # a corner: an edge along row 2, another along column 5
    image[5:, 8:] = 0.75
    down = np.diff(image, axis=0, append=image[-1:]) ** 2
    right = np.diff(image, axis=1, append=image[:, -1:]) ** 2
    energy = (down + right).mean(-1)
    expected = 0.5 / energy.size + 0.5 * energy / energy.sum()

    u = (np.indices((400, 400)).reshape(2, -1).T + 0.5) / 400  # a lattice instead of draws
    place = jax.jit(jax.vmap(lambda v: masks.place_on_edges(v, jnp.asarray(image))))
    places = np.asarray(place(u.astype(np.float32)))
    pixels = places.astype(int)
    np.testing.assert_array_equal(places, pixels + 0.5)
    frequency = np.zeros(energy.shape)
    np.add.at(frequency, tuple(pixels.T), 1 / len(u))
    np.testing.assert_allclose(frequency, expected, atol=2 / 400 * expected.max() + 1e-3)


def test_placement_on_a_flat_image_is_uniform():
    u = uniform(11, 500, 2)
    image = jnp.full((6, 9, 3), 0.3)
    both = [jax.vmap(lambda v, f=f: f(v, image))(u) for f in masks.PLACEMENTS.values()]
    np.testing.assert_array_equal(np.floor(both[0]), np.floor(both[1]))
