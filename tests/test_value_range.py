"""Images of more than 8 bits: one range for a data set, or a refusal that says what to do."""

import csv
import io
import json
import warnings

import numpy as np
import pytest
import tifffile
from PIL import Image

import runs
from data_pipelines.dataset import open_test, open_training
from data_pipelines.decode import decode_image, decode_mask, value_extrema
from data_pipelines.errors import BadInput
from data_pipelines.spec import DatasetSpec
from data_pipelines.textures import Textures
from data_pipelines.value_range import choose, parse
from layouts import category, open_images, write
from pae_jax import predict
from pae_jax.workdir import run as run_module
from pae_jax.workdir import trained_model

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 5), dtype=np.uint8)
GREY[0, 0], GREY[0, 1] = 0, 255


def tiff(values, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def decode(data, channels=1, shape=(6, 5)):
    image = decode_image(data, "x.tif", shape, channels)
    return image[..., 0] if channels == 1 else image


WIDE = GREY.astype(np.uint16)
STORED = {
    "float to 1": (GREY / 255).astype(np.float32),
    "float to 255": GREY.astype(np.float32),
    "float to 65535": (WIDE * 257).astype(np.float32),
    "int32": GREY.astype(np.int32),
    "int16": GREY.astype(np.int16),
    "uint32": GREY.astype(np.uint32),
    "8 in 16": WIDE,
    "10 in 16": np.round(GREY * (1023 / 255)).astype(np.uint16),
    "12 in 16": np.round(GREY * (4095 / 255)).astype(np.uint16),
    "14 in 16": np.round(GREY * (16383 / 255)).astype(np.uint16),
    "16": WIDE * 257,
    "big-endian": (WIDE * 257).astype(">u2"),
}


@pytest.mark.parametrize("values", STORED.values(), ids=STORED)
def test_every_range_becomes_the_whole_8_bits(values):
    np.testing.assert_array_equal(decode(tiff(values)), GREY)


def test_0_is_white():
    values = GREY.astype(np.uint16) * 257
    np.testing.assert_array_equal(decode(tiff(values, photometric="miniswhite")), 255 - GREY)
    np.testing.assert_array_equal(decode(tiff(GREY, photometric="miniswhite")), 255 - GREY)
    twelve = np.round(GREY * (4095 / 255)).astype(np.uint16)
    np.testing.assert_array_equal(decode(tiff(twelve, photometric="miniswhite")), 255 - GREY)
    mask = np.zeros((6, 5), np.uint16)
    mask[2:4] = 65535
    inverted = tiff(65535 - mask, photometric="miniswhite")
    np.testing.assert_array_equal(decode_mask(inverted, "m", None), mask > 0)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.float32([[0, np.nan]]), "infinite values or NaN"),
        (np.float32([[0, np.inf]]), "infinite values or NaN"),
        (np.float32([[-3, 4]]), "values from -3 to 4, .* set data.value_range=LOW:HIGH"),
        (np.float32([[0, 4]]), "values from 0 to 4, .* set data.value_range=LOW:HIGH"),
        (np.int16([[-1000, 3000]]), "values from -1000 to 3000, .* set data.value_range"),
        (np.uint32([[0, 2**32 - 1]]), "values from 0 to 4294967295, .* set data.value_range"),
        (np.float64([[0, 1]]), "damaged, or not an image that Pillow can read .* convert it"),
    ],
)
def test_values_without_a_meaning_are_refused(values, reason):
    with pytest.raises(BadInput, match=rf"^x\.tif: {reason}"):
        decode(tiff(values), shape=values.shape[:2])


def test_signed_bytes_are_not_read_as_unsigned_ones():
    assert value_extrema(tiff(np.int8([[-3, 100]])), "x") == (-3, 100)


def test_floats_overshoot_a_little():
    values = np.float32([[-0.01, 0, 0.5, 1, 1.04]])
    np.testing.assert_array_equal(decode(tiff(values), shape=(1, 5)), [[0, 0, 128, 255, 255]])


def test_pfm_and_pgm_of_12_bits():
    pgm = b"P5 5 6 4095\n" + np.round(GREY * (4095 / 255)).astype(">u2").tobytes()
    np.testing.assert_array_equal(decode(pgm), GREY)
    pfm = b"Pf\n5 6\n-1.0\n" + (GREY[::-1] / 255).astype("<f4").tobytes()
    np.testing.assert_array_equal(decode(pfm), GREY)


def test_choose():
    assert choose([(0, 12), (3, 1100)], [False] * 2, ["a", "b"]) == (0, 4095)
    assert choose([(0, 0.1), (0, 0.9)], [True] * 2, ["a", "b"]) == (0, 1)
    with pytest.raises(BadInput, match=r"^b: values from -5 to 7"):
        choose([(0, 12), (-5, 7)], [False] * 2, ["a", "b"])
    with pytest.raises(BadInput, match=r"^b: floating-point values, while a has integers"):
        choose([(0, 1), (0, 1)], [False, True], ["a", "b"])


