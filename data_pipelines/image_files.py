"""The image files below a folder.

A file counts as an image by its suffix, in lower or upper case: every suffix that the installed
Pillow reads (and its plugins, such as pillow-heif, if the program has registered them), except
those of `NO_IMAGES`. Folders may be nested. Linked folders are followed, each real folder once.
Hidden files and folders, whose names begin with a dot, are left out. All that is left out is
counted by its reason.
"""

import functools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from data_pipelines import errors
from data_pipelines.errors import BadInput

_DOCUMENTS = ("EPS", "PDF", "PSD", "WMF", "XBM", "XPM")
_FILMS = ("FLI", "MPEG")
_ICONS = ("CUR", "GBR", "ICNS", "ICO")
# Formats that Pillow only names, or hands to other programs.
_STUBS = ("BUFR", "GRIB", "HDF5", "IPTC")
NO_IMAGES = frozenset((*_DOCUMENTS, *_FILMS, *_ICONS, *_STUBS))
_SHOWN_REASONS = 6


class LeftOut:
    """Counts what is left out below a folder."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._reasons: Counter[str] = Counter()

    def add(self, reason: str) -> None:
        """Counts one entry."""
        self._reasons[reason] += 1

    def warn(self) -> None:
        """Tells the numbers in one line, if there are any."""
        total, shown = self._reasons.total(), self._reasons.most_common(_SHOWN_REASONS)
        if total:
            reasons = [f"{number} {reason}" for reason, number in shown]
            if others := total - sum(number for _, number in shown):
                reasons.append(f"{others} for other reasons")
            errors.warn(f"{self._folder}: {total} left out: {', '.join(reasons)}")


def image_files(directory: Path, is_result: Callable[[Path], bool] = lambda _: False) -> list[Path]:
    """Returns all image files under `directory`, sorted by posix path, without hidden ones.

    Args:
      directory: the folder.
      is_result: tells of a folder below it whether its images are results, and no images to read.

    Raises:
      BadInput: the directory is missing, cannot be listed, or holds no image.
    """
    left_out = LeftOut(directory)
    try:
        return find_images(directory, left_out, is_result)
    finally:
        left_out.warn()


def find_images(
    directory: Path, left_out: LeftOut, is_result: Callable[[Path], bool] = lambda _: False
) -> list[Path]:
    """Does what `image_files` does, and counts in `left_out` what is left out."""
    images = images_below(directory, left_out, is_result)
    if not images:
        raise BadInput(f"{directory}: no images in this folder")
    return images


def images_below(
    directory: Path, left_out: LeftOut, is_result: Callable[[Path], bool]
) -> list[Path]:
    """Does what `find_images` does, and returns nothing where there is no image."""
    above = {_identity(path) for path in directory.resolve().parents}
    seen: set[tuple[int, int]] = set()
    images: list[Path] = []
    folders, links = [directory], []
    # Links are followed after all real folders, so that an image has its real path if it has one.
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        identity = _identity(folder)
        # A folder above would bring other images, for example those of the test split.
        if identity in seen or identity in above:
            left_out.add("link to a folder that is read already, or to one above")
            continue
        seen.add(identity)
        if folder != directory and is_result(folder):
            left_out.add("folder of results")
            continue
        files, subfolders = list_folder(folder)
        for path in files + subfolders:
            # An entry with an image's suffix counts as an image even if it is no regular file:
            # reading it fails later with an error that names it.
            if path.name[0] == ".":
                left_out.add("hidden")
            elif is_image(path.name):
                images.append(path)
            elif path.is_dir():
                (links if path.is_symlink() else folders).append(path)
            else:
                left_out.add(_reason(path))
    return sorted(images, key=lambda path: path.relative_to(directory).as_posix())


def list_folder(directory: Path) -> tuple[list[Path], list[Path]]:
    """Returns the files and the folders in a folder, sorted by name; links by their target.

    Raises:
      BadInput: the directory is missing or cannot be listed.
    """
    try:
        with os.scandir(directory) as entries:
            kinds = sorted((entry.name, _is_folder(entry)) for entry in entries)
    except OSError as error:
        raise BadInput(f"{directory}: {error.strerror or error}") from error
    files = [directory / name for name, is_folder in kinds if not is_folder]
    return files, [directory / name for name, is_folder in kinds if is_folder]


def is_image(name: str) -> bool:
    """Returns whether a name is that of an image file."""
    return name[0] != "." and os.path.splitext(name)[1].lower() in suffixes()


@functools.cache
def suffixes() -> frozenset[str]:
    """Returns the suffixes of image files, in lower case."""
    registered = Image.registered_extensions()
    return frozenset(
        suffix
        for suffix, name in registered.items()
        # Pillow opens an MPO, a JPEG with a preview behind it, as a JPEG.
        if (name in Image.OPEN or name == "MPO") and name not in NO_IMAGES
    )


def _is_folder(entry: os.DirEntry) -> bool:
    # An entry's own method raises for a link to itself, and the other takes a call of the system.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _reason(path: Path) -> str:
    if not path.exists():
        return "broken link"
    suffix = path.suffix.lower()
    return f"{suffix} (no image)" if suffix else "without a suffix"


def _identity(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from error
    return stat.st_dev, stat.st_ino
