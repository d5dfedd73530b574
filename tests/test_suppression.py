"""A suppressed background is 0 and stays so: in images, corruptions, f, maps, files."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from data_pipelines.errors import BadInput
from pae_jax import augmentation, config, corruption, detection, image_ops, methods
from pae_jax.foreground.labels import otsu_mask
from pae_jax.workdir import suppression

KEY = jax.random.key(0)
SIDE = 24
CONFIG = config.from_config_dict(
    {
        "data": {"size": SIDE, "texture_size": SIDE, "foreground": "F"},
        "model": {"widths": (4,), "convs_per_stage": 1, "branch_width": 4, "dilation_rates": (1,)},
    }
)


def suppressed(count: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Float images that are 0 outside an object, and positive in it, and the object's mask."""
    rng = np.random.default_rng(1)
    mask = np.zeros((count, SIDE, SIDE, 1), bool)
    for i in range(count):
        mask[i, 4 + i : 19, 3 : 14 + i] = True
    pixels = rng.integers(0, 256, (count, SIDE, SIDE, 3)) * (rng.random((1, 1, 1, 3)) < 0.9)
    return np.float32(np.where(mask, np.maximum(pixels, 1), 0) / 255), mask


@pytest.mark.parametrize("policy", ["flips", "rotation", "shift", "exposure"])
def test_augmented_images_still_tell_the_background(policy):
    images, mask = suppressed()
    moved = augmentation.augment(KEY, jnp.asarray(images), policy, (SIDE - 4, SIDE - 2))
    # The mask as an image of its own, with the same random numbers.
    expected = augmentation.augment(KEY, jnp.float32(mask), policy, (SIDE - 4, SIDE - 2))
    np.testing.assert_array_equal(image_ops.foreground(moved), np.asarray(expected) > 0)
    assert 0 < np.mean(image_ops.foreground(moved)) < 1


# Riad's pattern is black, and would turn the object into background.
@pytest.mark.parametrize("kind", ["cutpaste", "riad"])
def test_the_background_is_not_corrupted(kind):
    images, mask = suppressed(8)
    settings = dataclasses.replace(CONFIG.corruption, kind=kind, clean_fraction=0.0)
    textures = jnp.zeros((8, SIDE, SIDE, 3))
    plain = corruption.corrupt(KEY, jnp.asarray(images), textures, settings)
    spared = corruption.spare_background(plain)
    outside = ~np.broadcast_to(mask, images.shape)
    assert (np.asarray(plain.mask)[~mask] > 0).any() and (np.asarray(spared.mask) > 0).any()
    np.testing.assert_array_equal(np.asarray(spared.mask), np.asarray(plain.mask) * mask)
    np.testing.assert_array_equal(np.asarray(spared.corrupted)[outside], 0)
    np.testing.assert_array_equal(image_ops.foreground(spared.corrupted), mask)
    # Eq. 13 holds in the object, up to the darkest grey level.
    change = np.abs(np.asarray(spared.corrupted) - np.asarray(plain.corrupted))[~outside]
    assert change.max() <= corruption.DARKEST


@pytest.fixture(scope="module")
def params():
    return methods.METHODS["projection"].init(CONFIG, KEY)


def test_f_is_the_identity_on_the_background_and_the_network_on_the_object(params):
    images, mask = suppressed()
    x = jnp.asarray(images)
    reconstruct = methods.METHODS["projection"].reconstruct
    assert reconstruct is not None
    bare = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, foreground=""))
    f, network = reconstruct(params, CONFIG), reconstruct(params, bare)
    np.testing.assert_array_equal(f(x), np.where(mask, network(x), images))
    # So that neither loss nor penalties see the background: J = I there, also of the iterates.
    direction = jax.random.normal(KEY, x.shape)
    value, tangent = jax.jvp(lambda x: f(f(x)), (x,), (direction,))
    outside = ~np.broadcast_to(mask, images.shape)
    np.testing.assert_array_equal(np.asarray(value)[outside], 0)
    np.testing.assert_array_equal(np.asarray(tangent)[outside], np.asarray(direction)[outside])


def test_the_map_and_the_scores_leave_the_background_out(params):
    images, mask = suppressed()
    stored = np.uint8(np.rint(255 * images))
    found = jax.device_get(detection.detect(params, jnp.asarray(stored), CONFIG))
    outside = ~mask[..., 0]
    np.testing.assert_array_equal(found.map[outside], 0)
    assert (found.map[~outside] > 0).all()
    np.testing.assert_allclose(found.scores["sum"], found.map.sum((1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(found.reconstruction[outside], 0)


def test_all_networks_share_one_program_and_noise_is_refused():
    other = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, foreground="G"))
    bare = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, foreground=""))
    assert detection.inference_config(other) == detection.inference_config(CONFIG)
    assert detection.inference_config(bare) != detection.inference_config(CONFIG)
    with pytest.raises(BadInput, match=r"^objective\.noise: 0\.1 needs an empty data\.foreground$"):
        config.from_config_dict({"data": {"foreground": "F"}, "objective": {"noise": 0.1}})