def test_parse():
    assert parse("auto") is None
    assert parse("-1000:3000") == (-1000, 3000)
    for text in ("", "5", "5:1", "a:b", "0:inf", "0:nan", "1:2:3"):
        with pytest.raises(BadInput, match=r"^data\.value_range: auto or LOW:HIGH"):
            parse(text)


# A whole data set.


@pytest.fixture
def eight_bits(tmp_path):
    root = category(tmp_path / "png", train=8)
    return DatasetSpec("folder", str(root), "", (20, 24), "none", str(tmp_path / "cache"))


def stored(spec, tmp_path, convert, splits=("train", "test")):
    """Returns a copy of the data set whose images `convert` has turned into TIFF."""
    root = tmp_path / "tiff"
    for path in sorted((tmp_path / "png").rglob("*.png")):
        to = root / path.relative_to(tmp_path / "png")
        to.parent.mkdir(parents=True, exist_ok=True)
        if to.relative_to(root).parts[0] in splits:
            to.with_suffix(".tif").write_bytes(tiff(convert(np.asarray(Image.open(path)))))
        else:
            to.write_bytes(path.read_bytes())
    return spec._replace(root=str(root))


def contents(split):
    return {image.tobytes() for image in [*split.images, *split.held_out]}


def opened(spec):
    split = open_training(spec, holdout_fraction=0.2, seed=0)
    test = open_test(spec, channels=split.channels, value_range=split.value_range)
    return split, test


@pytest.mark.parametrize(
    ("convert", "value_range"),
    [
        (lambda image: (image / 255).astype(np.float32), (0, 1)),
        (lambda image: image.astype(np.int32), (0, 255)),
        (lambda image: image.astype(np.uint16) * 16, (0, 4095)),
    ],
    ids=["float", "int32", "12 in 16"],
)
def test_a_data_set_is_that_of_8_bits(eight_bits, tmp_path, convert, value_range):
    expected, expected_test = opened(eight_bits)
    assert expected.value_range is None
    spec = stored(eight_bits, tmp_path, convert)
    for _ in range(2):  # decoded, then from the cache
        split, test = opened(spec)
        assert split.value_range == value_range
        got = dict(zip(split.names, split.images.astype(int), strict=True))
        for name, image in zip(expected.names, expected.images, strict=True):
            if (other := name.replace(".png", ".tif")) in got:
                assert np.abs(got[other] - image).max() <= 1
        assert np.abs(test.images.astype(int) - expected_test.images).max() <= 1
    folder = f"{spec.root}/test/good"
    names, images, _ = open_images(folder, spec.shape, 1, split.value_range)
    np.testing.assert_array_equal(images, test.images[-3:])
    assert names == ["000.tif", "001.tif", "002.tif"]


def test_one_range_serves_dark_and_bright_images(eight_bits, tmp_path, messages):
    # The images of a dark folder must stay dark, and brighter test images are clipped.
    spec = stored(eight_bits, tmp_path, lambda image: image.astype(np.uint16) * 4)
    dark = np.full((20, 24), 40, np.uint16)
    dark[0] = np.arange(24)
    (tmp_path / "tiff/test/good/000.tif").write_bytes(tiff(dark))
    (tmp_path / "tiff/test/good/001.tif").write_bytes(tiff(dark * 100))
    split, test = opened(spec)
    assert split.value_range == (0, 1023)
    good = dict(zip(test.names, test.images, strict=True))
    assert good["good/000.tif"].max() == 10
    assert good["good/001.tif"].max() == 255
    clipped = [line for line in messages if "clipped" in line]
    assert len(clipped) == 1
    assert clipped[0].startswith("1 images have values outside 0 to 1023")
    assert "good/001.tif, 0 to 4000" in clipped[0]


def test_the_key_sets_the_range(eight_bits, tmp_path):
    spec = stored(eight_bits, tmp_path, lambda image: image.astype(np.int16) * 10 - 1000)
    with pytest.raises(BadInput, match=r"data\.value_range=LOW:HIGH"):
        opened(spec)
    expected, _ = opened(eight_bits)
    split, _ = opened(spec._replace(value_range="-1000:1550"))
    assert split.value_range == (-1000, 1550)
    assert contents(split) == contents(expected)
    with pytest.raises(BadInput, match=r"^data\.value_range: auto or LOW:HIGH"):
        opened(spec._replace(value_range="bright"))


def test_test_images_of_more_bits_than_the_training_images(eight_bits, tmp_path, messages):
    expected = open_test(eight_bits, channels=1)
    spec = stored(eight_bits, tmp_path, lambda image: (image / 255).astype("f4"), ["test"])
    split, test = opened(spec)
    assert split.value_range is None
    np.testing.assert_array_equal(test.images, expected.images)
    assert len([m for m in messages if "unlike the training images" in m]) == 1


