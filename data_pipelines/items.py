"""The form in which every source returns its images: named, encoded, read on demand."""

from collections.abc import Callable
from typing import NamedTuple

GOOD = "good"


class Item(NamedTuple):
    """One image of a split, not yet read.

    Attributes:
      name: posix path inside the split, unique, for example "crack/003.png".
      image: returns the encoded file (PNG, JPEG, …) as bytes.
      type: "good" for a normal image, else the name of its defect type.
      mask: returns the encoded mask (non-zero = anomalous); None for a normal image and in a
        source without masks.
      origin: the file's path or the record's name, for error messages.
    """

    name: str
    image: Callable[[], bytes]
    type: str
    mask: Callable[[], bytes] | None
    origin: str
