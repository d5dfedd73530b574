"""The checks of opened files and decoded arrays, each of which warns in one line."""

import hashlib
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np

from data_pipelines import decode
from data_pipelines.cache import parallel
from data_pipelines.errors import BadInput, warn
from data_pipelines.spec import DatasetSpec

# Fewer grey levels than these say that the range of values was not understood.
_LEVELS = 32
# 16-bit colour that stays below this upper byte holds at most 14 bits.
_UPPER_BYTE = 64


class File(NamedTuple):
    """One encoded file whose header has been read, and which is not yet decoded."""

    read: Callable[[], bytes]
    origin: str
    digest: str
    size: int
    shape: tuple[int, int]
    kind: str
    frames: int


def read_headers(encoded: Sequence[tuple[Callable[[], bytes], str]]) -> list[File]:
    """Reads every file and its header, because most bad files show before any is decoded.

    Args:
      encoded: a function that reads the file, and its name, of each file.

    Raises:
      BadInput: a file cannot be read or is no image.
    """
    files = list(parallel(read_header, encoded, "reading"))
    check_frames(files)
    return files


def read_header(pair: tuple[Callable[[], bytes], str]) -> File:
    """Reads one file and its header.

    Args:
      pair: a function that reads the file, and its name.

    Raises:
      BadInput: it cannot be read or is no image.
    """
    read, origin = pair
    data = decode.read_encoded(read, origin)
    digest = hashlib.sha256(data).hexdigest()
    return File(read, origin, digest, len(data), *decode.read_header(data, origin))


def check_frames(files: Sequence[File]) -> None:
    """Warns of files with several frames."""
    several = [file for file in files if file.frames > 1]
    if several:
        warn_of_frames(several[0].origin, several[0].frames, len(several), len(files))


def warn_of_frames(origin: str, frames: int, several: int, total: int) -> None:
    """Warns of files with several frames.

    Args:
      origin: the first of them.
      frames: its number of frames.
      several: how many there are.
      total: the number of all files.
    """
    warn(
        f"{origin}: {frames} frames, of which only the first is read; {several} of {total} files "
        "have several"
    )


def check_levels(pixels: np.ndarray, files: Sequence[File], part: str) -> None:
    """Warns of images of a single value, and of a set with fewer than 32 levels.

    Args:
      pixels: uint8 (n, h, w, c).
      files: the n files.
      part: "training", "test" or "new", for the message.

    Raises:
      BadInput: 16-bit colour whose upper bytes are nearly empty.
    """
    levels = Levels()
    for image, file in zip(pixels, files, strict=True):
        levels.add(image, file.origin)
    upper = [file for file in files if file.kind == decode.UPPER_BYTE]
    if upper and part == "training" and not levels.bright:
        raise BadInput(
            f"{upper[0].origin}: colour of 16 bits, of which the upper 8 are read, and these are "
            f"at most {levels.seen.nonzero()[0].max()} in all images; convert them to 8 bits"
        )
    levels.warn(part)


class Levels:
    """The grey levels of a set of images, which are added one by one.

    Attributes:
      seen: bool (256,), the levels that occur; no more are looked for once there are enough.
    """

    def __init__(self):
        self.seen = np.zeros(256, bool)
        self._count = self._constant = 0
        self._first = self._first_constant = ""

    @property
    def bright(self) -> bool:
        """True if a level occurs that 14 bits stored in 16 do not reach."""
        return bool(self.seen[_UPPER_BYTE:].any())

    def add(self, image: np.ndarray, origin: str) -> None:
        """Adds an image, uint8 (h, w, c), with its name."""
        self._first = self._first or origin
        self._count += 1
        if _is_constant(image):
            self._first_constant = self._first_constant or f"{image.flat[0]}; first: {origin}"
            self._constant += 1
        if self.seen.sum() < _LEVELS or not self.bright:
            self.seen[image] = True

    def warn(self, part: str) -> None:
        """Warns of images of a single value, and of fewer than 32 levels in all; in one line."""
        faults = []
        if self._constant:
            faults.append(
                f"{self._constant} of {self._count} {part} images have a single value "
                f"({self._first_constant})"
            )
        if self._count and (levels := int(self.seen.sum())) < _LEVELS:
            faults.append(
                f"only {levels} of 256 levels occur in all {part} images (first: {self._first})"
            )
        if faults:
            warn(f"{' and '.join(faults)}; look at the images, and see data.value_range")


