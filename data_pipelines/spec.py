"""The specification of a data set. It imports nothing heavy, because the config imports it."""

from typing import NamedTuple


class DatasetSpec(NamedTuple):
    """The images of a data set, and the size to which they are resized.

    Attributes:
      source: a key of `dataset.SOURCES`.
      root: the source's folder; may be "" where the source needs none.
      category: one object or texture class; may be "".
      shape: (h, w) to which all images are resized.
      holdout_groups: the rule of `holdout` that groups the images that are held out together.
      cache_dir: the folder of decoded arrays, or "" for `cache.default_cache()`.
      value_range: "auto", or "LOW:HIGH" of the values that become 0 and 255; it concerns images
        of more than 8 bits (see `value_range`).
    """

    source: str
    root: str
    category: str
    shape: tuple[int, int]
    holdout_groups: str
    cache_dir: str
    value_range: str = "auto"
