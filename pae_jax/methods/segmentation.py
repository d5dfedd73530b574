"""Segmentation: the U-Net says where the corruption is."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pae_jax import anomaly_map, unet
from pae_jax.config import Config
from pae_jax.corruption import CorruptedBatch
from pae_jax.masks import VISIBLE
from pae_jax.methods.method import Images, Method, PerImage
from pae_jax.methods.projection import init_network


def _probability(params: Any, x: Images, config: Config) -> Float[Array, "b h w"]:
    model = dataclasses.replace(config.model, output="sigmoid")
    return jnp.mean(unet.bind(model, params)(x), axis=-1)


def segmentation_loss(
    params: Any, batch: CorruptedBatch, keys: Array, config: Config, step: Any
) -> tuple[PerImage, dict[str, Array]]:
    """Binary cross-entropy of M > 0.1, mean over the pixels, plus the soft Dice loss."""
    del keys, step
    probability = _probability(params, batch.corrupted, config)
    target = (batch.mask[..., 0] > VISIBLE).astype(probability.dtype)
    p = jnp.clip(probability, 1e-6, 1 - 1e-6)
    entropy = -jnp.mean(target * jnp.log(p) + (1 - target) * jnp.log1p(-p), axis=(1, 2))
    overlap = jnp.sum(probability * target, axis=(1, 2))
    total = jnp.sum(probability + target, axis=(1, 2))
    dice = 1 - (2 * overlap + 1) / (total + 1)
    return entropy + dice, {"cross_entropy": entropy, "dice": dice}


def segmentation_map(params: Any, x: Images, config: Config) -> tuple[None, Float[Array, "b h w"]]:
    """The probability of a corruption, smoothed as other maps are."""
    return None, anomaly_map.smooth_map(_probability(params, x, config), config.eval)


METHOD = Method(init=init_network, loss=segmentation_loss, anomaly_map=segmentation_map)
