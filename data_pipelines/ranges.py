"""The range of the files of a data set with more than 8 bits; `value_range` states the rule."""

from collections.abc import Sequence

import numpy as np

from data_pipelines import decode, value_range
from data_pipelines.cache import cached, content_key
from data_pipelines.checks import File
from data_pipelines.errors import inform, warn
from data_pipelines.spec import DatasetSpec
from data_pipelines.value_range import Range


def training_range(spec: DatasetSpec, files: Sequence[File]) -> Range | None:
    """Returns the range of the training images of more than 8 bits; None if there are none."""
    setting, pairs = value_range.parse(spec.value_range), extrema(spec, files)
    if not pairs:
        return None
    values = setting or _choose_range(files, pairs)
    inform(
        f"data.value_range={spec.value_range}: values {values[0]:.10g} to {values[1]:.10g} of "
        f"{len(pairs)} training images become 0 to 255"
    )
    return values


def test_range(
    files: Sequence[File], pairs: dict[int, Range], setting: str, trained: Range | None
) -> Range | None:
    """Returns the range of test or new images, and tells what it clips.

    Args:
      files: all images.
      pairs: smallest and largest value, by index, of those of more than 8 bits.
      setting: `data.value_range`.
      trained: the range of the training images.
    """
    if not pairs:
        return None
    values = trained or value_range.parse(setting)
    if values is None:
        values = _choose_range(files, pairs)
        first = files[next(iter(pairs))].origin
        warn(
            f"{first}: more than 8 bits, as {len(pairs)} images here, unlike the training "
            f"images; their values {values[0]:.10g} to {values[1]:.10g} become 0 to 255; "
            "data.value_range sets it for a new run"
        )
    outside = [i for i, pair in pairs.items() if is_outside(pair, values)]
    if outside:
        warn_of_clipping(len(outside), files[outside[0]].origin, pairs[outside[0]], values)
    return values


def is_outside(extrema: Range, values: Range) -> bool:
    """Returns whether an image with these extrema is clipped."""
    return extrema[0] < values[0] or extrema[1] > values[1]


def warn_of_clipping(number: int, origin: str, extrema: Range, values: Range) -> None:
    """Warns of images with values outside the range.

    Args:
      number: how many there are.
      origin: the first of them.
      extrema: its smallest and its largest value.
      values: the range.
    """
    (least, most), (low, high) = extrema, values
    warn(
        f"{number} images have values outside {low:.10g} to {high:.10g}, the range of the training "
        f"images, and are clipped (first: {origin}, {least:.10g} to {most:.10g})"
    )


def _choose_range(files: Sequence[File], pairs: dict[int, Range]) -> Range:
    """Returns the range that `value_range.choose` takes for the files of `pairs`."""
    deep = [files[i] for i in pairs]
    return value_range.choose(
        list(pairs.values()),
        [file.kind == decode.FLOAT for file in deep],
        [file.origin for file in deep],
    )


def deep_files(files: Sequence[File]) -> dict[int, File]:
    """Returns the files of more than 8 bits by index."""
    return {i: file for i, file in enumerate(files) if file.kind in (decode.INTEGER, decode.FLOAT)}


def extrema(spec: DatasetSpec, files: Sequence[File]) -> dict[int, Range]:
    """Returns the extrema of the files of more than 8 bits by index, from the cache."""
    deep = deep_files(files)
    if not deep:
        return {}
    found = list(deep.values())

    def row(i: int) -> np.ndarray:
        return np.array(value_extrema(found[i])).view(np.uint8)

    key = content_key("extrema", decode.VERSION, [file.digest for file in found])
    shape = (len(found), 16)  # two float64, because the cache holds bytes
    rows = cached(spec.cache_dir, key, [shape], lambda: (shape, row))
    pairs = np.ascontiguousarray(rows).view(np.float64).tolist()
    return {i: (low, high) for i, (low, high) in zip(deep, pairs, strict=True)}


def value_extrema(file: File) -> Range:
    """Returns the smallest and the largest value of one file; see `decode.value_extrema`."""
    return decode.value_extrema(decode.read_encoded(file.read, file.origin), file.origin)
