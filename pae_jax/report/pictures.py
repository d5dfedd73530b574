"""Pictures to look at: heat maps, overlays, panels, image files. Host code, uint8 (h, w, 3)."""

import functools
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Shaped, UInt8

from pae_jax.workdir.files import AnyPath, write_atomically

Picture = UInt8[np.ndarray, "h w 3"]

GAP = 4  # pixels between the cells of a grid
OUTLINE = (64, 224, 255)  # light blue, which is no colour of a heat map
_STRIP = 2**20  # pixels


def to_uint8(image: Float[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w c"]:
    """Rounds [0, 1] to {0, …, 255}; values outside are clamped."""
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


@functools.cache
def _colours() -> UInt8[np.ndarray, "256 3"]:
    from matplotlib import colormaps

    # Its lightness rises evenly, so that it can be read in grey and with any colour vision.
    return colormaps["inferno"](np.arange(256), bytes=True)[:, :3]


def heat_map(values: Float[np.ndarray, "h w"], limit: float) -> Picture:
    """Returns an anomaly map in colours, dark at 0 and below, light yellow at `limit` and above.

    Maps can be compared by eye if they share their limit. The picture is dark everywhere if the
    limit is not positive, as it is for maps that are 0 everywhere.
    """
    fraction = values / limit if limit > 0 else np.zeros_like(values)
    return _colours()[to_uint8(fraction[..., None])[..., 0]]


def overlay(image: Picture, heat: Picture, opacity: float = 0.6) -> Picture:
    """Blends a heat map with its image, made grey so that every colour comes from the heat map."""
    grey = image.astype(np.float32).mean(axis=-1, keepdims=True)
    return np.rint(grey + opacity * (heat - grey)).astype(np.uint8)


def count_regions(mask: Bool[np.ndarray, "h w"]) -> int:
    """Returns the number of connected regions of a mask; diagonal neighbours are connected."""
    from pae_jax.metrics.regions import label_regions

    return int(label_regions(mask).max())


def outline(mask: Bool[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 4"]:
    """Returns a transparent picture with the outlines of a mask's regions, one pixel wide.

    They run just outside of the regions, so that a region of one pixel can be seen, and along the
    border of the picture where a region touches it.
    """
    import scipy.ndimage

    square = np.ones((3, 3))
    wider = scipy.ndimage.binary_dilation(mask, square)
    line = wider != scipy.ndimage.binary_erosion(wider, square)
    picture = np.zeros((*mask.shape, 4), np.uint8)
    picture[line] = (*OUTLINE, 255)
    return picture


def overlay_map(image: Picture, values: Float[np.ndarray, "h w"], limit: float) -> Picture:
    """Returns `overlay` of an image and the `heat_map` of its map, in little more memory."""
    blended = np.empty(image.shape, np.uint8)
    for rows in strips(*values.shape):
        blended[rows] = overlay(image[rows], heat_map(values[rows], limit))
    return blended


def strips(height: int, width: int) -> Iterator[slice]:
    """Yields the rows of an image, about a million pixels at a time.

    The temporary arrays of a large image would take twenty times its own memory.
    """
    step = max(1, _STRIP // width)
    for top in range(0, height, step):
        yield slice(top, min(top + step, height))


def grid(rows: Sequence[Sequence[UInt8[np.ndarray, "_ _ 3"]]]) -> Picture:
    """Puts pictures into one, row by row, in cells of the size of the largest picture.

    Raises:
      ValueError: there is no picture.
    """
    height = max(picture.shape[0] for row in rows for picture in row)
    width = max(picture.shape[1] for row in rows for picture in row)
    columns = max(len(row) for row in rows)
    shape = (len(rows) * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3)
    canvas = np.full(shape, 255, np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top, left = i * (height + GAP), j * (width + GAP)
            canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return canvas


def shrink(picture: Picture, side: int) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Shrinks a picture in proportion to at most `side` pixels; a smaller one stays as it is."""
    from PIL import Image

    return np.asarray(Image.fromarray(picture).resize(_size(picture, side), Image.Resampling.BOX))


def shrink_map(values: Float[np.ndarray, "h w"], side: int) -> Float32[np.ndarray, "h2 w2"]:
    """Shrinks a map in the same way, in float32, so that no small value is rounded away."""
    from PIL import Image

    image = Image.fromarray(values.astype(np.float32))
    # The box filter averages just the pixels under a thumbnail's pixel, with positive weights. A
    # single positive value therefore stays positive.
    return np.asarray(image.resize(_size(values, side), Image.Resampling.BOX))


def _size(array: np.ndarray, side: int) -> tuple[int, int]:
    height, width = array.shape[:2]
    factor = min(1.0, side / max(height, width))
    return max(1, round(width * factor)), max(1, round(height * factor))


def encode(
    picture: Shaped[np.ndarray, "h w *c"], image_format: str = "png", **options: Any
) -> bytes:
    """Returns the content of an image file.

    Args:
      picture: uint8 (h, w, 3), (h, w, 4) with opacity or (h, w), or a bool mask (h, w), which
        becomes 0 and 255.
      image_format: "png" or "jpeg", or another name that Pillow knows.
      **options: those of Pillow's `Image.save`.
    """
    from PIL import Image

    buffer = io.BytesIO()
    levels = picture * np.uint8(255) if picture.dtype == bool else picture
    Image.fromarray(levels).save(buffer, image_format, **options)
    return buffer.getvalue()


def save_png(path: AnyPath, picture: Shaped[np.ndarray, "h w *c"]) -> None:
    """Writes a picture or mask as a PNG file, at once or not at all."""
    write_atomically(path, encode(picture))
