"""Images without labels, for prediction: which files they are, and each decoded by itself.

The place of the images is a folder, which is searched recursively; one file; a pattern such as
`shots/*.png`, in which `**` stands for folders of any depth; or a list. A list is a CSV file with a
column `image`, or a `.txt` file with one path a line. Its paths are relative to its folder.
"""

import functools
import glob
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipelines import checks, decode, ranges, value_range
from data_pipelines.cache import parallel
from data_pipelines.errors import BadInput
from data_pipelines.image_files import LeftOut, image_files, images_below, is_image
from data_pipelines.items import read_file
from data_pipelines.lists.table import read_csv
from data_pipelines.value_range import Range

LISTS = (".csv", ".txt")

_MAGIC = re.compile(r"[*?[]")


class NewImage(NamedTuple):
    """A file to be judged.

    Attributes:
      name: a posix path, unique among the images of one place.
      path: the file.
    """

    name: str
    path: Path


class Opened(NamedTuple):
    """A decoded image.

    Attributes:
      pixels: uint8 (h, w, channels).
      extrema: smallest and largest value of an image of more than 8 bits; None for another.
      frames: the number of frames in its file, of which the first is read.
    """

    pixels: np.ndarray
    extrema: Range | None
    frames: int


def list_images(place: str, is_result: Callable[[Path], bool] = lambda _: False) -> list[NewImage]:
    """Returns the images of a place, sorted by name; those of a list in its order.

    Args:
      place: a folder, a file, a pattern or a list.
      is_result: tells of a folder below the place whether its images are results, which are left
        out. An image that is named itself is never left out.

    Raises:
      BadInput: the place is missing or holds no image; a list names a file twice, or none that
        exists.
    """
    path = Path(place)
    if os.path.isdir(path):
        return _named(image_files(path, is_result), path)
    if os.path.isfile(path) and path.suffix.lower() in LISTS:
        files = _listed(path)
        return _named(files, Path(os.path.commonpath([file.parent for file in files])))
    try:
        os.stat(path)
    except (OSError, ValueError) as error:
        if _MAGIC.search(place):
            return _matching(place, is_result)
        raise BadInput(f"{place}: {getattr(error, 'strerror', None) or error}") from error
    return [NewImage(path.name, path)]


def _named(paths: Sequence[Path], folder: Path) -> list[NewImage]:
    return [NewImage(path.relative_to(folder).as_posix(), path) for path in paths]


def _matching(pattern: str, is_result: Callable[[Path], bool]) -> list[NewImage]:
    """Returns the images that match a pattern, and those in matching folders."""
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
    root = Path(*parts[:fixed])
    left_out = LeftOut(Path(pattern))
    is_result = functools.cache(is_result)
    found: set[Path] = set()
    for match in sorted(glob.glob(pattern, recursive=True)):
        path = Path(match)
        ends = range(fixed + 1, 1 + len(path.parts))
        folders = [root.joinpath(*path.parts[fixed:end]) for end in ends]
        if any(is_result(folder) for folder in folders if os.path.isdir(folder)):
            left_out.add("in a folder of results")
        elif not os.path.isdir(path):
            if is_image(path.name):
                found.add(path)
            else:
                left_out.add("no image")
        elif "**" not in parts:  # which lists what is in the folders, too
            found.update(images_below(path, left_out, is_result))
    left_out.warn()
    if not found:
        raise BadInput(f"{pattern}: matches no image; quote the pattern for the shell")
    return sorted(_named(list(found), root))


def _listed(path: Path) -> list[Path]:
    """Returns the files that a list names."""
    if path.suffix.lower() == ".csv":
        rows = [(number, row["image"]) for number, row in read_csv(path, ["image"])]
    else:
        try:
            text = os.fsdecode(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
        except OSError as error:
            raise BadInput(f"{path}: cannot be read ({error.strerror or error})") from error
        rows = list(enumerate(text.replace("\r\n", "\n").split("\n"), 1))
    seen: dict[Path, int] = {}
    for number, name in rows:
        if not name.strip():
            continue
        if "\0" in name:
            raise BadInput(f"{path}, line {number}: not the path of a file")
        file = Path(os.path.abspath(path.parent / name))
        if seen.setdefault(file, number) != number:
            raise BadInput(f"{path}, line {number}: {name} stands in line {seen[file]}, too")
    if not seen:
        raise BadInput(f"{path}: names no image")
    # One that is missing becomes a row with its error. If all are, the paths are meant otherwise.
    if not any(map(os.path.exists, seen)):
        raise BadInput(
            f"{path}: none of its {len(seen)} files exists (first: {next(iter(seen))}); paths are "
            "relative to the folder of the list"
        )
    return list(seen)


def common_range(images: Sequence[NewImage], setting: str, trained: Range | None) -> Range | None:
    """Returns the range of values of the images of more than 8 bits; see `value_range`.

    It is that of the training images, or the one that was set for the run. If the training images
    had 8 bits, it is chosen from all new images of more, and None if there are none. Only then the
    images are read before they are judged.

    Args:
      images: all images.
      setting: `data.value_range` of the run.
      trained: the range of the training images.

    Raises:
      BadInput: the values fit no range.
    """
    if values := trained or value_range.parse(setting):
        return values
    deep = list(parallel(decode.is_deep, [image.path for image in images], "reading"))
    pairs = [
        (functools.partial(read_file, image.path), str(image.path))
        for image, is_deep in zip(images, deep, strict=True)
        if is_deep
    ]

    def read(pair: tuple[Callable[[], bytes], str]) -> tuple[checks.File, Range] | None:
        try:
            file = checks.read_header(pair)
            return file, ranges.value_extrema(file)
        except BadInput:  # decoding it names the damage
            return None

    found = [entry for entry in parallel(read, pairs, "looking for the range") if entry]
    extrema = {i: pair for i, (_, pair) in enumerate(found)}
    return ranges.test_range([file for file, _ in found], extrema, setting, None)


def open_image(image: NewImage, channels: int, values: Range | None) -> Opened:
    """Reads and decodes one file, at its own size.

    Args:
      image: the file.
      channels: those of the training images.
      values: the range of values of `common_range`.

    Raises:
      BadInput: it cannot be read, or is no image.
    """
    origin = str(image.path)
    data = decode.read_encoded(functools.partial(read_file, image.path), origin)
    frames = decode.read_header(data, origin).frames
    return Opened(*decode.decode_picture(data, origin, channels, values), frames)


class Notes:
    """Collects what is to be told of images that are decoded one by one."""

    def __init__(self, values: Range | None):
        """Starts with no image; `values` is the range of values of `common_range`."""
        self._values = values
        self._levels = checks.Levels()
        self._total = self._several = self._clipped = 0
        self._first: tuple[str, int] | None = None
        self._first_clipped: tuple[str, Range] | None = None

    def add(self, origin: str, opened: Opened) -> None:
        """Adds an image, at the network's size, with the name of its file."""
        self._total += 1
        self._levels.add(opened.pixels, origin)
        if opened.frames > 1:
            self._several += 1
            self._first = self._first or (origin, opened.frames)
        if opened.extrema and self._values and ranges.is_outside(opened.extrema, self._values):
            self._clipped += 1
            self._first_clipped = self._first_clipped or (origin, opened.extrema)

    def warn(self) -> None:
        """Tells in one line each of further frames, clipped values and images without content."""
        if self._first:
            checks.warn_of_frames(*self._first, self._several, self._total)
        if self._first_clipped and self._values:
            ranges.warn_of_clipping(self._clipped, *self._first_clipped, self._values)
        self._levels.warn("new")
