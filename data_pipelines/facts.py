"""Facts that an owner states in the config, as far as normal images show them.

What looks like a fact in a few images need not be one. So a hint names the key, and the owner
decides. Only `in_place` decides by itself, where `eval.calibration` is auto.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

# Parts that lie in place have a share of 0.97, cells of solar panels 0.6 to 0.8, parts that are
# turned at random and surfaces 0.3 (docs/log/detection.md).
_IN_PLACE = 0.9
# A circle that becomes an ellipse of this ratio of its axes is still taken for undistorted.
_DISTORTION = 1.25
# The images that are looked at, and the largest side at which they are.
_IMAGES, _SIDE = 64, 256
# The sides of a hint, which suit every shipped network.
_MULTIPLE = 16


def aspect_ratio(shapes: Sequence[tuple[int, int]]) -> float:
    """Returns the median ratio of width to height.

    Args:
      shapes: (h, w) of each image.
    """
    return math.exp(float(np.median([math.log(width / height) for height, width in shapes])))


def share_by_place(images: np.ndarray) -> float:
    """Returns the part of the grey values' variance that the place in the image explains.

    It is the variance of the mean image over that of all pixels, without what a mean of few images
    owes to chance. Each image has its own mean subtracted, because brightness is not a place.

    Args:
      images: uint8 (n, h, w, c).

    Returns:
      1 for equal images, about 0 for images that have nothing in common; 0 for constant ones and
      for a single image, which says nothing of others.
    """
    if len(images) < 2:
        return 0.0
    every = math.ceil(len(images) / _IMAGES)
    step = math.ceil(max(images.shape[1:3]) / _SIDE)
    values = images[::every, ::step, ::step].mean(axis=-1, dtype=np.float32)
    values -= values.mean(axis=(1, 2), keepdims=True)
    within = float(values.var(axis=0, ddof=1).mean())
    between = max(float(values.mean(axis=0).var()) - within / len(values), 0.0)
    return between / (between + within) if between else 0.0


def in_place(images: np.ndarray) -> bool:
    """Returns whether parts lie in the same place in each image; see `share_by_place`."""
    return share_by_place(images) > _IN_PLACE


def keeping_aspect(ratio: float, shape: tuple[int, int]) -> tuple[int, int]:
    """Returns (h, w) of about the area of `shape` and the given ratio, in multiples of 16.

    Args:
      ratio: width over height.
      shape: (h, w).
    """
    height = math.sqrt(shape[0] * shape[1] / ratio)
    return _to_multiple(height), _to_multiple(ratio * height)


def _to_multiple(side: float) -> int:
    return max(_MULTIPLE * round(side / _MULTIPLE), _MULTIPLE)


def hints(images: np.ndarray, ratio: float, *, grey: bool, by_position: bool) -> Iterator[str]:
    """Yields a line for each fact that the images show and the config does not state.

    Args:
      images: uint8 (n, h, w, c), the training images at the network's size; one channel
        where every file is grey.
      ratio: see `aspect_ratio`, of the files.
      grey: the config states that they are grey, or its method cannot use that.
      by_position: it states that they lie in place, or leaves that to `in_place`, or its method
        cannot use that.
    """
    height, width = images.shape[1:3]
    distortion = ratio * height / width
    if max(distortion, 1 / distortion) > _DISTORTION:
        better = keeping_aspect(ratio, (height, width))
        yield (
            f"the images are {ratio:.2f} times as wide as high (the median) and are resized to "
            f"{height} × {width} pixels; --config.data.height={better[0]} "
            f"--config.data.width={better[1]} would keep their shape"
        )
    if images.shape[-1] == 1 and not grey:
        yield "all images are grey; --config.model.grey=True keeps reconstructions grey"
    if not by_position and (share := share_by_place(images)) > _IN_PLACE:
        yield (
            f"the images look alike at each place ({100 * share:.0f} % of their variance); if the "
            "parts lie in place, --config.eval.calibration=position compares each place with "
            "itself, in training or later in pae evaluate"
        )
