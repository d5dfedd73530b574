"""Numpy's archive of arrays, .npz: parameters, statistics and networks beside a model.

Numpy alone reads it, nothing in it can be executed (`allow_pickle=False`), and its checksums tell a
damaged file. Equal arrays give equal bytes.
"""

import io
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np


def encode(arrays: Mapping[str, Any]) -> bytes:
    """Returns the content of an archive of numbers and texts, by name."""
    buffer = io.BytesIO()
    # Nothing is pickled, because no array holds objects.
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def decode(content: bytes, required: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """Returns the arrays of an archive by name; a damaged one raises errors of many types.

    Args:
      content: that of the file.
      required: names that it must have; KeyError names the first that is missing.
    """
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        for name in required:
            if name not in file:
                raise KeyError(f"{name} is not a file in the archive")
        return {name: file[name] for name in file.files}


def by_name(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths, for example `params/encoder_0/Conv_0/kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
