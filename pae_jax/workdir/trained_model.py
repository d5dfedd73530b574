"""A trained model of a workdir: its parameters, its images and its thresholds."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from data_pipelines.dataset import TrainingSplit, open_training
from data_pipelines.errors import BadInput
from pae_jax import train_step
from pae_jax.config import Config, from_config_dict
from pae_jax.config_file import override
from pae_jax.config_schema import SCHEMA, upgrade
from pae_jax.detection import Thresholds, choose_thresholds, detect_all
from pae_jax.workdir.checkpoint import Checkpoints
from pae_jax.workdir.files import read_json, write_json
from pae_jax.workdir.record import read_config, read_data_record


class Model(NamedTuple):
    """A trained model of a workdir: its configuration, parameters and their training step."""

    config: Config
    params: Any
    step: int
    channels: int  # of the stored images: 1 for a grey category, else 3


def load(workdir: Path, overrides: Sequence[str] = ()) -> Model:
    """The newest checkpoint of a workdir, with `--config.eval.…` overrides applied.

    Raises:
      BadInput: no run, no readable checkpoint, or an override outside the section eval.
    """
    config = read_config(workdir)
    for word in overrides:
        if not word.startswith("--config.eval."):
            raise BadInput(f"{word}: after training, only --config.eval.KEY=VALUE can be set")
    config = from_config_dict(override(config.to_dict(), overrides))
    step, state = restore(workdir, config)
    channels = read_data_record(workdir)["channels"]
    return Model(config, state.eval_params, step, channels)


def restore(
    workdir: Path, config: Config, *, until: int | None = None
) -> tuple[int, train_step.TrainState]:
    """The newest readable checkpoint, of no step after `until`, on the first device.

    Returns:
      (updates done, state).
    """
    template = jax.eval_shape(lambda: train_step.init_state(config, jax.random.key(0)))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), template
    )
    with Checkpoints(workdir) as checkpoints:
        restored = checkpoints.restore(abstract, until=until)
    if restored is None:
        raise BadInput(f"{workdir}: holds no checkpoint yet")
    return restored


def open_split(workdir: Path, config: Config) -> TrainingSplit:
    """The run's training images and those held out.

    Raises:
      BadInput: the training images are gone, or are others than the run's.
    """
    data = config.data
    split = open_training(
        data.spec, holdout=data.holdout_fraction, seed=config.train.seed, images=data.max_images
    )
    if split.fingerprint != read_data_record(workdir)["fingerprint"]:
        raise BadInput(f"{data.root or data.source}: other training images than the run's")
    return split


def thresholds(
    workdir: Path, model: Model, split: Callable[[], TrainingSplit] | None = None
) -> Thresholds:
    """From the held-out normal images; kept in the workdir, so that they are needed once.

    Args:
      workdir: of the run.
      model: its model.
      split: opens its training images, `open_split` by default; called only where the workdir
        holds no thresholds of this step and these settings yet.
    """
    path = workdir / "thresholds.json"
    settings = model.config.to_dict()["eval"]
    kept = read_json(path) if path.exists() else {}
    if (
        upgrade({"schema": kept.get("schema", 1), "eval": kept.get("eval", {})})["eval"] == settings
        and kept.get("step") == model.step
    ):
        return Thresholds(**kept["thresholds"])
    opened = split() if split else open_split(workdir, model.config)
    detections = list(detect_all(model.params, opened.held_out, model.config))
    result = choose_thresholds(detections, model.config)
    record = {
        "schema": SCHEMA,
        "eval": settings,
        "step": model.step,
        "thresholds": result._asdict(),
    }
    write_json(path, record)
    return result
