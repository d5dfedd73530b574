"""The U-Net with a bottleneck of stacked dilated convolutions: a pure function of its parameters.

`UNet(config).apply(variables, x)` maps images (b, h, w, c) in [0, 1] to images of the same
shape and range. There is no state beside the parameters (no batch statistics), so an image's
output does not depend on its batch mates and f can be differentiated, iterated and vmapped.
The layout is §4 of the paper ("a modified U-Net with dilated bottleneck convolutions"); where
the paper is silent, the parent paper's stacked dilated convolutions (Bauer et al. 2024).
"""

import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from pae_jax import image_ops
from pae_jax.config import ModelConfig
from pae_jax.devices import winograd

EDGE = 1 / 512  # half a grey level of 8 bits: black and white have finite logits


class Convolution3x3(nn.Module):
    """`flax.linen.Conv` with a 3×3 kernel: the same parameters, names and values."""

    width: int
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], below: Array | None = None
    ) -> Float[Array, "b h w width"]:
        """With `below` (b, h/2, w/2, c'): the convolution of [upsample(below), x], not laid out."""
        dtype = jnp.dtype(self.dtype)
        count = 0 if below is None else below.shape[-1]
        shape = (3, 3, count + x.shape[-1], self.width)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape).astype(dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.width,)).astype(dtype)
        # A convolution is linear in its channels, so both parts go their own ways, and that of
        # upsample(below) is computed on the small map.
        y = winograd.convolve(x.astype(dtype), kernel[:, :, count:])
        if below is not None:
            y += winograd.convolve_upsampled(below.astype(dtype), kernel[:, :, :count])
        return y + bias[None, None, None]


def _convolution(
    width: int,
    kernel: int,
    config: ModelConfig,
    *,
    rate: int = 1,
    name: str | None = None,
    zero: bool = False,
) -> nn.Conv:
    return nn.Conv(
        width,
        (kernel, kernel),
        name=name,
        kernel_dilation=rate,
        dtype=jnp.dtype(config.dtype),
        kernel_init=nn.initializers.zeros if zero else nn.initializers.he_normal(),
    )


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018): one mean and variance per image and group of channels.

    The same numbers as linen's, in a form that XLA compiles to one multiply-add per value and
    whose forward pass takes two thirds of the time on a CPU: the statistics of channels are
    averaged over their group as (batch, channels) matrices.
    """

    groups: int
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        # Statistics in float32, whatever x is computed in.
        y = x.astype(jnp.float32)
        mean, square = self._by_group(y.mean((1, 2))), self._by_group((y * y).mean((1, 2)))
        variance = jnp.maximum(square - mean * mean, 0)
        factor = scale[None] * jax.lax.rsqrt(variance + self.epsilon)
        offset = bias[None] - mean * factor
        return (y * factor[:, None, None] + offset[:, None, None]).astype(x.dtype)

    def _by_group(self, of_channels: Float[Array, "b c"]) -> Float[Array, "b c"]:
        batch, channels = of_channels.shape
        grouped = of_channels.reshape(batch, self.groups, -1).mean(-1, keepdims=True)
        wide = jnp.broadcast_to(grouped, (batch, self.groups, channels // self.groups))
        return wide.reshape(batch, channels)


def _normalise(x: Array, config: ModelConfig) -> Array:
    channels = x.shape[-1]
    groups = {"group": math.gcd(8, channels), "instance": channels, "layer": 1, "none": 0}
    return GroupNorm(groups[config.norm])(x) if groups[config.norm] else x


class Stage(nn.Module):
    """Convolution, norm and ReLU, `config.convolutions` times, at one resolution.

    With `below` the first convolution takes [upsample(below), x], which is never laid out.
    """

    width: int
    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array, below: Array | None = None) -> Array:
        for i in range(self.config.convs_per_stage):
            convolution = Convolution3x3(self.width, self.config.dtype, name=f"Conv_{i}")
            x = convolution(x, below if i == 0 else None)
            x = nn.relu(_normalise(x, self.config))
        return x


class DilatedLayer(nn.Module):
    """Parallel dilated branches, concatenated, mixed by a 1×1 convolution, plus the input."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        config = self.config
        branches = [
            _convolution(config.branch_width, config.dilated_kernel_size, config, rate=rate)(x)
            for rate in config.dilation_rates
        ]
        y = nn.relu(_normalise(jnp.concatenate(branches, axis=-1), config))
        return nn.relu(x + _normalise(_convolution(x.shape[-1], 1, config)(y), config))


