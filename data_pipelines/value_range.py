"""The range of values that becomes 0…255, one for all images of a data set.

A file of more than 8 bits does not say which of its values is white: a camera of 12 bits stores
0…4095 in 16 bits, and other programs store 0…1 as floating-point numbers. Therefore the range is
taken from all training images together, kept in the data record of the run, and applied alike to
test images and to new ones. Images of 8 bits keep their values.

The range is 0…HIGH, where HIGH is the smallest of 1, 255, 1023, 4095, 16383 and 65535 that is not
below the largest value. Floating-point values may exceed it by 5 %, as interpolation does, and must
reach a quarter of 255 if they exceed 1. Values outside the range are clipped.
"""

import math
from collections.abc import Sequence

from data_pipelines.errors import BadInput

HIGHEST = (1, 255, 1023, 4095, 16383, 65535)
_TOLERANCE = 0.05
_ADVICE = "set data.value_range=LOW:HIGH, the values that become black and white"

Range = tuple[float, float]


def parse(text: str) -> Range | None:
    """Returns the range of `data.value_range`, None for "auto".

    Raises:
      BadInput: neither "auto" nor LOW:HIGH with LOW below HIGH.
    """
    if text == "auto":
        return None
    low, _, high = text.partition(":")
    try:
        values = float(low), float(high)
    except ValueError:
        values = (math.nan, math.nan)
    if not (all(map(math.isfinite, values)) and values[0] < values[1]):
        raise BadInput(f"data.value_range: auto or LOW:HIGH, for example 0:4095, not {text!r}")
    return values


def choose(extrema: Sequence[Range], floating: Sequence[bool], origins: Sequence[str]) -> Range:
    """Returns the range of a data set by the rule above.

    Args:
      extrema: the smallest and the largest value of each image.
      floating: whether each image has floating-point values.
      origins: the names of the files, for error messages.

    Raises:
      BadInput: the values fit no range, or floating-point numbers and integers are mixed.
    """
    if any(floating) and not all(floating):
        first, other = origins[floating.index(True)], origins[floating.index(False)]
        raise BadInput(
            f"{first}: floating-point values, while {other} has integers; store all images alike, "
            f"or {_ADVICE}"
        )
    low, high = min(low for low, _ in extrema), max(high for _, high in extrema)
    tolerance = _TOLERANCE if floating[0] else 0.0
    for step in HIGHEST:
        too_few = floating[0] and step > 1 and high < step / 4
        if -tolerance * step <= low and high <= (1 + tolerance) * step and not too_few:
            return 0.0, float(step)
    worst = [pair[0] for pair in extrema].index(low)
    if low >= 0:
        worst = [pair[1] for pair in extrema].index(high)
    raise BadInput(
        f"{origins[worst]}: values from {extrema[worst][0]:.10g} to {extrema[worst][1]:.10g}, "
        f"whose black and white are unknown; {_ADVICE}"
    )
