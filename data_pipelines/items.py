"""The form in which every source returns its images: named, encoded, read on demand."""

import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

GOOD = "good"


class Item(NamedTuple):
    """One image of a split, not yet read.

    Attributes:
      name: posix path inside the split, unique, for example "crack/003.png".
      image: returns the encoded file (PNG, JPEG, …) as bytes.
      type: "good" for a normal image, else the name of its defect type.
      mask: returns the encoded mask (see `decode.read_mask`); None for a normal image and in a
        source without masks.
      origin: the file's path or the record's name, for error messages.
      content: identifies what a drawn image shows, because its encoded bytes depend on the version
        of the encoder; "" for an image that is stored as it is.
      group: training images of one group are held out together where holdout_groups="auto"; ""
        if the source knows no group of this image.
      held_out: the source holds this training image out. Where it does so for any, it does for
        all that are held out.
    """

    name: str
    image: Callable[[], bytes]
    type: str
    mask: Callable[[], bytes] | None
    origin: str
    content: str = ""
    group: str = ""
    held_out: bool = False


def read_file(path: Path) -> bytes:
    """Returns the content of a regular file.

    Raises:
      OSError: it cannot be read, or is a pipe or a device, whose reading might never end.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError("neither a file nor a folder")
    return path.read_bytes()  # a folder raises the error that says so
