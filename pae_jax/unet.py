"""The U-Net with a bottleneck of stacked dilated convolutions (§4), and its building blocks.

`UNet(config).apply(variables, x)` maps images (b, h, w, c) in [0, 1] to images of the same shape
and range (the output "residual_logit" may exceed it by 1/510). It has no state besides its
parameters (no batch statistics). An image's output therefore does not depend on the other images of
its batch, and f can be differentiated, iterated and vmapped.

The layout is that of §4 of the paper ("a modified U-Net with dilated bottleneck convolutions").
Where the paper gives no detail, it follows the parent paper's stacked dilated convolutions
(Bauer et al. 2024).
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from pae_jax import image_ops
from pae_jax.config import ModelConfig
from pae_jax.devices import hardware, winograd

HIGH_PASS_SIGMA = 1.6  # pixels; exp(−(2πσ/8.5)²/2) = 0.5
EDGE = 1 / 512  # half an 8-bit grey level; [0, 1] is scaled to [EDGE, 1 − EDGE] before a logit


class Convolution3x3(nn.Module):
    """A 3×3 convolution with the parameters, names and values of `flax.linen.Conv`.

    Attributes:
      width: the number of output channels.
      dtype: of the arithmetic; parameters are float32.
    """

    width: int
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], coarse: Float[Array, "b hh ww cc"] | None = None
    ) -> Float[Array, "b h w width"]:
        """Convolves x, or [upsample(coarse), x] if `coarse` (b, h/2, w/2, c') is given."""
        dtype = jnp.dtype(self.dtype)
        count = 0 if coarse is None else coarse.shape[-1]
        shape = (3, 3, count + x.shape[-1], self.width)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape).astype(dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.width,)).astype(dtype)
        # A convolution is linear in its input channels. The two parts are therefore convolved
        # separately and added: the concatenation is never stored, and the part of
        # upsample(coarse) is computed on the coarse map.
        y = winograd.convolve(x.astype(dtype), kernel[:, :, count:])
        if coarse is not None:
            y += winograd.convolve_upsampled(coarse.astype(dtype), kernel[:, :, :count])
        return y + bias[None, None, None]


def _convolution(
    width: int,
    kernel_size: int,
    config: ModelConfig,
    *,
    dilation_rate: int = 1,
    zero_init: bool = False,
) -> nn.Conv:
    return nn.Conv(
        width,
        (kernel_size, kernel_size),
        kernel_dilation=dilation_rate,
        dtype=jnp.dtype(config.dtype),
        kernel_init=nn.initializers.zeros if zero_init else nn.initializers.he_normal(),
    )


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018): one mean and variance per image and group of channels.

    The values are those of `flax.linen.GroupNorm`. The statistics of single channels are averaged
    over each group as (batch, channels) matrices. XLA then compiles one multiply-add per value, and
    the forward pass takes two thirds of the time on a CPU.

    Attributes:
      groups: the number of groups; divides the number of channels.
      epsilon: is added to the variance.
    """

    groups: int
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Normalises x, then scales and shifts each channel."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        # Statistics are float32 even if x is bfloat16.
        y = x.astype(jnp.float32)
        mean, square = self._by_group(y.mean((1, 2))), self._by_group((y * y).mean((1, 2)))
        variance = jnp.maximum(square - mean * mean, 0)
        factor = scale[None] * jax.lax.rsqrt(variance + self.epsilon)
        offset = bias[None] - mean * factor
        return (y * factor[:, None, None] + offset[:, None, None]).astype(x.dtype)

    def _by_group(self, statistic: Float[Array, "b c"]) -> Float[Array, "b c"]:
        """Replaces each channel's statistic by the mean over its group."""
        batch, channels = statistic.shape
        means = statistic.reshape(batch, self.groups, -1).mean(-1, keepdims=True)
        means = jnp.broadcast_to(means, (batch, self.groups, channels // self.groups))
        return means.reshape(batch, channels)


def _normalise(x: Array, config: ModelConfig) -> Array:
    channels = x.shape[-1]
    groups = {"group": math.gcd(8, channels), "instance": channels, "layer": 1, "none": 0}
    return GroupNorm(groups[config.norm])(x) if groups[config.norm] else x


class Stage(nn.Module):
    """Convolution, normalisation and ReLU, `config.convs_per_stage` times, at one resolution."""

    width: int
    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], coarse: Float[Array, "b hh ww cc"] | None = None
    ) -> Float[Array, "b h w width"]:
        """Maps x, or [upsample(coarse), x] if `coarse` (b, h/2, w/2, c') is given."""
        for i in range(self.config.convs_per_stage):
            # The name is that of linen's convolutions, so that checkpoints keep their tree.
            convolution = Convolution3x3(self.width, self.config.dtype, name=f"Conv_{i}")
            x = convolution(x, coarse if i == 0 else None)
            x = nn.relu(_normalise(x, self.config))
        return x


