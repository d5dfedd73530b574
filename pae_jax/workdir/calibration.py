"""W/calibration/KEY.npz: statistics of the held-out maps, by which a model's maps are standardised.

There is a file for each way to compute a map that was asked for with `eval.calibration`; KEY is a
hash of these settings. The format is that of `archive`: `mean` and `deviation` (h, w), or
(h, w, parts) where `eval.anomaly_map` names several, `images`, the number of held-out images, and
`step` and `digest`, which identify the model as in thresholds.json. The file of another model is
not used, but replaced.
"""

import hashlib
import json
from typing import Any

import numpy as np

from data_pipelines.errors import BadInput, first_line
from pae_jax.anomaly_map import Calibration
from pae_jax.config import EvalConfig
from pae_jax.workdir import archive
from pae_jax.workdir.files import write_atomically
from pae_jax.workdir.paths import AnyPath
from pae_jax.workdir.thresholds import dependencies, identify

FOLDER = "calibration"


def locate(workdir: AnyPath, settings: EvalConfig) -> AnyPath:
    """Returns the path of the file for the settings of an evaluation."""
    text = json.dumps(dependencies(settings), sort_keys=True)
    return workdir / FOLDER / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"


def read(
    workdir: AnyPath, params: Any, step: int, settings: EvalConfig, shape: tuple[int, int]
) -> Calibration | None:
    """Returns the calibration of a model, numpy arrays; None if there is none of this model.

    Args:
      workdir: the folder of the run.
      params: the parameters of the model.
      step: the number of updates in its checkpoint.
      settings: the settings of the evaluation.
      shape: (h, w) of the maps.

    Raises:
      BadInput: the file is damaged.
    """
    path = locate(workdir, settings)
    if not path.exists():
        return None
    try:
        stored = archive.decode(path.read_bytes(), ("step", "digest", *Calibration._fields))
        model = {"step": int(stored["step"]), "digest": str(stored["digest"])}
        calibration = Calibration(stored["mean"], stored["deviation"])
        parts = len(settings.parts)
        expected = shape if parts == 1 else (*shape, parts)
        for values in calibration:
            if (values.shape, values.dtype) != (expected, np.float32):
                raise ValueError(f"{values.dtype}{list(values.shape)}, not float32{list(expected)}")
            if not np.isfinite(values).all():
                raise ValueError("a value is not finite")
        if not (calibration.deviation > 0).all():
            raise ValueError("a deviation is not positive")
    except Exception as error:  # zip, numpy and the drivers of buckets raise many types
        raise BadInput(f"{path}: damaged; remove it ({first_line(error, 120)})") from error
    return calibration if model == identify(params, step) else None


def write(
    workdir: AnyPath,
    params: Any,
    step: int,
    settings: EvalConfig,
    calibration: Calibration,
    *,
    images: int,
) -> None:
    """Writes the file, at once or not at all.

    Args:
      workdir: the folder of the run.
      params: the parameters of the model.
      step: the number of updates in its checkpoint.
      settings: the settings of the evaluation.
      calibration: the statistics.
      images: the number of images that they are taken from.

    Raises:
      CannotWrite: no space or no permission.
    """
    content = {**calibration._asdict(), "images": images, **identify(params, step)}
    write_atomically(locate(workdir, settings), archive.encode(content))
