"""Heat maps, overlays, panels and image files."""

import io

import numpy as np
import pytest
from PIL import Image

from pae_jax.report import pictures


def test_to_uint8_rounds_and_clamps():
    image = np.array([[[0.0, 1.0, 0.5], [-1.0, 2.0, 1 / 255]]])
    np.testing.assert_array_equal(pictures.to_uint8(image), [[[0, 255, 128], [0, 255, 1]]])


def test_heat_map_grows_lighter_up_to_its_limit():
    values = np.linspace(0, 1, 11, dtype=np.float32)[None]
    heat = pictures.heat_map(values, 0.5)
    assert heat.shape == (1, 11, 3) and heat.dtype == np.uint8
    lightness = heat.astype(int).sum(axis=-1)[0]
    assert np.all(np.diff(lightness[:6]) > 0) and np.all(lightness[5:] == lightness[5])
    np.testing.assert_array_equal(pictures.heat_map(values * 0, 0.0)[0, 0], heat[0, 0])


def test_overlay_takes_its_colours_from_the_heat_alone():
    red = np.full((2, 2, 3), (240, 0, 0), np.uint8)
    grey = np.full((2, 2, 3), 80, np.uint8)
    np.testing.assert_array_equal(pictures.overlay(red, grey), grey)
    heat = np.full((2, 2, 3), (255, 128, 0), np.uint8)
    np.testing.assert_array_equal(pictures.overlay(grey, heat, 0.0), grey)
    np.testing.assert_array_equal(pictures.overlay(grey, heat, 1.0), heat)


def test_grid_places_each_picture_in_its_cell():
    colours = [[np.full((4, 5, 3), 10 * i + j, np.uint8) for j in range(3)] for i in range(2)]
    panel = pictures.grid([colours[0], colours[1][:2]])
    step_down, step_right = 4 + pictures.GAP, 5 + pictures.GAP
    assert panel.shape == (4 + step_down, 5 + 2 * step_right, 3)
    for i, j in ((0, 0), (0, 2), (1, 1)):
        cell = panel[i * step_down : i * step_down + 4, j * step_right : j * step_right + 5]
        assert np.all(cell == 10 * i + j)
    assert np.all(panel[4:step_down] == 255) and np.all(panel[step_down:, -5:] == 255)
    with pytest.raises(ValueError):
        pictures.grid([])


@pytest.mark.parametrize(
    ("shape", "expected"), [((300, 100), (60, 20)), ((7, 30), (7, 30)), ((1000, 1), (60, 1))]
)
def test_shrinking_keeps_proportions_and_mean(shape, expected):
    values = np.random.default_rng(0).uniform(size=shape)
    small = pictures.shrink_map(values, 60)
    assert small.shape == expected and small.dtype == np.float32
    assert small.mean() == pytest.approx(values.mean(), rel=0.05)
    picture = pictures.to_uint8(np.repeat(values[..., None], 3, axis=-1))
    assert pictures.shrink(picture, 60).shape == (*expected, 3)


def test_shrinking_a_map_loses_no_single_pixel():
    mask = np.zeros((4000, 4000), np.float32)
    mask[1234, 567] = 1
    assert (pictures.shrink_map(mask, 100) > 0).sum() == 1


def test_png_files_hold_what_was_written(tmp_path):
    rng = np.random.default_rng(1)
    for shape in ((5, 7, 3), (5, 7)):
        array = rng.integers(0, 256, shape, np.uint8)
        pictures.save_png(tmp_path / "new" / "a.png", array)
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new" / "a.png")), array)
    mask = np.eye(3, dtype=bool)
    pictures.save_png(tmp_path / "mask.png", mask)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "mask.png")), mask * 255)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.png", "mask.png", "new"]


def test_jpeg_takes_pillows_options():
    picture = np.random.default_rng(2).integers(0, 256, (40, 40, 3), np.uint8)
    fine, coarse = (pictures.encode(picture, "jpeg", quality=q) for q in (95, 20))
    assert len(coarse) < len(fine)
    assert Image.open(io.BytesIO(fine)).format == "JPEG"


def test_a_large_image_is_blended_in_strips_without_a_seam(monkeypatch):
    rng = np.random.default_rng(0)
    image, values = rng.integers(0, 256, (23, 10, 3), dtype=np.uint8), rng.random((23, 10))
    whole = pictures.overlay(image, pictures.heat_map(values, 0.7))
    for pixels in (1, 40, 2**20):
        monkeypatch.setattr(pictures, "_STRIP", pixels)
        np.testing.assert_array_equal(pictures.overlay_map(image, values, 0.7), whole)
