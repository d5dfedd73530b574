"""Images without labels, for prediction: a damaged file does not stop the others."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from data_pipelines import checks, ranges
from data_pipelines.cache import parallel
from data_pipelines.checks import File
from data_pipelines.dataset import decode_file
from data_pipelines.errors import BadInput
from data_pipelines.image_files import image_files
from data_pipelines.items import read_file
from data_pipelines.value_range import Range

S = TypeVar("S")
T = TypeVar("T")


class NewImages(NamedTuple):
    """Images without labels.

    Attributes:
      names: n names, posix paths inside the folder, sorted; of one file, its name.
      images: uint8 (m, h, w, c), those that can be decoded, in the order of their names.
      errors: a line for each name whose file cannot be decoded.
    """

    names: list[str]
    images: np.ndarray
    errors: dict[str, str]


def open_images(
    place: str,
    shape: tuple[int, int],
    channels: int,
    value_range: Range | None = None,
    setting: str = "auto",
) -> NewImages:
    """Opens one image or all images under a folder, for prediction, without a cache.

    Args:
      place: the file or the folder.
      shape: (h, w) to which all images are resized.
      channels: the number of channels of the training images.
      value_range: that of the training images.
      setting: `data.value_range` of the run.

    Raises:
      BadInput: the place is missing, or a folder without images.
    """
    root = Path(place)
    paths = [root] if root.is_file() else image_files(root)
    folder = root.parent if root.is_file() else root
    names = [path.relative_to(folder).as_posix() for path in paths]
    encoded = [(partial(read_file, path), str(path)) for path in paths]
    headers = _attempt(checks.read_header, encoded, "reading")
    files = [file for file in headers if isinstance(file, File)]
    checks.check_frames(files)
    deep = ranges.deep_files(files)
    least_and_most = _attempt(ranges.value_extrema, list(deep.values()), "looking for the range")
    extrema = {
        i: pair for i, pair in zip(deep, least_and_most, strict=True) if isinstance(pair, tuple)
    }
    values = ranges.test_range(files, extrema, setting, value_range)
    decode = partial(decode_file, shape=shape, channels=channels, values=values)
    decoded = _attempt(decode, files, "decoding")
    # A file whose header is good may be damaged further on.
    pairs = zip(files, decoded, strict=True)
    good = [(file, image) for file, image in pairs if not isinstance(image, BadInput)]
    images = np.zeros((0, *shape, channels), np.uint8)
    if good:
        images = np.stack([image for _, image in good])
        checks.check_levels(images, [file for file, _ in good], "new")
    rest = iter(decoded)
    results = [next(rest) if isinstance(header, File) else header for header in headers]
    errors = {n: str(r) for n, r in zip(names, results, strict=True) if isinstance(r, BadInput)}
    return NewImages(names, images, errors)


def _attempt(function: Callable[[S], T], items: Sequence[S], label: str) -> list[T | BadInput]:
    """Returns the result of the function for each item, or the error that it raised."""

    def attempt(item: S) -> T | BadInput:
        try:
            return function(item)
        except BadInput as error:
            return error

    return list(parallel(attempt, items, label))
