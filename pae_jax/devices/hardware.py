"""What is known of accelerators: peak arithmetic, memory and its bandwidth, per chip."""

from typing import NamedTuple

import jax


class Chip(NamedTuple):
    """Vendors' figures, dense: bfloat16 FLOP/s, memory in bytes, bytes/s."""

    flops: float
    memory: float
    bandwidth: float


# By the beginning of `device_kind`, the longer name first.
CHIPS = {
    "TPU v6 lite": Chip(918e12, 32 * 2**30, 1.64e12),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 0.82e12),
    "TPU v5": Chip(459e12, 95 * 2**30, 2.77e12),
    "TPU v4": Chip(275e12, 32 * 2**30, 1.23e12),
    "NVIDIA H200": Chip(989e12, 141e9, 4.8e12),
    "NVIDIA H100": Chip(989e12, 80e9, 3.35e12),
    "NVIDIA A100": Chip(312e12, 80e9, 2.0e12),
}


def chip(kind: str) -> Chip | None:
    """The chip of a `device_kind`; None for a CPU and whatever else is not listed."""
    return next((found for name, found in CHIPS.items() if kind.startswith(name)), None)


def peak_flops() -> float | None:
    """Of one of this process's devices; None where it is not known."""
    found = chip(jax.local_devices()[0].device_kind)
    return found.flops if found else None


def loop_unroll(turns: int) -> int:
    """How many of a loop's turns to write out, where its body holds convolutions.

    Inside a loop XLA's convolutions take several times as long on a CPU. Written out they save no
    memory there, which is not what a CPU lacks (benchmarks/layouts.py).
    """
    return turns if jax.default_backend() == "cpu" else 1


def use_winograd() -> bool:
    """Whether matrix products beat XLA's convolutions by more than they cost to prepare."""
    return jax.default_backend() == "cpu"
