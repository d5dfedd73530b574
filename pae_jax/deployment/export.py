"""`pae export`: a trained model as one program that runs without this package.

F        the program: uint8 images in, map and scores out; parameters, map and smoothing inside
F.json   its sidecar: size and channels of the images, thresholds, versions that can read the
         program, its deviation from `detection`, provenance

Decoding and resizing stay outside, because image formats are no matter of a network.
"""

import hashlib
import importlib.util
import logging
import os
from collections.abc import Sequence
from typing import Any

import jax

from data_pipelines.errors import BadInput, printable
from pae_jax.deployment import onnx, program, stablehlo
from pae_jax.report import statements
from pae_jax.workdir import files, provenance, thresholds, trained_model
from pae_jax.workdir.paths import AnyPath, to_path, to_workdir

FORMATS = {"stablehlo": stablehlo, "onnx": onnx}
SCHEMA = 1  # of the sidecar
# The largest deviation from `detection` that is written. In bfloat16 each compiled program rounds
# other values.
BFLOAT16_TOLERANCE = 1e-2
TRIAL_IMAGES = 4  # black, white, grey and noise

_logger = logging.getLogger(__name__)


def export(
    workdir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str = "stablehlo",
    overrides: Sequence[str] = (),
) -> AnyPath:
    """Writes the program of a trained model and its sidecar.

    Before anything is written, the program runs on this machine's CPU and is compared with
    `detection`.

    Args:
      workdir: the folder of a training run or a packed model, local or gs://.
      out: the new file, local or a URI; the sidecar is `out`.json.
      format: "stablehlo", or "onnx" with the package jax2onnx.
      overrides: words --config.eval.KEY=VALUE, or places of the data, --config.data.root=DIR.

    Returns:
      The path of the program.

    Raises:
      BadInput: one line that names the file, key or package; also if the program deviates from
        `detection`.
      CannotWrite: no space or no permission.
    """
    workdir, path = to_workdir(workdir), to_path(out)
    sidecar = path.with_name(f"{path.name}.json")
    writer = _check(path, sidecar, format)
    model = trained_model.load(workdir, overrides)
    if model.foreground:
        raise BadInput(
            f"{workdir}: suppresses the background of its images by another network, which is no "
            "part of an exported program; `pae pack` keeps both"
        )
    files.check_writable(path.parent)
    chosen = trained_model.thresholds(workdir, model)
    config = program.settings(model.config)
    shape = (*config.data.shape, model.channels)
    params = jax.device_get(model.detector)
    content = writer.serialise(params, config, shape)
    deviation = program.deviation(
        writer.load(content), params, config, program.trial_images(TRIAL_IMAGES, shape)
    )
    limit = BFLOAT16_TOLERANCE if config.model.dtype == "bfloat16" else writer.TOLERANCE
    if max(deviation) > limit:
        raise BadInput(
            f"{path}: not written, because the {format} program deviates from this package by "
            f"{deviation.map:.2g} (map) and {deviation.score:.2g} (scores), more than {limit:g}"
        )
    record = {
        "schema": SCHEMA,
        "format": format,
        "file": {
            "name": path.name,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        },
        "input": _describe_input(model),
        "outputs": _describe_outputs(model, shape),
        "thresholds": {
            "decides": f"score_{config.eval.image_score}",
            **chosen._asdict(),
            "rule": statements.threshold(
                chosen.images,
                chosen.false_positive_rate,
                calibrated=model.calibration is not None,
            ),
        },
        "readers": writer.requirements(content),
        "deviation": {**deviation._asdict(), "limit": limit, "images": TRIAL_IMAGES},
        "model": thresholds.identify(model.params, model.step),
        "provenance": provenance.describe(model.config, step=model.step),
    }
    with files.new_files(sidecar, path):
        files.write_json(sidecar, record)
        # Last, because it stands for both.
        files.write_atomically(path, content)
    _logger.info(
        "%s", printable(f"{path}: {len(content) / 1e6:.1f} MB, deviation {max(deviation):.1g}")
    )
    return path


def _check(path: AnyPath, sidecar: AnyPath, format: str) -> Any:
    """Returns the module of a format, if a file of it can be written here.

    Raises:
      BadInput: the format does not exist or needs a package, or a file is there already.
    """
    if format not in FORMATS:
        raise BadInput(f"--format={format}: {' or '.join(FORMATS)}")
    if format != "onnx" and path.suffix == ".onnx":
        raise BadInput(f"{path}: --format={format} writes no ONNX; add --format=onnx")
    files.check_new(sidecar, path)
    writer = FORMATS[format]
    if importlib.util.find_spec(writer.REQUIRED) is None:
        raise BadInput(f"--format={format}: needs the package {writer.REQUIRED}; {_advice(format)}")
    return writer


def _advice(format: str) -> str:
    if format == "onnx":
        # It asks for an older Orbax than the checkpoints of this package do.
        return (
            "install it in an environment of its own, and export there what `pae pack` wrote "
            "(docs/deployment.md)"
        )
    return f"pip install {FORMATS[format].REQUIRED}"


def _describe_input(model: trained_model.Model) -> dict[str, Any]:
    """Returns what has to be done to an image before the program takes it (data_pipelines)."""
    height, width = model.config.data.shape
    colour = "RGB" if model.channels == 3 else "grey: ITU-R 601 luma"
    return {
        "name": program.IMAGES,
        "dtype": "uint8",
        "shape": [height, width, model.channels],
        "batch": "first axis, any number of images from 1 on",
        "colour": colour,
        "resize": "Pillow's bilinear filter with antialiasing, to (height, width) as they are",
        "values": "0 to 255; from images of more than 8 bits, value_range becomes 0 to 255",
        "value_range": list(model.value_range) if model.value_range else None,
    }


def _describe_outputs(model: trained_model.Model, shape: tuple[int, int, int]) -> dict[str, Any]:
    scores = {name: {"dtype": "float32", "shape": []} for name in program.OUTPUTS[1:]}
    values: dict[str, Any] = {"range": [0, 1]}
    if model.calibration is not None:
        values = {"unit": "standard deviations of held-out normal images at each position"}
    return {program.MAP: {"dtype": "float32", "shape": list(shape[:2]), **values}, **scores}
