"""Checks that runs have the same test images; their size, order and place may differ."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.dataset import TestSplit, open_test
from data_pipelines.errors import BadInput, spell
from pae_jax.workdir.paths import AnyPath
from pae_jax.workdir.trained_model import Model


class Opened(NamedTuple):
    """The test images of a run, as its model takes them.

    Attributes:
      workdir: of the run.
      model: of the run.
      test: the images, in the order of the source.
    """

    workdir: AnyPath
    model: Model
    test: TestSplit


def open_run(workdir: AnyPath, model: Model) -> Opened:
    """Opens the test images of a run.

    Raises:
      BadInput: they cannot be read.
    """
    data = model.config.data
    test = open_test(data.spec, channels=model.channels, value_range=model.value_range)
    test = test._replace(names=[*map(spell, test.names)], types=[*map(spell, test.types)])
    return Opened(workdir, model, test)


def match(first: Opened, other: Opened) -> Sequence[int]:
    """Returns where the images of the first run stand among those of another run.

    Args:
      first: the run whose order and labels are taken.
      other: the other run. Images and masks are compared as the first run sees them.

    Raises:
      BadInput: the images differ; one line that names the first difference.
    """
    place = {name: i for i, name in enumerate(other.test.names)}
    refuse = functools.partial(_refuse, first, other)
    if absent := [name for name in first.test.names if name not in place]:
        refuse(f"{absent[0]} is missing")
    if extra := sorted({*place} - {*first.test.names}, key=other.test.names.index):
        refuse(f"{extra[0]} is there as well")
    seen = _as_seen_by(first, other)
    if (seen.masks is None) != (first.test.masks is None):
        refuse("they have no masks" if seen.masks is None else "they have masks")
    order = [place[name] for name in first.test.names]
    for i, (name, j) in enumerate(zip(first.test.names, order, strict=True)):
        if first.test.types[i] != other.test.types[j]:
            refuse(f"{name} is {other.test.types[j]}, not {first.test.types[i]}")
        # Native sizes first, because two sizes may look alike when they are shrunk.
        same_shape = first.test.native_shape(i) == seen.native_shape(j)
        if not same_shape or not np.array_equal(first.test.images[i], seen.images[j]):
            refuse(f"{name} is another image")
        if first.test.masks is None or seen.masks is None:
            continue
        if not np.array_equal(first.test.masks[i], seen.masks[j]):
            refuse(f"{name} has another mask")
    return order


def _as_seen_by(first: Opened, other: Opened) -> TestSplit:
    """Returns the images of the other run at the first run's size, channels and values."""
    ours, theirs = first.model, other.model
    settings = (ours.config.data.shape, ours.channels, ours.value_range)
    if settings == (theirs.config.data.shape, theirs.channels, theirs.value_range):
        return other.test
    spec = theirs.config.data.spec._replace(shape=ours.config.data.shape)
    return open_test(spec, channels=ours.channels, value_range=ours.value_range)


def _refuse(first: Opened, other: Opened, difference: str) -> None:
    raise BadInput(
        f"{other.workdir}: its test images are not those of {first.workdir}: {difference}; only "
        "runs with the same test images can be compared"
    )
