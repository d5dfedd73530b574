"""Collectives in the text (HLO) of a compiled program."""

import re
from typing import NamedTuple

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# "%NAME = SHAPE KIND(" or, of an operation in two halves, "%NAME = SHAPE KIND-start(".
_COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?\S+ = (.+?) ({'|'.join(COLLECTIVES)})(-start)?\(", re.M)
_LAYOUT = re.compile(r"\{[^{}]*\}|/\*.*?\*/")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """The operations of one kind in a program.

    Attributes:
      count: how many there are.
      bytes: the size of their results on one chip.
    """

    count: int
    bytes: int


def collectives(hlo: str) -> dict[str, Collective]:
    """Returns the collectives in the text of a compiled program, by kind.

    An operation that is split into a start and a done counts once. One in the body of a loop
    also counts once.
    """
    totals: dict[str, Collective] = {}
    for shape, kind, start in _COLLECTIVE.findall(hlo):
        # Layouts and comments hold commas and brackets that would be read as parts of the shape.
        arrays = _LAYOUT.sub("", shape)
        if start and kind in ("all-gather", "collective-permute"):
            # The start of these two returns (operands, results, …).
            arrays = _tuple_elements(arrays)[1]
        count, size = totals.get(kind, (0, 0))
        totals[kind] = Collective(count + 1, size + byte_size(arrays))
    return totals


def _tuple_elements(shape: str) -> list[str]:
    """Returns the elements of the outermost tuple of a shape without layouts."""
    depth, elements = 0, [""]
    for letter in shape.strip()[1:-1]:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and not depth:
            elements.append("")
        else:
            elements[-1] += letter
    return elements


def byte_size(shape: str) -> int:
    """Returns the bytes of all arrays in a shape without layouts."""
    total = 0
    for dtype, sides in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        for side in filter(None, sides.split(",")):
            bits *= int(side)
        # Rounded up, because some types have less than 8 bits.
        total += -(-bits // 8)
    return total
