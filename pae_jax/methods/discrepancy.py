"""The paper's f with a learned discrepancy: a second network g reads Δ from x, f(x) and x − f(x).

f is trained by eq. 1 and its penalties, as in `projection`. g is trained beside it to find the
pixels that the corruption changed; no gradient of its loss reaches f. With `eval.anomaly_map` =
"learned" the anomaly map is the probability that g gives to each pixel, with "logit" its logit, and
with the other names it is the paper's Δ(x, f(x)).
DRAEM (arXiv 2108.07610) introduced the second network; this g is small, sees the residual as well,
and learns from targets that follow the visible change.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Key

from pae_jax import anomaly_map, image_ops, objective, projection, rng, unet
from pae_jax.config import Config, ModelConfig
from pae_jax.config_schema import LEARNED_MAPS
from pae_jax.corruption import CorruptedBatch, Examples, Pair
from pae_jax.methods.method import Images, Method, PerImage
from pae_jax.methods.projection import bind_network, init_network
from pae_jax.objective import Hyperparameters

# The change is averaged over 5×5 pixels, so that grain does not cut holes into the target.
_WINDOW = np.ones(5) / 5
_SLOPE = 3.0  # grey levels


def init_discrepancy(config: Config, key: Key[Array, ""]) -> dict[str, Any]:
    """Returns random parameters of f and g."""
    example = jnp.zeros((1, *config.data.train_shape, 3 * image_ops.CHANNELS))
    g = unet.UNet(head_model(config), outputs=1).init(rng.stream_key(key, "head"), example)
    return {"f": init_network(config, key), "g": g}


def head_model(config: Config) -> ModelConfig:
    """Returns the architecture of g."""
    head, model = config.head, config.model
    return ModelConfig(
        patch_size=head.patch_size,
        widths=head.widths,
        bottleneck_layers=1,
        branch_width=head.widths[0],
        dilation_rates=head.dilation_rates,
        dilated_kernel_size=3,
        norm="group",
        output="logit",
        dtype=model.dtype,
        precision=model.precision,
        remat=model.remat,
    )


def head_logit(
    params: Any, x: Images, reconstruction: Images, config: Config
) -> Float[Array, "b h w"]:
    """Returns g([x, f(x), x − f(x)]), the logit that a pixel was changed.

    g is applied to windows of the size of its training images: its group norm takes the statistics
    of all that it sees, and those of a whole image are not those of a crop.
    """
    model = head_model(config)

    def g(pair: Array) -> Array:
        with unet.product_precision(model):
            logit: Any = unet.UNet(model, outputs=1).apply(params["g"], pair)
        return logit[..., 0]

    pair = jnp.concatenate([x, reconstruction, x - reconstruction], axis=-1)
    return image_ops.apply_in_windows(g, pair, config.data.train_shape)


def head_target(batch: CorruptedBatch, changed: float) -> Float[Array, "b h w"]:
    """Returns the probability in [0, 1] that g should assign to each pixel.

    It is 0 outside the mask and 1/(1 + exp(−(d − changed)/3)) inside, where d is the change
    |x̂ − x| in grey levels, averaged over channels and 5×5 pixels.
    """
    change = 255 * jnp.mean(jnp.abs(batch.corrupted - batch.clean), axis=-1)
    visible = nn.sigmoid((image_ops.filter_axes(change, _WINDOW) - changed) / _SLOPE)
    return jnp.where(batch.mask[..., 0] > 0, visible, 0.0)


def head_loss(
    logit: Float[Array, "b h w"], target: Float[Array, "b h w"], gamma: float
) -> PerImage:
    """Returns the mean of |p − t|^γ · cross-entropy(p, t), plus half the mean of |p − t|.

    The first term is the focal loss (arXiv 1708.02002) for targets between 0 and 1: its minimum
    is at p = t. Pixels that are already right, by far the most, do not dominate it.
    """
    distance = jnp.abs(nn.sigmoid(logit) - target)
    entropy = optax.sigmoid_binary_cross_entropy(logit, target)
    # |p − t|^γ has no derivative at 0 for γ < 1, and is a weight only.
    weight = jax.lax.stop_gradient(distance) ** gamma
    return jnp.mean(weight * entropy + distance / 2, axis=(1, 2))


def discrepancy_loss(
    params: Any,
    batch: Examples,
    keys: Array,
    config: Config,
    step: Any,
    *,
    hyperparameters: Hyperparameters | None = None,
) -> tuple[PerImage, dict[str, Array]]:
    """Returns the objective of f plus the loss of g on the reconstructions of f.

    Of a pair, f is trained on the first examples and g on the second. An f reconstructs images
    that it was trained on better than others, and g must not take that difference for a defect.
    """
    f = bind_discrepancy(params, config)
    own, shown = batch if isinstance(batch, Pair) else (batch, batch)
    value = objective.objective(f, own, keys, config.objective, step, weights=hyperparameters)
    reconstruction = value.reconstruction if shown is own else f(shown.corrupted)
    # g must not make f worse so that its own task becomes easier.
    reconstruction = jax.lax.stop_gradient(reconstruction)
    logit = head_logit(params, shown.corrupted, reconstruction, config)
    loss = head_loss(logit, head_target(shown, config.head.changed), config.head.focal_gamma)
    return value.loss + loss, {**value.terms, "head": loss}


def discrepancy_map(params: Any, x: Images, config: Config) -> tuple[Array, Array]:
    """Returns f(x) and the smoothed maps: of g, or the paper's Δ(x, f(x)), or several."""
    reconstruction = projection.project(bind_discrepancy(params, config), x, config.eval)
    # An f may leave [0, 1] by a little, as in `projection_map`; g has learned from such an f.
    clipped = jnp.clip(reconstruction, 0, 1)

    def compare(name: str) -> Array:
        if name not in LEARNED_MAPS:
            return anomaly_map.MAPS[name](x, clipped)
        logit = head_logit(params, x, reconstruction, config)
        return logit if name == "logit" else nn.sigmoid(logit)

    return clipped, anomaly_map.smoothed_maps(compare, config.eval)


def bind_discrepancy(params: Any, config: Config) -> Callable[[Array], Array]:
    """Returns f: images (b, h, w, 3) → images of the same shape."""
    return bind_network(params["f"], config)


def networks(config: Config) -> tuple[ModelConfig, ...]:
    """Returns the architecture of f, and that of g if the map is that of g."""
    learned = any(part.name in LEARNED_MAPS for part in config.eval.parts)
    return (config.model, head_model(config)) if learned else (config.model,)


METHOD = Method(
    init=init_discrepancy,
    loss=discrepancy_loss,
    anomaly_map=discrepancy_map,
    reconstruct=bind_discrepancy,
    networks=networks,
    reserved_fraction=lambda config: config.head.reserved_fraction,
)
