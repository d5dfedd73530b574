"""ONNX by jax2onnx, for runtimes without JAX. Checked with onnxruntime.

jax2onnx asks for an older Orbax than the checkpoints of this package do. So it has an environment
of its own, and models get there as `pae pack` writes them.
"""

import importlib
import importlib.metadata
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.extend.core import jaxpr_as_fun

from data_pipelines.errors import BadInput, first_line
from pae_jax.config import Config
from pae_jax.deployment import program

TOLERANCE = 1e-4
REQUIRED = "jax2onnx"
# A name of no platform: none of the forms for one of them is chosen, but plain convolutions and
# reshapes, which ONNX has (devices/hardware.py).
FORMS = "onnx"


def serialise(params: Any, config: Config, shape: tuple[int, int, int]) -> bytes:
    """Returns the ONNX model.

    Args:
      params: the parameters, which become constants of the model.
      config: see `program.settings`.
      shape: (h, w, c) of the images.

    Raises:
      BadInput: an operation of the method has no translation.
    """
    to_onnx = importlib.import_module(REQUIRED).to_onnx
    # It says of every value without a use that its type is not known.
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    params, traced = jax.tree.map(jnp.asarray, params), program.make(config, FORMS)

    def run(image: Any) -> tuple[Any, ...]:
        outputs = traced(params, image[None])
        return tuple(outputs[name][0] for name in program.OUTPUTS)

    (count,) = export.symbolic_shape("b")
    images: Any = jax.ShapeDtypeStruct((count, *shape), jnp.uint8)
    try:
        # One image at a time, because ONNX cannot split an axis whose size is not known, as the
        # maps do. As a jaxpr, because jax2onnx replaces functions of jax.numpy and flax by its own,
        # which have no rule for vmap.
        traced_batch = jax.make_jaxpr(jax.vmap(run))(images)
        model: Any = to_onnx(
            jaxpr_as_fun(traced_batch),
            [images],
            input_names=[program.IMAGES],
            output_names=list(program.OUTPUTS),
        )
    except Exception as error:  # the translation raises many types
        raise BadInput(
            f"--format=onnx: the method {config.method} with eval.apply={config.eval.apply} has no "
            f"translation ({first_line(error, 200)}); try --format=stablehlo"
        ) from error
    return model.SerializeToString()


def load(content: bytes) -> program.Run:
    """Returns the model as a function of images, run by onnxruntime on the CPU.

    The function raises BadInput if onnxruntime cannot run the model.
    """
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # what it logs of an error it raises as well

    def run(images: np.ndarray) -> dict[str, Any]:
        try:
            session = runtime.InferenceSession(content, options, ["CPUExecutionProvider"])
            values = session.run(list(program.OUTPUTS), {program.IMAGES: images})
        except Exception as error:  # the runtime has types of its own for every status
            raise BadInput(
                "--format=onnx: onnxruntime cannot run the translation "
                f"({first_line(error, 200)}); try --format=stablehlo"
            ) from error
        return dict(zip(program.OUTPUTS, values, strict=True))

    return run


def requirements(content: bytes) -> dict[str, Any]:
    """Returns the versions that can read a file, for its sidecar."""
    model = importlib.import_module("onnx").load_from_string(content)
    return {
        "packages": ["onnxruntime"],
        "ir_version": model.ir_version,
        "opsets": {opset.domain or "ai.onnx": opset.version for opset in model.opset_import},
        "checked_with_onnxruntime": importlib.metadata.version("onnxruntime"),
        "written_by_jax2onnx": importlib.metadata.version("jax2onnx"),
    }
