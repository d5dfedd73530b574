"""W/parameters.npz: the parameters of a packed model, without optimizer and checkpoints.

The format is that of `archive`. Every array has the name of its path in the tree of parameters, for
example `params/encoder_0/Conv_0/kernel`; `step` is the number of updates.
"""

from typing import Any

import jax
import numpy as np

from data_pipelines.errors import BadInput, first_line
from pae_jax.workdir import archive
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
    leaves = {name: np.asarray(leaf) for name, leaf in archive.by_name(params).items()}
    content = archive.encode({_STEP: np.asarray(step)} | leaves)
    write_atomically(folder / NAME, content)
    return len(content)


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
        arrays = archive.decode(path.read_bytes())
    except Exception as error:  # zip, numpy and the drivers of buckets raise many types
        raise BadInput(f"{path}: cannot be read ({first_line(error, 120)})") from error
    leaves = archive.by_name(template)
    expected = {_STEP, *leaves}
    if different := sorted(expected ^ arrays.keys()):
        kind = "lacks" if different[0] in expected else "has"
        raise BadInput(
            f"{path}: {kind} the array {different[0]}, unlike a model of its config.json; pack the "
            "model again"
        )
    for name, leaf in leaves.items():
        array = arrays[name]
        if (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
            raise BadInput(
                f"{path}: {name} is {array.dtype}{list(array.shape)}, and by config.json "
                f"{leaf.dtype}{list(leaf.shape)}; pack the model again"
            )
    values = [arrays[name] for name in leaves]
    return int(arrays[_STEP]), jax.tree.unflatten(jax.tree.structure(template), values)
