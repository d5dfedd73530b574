"""W/thresholds.json: what the decision thresholds of a model are chosen from.

The file holds scores and maxima of the held-out normal images: for one model, and for each way to
compute a map that was asked for. With a calibration they are those of each image's map standardised
by the maps of the others (`detection.measure_held_out`). Rate and score of a threshold are applied
when it is read, so that another rate needs neither the images nor the network.
"""

import hashlib
from typing import Any

import jax
import numpy as np

from data_pipelines.errors import BadInput
from pae_jax.config import EvalConfig, from_config_dict
from pae_jax.config_schema import SCHEMA, upgrade
from pae_jax.detection import HeldOut, Thresholds, choose_thresholds
from pae_jax.workdir.files import read_json, write_json
from pae_jax.workdir.paths import AnyPath

NAME = "thresholds.json"

# The keys of `eval` that maps and scores depend on, and those that matter for one value of `apply`.
_ALWAYS = (
    "anomaly_map",
    "smoothing",
    "smoothing_fraction",
    "symmetries",
    "topk_fraction",
    "apply",
)
_ONLY_WITH = {
    "once": (),
    "tangent": (),
    "iterate": ("iterations",),
    "fixed_point": ("solver", "fixed_point_tolerance", "max_steps"),
}
# A version of the package changed the values of these maps, as many times as the number says.
# Statistics from before a change are not used; they are measured again.
_REVISIONS = {"learned": 1, "logit": 1}  # g in windows of its training size


def dependencies(settings: EvalConfig) -> dict[str, Any]:
    """Returns what the scores of an image depend on: settings, and revisions of the maps."""
    keys = (*_ALWAYS, *_ONLY_WITH[settings.apply])
    if settings.calibration != "none":  # so that files from before this key stay valid
        keys += ("calibration",)
    names = {part.name for part in settings.parts}
    revisions = {name: number for name, number in _REVISIONS.items() if name in names}
    chosen = {key: getattr(settings, key) for key in keys}
    return chosen | ({"revisions": revisions} if revisions else {})


def identify(params: Any, step: int) -> dict[str, Any]:
    """Returns what identifies a model: its step and a hash of its parameters."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return {"step": step, "digest": digest.hexdigest()[:32]}


def read(workdir: AnyPath, params: Any, step: int, settings: EvalConfig) -> Thresholds | None:
    """Returns the thresholds of a model, if the file has what they are chosen from.

    Args:
      workdir: the folder of the run.
      params: the parameters of the model.
      step: the number of updates in its checkpoint.
      settings: the settings of the evaluation.

    Raises:
      BadInput: the file is damaged.
    """
    path = workdir / NAME
    if not path.exists():
        return None
    content = read_json(path)
    try:
        if content.get("schema", 1) < SCHEMA:
            return _read_schema_1(content, step, settings)
        if content.get("model") != identify(params, step):
            return None
        for entry in content["held_out"]:
            if entry["settings"] == dependencies(settings):
                return choose_thresholds(HeldOut(entry["scores"], entry["maxima"]), settings)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path}: damaged; remove it ({error!r})") from error
    return None


def write(
    workdir: AnyPath, params: Any, step: int, settings: EvalConfig, held_out: HeldOut
) -> None:
    """Adds scores of the held-out images to the file, which keeps others of the same model.

    Args:
      workdir: the folder of the run.
      params: the parameters of the model.
      step: the number of updates in its checkpoint.
      settings: the settings of the evaluation.
      held_out: scores and maxima.

    Raises:
      CannotWrite: no space or no permission.
    """
    model, entries = identify(params, step), []
    try:
        content = read_json(workdir / NAME)
        if content["model"] == model:
            entries = [e for e in content["held_out"] if e["settings"] != dependencies(settings)]
    except (BadInput, KeyError, TypeError):  # not there, of schema 1, or damaged
        pass
    entries.append({"settings": dependencies(settings), **held_out._asdict()})
    write_json(workdir / NAME, {"schema": SCHEMA, "model": model, "held_out": entries})


def _read_schema_1(content: Any, step: int, settings: EvalConfig) -> Thresholds | None:
    """Returns the thresholds of a file that holds them for one rate and score."""
    old = from_config_dict({"eval": upgrade({"eval": content["eval"]})["eval"]}).eval
    chosen = [
        (dependencies(s), s.image_score, s.false_positive_rate, n)
        for s, n in ((old, content["step"]), (settings, step))
    ]
    return Thresholds(**content["thresholds"]) if chosen[0] == chosen[1] else None
