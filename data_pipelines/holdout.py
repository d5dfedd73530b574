"""Which training images are held out for validation: whole groups, never single exposures.

Photographs of one scene are near-copies; one of them in the training set makes its twin
useless for validation. A rule names the groups:

    none         every image by itself
    number:GAP   sorted by the first number in the file name, a new group begins where the
                 number jumps by more than GAP
    blocks:N     N contiguous blocks of the sorted names
    auto         number:150 for names like num001810_exp3.jpg (scenes under several
                 exposures), none for all others
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np

from data_pipelines.errors import BadInput

_EXPOSURES = re.compile(r"\D*\d+_exp\d+")


def groups(names: Sequence[str], rule: str) -> list[list[str]]:
    """Splits the names into groups, each sorted, by one of the rules above.

    Raises:
      BadInput: an unknown rule, or a name without a number under `number`.
    """
    names = sorted(names)
    kind, _, argument = rule.partition(":")
    if rule == "auto":
        if all(_EXPOSURES.fullmatch(_stem(name)) for name in names):
            return groups(names, "number:150")
        return groups(names, "none")
    if rule == "none":
        return [[name] for name in names]
    if kind == "number" and argument.isdecimal():
        return _by_number(names, int(argument))
    if kind == "blocks" and argument.isdecimal() and int(argument) >= 1:
        blocks = np.array_split(np.arange(len(names)), int(argument))
        return [[names[i] for i in block] for block in blocks if len(block)]
    raise BadInput(f"data.holdout_groups: auto, none, number:GAP or blocks:N, not {rule!r}")


def held_out(names: Sequence[str], rule: str, *, share: float, seed: int) -> set[str]:
    """The names of whole groups, drawn until they make up `share` of all names.

    At least one group, never all. The draw depends on the seed and on each group's first name
    alone: the same on every machine and with every version of a random generator.
    """
    found = groups(names, rule)
    if len(found) < 2:
        raise BadInput(
            f"data.holdout_groups: under {rule!r} all {len(names)} training images are one group, "
            "and none would be left to train on"
        )

    def draw(group: list[str]) -> bytes:
        return hashlib.sha256(f"{seed}/{group[0]}".encode()).digest()

    chosen: set[str] = set()
    for group in sorted(found, key=draw)[:-1]:
        chosen.update(group)
        if len(chosen) / len(names) >= share:  # a product would round up: 0.07 * 100 > 7
            break
    return chosen


def _by_number(names: Sequence[str], gap: int) -> list[list[str]]:
    found: list[list[str]] = []
    last = 0
    for number, name in sorted((_number(name), name) for name in names):
        if not found or number - last > gap:
            found.append([])
        found[-1].append(name)
        last = number
    return found


def _number(name: str) -> int:
    match = re.search(r"\d+", _stem(name))
    if match is None:
        raise BadInput(f"data.holdout_groups: no number in the file name {name}")
    return int(match.group())


def _stem(name: str) -> str:
    return PurePosixPath(name).stem
