"""Deep SVDD (Ruff et al. 2018), one-class: normal images are mapped close to a centre."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Key

from pae_jax import image_ops, unet
from pae_jax.config import Config, ModelConfig
from pae_jax.corruption import CorruptedBatch
from pae_jax.methods.method import Images, Method, PerImage, Stored, image_level_map, map_stored


class Encoder(nn.Module):
    """The U-Net's encoder, then one dense layer: (b, h, w, c) → (b, dimensions).

    As published, without biases and with unbounded activations (leaky ReLU), since a network
    that can make a constant maps everything to the centre. Its batch norm is left out.
    """

    config: ModelConfig
    dimensions: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        y = image_ops.pad_to_multiple(x, config.patch_size * 2 ** len(config.widths))
        y = image_ops.space_to_depth(2 * y.astype(dtype) - 1, config.patch_size)
        options = {"use_bias": False, "dtype": dtype, "kernel_init": nn.initializers.he_normal()}
        for width in config.widths:
            for _ in range(config.convs_per_stage):
                y = nn.leaky_relu(nn.Conv(width, (3, 3), **options)(y), 0.1)
            y = unet.max_pool(y)
        y = nn.Dense(self.dimensions, **options)(y.reshape(len(y), -1))
        return y.astype(jnp.float32)


def encode(params: dict[str, Any], x: Images, config: Config) -> Float[Array, "b d"]:
    """φ(x)."""
    encoder = Encoder(config.model, config.baseline.svdd_dimensions)
    return cast(Array, encoder.apply(params["encoder"], x))


def init_svdd(config: Config, key: Key[Array, ""]) -> dict[str, Any]:
    """A random network; the centre is still to be fitted."""
    example = jnp.zeros((1, *config.data.shape, image_ops.CHANNELS))
    dimensions = config.baseline.svdd_dimensions
    encoder = Encoder(config.model, dimensions).init(key, example)
    return {"encoder": encoder, "centre": jnp.zeros(dimensions)}


def fit_svdd(params: dict[str, Any], images: Stored, config: Config) -> dict[str, Any]:
    """c = the mean output of the initial network, values near 0 moved to ±0.1.

    Published: a value that a network reaches with weights of 0 invites it to do so. The network
    is not pretrained as an autoencoder.
    """
    codes = map_stored(lambda x, params: encode(params, x, config), images, params)
    centre = codes.mean(axis=0, dtype=np.float64)
    centre = np.where(np.abs(centre) < 0.1, np.copysign(0.1, centre), centre)
    return {**params, "centre": centre.astype(np.float32)}


def svdd_distance(params: dict[str, Any], x: Images, config: Config) -> PerImage:
    """‖φ(x) − c‖²; the centre is not trained."""
    centre = jax.lax.stop_gradient(params["centre"])[None]
    return jnp.sum(jnp.square(encode(params, x, config) - centre), axis=1)


def svdd_loss(
    params: dict[str, Any], batch: CorruptedBatch, keys: Array, config: Config, step: Any
) -> tuple[PerImage, dict[str, Array]]:
    """‖φ(x) − c‖² of clean images; the published weight decay is left out."""
    del keys, step
    return svdd_distance(params, batch.clean, config), {}


def svdd_map(
    params: dict[str, Any], x: Images, config: Config
) -> tuple[None, Float[Array, "b 1 1"]]:
    """The distance to the centre in units of the centre's own length."""
    length = jnp.sum(jnp.square(params["centre"]))
    return None, image_level_map(svdd_distance(params, x, config) / length)


METHOD = Method(
    init=init_svdd,
    loss=svdd_loss,
    anomaly_map=svdd_map,
    fit=fit_svdd,
    pixels=False,
    whole=True,
)
