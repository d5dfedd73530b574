"""The text of a compiled program: its collectives."""

import re
from typing import NamedTuple

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


_COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?\S+ = (.+?) ({'|'.join(KINDS)})(-start)?\(", re.M)


_LAYOUT = re.compile(r"\{[^{}]*\}|/\*.*?\*/")


_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """Operations of one kind in a program, and the bytes of their results on one chip."""

    count: int
    bytes: int


def collectives(hlo: str) -> dict[str, Collective]:
    """Counts the collectives in the text of a compiled program, by kind.

    One that is split into a start and an end counts once, one in the body of a loop too.
    """
    found: dict[str, Collective] = {}
    for result, kind, start in _COLLECTIVE.findall(hlo):
        arrays = _LAYOUT.sub("", result)
        if start and kind in ("all-gather", "collective-permute"):
            arrays = _elements(arrays)[1]  # (operands, results, …)
        before = found.get(kind, Collective(0, 0))
        found[kind] = Collective(before.count + 1, before.bytes + _bytes(arrays))
    return found


def _elements(text: str) -> list[str]:
    """The elements of the outermost tuple of an HLO shape without layouts."""
    depth, elements = 0, [""]
    for letter in text.strip()[1:-1]:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and not depth:
            elements.append("")
        else:
            elements[-1] += letter
    return elements


def _bytes(text: str) -> int:
    """Of all arrays in an HLO shape without layouts."""
    total = 0
    for kind, shape in _ARRAY.findall(text):
        bits = 8 if kind == "pred" else int(re.findall(r"\d+", kind)[0])
        for side in filter(None, shape.split(",")):
            bits *= int(side)
        total += -(-bits // 8)
    return total
