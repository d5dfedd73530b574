"""Decoding of image files: every mode that cameras and labelling tools write.

The same conventions hold for all sources. The EXIF orientation is applied. Only the
first frame of a file is read. Values of 16 bits are scaled to 8 by v / 257, so 65535 becomes
255. Transparent pixels are composited over black. Colour becomes grey by ITU-R 601 luma.
Images are resized by Pillow's antialiased bilinear filter, because Lanczos overshoots at edges
and the structural similarity responds to that. Masks are resized by nearest neighbour, sampled
at pixel centres.
"""

import io
from collections.abc import Callable

import numpy as np
import PIL
from PIL import Image, ImageOps

from data_pipelines.errors import BadInput

# Part of every cache key: increase the number whenever the decoded arrays change.
VERSION = f"1-pillow{PIL.__version__}"

SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pgm", ".ppm", ".pbm")
)

# Pillow warns above 89 megapixels, a limit meant for uploads, which line-scan cameras exceed.
Image.MAX_IMAGE_PIXELS = 2**29

_GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16L", "I;16B", "I;16N")
_ORIENTATION = 0x0112  # the EXIF tag; values from 5 on swap height and width


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


def image_shape(data: bytes, origin: str) -> tuple[int, int]:
    """Returns the native (h, w) after the EXIF rotation, from the header alone."""
    image = _open(data, origin)
    width, height = image.size
    return (width, height) if _orientation(image, data) >= 5 else (height, width)


def is_grey(data: bytes, origin: str) -> bool:
    """Returns whether the image has a grey mode or equal channels in every pixel."""
    image = _open(data, origin)
    if image.mode in _GREY_MODES:
        return True
    pixels = np.asarray(_load(image, data, origin))
    return pixels.ndim == 2 or bool((pixels == pixels[..., :1]).all())


def decode_image(data: bytes, origin: str, shape: tuple[int, int], channels: int) -> np.ndarray:
    """Decodes and resizes one image.

    Args:
      data: the encoded file.
      origin: the file's name for error messages.
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
    """Decodes one mask.

    Args:
      data: the encoded file, of any mode; in a palette the colour counts, not the index.
      origin: the file's name for error messages.
      shape: (h, w) of the result; None keeps the native size.

    Returns:
      bool (h, w), true where any colour channel is non-zero.

    Raises:
      BadInput: not an image, or a damaged one.
    """
    image = _open(data, origin)
    # Not scaled to 8 bits, because small 16-bit labels would become 0.
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
    except Exception as error:  # Pillow raises errors of many types on a damaged header.
        raise _damaged(origin, error) from error


def _orientation(image: Image.Image, data: bytes) -> int:
    # A PNG without these marks has no EXIF. Pillow would decode all pixels to find that out,
    # because the EXIF data may follow them.
    if image.format == "PNG" and b"eXIf" not in data and b"Raw profile type exif" not in data:
        return 1
    return image.getexif().get(_ORIENTATION, 1)


def _load(image: Image.Image, data: bytes, origin: str, *, scale: bool = True) -> Image.Image:
    """Returns the upright image in mode L or RGB.

    With `scale=False` an image of more than 8 bits stays in its integer mode.
    """
    try:
        # Pillow decodes lazily, so without this call damaged pixels would raise outside the `try`.
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
        # `_to_8_bit` raises it, and its message already names the file.
        raise
    except Exception as error:  # OSError, SyntaxError, struct.error, zlib.error, …
        raise _damaged(origin, error) from error


def _to_8_bit(image: Image.Image, origin: str) -> Image.Image:
    """Scales integers of up to 16 bits to 8 bits, rounded."""
    # In 16 bits the sum below could overflow.
    values = np.asarray(image).astype(np.int64)
    low, high = values.min(), values.max()
    if low < 0 or high > 65535:
        raise BadInput(f"{origin}: values from {low} to {high}, beyond 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _damaged(origin: str, error: Exception) -> BadInput:
    reason = " ".join(str(error).split()) or type(error).__name__
    return BadInput(f"{origin}: damaged or unsupported image ({reason})")
