"""Decoding of image files: every mode that cameras and labelling tools write.

The same conventions hold for all sources. The EXIF orientation is applied. Only the first frame of
a file is read. Colour becomes grey by ITU-R 601 luma. Images are resized by Pillow's antialiased
bilinear filter, because Lanczos overshoots at edges and the structural similarity responds to
that. The modes of Pillow, by their rule:

    1, L, RGB                    as they are
    P, CMYK, YCbCr, HSV, RGBX    converted to RGB
    LA, RGBA, PA, transparency   composited over black; an alpha of one value in the whole image is
                                 ignored, because some programs store 0 in an alpha without use
    I, I;16, I;16B, F, …         scaled by the range of the data set (`value_range`) and rounded; a
                                 TIFF in which 0 is white is inverted
    RGB, LA, … of 16 bits        the upper byte, as Pillow reads it
    LAB and all others           refused

Masks are resized by nearest neighbour, sampled at pixel centres; `read_mask` states their rule.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image, ImageOps

from data_pipelines.errors import BadInput
from data_pipelines.value_range import Range, choose

# Part of every cache key: increase the number whenever the decoded arrays change.
VERSION = f"1-pillow{PIL.__version__}"

# An image of a few kilobytes may expand to gigabytes. Pillow's own limit of 89 megapixels is meant
# for uploads; line-scan cameras exceed it. With this one a picture with a palette and an alpha
# channel, and its copies, take less than 2 GiB.
MAX_PIXELS = 2**27
Image.MAX_IMAGE_PIXELS = None

# How the values of a file are stored.
PLAIN, ALPHA, INTEGER, FLOAT, UPPER_BYTE = "8 bits", "alpha", "integer", "float", "upper byte"

_GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N", "F")
_INTEGER_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
_ORIENTATION = 0x0112  # the EXIF tag; values from 5 on swap height and width
# TIFF tags: bits of each sample, meaning of 0, signedness.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
# Formats whose further frames are no images of their own: previews, layers.
_ONE_IMAGE = ("MPO", "PSD")
# The bytes of a PNG up to its bit depth.
_HEADER_BYTES = 25
# The rules of `read_mask`.
MASK_RULES = ("non-zero", "labels", "half")
# At most this number of classes is told from grey levels.
_LABELS = 32


class Header(NamedTuple):
    """The header of an image file.

    Attributes:
      shape: the native (h, w) after the EXIF rotation.
      kind: PLAIN, ALPHA, INTEGER, FLOAT or UPPER_BYTE.
      frames: the number of frames, of which the first is read.
    """

    shape: tuple[int, int]
    kind: str
    frames: int


class Picture(NamedTuple):
    """A decoded image at its own size.

    Attributes:
      pixels: uint8 (h, w, 1 or 3).
      extrema: the smallest and the largest stored value of an image of more than 8 bits; None for
        another.
    """

    pixels: np.ndarray
    extrema: Range | None


class NativeMask(NamedTuple):
    """A mask at its own size.

    Attributes:
      mask: bool (h, w).
      rule: one of `MASK_RULES`; see `read_mask`.
    """

    mask: np.ndarray
    rule: str


def read_encoded(read: Callable[[], bytes], origin: str) -> bytes:
    """Returns the bytes of one file.

    Raises:
      BadInput: the file cannot be read or is empty; the message names `origin`.
    """
    try:
        data = read()
    except OSError as error:
        raise BadInput(f"{origin}: cannot be read ({error.strerror or error})") from error
    if not data:
        raise BadInput(f"{origin}: empty file")
    return data


def read_header(data: bytes, origin: str) -> Header:
    """Returns the header of an image file.

    Raises:
      BadInput: not an image, damaged, or of a mode without a rule.
    """
    image = _open(data, origin)
    with _damage_named(origin):
        width, height = image.size
        shape = (width, height) if _orientation(image, data) >= 5 else (height, width)
        return Header(shape, _kind(image, data, origin), _frames(image))


def image_shape(data: bytes, origin: str) -> tuple[int, int]:
    """Returns the native (h, w) after the EXIF rotation, from the header alone."""
    return read_header(data, origin).shape


def is_grey(data: bytes, origin: str) -> bool:
    """Returns whether the image has a grey mode or equal channels in every pixel."""
    image = _open(data, origin)
    if image.mode in _GREY_MODES:
        return True
    with _damage_named(origin):
        pixels = np.asarray(_flatten(_load(image, data)))
    return pixels.ndim == 2 or bool((pixels == pixels[..., :1]).all())


def is_deep(path: Path) -> bool:
    """Returns whether an image has more than 8 bits; False for a file that cannot be read.

    Only the header is read.
    """
    try:
        # Opening a pipe would wait for its other end.
        if not path.is_file():
            return False
        with path.open("rb") as file, Image.open(file) as image:
            file.seek(0)
            return _kind(image, file.read(_HEADER_BYTES), str(path)) in (INTEGER, FLOAT)
    except Exception:  # Pillow raises errors of many types; decoding the file names the damage
        return False


def value_extrema(data: bytes, origin: str) -> Range:
    """Returns the smallest and the largest value of an image of more than 8 bits.

    Raises:
      BadInput: damaged, or with a value that is not a finite number.
    """
    image = _open(data, origin)
    with _damage_named(origin):
        return _extrema(_values(image, _load(image, data), origin))


def decode_image(
    data: bytes,
    origin: str,
    shape: tuple[int, int],
    channels: int,
    value_range: Range | None = None,
) -> np.ndarray:
    """Decodes and resizes one image.

    Args:
      data: the encoded file.
      origin: the file's name for error messages.
      shape: (h, w) of the result; the aspect ratio is not kept.
      channels: 1 (grey) or 3 (RGB).
      value_range: the values of an image of more than 8 bits that become 0 and 255; None for
        the range that `value_range.choose` takes for this image alone.

    Returns:
      uint8 (h, w, channels).

    Raises:
      BadInput: not an image, truncated, or of a mode or values without a rule.
    """
    return resize(decode_picture(data, origin, channels, value_range).pixels, shape)


def decode_picture(
    data: bytes, origin: str, channels: int, value_range: Range | None = None
) -> Picture:
    """Decodes one image at its own size; see `decode_image`."""
    image, extrema = _open(data, origin), None
    with _damage_named(origin):
        kind, pixels = _kind(image, data, origin), _load(image, data)
        if kind in (INTEGER, FLOAT):
            values = _values(image, pixels, origin)
            extrema = _extrema(values)
            if value_range is None:
                value_range = choose([extrema], [kind == FLOAT], [origin])
            scaled = to_8_bit(values, value_range)
            pixels = Image.fromarray(255 - scaled if _inverted(image) else scaled)
        return Picture(to_pixels(pixels, channels), extrema)


def to_pixels(image: Image.Image, channels: int) -> np.ndarray:
    """Returns uint8 (h, w, channels) of an image of 8 bits in any mode."""
    image = _flatten(image).convert("L" if channels == 1 else "RGB")
    return np.asarray(image).reshape(image.height, image.width, channels)


def resize(pixels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Resizes uint8 (h, w, 1 or 3) to `shape`; the aspect ratio is not kept."""
    if pixels.shape[:2] == shape:
        return pixels
    height, width = shape
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized).reshape(height, width, pixels.shape[2])


