"""StableHLO by `jax.export`: one file for CPU, GPU and TPU, for any number of images."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from pae_jax.config import Config
from pae_jax.deployment import program

# The platforms of JAX, and the names that `hardware` has for them.
PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu"}
TOLERANCE = 1e-5
REQUIRED = "flatbuffers"  # the package by which jax.export writes and reads files


def serialise(params: Any, config: Config, shape: tuple[int, int, int]) -> bytes:
    """Returns the exported program.

    Args:
      params: the parameters, which become constants of the program.
      config: see `program.settings`.
      shape: (h, w, c) of the images.
    """
    (count,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((count, *shape), jnp.uint8)
    exported = export.export(jax.jit(_for_all_platforms(params, config)), platforms=[*PLATFORMS])
    with _without_locations():
        return bytes(exported(images).serialize())


@contextlib.contextmanager
def _without_locations() -> Iterator[None]:
    """Leaves out of a program which line of which file made each operation.

    The file would otherwise tell the folders of this machine, and its bytes depend on the caller.
    """
    name = "jax_traceback_in_locations_limit"
    limit = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, limit)


def _for_all_platforms(params: Any, config: Config) -> Callable[[Any], dict[str, Any]]:
    # Convolutions, pooling and loops have other forms on each platform (devices/hardware.py), and
    # they are chosen while a function is traced. Every form is valid everywhere, but that of a CPU
    # wastes an accelerator, and the reverse. So the program is traced once for each platform, and
    # the platform that it is called on selects one when it is compiled there. The parameters are an
    # operand of the selection, so that the file holds them once.
    branches = {name: program.make(config, form) for name, form in PLATFORMS.items()}

    def run(images: Any) -> dict[str, Any]:
        return jax.lax.platform_dependent(params, images, **branches)

    return run


def load(content: bytes) -> program.Run:
    """Returns the program of a file as a function of images."""
    call = jax.jit(export.deserialize(bytearray(content)).call)
    return lambda images: jax.device_get(call(images))


def requirements(content: bytes) -> dict[str, Any]:
    """Returns the versions that can read a file, for its sidecar."""
    exported = export.deserialize(bytearray(content))
    # MLIR's bytecode names its producer at its beginning.
    producer = re.search(rb"StableHLO_v([0-9.]+)", exported.mlir_module_serialized[:64])
    return {
        "packages": ["jax", REQUIRED],
        "platforms": list(exported.platforms),
        "written_by_jax": jax.__version__,
        "calling_convention": exported.calling_convention_version,
        "stablehlo": producer[1].decode() if producer else None,
        "rule": "JAX reads the files of versions at most six months older than itself",
    }