def check_equal_files(source: ModuleType, spec: DatasetSpec, files: Sequence[File]) -> None:
    """Warns of test images whose file is equal to that of a training image.

    Only the training files of the size of a test image are read.

    Args:
      source: the module that lists the training images.
      spec: the data set.
      files: the test images.
    """
    sizes = {file.size for file in files}
    if _file_size(files[0].origin) is None:  # records, whose listing would read them all
        return

    def digest(origin: str) -> tuple[str, str]:
        try:
            with open(origin, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest(), origin
        except OSError:
            return "", origin

    try:
        items = source.training_items(spec.root, spec.category)
    except BadInput:  # The training images may be elsewhere by now.
        return
    candidates = [item.origin for item in items if _file_size(item.origin) in sizes]
    training = dict(parallel(digest, candidates, "comparing"))
    equal = [(file.origin, training[file.digest]) for file in files if file.digest in training]
    if equal:
        warn(
            f"{equal[0][0]}: equal to the training image {equal[0][1]}, as {len(equal)} of "
            f"{len(files)} test images are to some; results on these say nothing of new images"
        )


def check_masks(masks: Sequence[File], facts: np.ndarray) -> np.ndarray:
    """Returns which masks mark a pixel; warns of empty ones and of those with several values.

    Args:
      masks: the n masks.
      facts: (n, 2), the number of the rule in `decode.MASK_RULES`, and 1 for any pixel.
    """
    texts = {
        "labels": "more than two values, all below 32: taken for numbers of classes, so that every "
        "one but 0 is anomalous",
        "half": "more than two values, as from soft edges or JPEG: anomalous is what is above half "
        "of a mask's largest value",
    }
    for rule, text in texts.items():
        those = np.flatnonzero(facts[:, 0] == decode.MASK_RULES.index(rule))
        if those.size:
            first = masks[those[0]].origin
            warn(f"{first}: {text} ({len(those)} of {len(masks)} masks)")
    empty = np.flatnonzero(facts[:, 1] == 0)
    if empty.size:
        warn(
            f"{masks[empty[0]].origin}: marks no pixel, as {len(empty)} of {len(masks)} masks; "
            "the pixels of these defective images are left out of the metrics of pixels"
        )
    return facts[:, 1] > 0


def check_small_masks(files: Sequence[File], lost: np.ndarray, shape: tuple[int, int]) -> None:
    """Warns of masks that mark no pixel at the network's size.

    Args:
      files: the n test images.
      lost: bool (n,).
      shape: (h, w), the network's size.
    """
    those = np.flatnonzero(lost)
    if those.size:
        warn(
            f"mask of {files[those[0]].origin}: marks no pixel at {shape[1]}×{shape[0]}, as "
            f"{len(those)} masks of too small defects; the pixels of these images are left out of "
            "the metrics of pixels; see data.size and eval.native_size"
        )


def _is_constant(image: np.ndarray) -> bool:
    """Returns whether all pixels are equal; most images are told by a few of them."""
    height, width = image.shape[:2]
    few = image[:: max(height // 8, 1), :: max(width // 8, 1)]
    return bool((few == few[0, 0]).all() and (image == image[0, 0]).all())


def _file_size(origin: str) -> int | None:
    """Returns the size of a file; None for a record that is no file."""
    try:
        return os.path.getsize(origin) if os.path.isfile(origin) else None
    except (OSError, ValueError):
        return None
