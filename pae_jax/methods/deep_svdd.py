"""One-class Deep SVDD (Ruff et al. 2018): a network maps normal images close to a centre.

The pretraining as an autoencoder, batch norm and weight decay of the publication are left out.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Key

from pae_jax import image_ops, unet
from pae_jax.config import Config, ModelConfig
from pae_jax.corruption import CorruptedBatch
from pae_jax.methods.method import (
    Images,
    Method,
    PerImage,
    StoredImages,
    image_level_map,
    map_stored,
)
from pae_jax.objective import Hyperparameters


class Encoder(nn.Module):
    """The encoder of the U-Net and a dense layer: (b, h, w, c) → (b, dimensions).

    It has no biases and unbounded activations (leaky ReLU), as published, because a network that
    can output a constant would learn to map every image to the centre.
    """

    config: ModelConfig
    dimensions: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
        """Returns φ(x)."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        y = image_ops.pad_to_multiple(x, config.patch_size * 2 ** len(config.widths))
        # Centred, so that the first convolution starts from values of both signs.
        y = image_ops.space_to_depth(2 * y.astype(dtype) - 1, config.patch_size)
        options = {"use_bias": False, "dtype": dtype, "kernel_init": nn.initializers.he_normal()}
        for width in config.widths:
            for _ in range(config.convs_per_stage):
                y = nn.leaky_relu(nn.Conv(width, (3, 3), **options)(y), 0.1)
            y = unet.max_pool(y)
        y = nn.Dense(self.dimensions, **options)(y.reshape(y.shape[0], -1))
        # The distance to the centre is computed in float32, whatever the type of the activations.
        return y.astype(jnp.float32)


def encode(params: dict[str, Any], x: Images, config: Config) -> Float[Array, "b d"]:
    """Returns φ(x), the code of each image."""
    encoder = Encoder(config.model, config.baseline.svdd_dimensions)
    with unet.product_precision(config.model):
        return cast(Array, encoder.apply(params["encoder"], x))


def init_svdd(config: Config, key: Key[Array, ""]) -> dict[str, Any]:
    """Returns a random network and the centre 0, which `fit_svdd` replaces."""
    example = jnp.zeros((1, *config.data.shape, image_ops.CHANNELS))
    dimensions = config.baseline.svdd_dimensions
    encoder = Encoder(config.model, dimensions).init(key, example)
    return {"encoder": encoder, "centre": jnp.zeros(dimensions)}


def fit_svdd(params: dict[str, Any], images: StoredImages, config: Config) -> dict[str, Any]:
    """Returns the parameters with the centre c, the mean output of the initial network.

    Values of c near 0 are moved to ±0.1, as published, because weights of 0 would reach a centre
    of 0.
    """
    codes = map_stored(lambda x, params: encode(params, x, config), images, params)
    centre = codes.mean(axis=0, dtype=np.float64)
    centre = np.where(np.abs(centre) < 0.1, np.copysign(0.1, centre), centre)
    return {**params, "centre": centre.astype(np.float32)}


def svdd_distance(params: dict[str, Any], x: Images, config: Config) -> PerImage:
    """Returns ‖φ(x) − c‖²; the centre is not trained."""
    # The centre is one of the parameters, so that checkpoints hold it. With a gradient of 0 the
    # optimizer leaves it unchanged.
    centre = jax.lax.stop_gradient(params["centre"])[None]
    return jnp.sum(jnp.square(encode(params, x, config) - centre), axis=1)


def svdd_loss(
    params: dict[str, Any],
    batch: CorruptedBatch,
    keys: Array,
    config: Config,
    step: Any,
    *,
    hyperparameters: Hyperparameters | None = None,
) -> tuple[PerImage, dict[str, Array]]:
    """Returns ‖φ(x) − c‖² of the clean images."""
    del keys, step, hyperparameters
    return svdd_distance(params, batch.clean, config), {}


def svdd_map(
    params: dict[str, Any], x: Images, config: Config
) -> tuple[None, Float[Array, "b 1 1"]]:
    """Returns maps of one value: the squared distance to the centre, relative to ‖c‖²."""
    length = jnp.sum(jnp.square(params["centre"]))
    return None, image_level_map(svdd_distance(params, x, config) / length)


METHOD = Method(
    init=init_svdd,
    loss=svdd_loss,
    anomaly_map=svdd_map,
    fit=fit_svdd,
    localises=False,
    fixed_size=True,
)