class DilatedLayer(nn.Module):
    """A residual layer of the bottleneck: parallel dilated convolutions and a 1×1 convolution.

    There is one branch of `config.branch_width` channels per rate in `config.dilation_rates`. The
    branches are concatenated, mixed by the 1×1 convolution and added to the input.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Maps features to features of the same shape."""
        config = self.config
        width, kernel_size = config.branch_width, config.dilated_kernel_size
        branches = [
            _convolution(width, kernel_size, config, dilation_rate=rate)(x)
            for rate in config.dilation_rates
        ]
        y = nn.relu(_normalise(jnp.concatenate(branches, axis=-1), config))
        return nn.relu(x + _normalise(_convolution(x.shape[-1], 1, config)(y), config))


class Decoder(nn.Module):
    """A stage on the upsampled features, joined with the encoder's as `config.skip` says."""

    width: int
    config: ModelConfig

    @nn.compact
    def __call__(
        self, coarse: Float[Array, "b hh ww cc"], encoded: Float[Array, "b h w c"]
    ) -> Float[Array, "b h w width"]:
        """Maps coarse features (b, h/2, w/2, c') and the encoder's at full resolution."""
        stage = Stage(self.width, self.config, name="stage")
        if self.config.skip == "concatenate":
            return stage(encoded, coarse)
        decoded = upsample(coarse)
        if self.config.skip == "none":
            return stage(decoded)
        # The parent paper's convex combination, with one learned weight in (0, 1) per channel.
        decoded = _convolution(encoded.shape[-1], 1, self.config)(decoded)
        logit = self.param("logit", nn.initializers.zeros, (encoded.shape[-1],))
        weight = nn.sigmoid(logit).astype(encoded.dtype)[None, None, None, :]
        return stage(weight * encoded + (1 - weight) * decoded)


def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h/2 w/2 c"]:
    """Returns the maximum of each 2×2 block; h and w are even."""
    if hardware.use_window_pooling():
        window = (1, 2, 2, 1)
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")
    # The gradient of this form is elementwise. Equally large pixels share it, while the other form
    # gives it to one of them. In the network these are zeros of a ReLU, where the gradient ends.
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))


