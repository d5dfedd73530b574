"""What every source hands out: named, lazily read, encoded images."""

from collections.abc import Callable
from typing import NamedTuple

GOOD = "good"


class Item(NamedTuple):
    """One image of a split, not yet read.

    Attributes:
      name: posix path inside the split, unique, for example "crack/003.png".
      image: returns the encoded file (PNG, JPEG, …) as bytes.
      type: "good" for a normal image, else the name of its defect type.
      mask: returns the encoded mask (non-zero = anomalous), or None: a normal image, or a
        source without masks.
      origin: what an error message names: the file's path, or the record's name.
    """

    name: str
    image: Callable[[], bytes]
    type: str
    mask: Callable[[], bytes] | None
    origin: str
