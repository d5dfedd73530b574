"""Segmentation: the U-Net predicts the mask of the corruption.

It is the comparison of §3.3 of the paper and reproduces no other publication. The network is that
of the projection, trained on the same corruptions, with cross-entropy and the Dice loss.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float

from pae_jax import anomaly_map, unet
from pae_jax.config import Config
from pae_jax.corruption import CorruptedBatch
from pae_jax.masks import VISIBLE
from pae_jax.methods.method import Images, Method, PerImage
from pae_jax.methods.projection import init_network
from pae_jax.objective import Hyperparameters


def segmentation_logit(params: Any, x: Images, config: Config) -> Float[Array, "b h w"]:
    """Returns one logit per pixel: the mean over the output channels of the network.

    The network has the parameters of the projection's. Its last layer is linear, so this mean is
    one output channel whose weights are the mean of the three.
    """
    model = dataclasses.replace(config.model, output="logit")
    return jnp.mean(unet.bind(model, params)(x), axis=-1)


def segmentation_loss(
    params: Any,
    batch: CorruptedBatch,
    keys: Array,
    config: Config,
    step: Any,
    *,
    hyperparameters: Hyperparameters | None = None,
) -> tuple[PerImage, dict[str, Array]]:
    """Returns the binary cross-entropy of M > 0.1, averaged over pixels, plus the Dice loss."""
    del keys, step, hyperparameters
    logit = segmentation_logit(params, batch.corrupted, config)
    entropy, dice = region_losses(logit, (batch.mask[..., 0] > VISIBLE).astype(logit.dtype))
    return entropy + dice, {"cross_entropy": entropy, "dice": dice}


def region_losses(
    logit: Float[Array, "b h w"], target: Float[Array, "b h w"]
) -> tuple[PerImage, PerImage]:
    """Returns the binary cross-entropy, averaged over pixels, and the Dice loss.

    Args:
      logit: that a pixel belongs to the region.
      target: 1 in the region, 0 elsewhere.
    """
    # From the logit, because the logarithm of a probability that is rounded or clipped to 0 has
    # no gradient.
    entropy = jnp.mean(optax.sigmoid_binary_cross_entropy(logit, target), axis=(1, 2))
    probability = nn.sigmoid(logit)
    overlap = jnp.sum(probability * target, axis=(1, 2))
    total = jnp.sum(probability + target, axis=(1, 2))
    # The added 1 defines the quotient for an empty mask and an empty prediction.
    return entropy, 1 - (2 * overlap + 1) / (total + 1)


def segmentation_map(params: Any, x: Images, config: Config) -> tuple[None, Float[Array, "b h w"]]:
    """Returns the probability of a corruption at each pixel, smoothed as other maps are."""
    probability = nn.sigmoid(segmentation_logit(params, x, config))
    smoothed = anomaly_map.smooth(
        probability, config.eval.smoothing, config.eval.smoothing_fraction
    )
    return None, smoothed


METHOD = Method(
    init=init_network,
    loss=segmentation_loss,
    anomaly_map=segmentation_map,
    networks=lambda config: (config.model,),
)
