"""The program that is exported: uint8 images in, anomaly maps and image scores out.

It is `detection.detect` without the reconstruction, so that everything but decoding and resizing is
inside, the calibration of the maps included. `deviation` compares an exported form of it with
`detection` itself.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, UInt8

from data_pipelines.errors import BadInput
from pae_jax import detection
from pae_jax.config import Config
from pae_jax.detection import REPORTED_SCORES
from pae_jax.devices import hardware

IMAGES, MAP = "images", "map"
OUTPUTS = (MAP, *(f"score_{name}" for name in REPORTED_SCORES))  # the columns of scores.csv

Run = Callable[[UInt8[np.ndarray, "n h w c"]], dict[str, Any]]


class Deviation(NamedTuple):
    """The largest differences between an exported program and `detection`.

    Attributes:
      map: of the maps' pixels in [0, 1], before they are standardised if they are calibrated.
      score: of the scores, relative to those above 1; of calibrated maps, relative to the score of
        a map that is everywhere 1 before it is divided by the deviations, if that is larger.
    """

    map: float
    score: float


def settings(config: Config) -> Config:
    """Returns the config of the program: nothing of training is left in it."""
    config = detection.inference_config(config)
    # Rematerialisation concerns gradients, of which there are none.
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat=False))


def make(config: Config, platform: str) -> Callable[[Any, Array], dict[str, Array]]:
    """Returns the program as a new function (params, images) → outputs by name.

    Args:
      config: see `settings`.
      platform: the platform whose forms are traced, "cpu", "gpu" or "tpu"; another name chooses
        none of their own forms.
    """

    def run(params: Any, images: Array) -> dict[str, Array]:
        with hardware.building_for(platform):
            result = detection.detect(params, images, config)
        scores = {f"score_{name}": value for name, value in result.scores.items()}
        return {MAP: result.map, **scores}

    return run


def trial_images(count: int, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "n h w c"]:
    """Returns images of noise; the first of them, except the last, are black, white and grey."""
    images = np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)
    for i, value in zip(range(count - 1), (0, 255, 128), strict=False):
        images[i] = value
    return images


def deviation(run: Run, params: Any, config: Config, images: np.ndarray) -> Deviation:
    """Compares an exported program with `detection` on this machine's CPU.

    Args:
      run: the exported program; NaN in its outputs counts as an infinite deviation.
      params: the parameters that are inside it, with the calibration if there is one.
      config: see `settings`.
      images: (n, h, w, c) uint8.

    Raises:
      BadInput: JAX has no CPU in this process.
    """
    # On a CPU, because accelerators round products to fewer bits, in each program otherwise.
    device = _cpu()
    with jax.default_device(device):
        expected = jax.jit(make(config, "cpu"))(jax.device_put(params, device), images)
        found = run(images)
    errors, units = {}, _units(params, config)
    for name in OUTPUTS:
        value, reference = np.asarray(found[name]), np.asarray(expected[name])
        if value.shape != reference.shape:
            return Deviation(np.inf, np.inf)
        scale = units[name] if name == MAP else np.maximum(units[name], np.abs(reference))
        error = float(np.max(np.abs(value - reference) / scale))
        errors[name] = error if np.isfinite(error) else np.inf
    return Deviation(errors.pop(MAP), max(errors.values()))


def _units(params: Any, config: Config) -> dict[str, Any]:
    """Returns the scale of each output on which its deviations are measured.

    A program rounds the map in [0, 1], and a calibration divides the rounding by the deviations.
    Where it adds several maps, their roundings add up.
    """
    if not isinstance(params, detection.Calibrated):
        return dict.fromkeys(OUTPUTS, 1.0)
    unit = 1 / np.asarray(params.calibration.deviation)[None]
    unit = unit if unit.ndim == 3 else unit.sum(axis=-1)
    scores = detection.image_scores(jax.device_put(unit, _cpu()), config.eval)
    return {MAP: unit, **{f"score_{name}": np.asarray(value) for name, value in scores.items()}}


def _cpu() -> Any:
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        raise BadInput(
            "JAX_PLATFORMS: the check of an exported program needs the CPU too; write it last, as "
            "in JAX_PLATFORMS=cuda,cpu"
        ) from None