def test_images_that_show_nothing_are_told_in_one_line(eight_bits, tmp_path, messages):
    spec = stored(eight_bits, tmp_path, lambda image: image, ["train"])
    opened(spec)
    assert not [line for line in messages if "levels" in line or "single value" in line]
    dark = spec._replace(value_range="0:100000")
    for path in (tmp_path / "tiff/train/good").iterdir():
        path.write_bytes(tiff(RNG.integers(0, 4000, (20, 24), dtype=np.uint16)))
    (tmp_path / "tiff/train/good/000.tif").write_bytes(tiff(np.full((20, 24), 99, np.uint16)))
    opened(dark)
    lines = [line for line in messages if "levels" in line or "single value" in line]
    assert len(lines) == 1
    assert "1 of 8 training images have a single value (0; first: " in lines[0]
    assert "good/000.tif) and only 11 of 256 levels occur in all training images" in lines[0]


def test_colour_of_16_bits(eight_bits, tmp_path):
    full = RNG.integers(0, 65536, (20, 24, 3), dtype=np.uint16)
    decoded = decode(tiff(full, photometric="rgb"), 3, (20, 24))
    np.testing.assert_array_equal(decoded, full >> 8)
    convert = lambda image: np.repeat(image[..., None], 3, -1).astype(np.uint16) * 16  # noqa: E731
    spec = stored(eight_bits, tmp_path, convert)
    with pytest.raises(BadInput, match=r"\.tif: colour of 16 bits, .* at most 15 .* convert them"):
        opened(spec)


def test_alpha_without_use_is_ignored():
    for alpha in (0, 128, 255):
        image = Image.fromarray(GREY).convert("RGBA")
        image.putalpha(alpha)
        buffer = io.BytesIO()
        image.save(buffer, "png")
        np.testing.assert_array_equal(decode(buffer.getvalue()), GREY)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "RGBX"])
def test_modes_are_read_or_refused_by_name(mode):
    colour = Image.fromarray(np.repeat(GREY[..., None], 3, -1))
    image = Image.frombytes("LAB", (5, 6), bytes(90)) if mode == "LAB" else colour.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "tiff")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if mode == "LAB":
            with pytest.raises(BadInput, match=r"^x\.tif: an image of mode LAB; convert it"):
                decode(buffer.getvalue())
        else:
            assert np.abs(decode(buffer.getvalue()).astype(int) - GREY).max() <= 2


def test_several_frames_are_told(tmp_path, messages):
    frames = [Image.fromarray(GREY // factor) for factor in (10, 1)]
    for name in ("a.gif", "b.tif", "c.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    Image.fromarray(GREY).save(tmp_path / "d.png")
    _, images, _ = open_images(str(tmp_path), (6, 5), 1)
    assert images[:3].max() == 25
    lines = [line for line in messages if "frames" in line]
    assert lines == [
        f"{tmp_path}/a.gif: 2 frames, of which only the first is read; 3 of 4 files have several"
    ]


# A run.


def test_the_data_record_holds_the_range(eight_bits, tmp_path):
    none = np.zeros((0, 8, 8, 3), np.uint8)
    textures = Textures(none, none, "", "")
    split, _ = opened(stored(eight_bits, tmp_path, lambda image: image.astype(np.uint16) * 16))
    assert [r["value_range"] for r in run_module._data_records(split, textures)] == [[0, 4095]] * 2
    # The records of runs on 8 bits stay as they are.
    assert "value_range" not in next(run_module._data_records(opened(eight_bits)[0], textures))


def scores(out):
    rows = csv.DictReader((out / "scores.csv").read_text().splitlines())
    return [float(row["score_sum"]) for row in rows]


def test_prediction_takes_the_range_of_the_run(trained, tmp_path):
    run = runs.clone(trained, tmp_path)
    new, plain = tmp_path / "new", tmp_path / "plain"
    dim = np.minimum(GREY, 80)  # by its own values it would be brighter
    new.mkdir()
    (new / "x.tif").write_bytes(tiff(np.round(dim * (4095 / 255)).astype(np.uint16)))
    write(plain / "x.png", dim)
    predict.predict(run.workdir, plain, tmp_path / "plain_out")
    record = json.loads((run.workdir / "data.json").read_text())
    (run.workdir / "data.json").write_text(json.dumps(record | {"value_range": [0, 4095]}))
    predict.predict(run.workdir, new, tmp_path / "out")
    assert scores(tmp_path / "out") == scores(tmp_path / "plain_out")


def test_a_run_whose_images_were_read_by_another_range_is_refused(trained, tmp_path):
    run = runs.clone(trained, tmp_path)
    config = trained_model.read_config(run.workdir)
    for path in (run.root / "data/train/good").iterdir():
        values = np.asarray(Image.open(path)).astype(np.uint16) * 16
        path.with_suffix(".tif").write_bytes(tiff(values))
        path.unlink()
    split = open_training(config.data.spec, holdout_fraction=0.3, seed=0)
    record = json.loads((run.workdir / "data.json").read_text())
    record["fingerprint"] = split.fingerprint
    (run.workdir / "data.json").write_text(json.dumps(record))
    with pytest.raises(BadInput, match=r"data\.value_range they are \(0\.0, 4095\.0\) now"):
        trained_model.open_split(run.workdir, config)
    (run.workdir / "data.json").write_text(json.dumps(record | {"value_range": [0, 4095]}))
    assert trained_model.open_split(run.workdir, config).channels == 1
