"""The split of the training images into training and validation, by whole groups.

Photographs of one scene are near-copies: with one of them in the training set, the others say
nothing about unseen images. Therefore a whole group is held out or none of it. A rule defines
the groups:

    none         every image is a group
    number:GAP   images are sorted by the first number in the file name; a new group begins
                 where the number increases by more than GAP
    blocks:N     N contiguous blocks of the sorted names
    auto         for names such as num001810_exp3.jpg (scenes under several exposures) the first
                 of number:150 and number:0 under which no group holds more than four fifths
                 of the images; none for all others

A source may give the groups itself, and the images that are held out; see `held_out_items`.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np

from data_pipelines.errors import BadInput
from data_pipelines.items import Item

# `held_out_items` returns one of these as the rule if the source has given the choice.
GIVEN_GROUPS = "groups given by the data"
GIVEN_IMAGES = "images given by the data"

_EXPOSURES = re.compile(r"\D*\d+_exp\d+")


def groups(names: Sequence[str], rule: str) -> list[list[str]]:
    """Splits the names into groups, each sorted, by one of the rules above.

    Raises:
      BadInput: an unknown rule, or a name without a number under `number`.
    """
    names = sorted(names)
    method, _, argument = rule.partition(":")
    if rule == "auto":
        return groups(names, resolve(names, rule))
    if rule == "none":
        return [[name] for name in names]
    if method == "number" and argument.isdecimal():
        return _by_number(names, int(argument))
    if method == "blocks" and argument.isdecimal() and int(argument) >= 1:
        blocks = np.array_split(np.arange(len(names)), int(argument))
        return [[names[i] for i in block] for block in blocks if len(block)]
    raise BadInput(f"data.holdout_groups: auto, none, number:GAP or blocks:N, not {rule!r}")


def resolve(names: Sequence[str], rule: str) -> str:
    """Returns the rule that "auto" stands for with these names; any other rule as it is."""
    if rule != "auto":
        return rule
    if all(_EXPOSURES.fullmatch(_stem(name)) for name in names):
        for candidate in ("number:150", "number:0"):
            # One large group would leave nothing to train on, or next to nothing.
            if 5 * max(map(len, groups(names, candidate))) <= 4 * len(names):
                return candidate
    return "none"


def held_out_items(
    items: Sequence[Item], rule: str, *, fraction: float, seed: int
) -> tuple[set[str], str]:
    """Returns the names of the held-out images, and the rule by which they were chosen.

    The images that the source holds out take the place of any draw. Its groups take the place of
    the rule "auto"; an image without a group is one by itself.

    Raises:
      BadInput: see `held_out`.
    """
    if given := {item.name for item in items if item.held_out}:
        return given, GIVEN_IMAGES
    name_groups, rule = _groups_of_items(items, rule)
    return _draw(name_groups, rule, fraction, seed), rule


def reserved_items(
    items: Sequence[Item], rule: str, held_out_names: set[str], *, fraction: float, seed: int
) -> set[str]:
    """Draws whole groups of the images that are not held out, for a second network.

    At least one group is drawn, and at least one remains.

    Raises:
      BadInput: an unknown rule, or a rule under which all these images are one group.
    """
    name_groups, rule = _groups_of_items(items, rule)
    left = [[name for name in group if name not in held_out_names] for group in name_groups]
    left = [group for group in left if group]
    if len(left) < 2:
        raise BadInput(
            f"data.holdout_groups: under {rule!r} all images that are not held out are one group, "
            "and none would be left for the second network; set head.reserved_fraction=0, or "
            "another rule"
        )
    return _draw(left, rule, fraction, seed)


def _groups_of_items(items: Sequence[Item], rule: str) -> tuple[list[list[str]], str]:
    """Returns the groups of all items, and the rule that made them."""
    if rule == "auto" and any(item.group for item in items):
        by_group: dict[tuple[str, str], list[str]] = {}
        for item in sorted(items, key=lambda item: item.name):
            key = (item.group, "" if item.group else item.name)
            by_group.setdefault(key, []).append(item.name)
        return list(by_group.values()), GIVEN_GROUPS
    names = [item.name for item in items]
    rule = resolve(names, rule)
    return groups(names, rule), rule


def held_out(names: Sequence[str], rule: str, *, fraction: float, seed: int) -> set[str]:
    """Draws whole groups until they make up `fraction` of all names.

    At least one group is held out, and at least one remains for training.

    Returns:
      The names of the held-out images. They depend on the names, the rule, the fraction and the
      seed alone, on every machine and with every version of NumPy.

    Raises:
      BadInput: an unknown rule, or a rule under which all images are one group.
    """
    return _draw(groups(names, rule), rule, fraction, seed)


def _draw(name_groups: list[list[str]], rule: str, fraction: float, seed: int) -> set[str]:
    """Does what `held_out` does with groups, each of which is sorted."""
    count = sum(map(len, name_groups))
    if len(name_groups) < 2:
        raise BadInput(
            f"data.holdout_groups: under {rule!r} all {count} training images are one group, "
            "and none would be left to train on; auto or none serves"
        )

    # Groups are ordered by a hash, because the streams of random generators change between
    # versions and a resumed run must find the same images.
    def order(group: list[str]) -> bytes:
        name = f"{seed}/{group[0]}"
        # A name that is not UTF-8 is hashed by its own bytes.
        return hashlib.sha256(name.encode(errors="surrogateescape")).digest()

    drawn: set[str] = set()
    for group in sorted(name_groups, key=order)[:-1]:
        drawn.update(group)
        # Compared as a quotient, because a product would round up: 0.07 * 100 > 7.
        if len(drawn) / count >= fraction:
            break
    return drawn


def _by_number(names: Sequence[str], gap: int) -> list[list[str]]:
    """Begins a new group where the number in the name increases by more than `gap`."""
    name_groups: list[list[str]] = []
    last = 0
    for number, name in sorted((_number(name), name) for name in names):
        if not name_groups or number - last > gap:
            name_groups.append([])
        name_groups[-1].append(name)
        last = number
    return name_groups


def _number(name: str) -> int:
    match = re.search(r"\d+", _stem(name))
    if match is None:
        raise BadInput(f"data.holdout_groups: no number in the file name {name}")
    return int(match.group())


def _stem(name: str) -> str:
    return PurePosixPath(name).stem
