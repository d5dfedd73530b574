"""The paper's method: a network f is trained by eq. 1 to undo corruptions.

At test time, the parts of an image that f changes are anomalous.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from pae_jax import anomaly_map, image_ops, objective, projection, unet
from pae_jax.config import Config
from pae_jax.corruption import CorruptedBatch
from pae_jax.methods.method import Method, PerImage
from pae_jax.objective import Hyperparameters

Bind = Callable[[Any, Config], Callable[[Array], Array]]  # (params, config) → f


def init_network(config: Config, key: Key[Array, ""]) -> Any:
    """Returns random parameters of the network `config.model`."""
    example = jnp.zeros((1, *config.data.train_shape, image_ops.CHANNELS))
    return unet.backbone(config.model).init(key, example)


def bind_network(params: Any, config: Config) -> Callable[[Array], Array]:
    """Returns the network as f: images (b, h, w, 3) → images of the same shape.

    With `data.foreground`, f leaves the background as it is, so that neither loss nor map nor any
    diagnostic sees what the network makes of it, and f stays a projection there.
    """
    f = unet.bind(config.model, params)
    # A Partial as well, for the same reason as in `unet.bind`.
    return jax.tree_util.Partial(_keep_background, f) if config.data.foreground else f


def _keep_background(f: Callable[[Array], Array], x: Array) -> Array:
    return jnp.where(image_ops.foreground(x), f(x), x)


def projection_loss(bind: Bind) -> Callable[..., tuple[PerImage, dict[str, Array]]]:
    """Returns `Method.loss` for an f: eq. 1 and the weighted penalties of `config.objective`."""

    def loss(
        params: Any,
        batch: CorruptedBatch,
        keys: Array,
        config: Config,
        step: Any,
        *,
        hyperparameters: Hyperparameters | None = None,
    ) -> tuple[PerImage, dict[str, Array]]:
        f = bind(params, config)
        value = objective.objective(f, batch, keys, config.objective, step, weights=hyperparameters)
        return value.loss, value.terms

    return loss


def projection_map(bind: Bind) -> Callable[[Any, Array, Config], tuple[Array, Array]]:
    """Returns `Method.anomaly_map` for an f: f(x̂) and the smoothed map Δ(x̂, f(x̂)) of §2.2."""

    def compare(params: Any, x: Array, config: Config) -> tuple[Array, Array]:
        # An f may leave [0, 1] by a little. Only here it is clipped, after its last application.
        reconstruction = jnp.clip(projection.project(bind(params, config), x, config.eval), 0, 1)
        return reconstruction, anomaly_map.smoothed_map(x, reconstruction, config.eval)

    return compare


METHOD = Method(
    init=init_network,
    loss=projection_loss(bind_network),
    anomaly_map=projection_map(bind_network),
    reconstruct=bind_network,
    networks=lambda config: (config.model,),
)
