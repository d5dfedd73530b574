"""`pae_jax.load`: a trained model in three lines of Python, on arrays and files of any kind."""

import concurrent.futures
import doctest
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tifffile
from PIL import Image

import pae_jax
import runs
from data_pipelines.errors import BadInput
from layouts import write
from pae_jax import detection
from pae_jax.inference import model as model_module
from pae_jax.metrics import measure
from pae_jax.workdir import trained_model

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (21, 30), dtype=np.uint8)
GREY[0, 0], GREY[0, 1] = 0, 255
COLOUR = RNG.integers(0, 256, (40, 25, 3), dtype=np.uint8)
WIDE = GREY.astype(np.uint16)


@pytest.fixture(scope="module")
def model(trained):
    return pae_jax.load(trained.workdir, pixel_threshold=0.55)


def assert_same(result, other, tolerance=1e-5):
    np.testing.assert_allclose(result.map, other.map, rtol=tolerance, atol=tolerance)
    assert result.score == pytest.approx(other.score, rel=tolerance)


def test_a_result_is_that_of_the_detection_at_own_size(trained, model):
    result = model(GREY)
    small = np.asarray(Image.fromarray(GREY).resize((16, 16), Image.Resampling.BILINEAR))
    loaded = trained_model.load(trained.workdir)
    (found,) = detection.detect_all(loaded.params, small[None, ..., None], loaded.config)
    np.testing.assert_array_equal(result.map, measure.resize_map(found.map, (21, 30)))
    assert result.scores == {name: float(value) for name, value in found.scores.items()}
    assert result.score == result.scores["sum"]
    assert model.thresholds.score == trained_model.thresholds(trained.workdir, loaded).score
    assert result.decision == (result.score > model.thresholds.score)
    np.testing.assert_array_equal(result.mask, result.map > 0.55)
    assert sum(region.area for region in result.regions) == result.mask.sum() > 0
    assert (result.reconstruction.shape, result.reconstruction.dtype) == ((21, 30, 3), np.uint8)
    shrunk = Image.fromarray(result.reconstruction).resize((16, 16), Image.Resampling.BOX)
    assert np.abs(np.asarray(shrunk) / 255 - found.reconstruction).mean() < 0.05


def test_one_or_many_arrays_and_files(model, tmp_path):
    path = tmp_path / "x.png"
    write(path, COLOUR)
    one = model(COLOUR)
    assert isinstance(one, model_module.Result)
    for image in (path, str(path), jnp.asarray(COLOUR)):
        assert_same(model(image), one)
    several = model([COLOUR, GREY, path, GREY[..., None], COLOUR[:3, :5]])
    assert [result.map.shape for result in several] == [(40, 25), (21, 30)] * 2 + [(3, 5)]
    assert_same(several[0], one)
    assert_same(several[2], one)
    assert_same(several[3], model(GREY))
    stacked = model(np.stack([COLOUR] * 2))
    assert len(stacked) == 2
    assert_same(stacked[1], one)
    assert [result.score for result in model(iter([COLOUR]))] == [one.score]
    assert model([]) == []


@pytest.mark.parametrize(
    "values",
    [
        (GREY / 255).astype(np.float32),
        GREY / 255,
        np.repeat(GREY[..., None] / 255, 3, axis=-1),
        GREY.astype(np.int64),
        WIDE,
        (WIDE * 257).astype(">u2"),
        np.round(GREY * (4095 / 255)).astype(np.int32),
        np.repeat(WIDE[..., None] << 8, 3, axis=-1),
        np.dstack([GREY, np.full_like(GREY, 7)]),
        np.dstack([GREY] * 3 + [np.full_like(GREY, 255)]),
    ],
    ids=["f4", "f8", "f8 colour", "i8", "8 in 16", "16", "12 in 32", "colour 16", "LA", "RGBA"],
)
def test_every_type_is_that_of_8_bits(model, values):
    assert_same(model(values), model(GREY), 0.01)


def test_booleans_and_the_alpha_of_a_file(model, tmp_path):
    assert_same(model(GREY > 127), model(np.where(GREY > 127, 255, 0).astype(np.uint8)))
    alpha = np.dstack([COLOUR, COLOUR[..., 0]])
    write(tmp_path / "x.png", alpha)
    assert_same(model(alpha), model(tmp_path / "x.png"))


