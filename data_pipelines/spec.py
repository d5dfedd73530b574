"""Which images a data set is made of, and how large they are."""

from typing import NamedTuple


class DatasetSpec(NamedTuple):
    """Which images, and how large.

    Attributes:
      source: a key of `SOURCES`.
      root: the source's folder; may be "" where the source needs none.
      category: one object or texture class; may be "".
      shape: (h, w) to which all images are resized.
      groups: the rule of `holdout` by which validation images are held out.
      cache: the folder of decoded arrays, or "" for `cache.default_cache()`.
    """

    source: str
    root: str
    category: str
    shape: tuple[int, int]
    groups: str
    cache: str