def decode_mask(data: bytes, origin: str, shape: tuple[int, int] | None) -> np.ndarray:
    """Returns the mask of `read_mask`, bool (h, w), resized to `shape` if that is not None."""
    mask = read_mask(data, origin).mask
    if shape is None or mask.shape == shape:
        return mask
    height, width = shape
    resized = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
    # Pillow's True is 255, which NumPy takes for True and JAX converts to 255.
    return np.asarray(resized).view(np.uint8) != 0


def read_mask(data: bytes, origin: str) -> NativeMask:
    """Decodes one mask; the value of a pixel is the largest of its colour channels.

    A mask of at most two values, or with the colours of a palette, marks the pixels that are not
    zero. So does a mask of integers below 32, which are the numbers of classes. In any other
    mask the values between belong to soft edges or to JPEG, and it marks the pixels above half of
    its largest value.

    In a palette the colour counts, unless all colours are equal: then the index does. A varying
    alpha is the mask if the colours are equal; else it is composited over black.

    Args:
      data: the encoded file, of any mode.
      origin: the file's name for error messages.

    Raises:
      BadInput: not an image, or a damaged one.
    """
    image = _open(data, origin)
    with _damage_named(origin):
        values, classes = _mask_values(image, data, origin)
    largest = values.max()
    if classes or len(np.unique(values)) <= 2:
        return NativeMask(values != 0, "non-zero")
    if values.dtype.kind != "f" and largest < _LABELS:
        return NativeMask(values != 0, "labels")
    return NativeMask(values > largest / 2, "half")


def _mask_values(image: Image.Image, data: bytes, origin: str) -> tuple[np.ndarray, bool]:
    """Returns the values (h, w) of a mask, and whether they are colours of classes."""
    kind, pixels = _kind(image, data, origin), _load(image, data)
    if kind in (INTEGER, FLOAT):
        # Not scaled to 8 bits, because small 16-bit labels would become 0.
        values = np.abs(_values(image, pixels, origin))
        if _inverted(image):
            values = values.max() - values
        return values if kind == FLOAT else values.astype(np.int64), False
    colours = np.asarray(_flatten(pixels, composite=False))
    colours = colours.reshape(*colours.shape[:2], -1)
    if (colours == colours[0, 0]).all():
        if image.has_transparency_data and len(np.unique(_alpha(pixels))) > 1:
            return _alpha(pixels), False
        if image.mode == "P":
            return np.asarray(pixels), True
    colours = np.asarray(_flatten(pixels))
    colours = colours.reshape(*colours.shape[:2], -1)
    grey = bool((colours == colours[..., :1]).all())
    return colours.max(axis=-1), image.mode in ("P", "PA") and not grey