def test_the_range_is_that_of_the_training_images_or_of_the_call(trained, model, tmp_path):
    dim = np.minimum(GREY, 80)
    deep = np.round(dim * (4095 / 255)).astype(np.uint16)
    # Alone its values would end at 1285 and be taken for 0 to 4095 as well; these are darker.
    darker = deep // 8
    assert_same(model([darker, deep])[0], model(dim // 8), 0.01)
    assert abs(model(darker).score - model(dim // 8).score) > 1e-3
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, darker)
    (tmp_path / "x.tif").write_bytes(buffer.getvalue())
    run = runs.clone(trained, tmp_path / "clone")
    record = json.loads((run.workdir / "data.json").read_text())
    (run.workdir / "data.json").write_text(json.dumps(record | {"value_range": [0, 4095]}))
    other = pae_jax.load(run.workdir)
    assert_same(other(darker), model(dim // 8), 0.01)
    assert_same(other(tmp_path / "x.tif"), other(darker))


@pytest.mark.parametrize(
    ("image", "line"),
    [
        (np.zeros((2, 9, 9), np.uint8), r"^the image: an array of shape \(2, 9, 9\); an image is"),
        (np.zeros(9), r"^the image: an array of shape \(9,\)"),
        ([GREY, np.zeros((0, 4))], r"^image 1: 4×0 pixels"),
        ([GREY, np.full((3, 3), np.nan)], r"^image 1: infinite values or NaN"),
        (np.zeros((3, 3), complex), r"^the image: values of type complex128"),
        ([None], r"^image 0: values of type object"),
        (np.full((3, 3), 1e9), r"^the image: values from 1000000000 to .* data\.value_range"),
        (np.zeros((3, 3, 4), np.float32), r"^the image: an alpha in values of type float32"),
        (Image.fromarray(GREY), r"^the image: a PIL image"),
        ("gone.png", r"^gone\.png: cannot be read"),
        ([GREY, __file__], r"test_model\.py: not an image"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(model, image, line):
    with pytest.raises(BadInput, match=line) as caught:
        model(image)
    assert "\n" not in str(caught.value)


def test_threads_get_the_results_of_one_and_each_size_is_compiled_once(trained, tmp_path):
    run = runs.clone(trained, tmp_path)
    before = detection._detect._cache_size()
    # With settings that no other test has compiled, the thresholds take a batch of four.
    model = pae_jax.load(run.workdir, ["--config.eval.topk_fraction=0.02"])
    assert detection._detect._cache_size() == before + 1
    images = [RNG.integers(0, 256, (9, 9 + i), dtype=np.uint8) for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(model, images))
    assert detection._detect._cache_size() == before + 2
    for count in (3, 4, 7, 8):  # the batch size of the run is 4
        model(images[:count])
    assert detection._detect._cache_size() == before + 2
    for image, result in zip(images, found, strict=True):
        np.testing.assert_array_equal(result.map, model(image).map)


def test_the_example_of_load(trained, tmp_path):
    run = runs.clone(trained, tmp_path)
    stored = json.loads((run.workdir / "thresholds.json").read_text())
    (entry,) = stored["held_out"]
    entry["scores"]["sum"] = [0.0] * len(entry["maxima"])  # so that noise is defective
    (run.workdir / "thresholds.json").write_text(json.dumps(stored))
    write(tmp_path / "x.png", GREY)
    names = {"workdir": run.workdir, "image": COLOUR, "path": tmp_path / "x.png"}
    (test,) = doctest.DocTestFinder().find(
        model_module.load, "load", globs={"pae_jax": pae_jax, **names}
    )
    assert len(test.examples) == 4
    assert doctest.DocTestRunner().run(test).failed == 0


def test_the_lines_of_the_readme(trained, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    code = re.search(r"```python\n(import pae_jax\n.*?)```", text, re.DOTALL)
    assert code
    write(tmp_path / "new/1.png", GREY)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/python").symlink_to(trained.workdir)
    monkeypatch.chdir(tmp_path)
    exec(compile(code[1], "README.md", "exec"), {})
    assert re.match(r"(True|False) \d+\.\d+ \[.*\] \(21, 30\)\n", capsys.readouterr().out)


def test_the_package_is_imported_quickly_and_lists_load():
    code = "import sys, pae_jax; print('load' in dir(pae_jax), 'jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"
