"""Descriptions of accelerators that this machine does not have, to compile programs for them.

XLA's compilers need no device. For a TPU the compiler is in libtpu, which knows the slices by
name. For a GPU it is in JAX's CUDA plugin, which is given the figures of the chip as text.
"""

import importlib.util
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from data_pipelines.errors import BadInput

# Without these variables libtpu asks the metadata server of a cloud which machine this is, and
# waits for the answer. The values are not used, because the caller names the topology.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile, as no device is taken
}
CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
EXAMPLES = "v5e:2x2, h100 or h100:8"


class Gpu(NamedTuple):
    """The figures of a GPU that XLA's compiler reads, of the boards with SXM sockets.

    They are those of XLA's target specifications (xla/tools/hlo_opt/gpu_specs).

    Attributes:
      name: the device kind.
      capability: the major number of the CUDA compute capability.
      cores: the number of multiprocessors.
      lanes: the float32 units of each.
      shared: the shared memory of each, in bytes.
      shared_per_block: the largest part of it that one block can ask for.
      memory: the size of the memory, in bytes.
      bandwidth: its bandwidth, in bytes/s.
      cache: the size of the L2 cache, in bytes.
      clock: in GHz.
    """

    name: str
    capability: int
    cores: int
    lanes: int
    shared: int
    shared_per_block: int
    memory: int
    bandwidth: int
    cache: int
    clock: float


_H100 = Gpu(
    name="NVIDIA H100 80GB HBM3",
    capability=9,
    cores=132,
    lanes=128,
    shared=233_472,
    shared_per_block=232_448,
    memory=84_978_434_048,
    bandwidth=3_352_320_000_000,
    cache=52_428_800,
    clock=1.98,
)
GPUS = {
    "a100": Gpu(
        name="NVIDIA A100-SXM4-80GB",
        capability=8,
        cores=108,
        lanes=64,
        shared=167_936,
        shared_per_block=166_912,
        memory=85_100_068_864,
        bandwidth=2_039_040_000_000,
        cache=41_943_040,
        clock=1.41,
    ),
    "h100": _H100,
    # XLA publishes none for the H200. It is an H100 with another memory (the vendor's figures).
    "h200": _H100._replace(name="NVIDIA H200", memory=141_000_000_000, bandwidth=4_800_000_000_000),
}
# The last two versions are those of cuDNN and CUDA, from which XLA knows what they can do.
_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared}
  threads_per_core_limit: 2048
  core_count: {gpu.cores}
  fpus_per_core: {gpu.lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth}
  l2_cache_size: {gpu.cache}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.memory}
  shared_memory_per_block_optin: {gpu.shared_per_block}
  cuda_compute_capability {{ major: {gpu.capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{gpu.name}"
"""


def start() -> None:
    """Prepares this process; call it before the process touches a device."""
    for name, value in ENVIRONMENT.items():
        # A value that the user has set takes precedence.
        os.environ.setdefault(name, value)
    # Otherwise JAX would look for an accelerator in this machine.
    jax.config.update("jax_platforms", "cpu")
    # JAX can write a program for absent devices to its cache, but cannot read it again.
    jax.config.update("jax_enable_compilation_cache", False)


def devices(topology: str) -> list[Any]:
    """Returns descriptions of devices, which need not exist.

    Args:
      topology: a TPU slice as GENERATION:SHAPE, for example "v5e:2x2"; or GPUs of one host as
        NAME or NAME:COUNT with a name in `GPUS`.

    Raises:
      BadInput: the topology does not exist, or the package with its compiler is missing.
    """
    tpu = re.fullmatch(r"v\d+\w*:(\d+)x(\d+)(?:x\d+)?", topology)
    gpu = re.fullmatch(rf"({'|'.join(GPUS)})(?::([1-9]\d*))?", topology)
    if tpu:
        if importlib.util.find_spec("libtpu") is None:
            raise BadInput("libtpu is missing: pip install -c constraints.txt -e '.[tpu]'")
        # A host has 2×2 chips; a smaller slice is a part of a host.
        host = (*(min(int(side), 2) for side in tpu.groups()), 1)
        options: dict[str, Any] = {"topology_name": topology, "chips_per_host_bounds": host}
    elif gpu:
        if not any(importlib.util.find_spec(name) for name in CUDA_PLUGINS):
            raise BadInput(
                "JAX's CUDA plugin is missing: pip install -c constraints.txt -e '.[cuda]' "
                "(no GPU is needed)"
            )
        target = _TARGET.format(gpu=GPUS[gpu[1]])
        options = {"target_config": target, "topology": f"1x1x{gpu[2] or 1}"}
    else:
        names = ", ".join(GPUS)
        raise BadInput(
            f"--topology: a TPU slice or GPUs ({names}), such as {EXAMPLES}, not {topology!r}"
        )
    try:
        description = topologies.get_topology_desc(platform="tpu" if tpu else "cuda", **options)
    except jax.errors.JaxRuntimeError as error:
        raise BadInput(f"--topology: {topology}: {first_line(error)}") from None
    return list(description.devices)


def first_line(error: Exception) -> str:
    """Returns the first line of an error of XLA."""
    return str(error).partition("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")