def _open(data: bytes, origin: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
    except Image.UnidentifiedImageError as error:
        if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            raise BadInput(
                f"{origin}: damaged, or not an image that Pillow can read (a TIFF of a rare kind, "
                "such as float64 or float colour); convert it, for example to PNG"
            ) from error
        raise BadInput(f"{origin}: not an image that Pillow can read") from error
    except Exception as error:  # Pillow raises errors of many types on a damaged header.
        raise _damaged(origin, error) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadInput(
            f"{origin}: {width}×{height} pixels, more than {MAX_PIXELS / 1e6:.0f} million; "
            "shrink the image or cut it into parts"
        )
    return image


def _orientation(image: Image.Image, data: bytes) -> int:
    # A PNG without these marks has no EXIF. Pillow would decode all pixels to find that out,
    # because the EXIF data may follow them.
    if image.format == "PNG" and b"eXIf" not in data and b"Raw profile type exif" not in data:
        return 1
    return image.getexif().get(_ORIENTATION, 1)


def _frames(image: Image.Image) -> int:
    try:
        return 1 if image.format in _ONE_IMAGE else getattr(image, "n_frames", 1)
    except Exception:  # A damaged later frame is of no concern, because only the first is read.
        return 1


def _tag(image: Image.Image, tag: int, default: Any) -> Any:
    """Returns the value of a TIFF tag; the default in other formats."""
    return getattr(image, "tag_v2", {}).get(tag, default)


def _kind(image: Image.Image, data: bytes, origin: str) -> str:
    """Returns how the values are stored, from the header."""
    if image.mode == "F":
        return FLOAT
    # Pillow reads signed bytes as unsigned ones.
    if image.mode in _INTEGER_MODES or (image.mode == "L" and _signed(image)):
        return INTEGER
    if image.mode not in _GREY_MODES + _COLOUR_MODES:
        raise BadInput(f"{origin}: an image of mode {image.mode}; convert it to grey or RGB")
    bits = _tag(image, _BITS, (data[24],) if image.format == "PNG" and len(data) > 24 else (8,))
    if max(bits) > 8:
        return UPPER_BYTE
    return ALPHA if image.has_transparency_data else PLAIN


def _signed(image: Image.Image) -> bool:
    return 2 in _tag(image, _SAMPLE_FORMAT, (1,))


def _inverted(image: Image.Image) -> bool:
    """Returns whether 0 is white in values that Pillow leaves as they are."""
    return _tag(image, _PHOTOMETRIC, 1) == 0


def _load(image: Image.Image, data: bytes) -> Image.Image:
    """Returns the upright image in its own mode, with all pixels decoded."""
    # Pillow decodes lazily, so without this call damaged pixels would raise at a later place.
    image.load()
    return image if _orientation(image, data) == 1 else ImageOps.exif_transpose(image)


def _flatten(image: Image.Image, *, composite: bool = True) -> Image.Image:
    """Returns an image of 8 bits in mode L or RGB; without `composite` its alpha is dropped."""
    mode = "L" if image.mode in _GREY_MODES else "RGB"
    if not image.has_transparency_data:
        return image.convert(mode)
    image = image.convert("RGBA")
    if composite and len(set(image.getchannel("A").getextrema())) > 1:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    # RGBA becomes RGB first, because its luma need not keep equal channels.
    return image.convert("RGB").convert(mode)


def _alpha(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGBA").getchannel("A"))


def _values(image: Image.Image, upright: Image.Image, origin: str) -> np.ndarray:
    """Returns the stored values (h, w) of an image of more than 8 bits, float64.

    Args:
      image: the opened file, whose tags give the type of the values.
      upright: its pixels.
      origin: the file's name for error messages.
    """
    values = np.asarray(upright)
    # Pillow has no mode for these types, and keeps their bits.
    if image.mode == "L":
        values = values.view(np.int8)
    elif image.mode == "I" and _tag(image, _BITS, (0,)) == (32,) and not _signed(image):
        values = values.view(np.uint32)
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise BadInput(f"{origin}: infinite values or NaN; replace them by numbers")
    return values


def _extrema(values: np.ndarray) -> Range:
    return float(values.min()), float(values.max())


def to_8_bit(values: np.ndarray, value_range: Range) -> np.ndarray:
    """Scales the values of a range to 0…255, rounded; other values are clipped."""
    low, high = value_range
    return np.floor((values - low) * 255 / (high - low) + 0.5).clip(0, 255).astype(np.uint8)


@contextlib.contextmanager
def _damage_named(origin: str) -> Iterator[None]:
    """Turns the errors that Pillow raises on a damaged file into `BadInput`."""
    try:
        yield
    except BadInput:
        raise  # its message already names the file
    except Exception as error:  # OSError, SyntaxError, struct.error, zlib.error, …
        raise _damaged(origin, error) from error


def _damaged(origin: str, error: Exception) -> BadInput:
    reason = " ".join(str(error).split()) or type(error).__name__
    return BadInput(f"{origin}: damaged or unsupported image ({reason})")