def upsample(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    """Repeats each pixel in a 2×2 block (nearest-neighbour upsampling)."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)


class UNet(nn.Module):
    """The network f_θ: [0,1]^{h×w×c} → [0,1]^{h×w×c} (§2, §4), for any h, w ≥ 1.

    The output "residual_logit" may exceed [0, 1] by half a grey level. It is clipped for anomaly
    maps only, because a clipped f has no derivative there.

    With `config.patch_size` p > 1 each p × p block of pixels becomes one position with p²·c
    channels. The encoder and the decoder have one stage per entry of `config.widths`; the image is
    padded so that every stage halves the resolution evenly, and the output is cropped.

    Attributes:
      config: the architecture.
      outputs: the number of output channels; None gives an image of the input's shape, whose
        channels are equal with `config.grey`.
    """

    config: ModelConfig
    outputs: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w outputs"]:
        """Returns the reconstructions f(x), float32."""
        config = self.config
        # Rematerialisation computes a block twice instead of keeping its activations.
        remat: Callable[[type[nn.Module]], Any] = nn.remat if config.remat else lambda block: block
        stage, dilated, decoder = remat(Stage), remat(DilatedLayer), remat(Decoder)
        _, height, width, channels = x.shape
        outputs = self.outputs or (1 if config.grey else channels)
        y = INPUTS[config.input](x)
        y = image_ops.pad_to_multiple(y, stride(config))
        # Inputs are centred, so that the first convolution sees values of both signs.
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

        # The last layer is float32, so that neither the loss nor the iterates of f are rounded.
        last = dataclasses.replace(config, dtype="float32")
        zero_init = config.output == "residual_logit"
        y = _convolution(outputs * config.patch_size**2, 1, last, zero_init=zero_init)(y)
        y = image_ops.depth_to_space(y, config.patch_size)[:, :height, :width]
        if self.outputs is None:
            y = jnp.broadcast_to(y, x.shape)
        return OUTPUTS[config.output](y, x)


def _residual_logit(y: Float[Array, "b h w c"], x: Float[Array, "b h w c"]) -> Array:
    """Returns x with y added to the logit of s = e + (1 − 2e)x, where e = `EDGE`.

    That is (σ(y + logit s) − e) / (1 − 2e). Before training y = 0, so f(x) = x and J_f = I for
    every pixel, including 0 and 1, and f has to learn the corrections only. For x in [0, 1] the
    output is in [−e/(1 − 2e), 1 + e/(1 − 2e)], which exceeds [0, 1] by 1/510.
    """
    scale = 1 - 2 * EDGE
    # Outside the range of f, for example in an image with noise, s is kept positive. The output
    # there still follows x.
    least = EDGE / 16
    s, r = (jnp.maximum(EDGE + scale * part, least) for part in (x, 1 - x))  # r = 1 − s
    # σ(y + logit s) − s, written so that it is exactly 0 for y = 0, and so that nothing cancels in
    # float32: r comes from 1 − x, and only positive terms are added.
    change = s * r * jnp.tanh(y / 2) / (s * nn.sigmoid(y) + r * nn.sigmoid(-y))
    return x + change / scale


def _high_pass(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Returns 0.5 + the grey image less its Gaussian blur, in each channel.

    J·v = 0 for every smooth v, so that f cannot copy slow changes of tone or a colour from its
    input and has to predict them. FAIR (Liu et al. 2023) takes a Butterworth filter of wavelength
    8.5 pixels; the Gaussian halves the amplitude at about that wavelength.
    """
    grey = jnp.mean(x, axis=-1)
    detail = grey - image_ops.filter_axes(grey, image_ops.gaussian_kernel(HIGH_PASS_SIGMA))
    return jnp.broadcast_to(0.5 + detail[..., None], x.shape)


# Input layers by `model.input`: x → the image that the encoder sees, (b, h, w, c) both.
INPUTS: dict[str, Callable[[Array], Array]] = {"image": lambda x: x, "high_pass": _high_pass}

# Output layers by `model.output`: (last features, x), both (b, h, w, c), → f(x).
OUTPUTS: dict[str, Callable[[Array, Array], Array]] = {
    "sigmoid": lambda y, x: nn.sigmoid(y),
    "residual_logit": _residual_logit,
    "logit": lambda y, x: y,  # for the segmentation method; not a choice of `model.output`
}

# Modules by `model.name`; each is built from a ModelConfig.
BACKBONES = {"unet": UNet}


def backbone(config: ModelConfig) -> nn.Module:
    """Returns the network that `config.name` names; its `apply` maps images to images."""
    return BACKBONES[config.name](config)


def bind(config: ModelConfig, variables: Any) -> Callable[[Array], Array]:
    """Returns f_θ as a function of images (b, h, w, c) alone.

    It is a `jax.tree_util.Partial`. A jitted function that takes f as an argument is therefore
    compiled once for all parameters of one configuration.
    """
    return jax.tree_util.Partial(_apply(config), variables)


@functools.cache  # Jit compares functions by identity: one object per configuration.
def _apply(config: ModelConfig) -> Callable[[Any, Array], Array]:
    def apply(variables: Any, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        with product_precision(config):
            return cast(Array, backbone(config).apply(variables, x))

    return apply


def stride(config: ModelConfig) -> int:
    """Returns the smallest shift in pixels that f commutes with: blocks and pooling have a grid."""
    return config.patch_size * 2 ** len(config.widths)


def reach(config: ModelConfig) -> int:
    """Returns how many pixels away, along an axis, f(x) still depends on x.

    It follows from the convolutions, pooling and blocks, and is exact for norm="none". The
    statistics of a norm depend on the whole image besides.
    """
    # Positions within one stride see different distances.
    seen = [(pixel, *_seen(pixel, config)) for pixel in range(stride(config))]
    return max(max(pixel - first, last - pixel) for pixel, first, last in seen)


def _seen(pixel: int, config: ModelConfig) -> tuple[int, int]:
    """Returns the first and the last pixel on which f(x) at `pixel` depends along an axis."""
    first = last = pixel // config.patch_size
    for _ in config.widths:  # from the last layer through the decoder
        first, last = first - config.convs_per_stage, last + config.convs_per_stage
        first, last = first // 2, last // 2
    spread = max(config.dilation_rates) * (config.dilated_kernel_size // 2)
    first -= config.bottleneck_layers * spread
    last += config.bottleneck_layers * spread
    # A skip connection sees a part of what the coarser stage sees.
    for _ in config.widths:
        first, last = 2 * first, 2 * last + 1
        first, last = first - config.convs_per_stage, last + config.convs_per_stage
    margin = 0
    if config.input == "high_pass":
        margin = image_ops.gaussian_kernel(HIGH_PASS_SIGMA).size // 2
    patch = config.patch_size
    return first * patch - margin, (last + 1) * patch - 1 + margin


def product_precision(config: ModelConfig) -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which products and convolutions are traced with `config.precision`.

    "default" leaves the choice to `jax_default_matmul_precision`.
    """
    if config.precision == "default":
        return contextlib.nullcontext()
    return jax.default_matmul_precision(config.precision)


def parameter_count(variables: Any) -> int:
    """Returns the number of scalar parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(variables))
