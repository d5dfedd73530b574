"""Every mode of image and mask, and every form of damage."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from data_pipelines.decode import decode_image, decode_mask, image_shape, is_grey, read_encoded
from data_pipelines.errors import BadInput
from layouts import encode

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 5), dtype=np.uint8)
RGB = RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)


def saved(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def decode(data, channels=3, shape=(6, 5)):
    return decode_image(data, "x.png", shape, channels)


def test_rgb_and_grey_are_exact():
    np.testing.assert_array_equal(decode(encode(RGB)), RGB)
    np.testing.assert_array_equal(decode(encode(GREY), 1)[..., 0], GREY)
    np.testing.assert_array_equal(decode(encode(GREY), 3), np.repeat(GREY[..., None], 3, -1))


def test_colour_becomes_luma():
    luma = RGB @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(decode(encode(RGB), 1)[..., 0], luma, atol=1)
    three_equal = np.repeat(GREY[..., None], 3, -1)
    np.testing.assert_array_equal(decode(encode(three_equal), 1)[..., 0], GREY)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bits_use_the_whole_8_bits(file_format):
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    out = decode(saved(Image.fromarray(values), file_format), 1, (1, 6))
    np.testing.assert_array_equal(out[0, :, 0], [0, 0, 1, 1, 128, 255])


def test_32_bits_serve_as_long_as_16_suffice():
    values = np.array([[0, 257, 65535]], np.int32)
    out = decode(saved(Image.fromarray(values), "TIFF"), 1, (1, 3))
    np.testing.assert_array_equal(out[0, :, 0], [0, 1, 255])
    with pytest.raises(BadInput, match=r"^x\.png: values from 0 to 65536"):
        decode(saved(Image.fromarray(values + np.int32([[0, 0, 1]])), "TIFF"), 1, (1, 3))


def test_one_bit():
    bits = GREY > 127
    data = saved(Image.fromarray(bits))
    np.testing.assert_array_equal(decode(data, 1)[..., 0], bits * 255)
    assert is_grey(data, "x")


@pytest.mark.parametrize("alpha", [False, True])
def test_palette(alpha):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 100, 50, 7, 7, 7])
    image.putdata([0, 1, 2])
    options = {"transparency": bytes([255, 0, 255])} if alpha else {}
    data = saved(image, **options)
    assert Image.open(io.BytesIO(data)).mode == "P"
    second = [0, 0, 0] if alpha else [200, 100, 50]
    np.testing.assert_array_equal(decode(data, 3, (1, 3))[0], [[10, 20, 30], second, [7, 7, 7]])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_stand_before_black(mode):
    image = Image.fromarray(GREY).convert(mode)
    alpha = np.zeros((6, 5), np.uint8)
    alpha[:, :2] = 255
    image.putalpha(Image.fromarray(alpha))
    out = decode(saved(image), 1)[..., 0]
    np.testing.assert_array_equal(out, np.where(alpha > 0, GREY, 0))


def test_cmyk():
    image = Image.fromarray(np.full((8, 8, 3), (200, 40, 90), np.uint8)).convert("CMYK")
    out = decode(saved(image, "JPEG", quality=95), 3, (8, 8))
    np.testing.assert_allclose(out.reshape(-1, 3).mean(0), (200, 40, 90), atol=4)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_exif_rotation(file_format):
    image = Image.fromarray(np.repeat(np.arange(0, 240, 30, dtype=np.uint8)[:, None], 16, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise: the top row becomes the right column
    data = saved(image, file_format, exif=exif)
    assert image_shape(data, "x") == (16, 8)
    turned = np.rot90(np.asarray(image), -1)
    np.testing.assert_allclose(decode(data, 1, (16, 8))[..., 0].astype(int), turned, atol=3)


def test_resize_is_antialiased_and_does_not_overshoot():
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    assert np.abs(decode(encode(board), 1, (8, 8)).astype(int) - 127).max() <= 6
    step = np.repeat(np.where(np.arange(64) < 30, 50, 200), 64).reshape(64, 64).T
    small = decode(encode(step.astype(np.uint8)), 1, (16, 16))
    assert small.min() == 50
    assert small.max() == 200


def test_is_grey():
    assert is_grey(encode(GREY), "x")
    assert is_grey(encode(np.repeat(GREY[..., None], 3, -1)), "x")
    assert not is_grey(encode(RGB), "x")
    one_pixel = np.repeat(GREY[..., None], 3, -1)
    one_pixel[3, 3, 1] ^= 1
    assert not is_grey(encode(one_pixel), "x")


def test_large_images_do_not_warn():
    data = saved(Image.new("1", (11_000, 10_000)))  # 110 megapixels
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_shape(data, "x") == (10_000, 11_000)


def test_an_image_that_would_take_gigabytes_is_refused_before_it_is_decoded():
    data = saved(Image.new("1", (2**14, 2**13 + 1)))
    with pytest.raises(BadInput, match="16384×8193 pixels, more than 134 million"):
        decode(data)


MASK = np.zeros((6, 5), bool)
MASK[1:3, 2:4] = True
LABELS = Image.fromarray((MASK * 2).astype(np.uint8))
LABELS = LABELS.convert("P")
LABELS.putpalette([0, 0, 0, 9, 9, 9, 0, 90, 0])


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray((MASK * 255).astype(np.uint8)),
        Image.fromarray(MASK.astype(np.uint8)),
        Image.fromarray(MASK),
        Image.fromarray(MASK.astype(np.uint16)),
        Image.fromarray((MASK[..., None] * [0, 0, 1]).astype(np.uint8)),
        Image.fromarray((MASK * 255).astype(np.uint8)).convert("RGBA"),
        Image.fromarray((MASK * 255).astype(np.uint8)).convert("LA"),
        LABELS,
    ],
    ids=["L", "L of 1", "1", "16 bits of 1", "blue of 1", "RGBA", "LA", "P"],
)
def test_masks_of_every_mode(image):
    out = decode_mask(saved(image), "m.png", None)
    assert out.dtype == np.bool_
    np.testing.assert_array_equal(out, MASK)


def test_masks_are_resized_by_nearest_neighbour():
    wide = np.kron(MASK, np.ones((4, 4), bool))
    np.testing.assert_array_equal(decode_mask(encode(wide), "m", (6, 5)), MASK)
    np.testing.assert_array_equal(decode_mask(encode(MASK), "m", (24, 20)), wide)


@pytest.mark.parametrize("reader", [decode, lambda data: decode_mask(data, "x.png", None)])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif"])
def test_truncated(reader, suffix):
    data = encode(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8), suffix)
    with pytest.raises(BadInput) as caught:
        reader(data[: len(data) // 2])
    assert str(caught.value).startswith("x.png: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"a few words", b"\x89PNG\r\n\x1a\n", b"\x00" * 100])
def test_not_an_image(data):
    with pytest.raises(BadInput, match=r"^x\.png: .*image.*$"):
        image_shape(data, "x.png")


def test_damaged_bytes_give_an_array_or_one_line():
    good = encode(RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for i in range(0, len(good), 7):
        bad = good[:i] + bytes([good[i] ^ 0x55]) + good[i + 1 :]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert decode(bad).shape == (6, 5, 3)
        except BadInput as error:
            assert str(error).startswith("x.png: ")
            assert "\n" not in str(error)


def test_unreadable_and_empty(tmp_path):
    (tmp_path / "x.png").mkdir()
    (tmp_path / "y.png").symlink_to(tmp_path / "nowhere")
    for name in ("x.png", "y.png"):
        with pytest.raises(BadInput, match=rf"{name}: cannot be read \("):
            read_encoded((tmp_path / name).read_bytes, str(tmp_path / name))
    with pytest.raises(BadInput, match=r"^z\.png: empty file$"):
        read_encoded(lambda: b"", "z.png")