class Decoder(nn.Module):
    """A stage on the features from below and, by `config.skip`, the encoder's beside them."""

    width: int
    config: ModelConfig

    @nn.compact
    def __call__(self, below: Array, encoded: Array) -> Array:
        stage = Stage(self.width, self.config, name="stage")
        if self.config.skip == "concatenate":
            return stage(encoded, below)
        decoded = upsample(below)
        if self.config.skip == "none":
            return stage(decoded)
        # The parent paper's convex combination: a learned share in (0, 1) for each channel.
        decoded = _convolution(encoded.shape[-1], 1, self.config)(decoded)
        logit = self.param("logit", nn.initializers.zeros, (encoded.shape[-1],))
        share = nn.sigmoid(logit).astype(encoded.dtype)[None, None, None, :]
        return stage(share * encoded + (1 - share) * decoded)


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h/2 w/2 c"]:
    """The maximum over 2×2 blocks; h and w even."""
    # A reshape, not a reduce_window: its gradient is elementwise, not a select-and-scatter.
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))


def upsample(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    """Nearest-neighbour upsampling by two."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)


class UNet(nn.Module):
    """f_θ: [0,1]^{h×w×c} → [0,1]^{h×w×c}; any h, w ≥ 1, padded and cropped where needed."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        config = self.config
        # Rematerialisation trades a second forward pass of a block for its activations.
        remat: Callable[[type[nn.Module]], Any] = nn.remat if config.remat else lambda block: block
        stage, dilated, decoder = remat(Stage), remat(DilatedLayer), remat(Decoder)
        _, height, width, channels = x.shape
        y = image_ops.pad_to_multiple(x, config.patch_size * 2 ** len(config.widths))
        # Centred input: the first convolution then starts from values of both signs.
        y = image_ops.space_to_depth(2 * y.astype(jnp.dtype(config.dtype)) - 1, config.patch_size)

        encoded = []
        for i, stage_width in enumerate(config.widths):
            y = stage(stage_width, config, name=f"encoder_{i}")(y)
            encoded.append(y)
            y = max_pool(y)

        for i in range(config.bottleneck_layers):
            y = dilated(config, name=f"bottleneck_{i}")(y)

        for i, stage_width in reversed(list(enumerate(config.widths))):
            y = decoder(stage_width, config, name=f"decoder_{i}")(y, encoded[i])

        # The output leaves in float32: the loss and the iterates of f are not rounded.
        y = _convolution(
            channels * config.patch_size**2, 1, config, zero=config.output == "residual_logit"
        )(y)
        y = image_ops.depth_to_space(y.astype(jnp.float32), config.patch_size)[:, :height, :width]
        return OUTPUTS[config.output](y, x)


def _residual_logit(y: Float[Array, "b h w c"], x: Float[Array, "b h w c"]) -> Array:
    # Before training y = 0 and f = id: a conservative projection has to learn corrections only.
    return nn.sigmoid(y + jax.scipy.special.logit(jnp.clip(x, EDGE, 1 - EDGE)))


OUTPUTS: dict[str, Callable[[Array, Array], Array]] = {
    "sigmoid": lambda y, x: nn.sigmoid(y),
    "residual_logit": _residual_logit,
}
"""From the last features and the input to f(x), by `model.output`."""

BACKBONES = {"unet": UNet}  # by `model.name`: modules built from a ModelConfig


def backbone(config: ModelConfig) -> nn.Module:
    """The network that the configuration names; its `apply` maps images to images."""
    return BACKBONES[config.name](config)


def bind(config: ModelConfig, variables: Any) -> Callable[[Array], Array]:
    """f_θ as a function of images alone."""

    def f(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return cast(Array, backbone(config).apply(variables, x))

    return f


def parameter_count(variables: Any) -> int:
    """The number of scalar parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(variables))