@pytest.fixture
def found(monkeypatch):
    """Lets the network find a mask of our choice; returns the function that sets it."""
    masks: list[np.ndarray] = []
    monkeypatch.setattr(suppression, "_find", lambda params, images, *, shape: masks[-1][None])
    return masks.append


def test_masks_are_filled_and_grown_and_have_no_specks(found):
    mask = np.zeros((40, 60), bool)
    mask[10:30, 10:40] = True
    expected = mask.copy()
    mask[15:20, 20:25] = False  # a hole
    mask[35:37, 50:54] = True  # 8 of 575 pixels
    found(mask)
    image = np.zeros((40, 60, 1), np.uint8)
    foreground = suppression.Foreground({}, (40, 60), 0.0, b"")
    np.testing.assert_array_equal(suppression.find(image, foreground), expected)
    grown = suppression.find(image, foreground._replace(margin=0.1))  # 4 pixels
    disc = np.hypot(*np.mgrid[-4:5, -4:5]) <= 4
    np.testing.assert_array_equal(grown, scipy.ndimage.binary_dilation(expected, disc))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_background_becomes_black_and_the_object_is_nowhere_black(found, channels):
    image = np.random.default_rng(0).integers(0, 3, (20, 30, channels), dtype=np.uint8)
    mask = np.zeros((20, 30), bool)
    mask[4:14, 5:25] = True
    found(mask)
    foreground = suppression.Foreground({}, (20, 30), 0.0, b"")
    result = suppression.suppress(image, foreground)
    np.testing.assert_array_equal(result, np.where(mask[..., None], image.clip(1), 0))
    np.testing.assert_array_equal(result.any(axis=-1), mask)
    assert suppression.suppress(image, None) is image
    # Without an object nothing is suppressed, because a defect would be, too.
    found(np.zeros((20, 30), bool))
    np.testing.assert_array_equal(suppression.suppress(image, foreground), image.clip(1))


def test_a_split_is_cached_and_whole_images_are_told(found, tmp_path, messages):
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 1), dtype=np.uint8)
    mask = np.zeros((16, 16), bool)
    mask[4:12, 4:12] = True
    foreground = suppression.Foreground({}, (16, 16), 0.0, b"a")
    options = {"cache_dir": str(tmp_path), "part": "test"}
    found(mask)
    first = suppression.suppress_all(images, foreground, **options)
    np.testing.assert_array_equal(first, np.where(mask[None, ..., None], images.clip(1), 0))
    found(np.zeros_like(mask))  # is not asked again for the same images and network
    np.testing.assert_array_equal(suppression.suppress_all(images, foreground, **options), first)
    assert not any("stay whole" in line for line in messages)
    other = suppression.suppress_all(images, foreground._replace(encoded=b"b"), **options)
    np.testing.assert_array_equal(other, images.clip(1))
    assert any("no object, in 3 of 3 test images (first: number 1)" in line for line in messages)


def test_a_network_is_written_and_read(tmp_path):
    rng, shapes = np.random.default_rng(0), suppression.init(KEY, abstract=True)
    params = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), shapes)
    written = suppression.encode(params, (32, 48), 0.05)
    suppression.write(tmp_path, written)
    read = suppression.read(tmp_path, "")
    assert (read.shape, read.margin) == ((32, 48), 0.05)
    assert read.fingerprint == written.fingerprint
    jax.tree.map(np.testing.assert_array_equal, read.params, params)
    again = suppression.encode(params, (32, 48), 0.05)
    assert again.fingerprint == written.fingerprint
    assert suppression.encode(params, (32, 48), 0.06).fingerprint != written.fingerprint


def test_files_that_are_no_network_are_refused_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match=r"foreground\.npz: no such file, .*; do this$"):
        suppression.read(tmp_path, "do this")
    (tmp_path / suppression.NAME).write_bytes(b"PK nothing")
    with pytest.raises(BadInput, match=r"foreground\.npz: damaged \(.*\); do this$"):
        suppression.read(tmp_path, "do this")
    buffer = io.BytesIO()
    np.savez(buffer, settings=np.array('{"version": 1, "shape": [8, 8], "margin": 0.0}'))
    (tmp_path / suppression.NAME).write_bytes(buffer.getvalue())
    with pytest.raises(BadInput, match=r"of another version of this package; do this$"):
        suppression.read(tmp_path, "do this")


@pytest.mark.parametrize("channels", [1, 3])
def test_pseudo_labels_mark_what_differs_from_the_border(channels):
    rng = np.random.default_rng(0)
    image = rng.integers(58, 63, (64, 72, channels), dtype=np.uint8)
    mask = np.zeros((64, 72), bool)
    mask[16:48, 20:60] = True
    image[mask] = 180
    image[20:23, 30:34] = 60  # a hole of the colour of the background
    image[2:8, 2:9] = 200  # clutter of 42 pixels
    np.testing.assert_array_equal(otsu_mask(image), mask)


def test_images_without_an_object_have_no_pseudo_label():
    assert otsu_mask(np.full((32, 32, 3), 9, np.uint8)) is None
    speck = np.full((64, 64, 1), 9, np.uint8)
    speck[30:34, 30:34] = 200
    assert otsu_mask(speck) is None
