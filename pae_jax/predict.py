"""From images to anomaly maps and scores (§2.2): the compiled detector, and `pae predict`."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from pae_jax import anomaly_map, preprocess, projection
from pae_jax.config import Config, EvalConfig
from pae_jax.unet import UNet

SCORES = ("sum", "max", "topk")  # §2.2: summation, or alternatives less sensitive to extent


class Detection(NamedTuple):
    """What the model says of a batch of images.

    Attributes:
      reconstruction: (b, h, w, 3), f(x̂), fⁿ(x̂) or the fixed point, float32 in [0, 1].
      map: (b, h, w), the smoothed anomaly map Δ(x̂, ·), float32 in [0, 1].
      scores: image scores by name, each (b,).
    """

    reconstruction: Float[Array, "b h w 3"]
    map: Float[Array, "b h w"]
    scores: dict[str, Float[Array, " b"]]


def localise(
    f: Callable, x: Float[Array, "b h w 3"], config: EvalConfig
) -> tuple[Float[Array, "b h w 3"], Float[Array, "b h w"]]:
    """The reconstruction of x̂ and the smoothed map Δ(x̂, reconstruction) (§2.2)."""
    reconstruction = projection.project(f, x, config)
    maps = anomaly_map.MAPS[config.map](x, reconstruction)
    return reconstruction, anomaly_map.smooth(maps, config.smoothing, config.smoothing_share)


def detect(params: Any, images: Array, config: Config) -> Detection:
    """uint8 images (b, h, w, 1 or 3) → `Detection`; pure and jittable."""
    f = functools.partial(UNet(config.model).apply, params)
    reconstruction, maps = localise(f, preprocess.to_float(images), config.eval)
    scores = {
        kind: anomaly_map.image_score(maps, kind, config.eval.topk_share) for kind in SCORES
    }
    return Detection(reconstruction, maps, scores)


def detect_all(params: Any, images: np.ndarray, config: Config) -> Iterator[Detection]:
    """`detect` over uint8 images (n, h, w, c) in batches; yields numpy arrays, batch by batch.

    The last batch is filled up, so that the program compiles once, and cut again.
    """
    run = jax.jit(functools.partial(detect, config=config))
    size = min(config.eval.batch_size, len(images))
    for start in range(0, len(images), size):
        batch = np.asarray(images[start : start + size])
        count = len(batch)
        if count < size:
            batch = np.concatenate([batch, np.repeat(batch[-1:], size - count, axis=0)])
        yield jax.tree.map(lambda leaf, n=count: np.asarray(leaf)[:n], run(params, batch))
