"""pae_jax.augmentation: exact permutations, and interpolation against scipy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from data_pipelines.errors import BadInput
from pae_jax import augmentation, image_ops
from sampling import KEY, jit, uniform


def images(batch: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    return uniform(1, batch, height, width, channels)


@functools.partial(jit, static_argnums=(2, 3))
def augment(key, x, policy, shape):
    return augmentation.augment(key, x, policy, shape)


rotate = jit(image_ops.rotate)

IDENTITY = np.array
H_FLIP, V_FLIP = (lambda x: x[:, ::-1]), (lambda x: x[::-1])
TURNS = [functools.partial(np.rot90, k=k) for k in range(4)]
PERMUTATIONS = {
    "none": [IDENTITY],
    "horizontal_flip": [IDENTITY, H_FLIP],
    "vertical_flip": [IDENTITY, V_FLIP],
    "flips": [IDENTITY, H_FLIP, V_FLIP, TURNS[2]],
    "half_turns": [IDENTITY, TURNS[2]],
    "quarter_turns": TURNS,
    "quarter_turns+horizontal_flip": [*TURNS, *(lambda x, t=t: H_FLIP(t(x)) for t in TURNS)],
}


@pytest.mark.parametrize("policy", PERMUTATIONS)
def test_every_permutation_is_exact_and_equally_likely(policy):
    batch = 400
    x = np.broadcast_to(images(1, 5, 5), (batch, 5, 5, 3))
    result = np.asarray(augment(KEY, x, policy, (5, 5)))
    choices = np.stack([p(x[0]) for p in PERMUTATIONS[policy]])
    equal = (result[:, None] == choices[None]).all(axis=(2, 3, 4))
    assert (equal.sum(axis=1) == 1).all()
    # Five standard deviations of a binomial frequency.
    p = 1 / len(choices)
    assert np.abs(equal.mean(axis=0) - p).max() <= 5 * math.sqrt(p * (1 - p) / batch)


@pytest.mark.parametrize("policy", [*PERMUTATIONS, "rotation", "shift+flips+exposure"])
def test_symmetries_are_all_that_a_policy_may_do_and_invertible(policy):
    x = jnp.asarray(images(1, 5, 5))
    elements = augmentation.symmetries(policy, (5, 5))
    copies = [augmentation.transform(x, *element) for element in elements]
    expected = PERMUTATIONS.get(policy, TURNS if policy == "rotation" else PERMUTATIONS["flips"])
    found = {np.asarray(copy[0]).tobytes() for copy in copies}
    assert found == {np.ascontiguousarray(p(x[0])).tobytes() for p in expected}
    assert len(copies) == len(expected) and elements[0] == (False, 0)
    for element, copy in zip(elements, copies, strict=True):
        back = augmentation.transform(copy, *element, inverse=True)
        np.testing.assert_array_equal(back, x)


def test_symmetries_keep_the_shape_of_images_that_are_not_square():
    assert augmentation.symmetries("rotation", (4, 6)) == [(False, 0), (False, 2)]
    assert len(augmentation.symmetries("rotation+flips", (4, 6))) == 4


@pytest.mark.parametrize("policy", ["rotation+flips", "shift+half_turns"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 300)])
def test_shape_and_range_are_kept(policy, shape):
    x = images(2, *shape)
    y = augment(KEY, x, policy, shape)
    assert y.shape == x.shape and y.dtype == jnp.float32
    # Interpolation weights sum to one up to rounding.
    assert x.min() - 1e-6 <= y.min() and y.max() <= x.max() + 1e-6


@pytest.mark.parametrize("size", [7, 64])
@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_rotation_by_quarters_is_a_quarter_turn(size, quarters):
    x = images(1, size, size)[0]
    turned = rotate(jnp.asarray(x), quarters * math.pi / 2)
    np.testing.assert_allclose(turned, np.rot90(x, quarters), atol=1e-5)


def test_rotation_agrees_with_scipy():
    x = images(1, 24, 24, 1)[0]
    ours = image_ops.rotate(jnp.asarray(x), math.radians(33))
    theirs = scipy.ndimage.rotate(x[..., 0], 33, reshape=False, order=1, mode="reflect")
    np.testing.assert_allclose(ours[..., 0], theirs, atol=2e-5)


def test_rotation_of_a_constant_has_no_corners():
    x = jnp.full((3, 21, 40, 3), 0.7)
    np.testing.assert_allclose(augment(KEY, x, "rotation", (21, 40)), 0.7, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (9, 5)])
def test_resample_reflects_like_scipy(shape):
    x = images(1, *shape)[0]
    y, z = np.random.default_rng(2).uniform(-40, 40, (2, 50, 3)).astype(np.float32)
    ours = jit(image_ops.resample)(jnp.asarray(x), jnp.asarray(y), jnp.asarray(z))
    for channel in range(3):
        theirs = scipy.ndimage.map_coordinates(x[..., channel], [y, z], order=1, mode="reflect")
        np.testing.assert_allclose(ours[..., channel], theirs, atol=2e-5)


def test_crop_reaches_every_window_and_only_windows():
    x = images(1, 4, 6)[0]
    batch = np.broadcast_to(x, (300, 4, 6, 3))
    result = np.asarray(augment(KEY, batch, "none", (3, 4)))
    windows = np.stack([x[i : i + 3, j : j + 4] for i in range(2) for j in range(3)])
    counts = (result[:, None] == windows[None]).all(axis=(2, 3, 4)).sum(axis=0)
    assert counts.sum() == 300
    assert counts.min() >= 20  # expected 50 ± 6.5


def test_crop_follows_the_transform():
    # A turned image is cropped; a turned crop would still show its own window.
    x = np.broadcast_to(np.float32([[0, 0], [1, 1]])[None, :, :, None], (64, 2, 2, 3))
    result = augment(KEY, x, "vertical_flip", (1, 2))
    assert set(np.asarray(result).ravel()) == {0.0, 1.0}


def test_shift_moves_by_whole_pixels_with_reflection():
    x = images(1, 16, 32)[0]
    result = np.asarray(augment(KEY, np.broadcast_to(x, (64, 16, 32, 3)), "shift", (16, 32)))
    padded = np.pad(x, ((1, 1), (2, 2), (0, 0)), mode="symmetric")
    windows = np.stack([padded[i : i + 16, j : j + 32] for i in range(3) for j in range(5)])
    equal = (result[:, None] == windows[None]).all(axis=(2, 3, 4))
    assert (equal.sum(axis=1) == 1).all() and (equal.sum(axis=0) > 0).all()


def test_an_example_depends_on_its_key_alone():
    x = np.broadcast_to(images(1, 12, 12), (6, 12, 12, 3))
    policy = "rotation+flips+shift"
    whole = np.asarray(augment(KEY, x, policy, (9, 9)))
    np.testing.assert_array_equal(whole, augment(KEY, x, policy, (9, 9)))
    np.testing.assert_allclose(whole[:2], augment(KEY, x[:2], policy, (9, 9)), atol=1e-6)
    for i in range(1, 6):
        assert not np.allclose(whole[0], whole[i])
    assert not np.allclose(whole, augment(jax.random.key(1), x, policy, (9, 9)))


@pytest.mark.parametrize(
    ("policy", "shape", "message"),
    [
        ("spin", (8, 8), "no policy 'spin'"),
        ("", (8, 8), "no policy ''"),
        ("flips+", (8, 8), "no policy ''"),
        ("flips+quarter_turns", (8, 9), "square images, not 8×9"),
    ],
)
def test_a_bad_policy_is_one_line_with_the_key(policy, shape, message):
    with pytest.raises(BadInput, match=message) as error:
        augmentation.check_policy(policy, shape)
    assert str(error.value).startswith("data.augmentation: ") and "\n" not in str(error.value)


def test_good_policies_pass():
    for policy in augmentation.POLICIES:
        augmentation.check_policy(policy, (8, 8))
    augmentation.check_policy("rotation+flips+half_turns+shift", (7, 300))


def test_exposure_is_a_gain_within_its_range():
    images = jax.random.uniform(jax.random.key(0), (256, 4, 4, 3), minval=0.1, maxval=0.5)
    out = augmentation.augment(jax.random.key(1), images, "exposure", (4, 4))
    gains = np.asarray(out / images)
    np.testing.assert_allclose(gains, gains[:, :1, :1, :1] * np.ones((1, 4, 4, 3)), rtol=1e-5)
    gains = gains[:, 0, 0, 0]
    low, high = augmentation.GAINS
    assert low <= gains.min() < 1.1 * low and 0.95 * high < gains.max() <= high * 1.00001
    # Log-uniform: the median is the geometric mean of the ends.
    assert abs(np.median(np.log(gains)) - np.log(low * high) / 2) < 0.15
    brighter = augmentation.augment(jax.random.key(1), images + 0.5, "exposure", (4, 4))
    assert float(brighter.max()) <= 1
