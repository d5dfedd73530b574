"""The interface of a method, and two helpers that several methods share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from pae_jax import image_ops
from pae_jax.config import Config, ModelConfig

Images = Float[Array, "b h w 3"]
PerImage = Float[Array, " b"]
StoredImages = UInt8[np.ndarray, "n h w c"]


class Method(NamedTuple):
    """The functions and properties that distinguish a method.

    All functions but `fit` are pure and can be traced.

    Attributes:
      init: (config, key) → parameters; their shapes depend on the config alone.
      loss: (params, examples, keys (b,), config, step, *, hyperparameters=None) → the value to be
        averaged, (b,), and its terms by name, (b,) each. `hyperparameters` are traced if one
        program trains several runs; None takes the values of the config.
      anomaly_map: (params, images (b, h, w, 3) in [0, 1], config) → a reconstruction of the
        images in [0, 1], or None, and smoothed maps (b, h, w) in [0, 1]; (b, h, w, parts) if
        `eval.anomaly_map` names several; or (b, 1, 1) with one value per image.
      reconstruct: (params, config) → f, the function from images to images whose properties as a
        projection are measured; it may leave [0, 1] by a little. None if the method has no such
        function; then there are no diagnostics.
      fit: (params, stored images (n, h, w, c), config) → parameters, on the host, once before
        the first step. None if nothing is computed from the training images at once.
      networks: config → the networks through which an image passes to its map, one after another,
        if each value of the map follows from a neighbourhood in the image; then large images can
        be judged in tiles. None otherwise.
      reserved_fraction: config → the fraction of the training images, by whole groups, that f
        does not see. If it is not 0, the examples in training are a `corruption.Pair`.
      localises: True if the maps differ between pixels; otherwise pixel metrics are undefined.
      fixed_size: True if training and test images must have the same size.
      closed_form: True if `fit` is the whole training, so that no step is taken.
      requires: the name of a package of the extra "baselines" that `fit` imports; "" for none.
    """

    init: Callable[[Config, Array], Any]
    loss: Callable[..., tuple[Array, dict[str, Array]]]
    anomaly_map: Callable[[Any, Array, Config], tuple[Array | None, Array]]
    reconstruct: Callable[[Any, Config], Callable[[Array], Array]] | None = None
    fit: Callable[[Any, Any, Config], Any] | None = None
    networks: Callable[[Config], tuple[ModelConfig, ...]] | None = None
    reserved_fraction: Callable[[Config], float] = lambda config: 0.0
    localises: bool = True
    fixed_size: bool = False
    closed_form: bool = False
    requires: str = ""


def map_stored(function: Callable[..., Array], images: StoredImages, params: Any = None) -> Any:
    """Returns `function(x, params)` of all stored images, computed in batches.

    Args:
      function: (float images (b, h, w, 3), params) → an array with the batch as first axis.
      images: (n, h, w, c) uint8.
      params: passed to the function.

    Returns:
      (n, …) a numpy array.
    """
    # The parameters are an argument, because constants would be compiled into the program.
    run = jax.jit(lambda stored, params: function(image_ops.to_float(stored), params))
    size, parts = min(64, len(images)), []
    for start in range(0, len(images), size):
        # The last batch is padded with the last image, so that one compiled program serves all.
        rows = np.minimum(np.arange(start, start + size), len(images) - 1)
        parts.append(jax.device_get(run(images[rows], params))[: len(images) - start])
    return np.concatenate(parts)


def image_level_map(score: PerImage) -> Float[Array, "b 1 1"]:
    """Returns maps with one value in [0, 1) per image, in the order of the scores ≥ 0."""
    return (score / (1 + score))[:, None, None]
