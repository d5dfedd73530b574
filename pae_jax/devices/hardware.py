"""The platform that programs are built for, and the figures of known accelerators."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax


class Chip(NamedTuple):
    """The vendor's figures of one chip.

    Attributes:
      flops: peak of dense bfloat16 arithmetic, in FLOP/s.
      memory: the size of the memory, in bytes.
      bandwidth: the bandwidth of the memory, in bytes/s.
    """

    flops: float
    memory: float
    bandwidth: float


# Keys are prefixes of `device_kind`; a longer prefix stands before a shorter one of its own.
CHIPS = {
    "TPU v6 lite": Chip(918e12, 32 * 2**30, 1.64e12),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 0.82e12),
    "TPU v5": Chip(459e12, 95 * 2**30, 2.77e12),
    "TPU v4": Chip(275e12, 32 * 2**30, 1.23e12),
    "NVIDIA H200": Chip(989e12, 141e9, 4.8e12),
    "NVIDIA H100": Chip(989e12, 80e9, 3.35e12),
    "NVIDIA A100": Chip(312e12, 80e9, 2.0e12),
}


def chip(device_kind: str) -> Chip | None:
    """Returns the figures of a device kind, or None for a CPU or a chip that is not listed."""
    return next((chip for prefix, chip in CHIPS.items() if device_kind.startswith(prefix)), None)


def peak_flops() -> float | None:
    """Returns the peak FLOP/s of one local device, or None where it is not known."""
    device_chip = chip(jax.local_devices()[0].device_kind)
    return device_chip.flops if device_chip else None


# A context variable rather than a global, because each thread may build for another platform.
_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def platform() -> str:
    """Returns the platform that programs are being built for: "cpu", "gpu" or "tpu".

    It is JAX's default backend, except inside `building_for`.
    """
    return _platform.get() or jax.default_backend()


@contextlib.contextmanager
def building_for(platform: str) -> Iterator[None]:
    """Makes the package choose the forms that suit `platform` while the context is open.

    A program that is compiled ahead of time or exported runs on another platform than this
    process. The choices are made while a function is traced, and JAX keeps the trace of a
    function, so trace a new function inside the context.

    Args:
      platform: "cpu", "gpu" or "tpu".

    Yields:
      Nothing.
    """
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)


def loop_unroll(iterations: int) -> int:
    """Returns how many iterations of a loop to unroll if its body holds convolutions.

    On a CPU it is all of them, because XLA's convolutions take several times as long inside a
    loop there. Unrolling uses more memory, which is rarely the limit on a CPU
    (benchmarks/layouts.py).
    """
    return iterations if platform() == "cpu" else 1


def validates_beside_training() -> bool:
    """Returns whether the first validation runs beside the first steps.

    On an accelerator both would need its memory at the same time.
    """
    return platform() == "cpu"


def use_winograd() -> bool:
    """Returns whether matrix products replace XLA's convolutions, which are slow on a CPU."""
    return platform() == "cpu"


def use_transposed_convolution() -> bool:
    """Returns whether a convolution of an upsampled map is one transposed convolution.

    On a GPU the compiled network has less memory traffic and fewer temporaries with it than with
    four small convolutions. On a TPU it is cheaper alone, but the compiler estimates more cycles
    for the whole network (benchmarks/forms.py, docs/gpu.md).
    """
    return platform() == "gpu"


def use_window_pooling() -> bool:
    """Returns whether 2×2 pooling is a window reduction instead of a reshape and a maximum.

    For a TPU the compiler estimates 8 % fewer cycles of the whole network with it. For a GPU it
    counts more memory traffic, and on a CPU it is slower (benchmarks/forms.py, docs/gpu.md).
    """
    return platform() == "tpu"


def compiler_options(*, deterministic: bool) -> dict[str, bool] | None:
    """Returns options for the compilation of a training step, or None for XLA's defaults.

    Args:
      deterministic: `train.deterministic`. On a GPU, XLA then leaves out kernels whose sums have
        no fixed order, and takes the first kernel that fits instead of the one that was fastest
        in a measurement. A CPU and a TPU give the same bits in every run as they are.
    """
    if deterministic and platform() == "gpu":
        return {"xla_gpu_deterministic_ops": True}
    return None
