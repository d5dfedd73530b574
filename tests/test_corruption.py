"""pae_jax.corruption: eq. 13, the statistics of its masks, and the randomness contract."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from pae_jax import corruption, masks, rng
from pae_jax.config import CorruptionConfig
from sampling import KEY, jit, uniform

DEFAULT = CorruptionConfig()
VARIANTS = {
    "ellipses": DEFAULT,
    "perlin": dataclasses.replace(DEFAULT, mask="perlin"),
    "boxes": dataclasses.replace(DEFAULT, mask="boxes"),
    "mixed": dataclasses.replace(DEFAULT, kind="mixed", placement="edges"),
    "varied": dataclasses.replace(DEFAULT, kind="varied", mask="shapes"),
    "draem": dataclasses.replace(DEFAULT, kind="draem"),
    "cutpaste": dataclasses.replace(DEFAULT, kind="cutpaste"),
    "riad": dataclasses.replace(DEFAULT, kind="riad"),
}


@functools.partial(jit, static_argnums=3)
def corrupt(key, images, textures, config):
    return corruption.corrupt(key, images, textures, config)


@functools.partial(jit, static_argnums=3)
def corrupt_and_draw_again(key, images, textures, config):
    """The batch, and (y, M) of the same draws, which a batch does not hold."""
    keys = jax.vmap(lambda k: jax.random.split(k)[1])(rng.example_keys(key, len(images)))
    draw = functools.partial(corruption.KINDS[config.kind], config=config)
    return corruption.corrupt(key, images, textures, config), jax.vmap(draw)(keys, images, textures)


@functools.partial(jit, static_argnums=3)
def kind(key, image, texture, config):
    """(y, M) of many draws for one image."""
    draw = corruption.KINDS[config.kind]
    return jax.vmap(lambda k: draw(k, image, texture, config))(jax.random.split(key, 200))


def test_registries_and_configuration_agree():
    fields = {f.name: f.metadata["choices"] for f in dataclasses.fields(CorruptionConfig)}
    assert set(fields["kind"]) == set(corruption.KINDS)
    assert set(fields["mask"]) == set(masks.MASKS)
    assert set(fields["placement"]) == set(masks.PLACEMENTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_equation_13_in_colour_and_in_grey(name):
    config = dataclasses.replace(VARIANTS[name], clean_fraction=0.0)
    x, textures = uniform(1, 8, 17, 32, 3), uniform(2, 8, 20, 9, 3)
    batch, (y, m) = corrupt_and_draw_again(KEY, x, textures, config)
    corrupted, clean, mask = map(np.asarray, batch)
    assert mask.shape == (8, 17, 32, 1)
    np.testing.assert_array_equal(clean, x)
    np.testing.assert_allclose(mask[..., 0], m, atol=1e-6)
    np.testing.assert_allclose(corrupted, mask * y + (1 - mask) * x, atol=1e-6)
    assert not np.array_equal(corrupted, x)

    x, textures = (np.repeat(t[..., :1], 3, axis=-1) for t in (x, textures))
    grey = np.asarray(corrupt_and_draw_again(KEY, x, textures, config)[0].corrupted)
    np.testing.assert_array_equal(grey, np.repeat(grey[..., :1], 3, axis=-1))


@pytest.mark.parametrize(
    ("name", "shape", "texture"),
    [
        *((name, (1, 1), (1, 1)) for name in VARIANTS),
        ("ellipses", (7, 300), (5, 9)),
        ("perlin", (7, 300), (1, 400)),
    ],
)
def test_any_size_stays_in_range(name, shape, texture):
    x, textures = uniform(3, 8, *shape, 3), uniform(4, 8, *texture, 3)
    corrupted, _, mask = map(np.asarray, corrupt(KEY, x, textures, VARIANTS[name]))
    assert corrupted.shape == x.shape and corrupted.dtype == mask.dtype == np.float32
    assert mask.shape == (8, *shape, 1)
    for values in (mask, corrupted):
        # Rounding of M + (1 − M) may exceed 1 by an ulp or two.
        assert values.min() >= 0 and values.max() <= 1 + 1e-6
    untouched = np.broadcast_to(mask == 0, x.shape)
    np.testing.assert_array_equal(corrupted[untouched], x[untouched])


def test_an_example_depends_on_its_key_alone():
    x = np.broadcast_to(uniform(7, 1, 32, 32, 3), (6, 32, 32, 3))
    textures = np.broadcast_to(uniform(8, 1, 32, 32, 3), (6, 32, 32, 3))
    config = dataclasses.replace(DEFAULT, clean_fraction=0.0)
    whole = corrupt(KEY, x, textures, config)
    for a, b in zip(whole, corrupt(KEY, x, textures, config), strict=True):
        np.testing.assert_array_equal(a, b)
    part = corrupt(KEY, x[:2], textures[:2], config)
    np.testing.assert_allclose(part.mask, whole.mask[:2], atol=1e-5)
    np.testing.assert_allclose(part.corrupted, whole.corrupted[:2], atol=1e-5)
    for i in range(1, 6):
        assert not np.allclose(whole.mask[0], whole.mask[i])
    assert not np.allclose(whole.mask, corrupt(jax.random.key(1), x, textures, config).mask)


def test_clean_fraction():
    x, textures = uniform(9, 1000, 8, 8, 3), uniform(10, 1000, 8, 8, 3)
    config = dataclasses.replace(DEFAULT, max_blobs=1, mask="boxes")
    corrupted, _, mask = map(np.asarray, corrupt(KEY, x, textures, config))
    clean = mask.max(axis=(1, 2, 3)) == 0
    assert abs(clean.mean() - 0.1) < 0.04  # 4 standard deviations
    np.testing.assert_array_equal(corrupted[clean], x[clean])


def test_random_view_continues_a_texture_by_reflection():
    constant = jnp.full((3, 5, 3), 0.3)
    view = jit(lambda key: corruption.random_view(key, constant, (16, 9)))(KEY)
    np.testing.assert_allclose(view, 0.3, atol=1e-6)
    # Neighbouring pixels lie at most two texture pixels apart, at least half of one.
    ramp = jnp.broadcast_to(jnp.arange(400.0)[:, None, None], (400, 400, 3))
    draw = jit(jax.vmap(lambda k: corruption.random_view(k, ramp, (3, 3))))
    views = np.asarray(draw(jax.random.split(KEY, 200)))[..., 0]
    step = np.hypot(views[:, 1, 1] - views[:, 0, 1], views[:, 1, 1] - views[:, 1, 0])
    inner = (views[:, 1, 1] > 8) & (views[:, 1, 1] < 391)
    assert inner.sum() > 150
    assert 0.49 < step[inner].min() < 0.6 and 1.7 < step[inner].max() < 2.01
    assert scipy.stats.kstest(np.log2(step[inner]), "uniform", (-1, 2)).pvalue > 0.01


def test_tone_is_affine_and_clipped():
    x = jnp.linspace(0, 1, 30).reshape(2, 5, 3)
    draw = jit(jax.vmap(lambda k: corruption.change_tone(k, x, brightness=0.2, contrast=0.3)))
    tones = np.asarray(draw(jax.random.split(KEY, 500)))
    assert tones.min() == 0 and tones.max() == 1
    low, high = tones.reshape(500, -1)[:, [13, 16]].T  # about mid-grey, never clipped
    gain = (high - low) / (3 / 29)
    assert 0.7 - 1e-4 <= gain.min() < 0.72 and 1.28 < gain.max() <= 1.3 + 1e-4
    middle = (low + high) / 2 - 0.5
    assert -0.2 - 1e-4 <= middle.min() < -0.19 and 0.19 < middle.max() <= 0.2 + 1e-4


def test_draem_is_hard_with_one_opacity():
    y, mask = map(np.asarray, kind(KEY, *uniform(11, 2, 48, 48, 3), VARIANTS["draem"]))
    assert all(len(np.unique(m)) <= 2 for m in mask)
    opacity = mask.max(axis=(1, 2))
    opacity = opacity[opacity > 0]
    assert len(opacity) > 150  # some thresholded fields are empty, as published
    assert scipy.stats.kstest(opacity, "uniform", (0.1, 0.9)).pvalue > 0.01
    assert y.min() >= 0 and y.max() <= 1


def test_cutpaste_moves_a_connected_piece():
    height, width = 40, 56
    ramp = np.linspace(0.3, 0.7, width, dtype=np.float32)
    image = np.stack(np.broadcast_arrays(np.linspace(0.3, 0.7, height)[:, None], ramp, 0.5), -1)
    image = image.astype(np.float32)
    y, mask = map(np.asarray, kind(KEY, image, image, VARIANTS["cutpaste"]))
    assert set(np.unique(mask)) == {0.0, 1.0}
    area = mask.mean(axis=(1, 2))
    assert area.min() > 0
    # Patches cover 2 to 15 %; scars at most 25 × 16 of 256² pixels.
    scar = area < 0.012
    assert 0.35 < scar.mean() < 0.65
    assert area[~scar].min() > 0.015 and area[~scar].max() < 0.17
    for piece, m in zip(y, mask, strict=True):
        rows, columns = np.nonzero(m)
        for channel, index, size in ((0, rows, height), (1, columns, width)):
            # Inside the mask y is the image moved: an affine ramp, with no seam.
            values = piece[rows, columns, channel]
            if np.ptp(index) > 2:
                gain, offset = np.polyfit(index * 0.4 / (size - 1), values, 1)
                assert 0.89 < gain < 1.11
                assert np.abs(gain * index * 0.4 / (size - 1) + offset - values).max() < 1e-4


def test_riad_blacks_out_a_third_in_cells():
    image = uniform(12, 32, 48, 3)
    y, mask = map(np.asarray, kind(KEY, image, image, VARIANTS["riad"]))
    assert y.max() == 0 and set(np.unique(mask)) == {0.0, 1.0}
    sides = []
    for m in mask:
        # The largest cell on whose grid the mask is constant.
        fits = [
            k
            for k in (2, 4, 8, 16)
            if np.array_equal(m, np.kron(m[::k, ::k], np.ones((k, k)))[:32, :48])
        ]
        sides.append(max(fits))
    assert set(sides) == {2, 4, 8, 16}
    # 200 draws of 6 cells at least: standard deviation of the mean below 0.01.
    assert abs(mask.mean() - 1 / 3) < 0.04


def test_a_mixed_pattern_is_one_of_four_equally_often():
    """On an image of one grey level a warp and a tone stay flat, a texture does not."""
    grey = jnp.full((32, 32, 3), 0.4)
    config = dataclasses.replace(DEFAULT, kind="mixed", contrast=0.0)
    patterns, _ = kind(KEY, grey, uniform(1, 32, 32, 3), config)
    flat = np.ptp(np.asarray(patterns), axis=(1, 2, 3)) < 1e-6
    same = np.abs(np.asarray(patterns) - 0.4).max((1, 2, 3)) < 1e-6
    # 200 draws: standard deviations of 0.031.
    assert abs(flat.mean() - 0.75) < 0.1
    assert abs(same.mean() - 0.25) < 0.1  # the warp alone changes nothing at all


def test_a_warp_moves_a_few_pixels_smoothly():
    """The values of a ramp are its positions, so a warped ramp shows the displacement."""
    side = 128
    ramp = np.broadcast_to(
        np.linspace(0, 1, side, dtype=np.float32)[None, :, None], (side, side, 3)
    )
    moved = jit(jax.vmap(corruption.warp, (0, None)))(jax.random.split(KEY, 50), jnp.asarray(ramp))
    shift = (np.asarray(moved) - ramp)[:, 20:-20, 20:-20, 0] * (side - 1)
    deviation = shift.std(axis=(1, 2))
    # Half the correlation length of 3 to 12 % of the side, times the spline's factor below 1.
    assert 0.2 * 0.03 * side < deviation.min() < deviation.max() < 0.5 * 0.12 * side
    neighbours = np.abs(np.diff(shift, axis=2)).max((1, 2))
    assert neighbours.max() < 1.5  # hardly ever folds
    assert np.ptp(shift[:, 0, 0]) > 1  # each key has another displacement
