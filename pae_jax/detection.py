"""What a method says of a batch of images (§2.2)."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from pae_jax import anomaly_map, projection
from pae_jax.config import EvalConfig

SCORES = ("sum", "max", "topk")  # §2.2: summation, or alternatives less sensitive to extent
VISIBLE = 0.1  # a pixel with M above this counts as anomalous where corruptions are to be found


class Detection(NamedTuple):
    """What the model says of a batch of images.

    Attributes:
      reconstruction: (b, h, w, 3), f(x̂), fⁿ(x̂) or the fixed point, float32 in [0, 1]; None where
        the method makes none.
      map: (b, h, w), the smoothed anomaly map Δ(x̂, ·), float32 in [0, 1].
      scores: image scores by name, each (b,).
    """

    reconstruction: Any
    map: Any
    scores: dict[str, Any]


def localise(
    f: Callable, x: Float[Array, "b h w 3"], config: EvalConfig
) -> tuple[Float[Array, "b h w 3"], Float[Array, "b h w"]]:
    """The reconstruction of x̂ and the smoothed map Δ(x̂, reconstruction) (§2.2)."""
    reconstruction = projection.project(f, x, config)
    return reconstruction, difference(x, reconstruction, config)


def difference(
    x: Float[Array, "b h w 3"], reconstruction: Float[Array, "b h w 3"], config: EvalConfig
) -> Float[Array, "b h w"]:
    """The smoothed map Δ(x̂, ·) of a reconstruction that is already there."""
    maps = anomaly_map.MAPS[config.map](x, reconstruction)
    return anomaly_map.smooth(maps, config.smoothing, config.smoothing_share)
