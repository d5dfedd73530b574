"""The U-Net, the loss and the Adam step of pae_jax in PyTorch, for benchmarks only.

The modules have the names of the Flax parameters, so that `load` can copy the parameters and
`load_state_dict` reports whatever is missing or superfluous.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

from pae_jax.config import ModelConfig

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _convolution(inputs: int, outputs: int, kernel: int, rate: int = 1) -> nn.Module:
    return nn.Conv2d(inputs, outputs, kernel, padding=rate * (kernel // 2), dilation=rate)


def _norm(channels: int, config: ModelConfig) -> nn.Module:
    groups = {"group": math.gcd(8, channels), "instance": channels, "layer": 1, "none": 0}
    if not groups[config.norm]:
        return nn.Identity()
    return nn.GroupNorm(groups[config.norm], channels, eps=1e-6)


class Stage(nn.Module):
    """The counterpart of pae_jax.unet.Stage."""

    def __init__(self, inputs: int, width: int, config: ModelConfig):
        super().__init__()
        self.count = config.convs_per_stage
        for i in range(self.count):
            self.add_module(f"Conv_{i}", _convolution(width if i else inputs, width, 3))
            self.add_module(f"GroupNorm_{i}", _norm(width, config))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(self.count):
            x = self.get_submodule(f"Conv_{i}")(x)
            x = functional.relu(self.get_submodule(f"GroupNorm_{i}")(x))
        return x


class DilatedLayer(nn.Module):
    """The counterpart of pae_jax.unet.DilatedLayer."""

    def __init__(self, channels: int, config: ModelConfig):
        super().__init__()
        self.count, width = len(config.dilation_rates), config.branch_width
        for i, rate in enumerate(config.dilation_rates):
            self.add_module(
                f"Conv_{i}", _convolution(channels, width, config.dilated_kernel_size, rate)
            )
        self.add_module(f"Conv_{self.count}", _convolution(self.count * width, channels, 1))
        self.GroupNorm_0 = _norm(self.count * width, config)
        self.GroupNorm_1 = _norm(channels, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = [self.get_submodule(f"Conv_{i}")(x) for i in range(self.count)]
        y = functional.relu(self.GroupNorm_0(torch.cat(branches, 1)))
        return functional.relu(x + self.GroupNorm_1(self.get_submodule(f"Conv_{self.count}")(y)))


class UNet(nn.Module):
    """The counterpart of pae_jax.unet.UNet with skip="concatenate" and output="sigmoid".

    Images are (b, c, h, w), and the poolings have to divide their sides.
    """

    def __init__(self, config: ModelConfig, channels: int = 3):
        super().__init__()
        self.config, blocks = config, channels * config.patch_size**2
        before = blocks
        for i, width in enumerate(config.widths):
            self.add_module(f"encoder_{i}", Stage(before, width, config))
            before = width
        for i in range(config.bottleneck_layers):
            self.add_module(f"bottleneck_{i}", DilatedLayer(before, config))
        for i, width in reversed(list(enumerate(config.widths))):
            self.add_module(f"decoder_{i}", Stage(before + width, width, config))
            before = width
        self.Conv_0 = _convolution(before, blocks, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        config = self.config
        y = space_to_depth(2 * x - 1, config.patch_size)
        encoded = []
        for i in range(len(config.widths)):
            encoded.append(self.get_submodule(f"encoder_{i}")(y))
            y = functional.max_pool2d(encoded[-1], 2)
        for i in range(config.bottleneck_layers):
            y = self.get_submodule(f"bottleneck_{i}")(y)
        for i in reversed(range(len(config.widths))):
            y = functional.interpolate(y, scale_factor=2, mode="nearest")
            y = self.get_submodule(f"decoder_{i}")(torch.cat([y, encoded[i]], 1))
        return torch.sigmoid(depth_to_space(self.Conv_0(y).float(), config.patch_size))


def space_to_depth(x: torch.Tensor, factor: int) -> torch.Tensor:
    """The counterpart of image_ops.space_to_depth.

    The order of the channels of a block differs from PyTorch's pixel_unshuffle.
    """
    if factor == 1:
        return x
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // factor, factor, w // factor, factor)
    return x.permute(0, 3, 5, 1, 2, 4).reshape(b, factor**2 * c, h // factor, w // factor)


def depth_to_space(x: torch.Tensor, factor: int) -> torch.Tensor:
    """The counterpart of image_ops.depth_to_space."""
    if factor == 1:
        return x
    b, c, h, w = x.shape
    x = x.reshape(b, factor, factor, c // factor**2, h, w)
    return x.permute(0, 3, 4, 1, 5, 2).reshape(b, c // factor**2, h * factor, w * factor)


def reconstruction_loss(
    reconstruction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, weight: float = 0.5
) -> torch.Tensor:
    """Returns eq. 1, averaged over the batch; the mask is (b, 1, h, w)."""
    residual = reconstruction - target

    def term(region: torch.Tensor) -> torch.Tensor:
        norm = residual.shape[1] * region.sum((1, 2, 3))
        error = ((region * residual) ** 2).sum((1, 2, 3))
        return error / torch.where(norm > 0, norm, 1)

    return ((1 - weight) * term(1 - mask) + weight * term(mask)).mean()


def load(module: nn.Module, variables: Any) -> None:
    """Copies the parameters of a Flax tree into the module."""
    module.load_state_dict(to_torch(variables))


def to_torch(variables: Any) -> dict[str, torch.Tensor]:
    """Converts a tree like that of the Flax parameters to tensors by their names in the module."""
    # Here, because the process of predict_torch.py must not spend its time on JAX.
    import jax

    tensors = {}
    for path, leaf in jax.tree.flatten_with_path(variables["params"])[0]:
        *modules, name = (part.key for part in path)
        value = np.array(leaf)
        if name == "kernel":  # (h, w, in, out) → (out, in, h, w)
            value = np.ascontiguousarray(value.transpose(3, 2, 0, 1))
        # A decoder has a stage as its only child; here the decoder is that stage.
        modules = [module for module in modules if module != "stage"]
        tensors[".".join([*modules, name if name == "bias" else "weight"])] = torch.tensor(value)
    return tensors


def make_step(
    config: ModelConfig,
    variables: Any,
    batch: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    learning_rate: float = 1e-4,
    layout: str = "contiguous",
    compiled: bool = False,
    device: str = "cpu",
) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """Returns the module, and a function that takes one step of Adam and returns the loss.

    Args:
      config: the configuration of the network; bfloat16 runs under autocast.
      variables: the Flax parameters to start from.
      batch: x̂, x (b, h, w, c) and M (b, h, w, 1).
      learning_rate: the learning rate of Adam.
      layout: the memory layout of images and convolution kernels, a key of `LAYOUTS`.
      compiled: whether torch.compile compiles loss and gradient.
      device: "cpu" or "cuda".
    """
    module = UNet(config, batch[0].shape[-1])
    load(module, variables)
    # PyTorch's annotations lack the memory format of a module.
    module = module.to(device).to(memory_format=LAYOUTS[layout])  # pyright: ignore
    corrupted, clean, mask = (
        torch.tensor(part.transpose(0, 3, 1, 2).copy())
        .to(device)
        .contiguous(memory_format=LAYOUTS[layout])
        for part in batch
    )
    adam = torch.optim.Adam(module.parameters(), lr=learning_rate, fused=True)
    low = config.dtype == "bfloat16"

    def evaluate() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=low):
            reconstruction = module(corrupted)
        return reconstruction_loss(reconstruction, clean, mask)

    run = torch.compile(evaluate, dynamic=False) if compiled else evaluate

    def step() -> torch.Tensor:
        adam.zero_grad(set_to_none=True)
        loss = run()
        loss.backward()
        adam.step()
        return loss.detach()

    return module, step
