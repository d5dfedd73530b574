"""Encoded image files to arrays: every mode that cameras and labelling tools write.

Conventions, once for all sources: orientation as in EXIF; the first frame of several; 16 bits
are scaled to 8 by v / 257, so 65535 becomes 255; what is transparent stands before black;
colour becomes grey by ITU-R 601 luma. Images are resized by Pillow's bilinear filter, which
widens with the factor (antialiased, without the overshoot of Lanczos that a structural
similarity would see); masks by nearest neighbour, sampled at pixel centres.
"""

import io
from collections.abc import Callable

import numpy as np
import PIL
from PIL import Image, ImageOps

from data_pipelines.errors import BadInput

# Part of every cache key: raise the number whenever the arrays that come out change.
VERSION = f"1-pillow{PIL.__version__}"

SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pgm", ".ppm", ".pbm")
)

# Pillow warns of larger images, meant for uploads; line-scan cameras exceed its 89 megapixels.
Image.MAX_IMAGE_PIXELS = 2**29

_GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N")
_ORIENTATION = 0x0112  # the EXIF tag; values from 5 on swap height and width


def read_encoded(read: Callable[[], bytes], origin: str) -> bytes:
    """The bytes of one file; `BadInput` naming `origin` when unreadable or empty."""
    try:
        data = read()
    except OSError as error:
        raise BadInput(f"{origin}: cannot be read ({error.strerror or error})") from error
    if not data:
        raise BadInput(f"{origin}: empty file")
    return data


def image_shape(data: bytes, origin: str) -> tuple[int, int]:
    """Native (h, w) after rotation as in EXIF, from the header alone."""
    image = _open(data, origin)
    width, height = image.size
    return (width, height) if _orientation(image, data) >= 5 else (height, width)


def is_grey(data: bytes, origin: str) -> bool:
    """Whether the image has no colour: a grey mode, or equal channels in every pixel."""
    image = _open(data, origin)
    if image.mode in _GREY_MODES:
        return True
    pixels = np.asarray(_load(image, data, origin))
    return pixels.ndim == 2 or bool((pixels == pixels[..., :1]).all())


def decode_image(data: bytes, origin: str, shape: tuple[int, int], channels: int) -> np.ndarray:
    """Decodes and resizes one image.

    Args:
      data: the encoded file.
      origin: what an error names.
      shape: (h, w) of the result; the aspect ratio is not kept.
      channels: 1 (grey) or 3 (RGB).

    Returns:
      uint8 (h, w, channels).

    Raises:
      BadInput: not an image, truncated, or of a mode without a defined 8-bit meaning.
    """
    height, width = shape
    image = _load(_open(data, origin), data, origin).convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(height, width, channels)


def decode_mask(data: bytes, origin: str, shape: tuple[int, int] | None) -> np.ndarray:
    """Decodes one mask: bool (h, w), true where any colour channel is non-zero.

    Args:
      data: the encoded file, of any mode; in a palette the colour counts, not the index.
      origin: what an error names.
      shape: (h, w) of the result; None keeps the native size.
    """
    image = _open(data, origin)
    # Read before the scaling to 8 bits, under which small 16-bit values vanish.
    pixels = np.asarray(_load(image, data, origin, scale=False))
    mask = np.any(pixels.reshape(*pixels.shape[:2], -1), axis=-1)
    if shape is None or mask.shape == shape:
        return mask
    height, width = shape
    resized = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(resized)


def _open(data: bytes, origin: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except Image.UnidentifiedImageError as error:
        raise BadInput(f"{origin}: not an image that Pillow can read") from error
    except Exception as error:  # Pillow's readers raise many kinds on a damaged header
        raise _damaged(origin, error) from error


def _orientation(image: Image.Image, data: bytes) -> int:
    # Without these marks Pillow would decode a whole PNG to look for EXIF behind the pixels.
    if image.format == "PNG" and b"eXIf" not in data and b"Raw profile type exif" not in data:
        return 1
    return image.getexif().get(_ORIENTATION, 1)


def _load(image: Image.Image, data: bytes, origin: str, *, scale: bool = True) -> Image.Image:
    """The upright image in mode L or RGB; `scale=False` leaves integers beyond 8 bits alone."""
    try:
        image.load()
        if _orientation(image, data) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            return _to_8_bit(image, origin) if scale else image
        mode = "L" if image.mode in _GREY_MODES else "RGB"
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
        return image.convert(mode)
    except BadInput:
        raise
    except Exception as error:  # likewise: OSError, SyntaxError, struct.error, zlib.error, …
        raise _damaged(origin, error) from error


def _to_8_bit(image: Image.Image, origin: str) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    low, high = values.min(), values.max()
    if low < 0 or high > 65535:
        raise BadInput(f"{origin}: values from {low} to {high}, beyond 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _damaged(origin: str, error: Exception) -> BadInput:
    reason = " ".join(str(error).split()) or type(error).__name__
    return BadInput(f"{origin}: damaged or unsupported image ({reason})")
