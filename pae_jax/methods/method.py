"""The interface of a method, and two helpers that several methods share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, UInt8

from pae_jax import image_ops
from pae_jax.config import Config


class Method(NamedTuple):
    """What distinguishes a method; all but `fit` are pure and traced.

    Attributes:
      init: (config, key) → parameters; their shapes depend on the config alone.
      loss: (params, examples, keys (b,), config, step) → the value to be averaged, (b,), and its
        terms by name, (b,) each.
      anomaly_map: (params, images (b, h, w, 3) in [0, 1], config) → a reconstruction of the images,
        or None, and maps (b, h, w) in [0, 1], or (b, 1, 1) with one value for the whole image.
      reconstruct: (params, config) → f, if there is a function from images to images that may
        be judged as a projection; else None, and there are no diagnostics.
      fit: (params, stored images (n, h, w, c), config) → parameters, on the host, once before
        the first step; None where nothing is taken from the images in this way.
      pixels: whether the maps tell pixels apart; pixel metrics are undefined otherwise.
      whole: whether training and test images must have one size.
      closed_form: whether `fit` is all of the training, so that no step is taken.
      needs: a package of the extra "baselines" without which there is no `fit`.
    """

    init: Callable[[Config, Array], Any]
    loss: Callable[..., tuple[Array, dict[str, Array]]]
    anomaly_map: Callable[[Any, Array, Config], tuple[Array | None, Array]]
    reconstruct: Callable[[Any, Config], Callable[[Array], Array]] | None = None
    fit: Callable[[Any, Any, Config], Any] | None = None
    pixels: bool = True
    whole: bool = False
    closed_form: bool = False
    needs: str = ""


Images = Float[Array, "b h w 3"]


Stored = UInt8[np.ndarray, "n h w c"]


PerImage = Float[Array, " b"]


def map_stored(function: Callable[..., Array], images: Stored, params: Any = None) -> Any:
    """`function(x, params)` of stored images (n, h, w, c), in batches; (n, …) on the host."""
    run = jax.jit(lambda stored, params: function(image_ops.to_float(stored), params))
    size, parts = min(64, len(images)), []
    for start in range(0, len(images), size):
        rows = np.minimum(np.arange(start, start + size), len(images) - 1)
        parts.append(jax.device_get(run(images[rows], params))[: len(images) - start])
    return np.concatenate(parts)


def image_level_map(score: PerImage) -> Float[Array, "b 1 1"]:
    """Scores ≥ 0 → maps of one value in [0, 1), in the same order."""
    return (score / (1 + score))[:, None, None]
