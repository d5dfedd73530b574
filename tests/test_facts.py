"""data_pipelines/facts.py: what training images show of facts that a config can state."""

import numpy as np
import pytest

from data_pipelines import facts

RNG = np.random.default_rng(0)
MOTIF = RNG.integers(40, 216, (32, 64, 1))


def in_place(n, shift=0, noise=4, exposure=0):
    """Returns n images of one motif, moved, brightened and with noise; uint8 (n, 32, 64, 1)."""
    images = []
    for _ in range(n):
        moved = np.roll(MOTIF, RNG.integers(0, shift + 1, 2), axis=(0, 1))
        value = moved + RNG.normal(0, noise, MOTIF.shape) + RNG.integers(-exposure, exposure + 1)
        images.append(np.clip(value, 0, 255).astype(np.uint8))
    return np.stack(images)


def test_the_share_of_the_place_is_that_of_the_made_variance():
    # The motif varies with the place alone, the noise has a standard deviation of 30.
    expected = MOTIF.var() / (MOTIF.var() + 30**2)
    assert facts.share_by_place(in_place(40, noise=30)) == pytest.approx(expected, abs=0.02)


def test_brightness_is_not_a_place():
    assert facts.share_by_place(in_place(20, exposure=35)) > 0.95


@pytest.mark.parametrize("n", [2, 3, 20, 200])
def test_images_that_share_nothing_have_no_share(n):
    images = RNG.integers(0, 256, (n, 32, 64, 3)).astype(np.uint8)
    assert facts.share_by_place(images) < 0.05


def test_large_images_are_sampled():
    large = in_place(130).repeat(16, axis=1).repeat(16, axis=2)[:, :500, :999]
    assert facts.share_by_place(large) > 0.95


def test_moved_parts_do_not_lie_in_place():
    assert facts.share_by_place(in_place(40, shift=31)) < 0.2


def test_constant_images_and_a_single_one_say_nothing():
    assert facts.share_by_place(np.full((5, 8, 8, 3), 7, np.uint8)) == 0
    assert facts.share_by_place(in_place(1)) == 0


def test_the_median_ratio_of_width_to_height():
    assert facts.aspect_ratio([(100, 200), (100, 100), (50, 200)]) == pytest.approx(2)
    assert facts.aspect_ratio([(278, 618)] * 4) == pytest.approx(618 / 278)


@pytest.mark.parametrize("ratio", [0.2, 0.5, 1.0, 2.223, 7.0])
@pytest.mark.parametrize("shape", [(256, 256), (64, 64), (192, 448)])
def test_sides_that_keep_the_shape(ratio, shape):
    height, width = facts.keeping_aspect(ratio, shape)
    assert height % 16 == width % 16 == 0 and min(height, width) >= 16
    assert abs(height - np.sqrt(shape[0] * shape[1] / ratio)) <= 8 or height == 16
    assert abs(width - np.sqrt(shape[0] * shape[1] * ratio)) <= 8 or width == 16


def hints(images, ratio=2.0, *, grey=True, by_position=False):
    return list(facts.hints(images, ratio, grey=grey, by_position=by_position))


def test_each_hint_names_its_key_and_goes_when_the_fact_is_stated():
    images = in_place(20)
    (line,) = hints(images)
    assert "--config.eval.calibration=position" in line
    assert hints(images, by_position=True) == []
    (line,) = hints(images, by_position=True, grey=False)
    assert "--config.model.grey=True" in line
    assert hints(np.repeat(images, 3, axis=-1), grey=False, by_position=True) == []


def test_a_distorted_shape_is_told_with_the_sides_that_keep_it():
    square = np.repeat(RNG.integers(0, 256, (20, 64, 64, 1)).astype(np.uint8), 3, axis=-1)
    (line,) = hints(square, 618 / 278)
    assert "2.22 times as wide as high" in line and "64 × 64" in line
    assert "--config.data.height=48 --config.data.width=96" in line
    assert hints(square, 1.2) == hints(square, 1 / 1.2) == []
    assert "--config.data.height=96" in hints(square, 1 / 2)[0]
