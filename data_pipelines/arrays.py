"""Images given as arrays, by the rules of `decode` for files with the same values.

bool                        0 and 255
uint8                       as they are; an alpha as in a file
uint16 with colour          the upper byte
all others                  scaled by the range of the data set (`value_range`) and rounded
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines import decode, value_range
from data_pipelines.decode import Picture
from data_pipelines.errors import BadInput
from data_pipelines.value_range import Range

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def as_image(value: Any, origin: str) -> np.ndarray:
    """Returns one image as (h, w, c) of a type and a size that can be judged.

    Args:
      value: (h, w), or (h, w, c) with one channel, three, or one of both and an alpha.
      origin: its name, for error messages.

    Raises:
      BadInput: another shape or type.
    """
    if isinstance(value, Image.Image):
        raise BadInput(f"{origin}: a PIL image; give its path, or numpy.asarray of its L or RGB")
    array = np.asarray(value)
    if array.dtype.kind not in "buif":
        raise BadInput(f"{origin}: values of type {array.dtype}; give numbers, such as uint8")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in _MODES:
        raise BadInput(
            f"{origin}: an array of shape {np.shape(value)}; an image is (h, w) or (h, w, c) with "
            "c from 1 to 4, and several are a list of images or (n, h, w, c)"
        )
    height, width, channels = array.shape
    if not 0 < height * width <= decode.MAX_PIXELS:
        raise BadInput(f"{origin}: {width}×{height} pixels; at least 1 and at most 2²⁸")
    if array.dtype.kind in "iuf" and not _is_plain(array) and channels in (2, 4):
        raise BadInput(f"{origin}: an alpha in values of type {array.dtype}; convert it to uint8")
    if not np.isfinite(array).all():
        raise BadInput(f"{origin}: infinite values or NaN; replace them by numbers")
    return array


def common_range(
    images: Mapping[str, np.ndarray], setting: str, trained: Range | None
) -> Range | None:
    """Returns the range of values of images of more than 8 bits; see `new_images.common_range`.

    Args:
      images: those of `as_image`, by their names.
      setting: `data.value_range` of the run.
      trained: the range of the training images.
    """
    if values := trained or value_range.parse(setting):
        return values
    deep = {name: image for name, image in images.items() if not _is_plain(image)}
    if not deep:
        return None
    floating = [image.dtype.kind == "f" for image in deep.values()]
    return value_range.choose([*map(_extrema, deep.values())], floating, list(deep))


def convert(array: np.ndarray, channels: int, values: Range | None) -> Picture:
    """Returns an image of `as_image` as a file with the same values would be decoded.

    Args:
      array: (h, w, c).
      channels: those of the training images.
      values: the range of `common_range`.
    """
    extrema = None
    if array.dtype == bool:
        array = array * np.uint8(255)
    elif array.dtype == np.uint16 and _is_plain(array):
        array = (array >> 8).astype(np.uint8)
    elif array.dtype != np.uint8:
        assert values, "a range is chosen for every image of more than 8 bits"
        extrema = _extrema(array)
        array = decode.to_8_bit(array.astype(np.float64), values)
    mode = _MODES[array.shape[2]]
    image = Image.fromarray(np.ascontiguousarray(array[..., 0] if mode == "L" else array))
    assert image.mode == mode
    return Picture(decode.to_pixels(image, channels), extrema)


def _is_plain(array: np.ndarray) -> bool:
    """Returns whether the values need no range."""
    colour = array.shape[2] > 1
    return array.dtype in (np.bool_, np.uint8) or (array.dtype == np.uint16 and colour)


def _extrema(array: np.ndarray) -> Range:
    return float(array.min()), float(array.max())
