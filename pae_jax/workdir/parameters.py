"""W/parameters.npz: the parameters of a packed model, without optimizer and checkpoints.

The format is numpy's archive of arrays, because numpy alone reads it, nothing in it can be executed
(`allow_pickle=False`), and its checksums tell a damaged file. Every array has the name of its path
in the tree of parameters, for example `params/encoder_0/Conv_0/kernel`; `step` is the number of
updates.
"""

import io
from typing import Any

import jax
import numpy as np

from data_pipelines.errors import BadInput, first_line
from pae_jax.workdir.files import write_atomically
from pae_jax.workdir.paths import AnyPath

NAME = "parameters.npz"
_STEP = "step"


def write(folder: AnyPath, params: Any, step: int) -> int:
    """Writes the file and returns its size in bytes.

    Args:
      folder: the folder of the packed model.
      params: the parameters for evaluation, a tree of arrays.
      step: the number of updates that they are the result of.

    Raises:
      CannotWrite: no space or no permission.
    """
    arrays: dict[str, Any] = {_STEP: np.asarray(step)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        arrays[_name(path)] = np.asarray(leaf)
    buffer = io.BytesIO()
    # Nothing is pickled, because all arrays hold numbers.
    np.savez_compressed(buffer, **arrays)
    write_atomically(folder / NAME, buffer.getvalue())
    return buffer.getbuffer().nbytes


def read(folder: AnyPath, template: Any) -> tuple[int, Any]:
    """Returns the number of updates and the parameters, numpy arrays in the tree of `template`.

    Args:
      folder: the folder of the packed model.
      template: a tree of the shapes and types of the arrays.

    Raises:
      BadInput: the file is damaged, or its arrays are not those of `template`.
    """
    path = folder / NAME
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # zip, numpy and the drivers of buckets raise many types
        raise BadInput(f"{path}: cannot be read ({first_line(error, 120)})") from error
    leaves, structure = jax.tree_util.tree_flatten_with_path(template)
    expected = {_STEP, *(_name(place) for place, _ in leaves)}
    if different := sorted(expected ^ arrays.keys()):
        kind = "lacks" if different[0] in expected else "has"
        raise BadInput(
            f"{path}: {kind} the array {different[0]}, unlike a model of its config.json; pack the "
            "model again"
        )
    for place, leaf in leaves:
        array = arrays[_name(place)]
        if (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
            raise BadInput(
                f"{path}: {_name(place)} is {array.dtype}{list(array.shape)}, and by config.json "
                f"{leaf.dtype}{list(leaf.shape)}; pack the model again"
            )
    values = [arrays[_name(place)] for place, _ in leaves]
    return int(arrays[_STEP]), jax.tree_util.tree_unflatten(structure, values)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
