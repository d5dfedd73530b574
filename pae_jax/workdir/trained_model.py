"""A trained model of a workdir: its parameters, its images, its calibration and its thresholds."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from data_pipelines.dataset import TrainingSplit
from data_pipelines.errors import BadInput, CannotWrite
from data_pipelines.textures import Textures
from pae_jax import detection, train_step
from pae_jax.anomaly_map import Calibration
from pae_jax.config import Config, from_config_dict
from pae_jax.config_file import override
from pae_jax.detection import Calibrated, HeldOut, Thresholds, choose_thresholds
from pae_jax.workdir import calibration as stored_calibration
from pae_jax.workdir import parameters, suppression
from pae_jax.workdir import thresholds as stored_thresholds
from pae_jax.workdir.changes import PLACES
from pae_jax.workdir.checkpoint import Checkpoints
from pae_jax.workdir.paths import AnyPath
from pae_jax.workdir.record import read_config, read_data_record
from pae_jax.workdir.run import open_images, open_run_textures
from pae_jax.workdir.suppression import Foreground

_logger = logging.getLogger(__name__)

# The beginnings of keys that may be set after training.
_SETTABLE = ("eval.", *(f"{key}=" for key in PLACES))


class Model(NamedTuple):
    """A trained model of a workdir.

    Attributes:
      config: the configuration of the run, with the overrides.
      params: the parameters for evaluation; their moving average if the run computes one.
      step: the number of updates in the checkpoint.
      channels: the channels of the stored images; 1 if all training images are grey, else 3.
      value_range: the values of training images of more than 8 bits that became 0 and 255, or None.
      foreground: the network that suppresses the background, or None.
      calibration: the statistics of the held-out maps; None if `eval.calibration` is none.
    """

    config: Config
    params: Any
    step: int
    channels: int
    value_range: tuple[float, float] | None = None
    foreground: Foreground | None = None
    calibration: Calibration | None = None

    @property
    def detector(self) -> Any:
        """What `detection` takes as parameters: `params`, with the calibration if there is one."""
        if self.calibration is None:
            return self.params
        return Calibrated(self.params, self.calibration)


def load(workdir: AnyPath, overrides: Sequence[str] = ()) -> Model:
    """Returns the model of the newest readable checkpoint, or of a packed folder.

    The calibration of its maps is stored in the workdir when training ends. For settings that no
    call has asked for yet, it is computed from the held-out images and stored.

    Args:
      workdir: the folder of a training run, or of `pae pack`.
      overrides: words --config.eval.KEY=VALUE, or places of the data, --config.data.root=DIR.

    Raises:
      BadInput: no run, no readable checkpoint or parameters, or an override of another key; or a
        calibration that needs the training images, which cannot be opened, or is not possible.
    """
    config = read_config(workdir)
    for word in overrides:
        if not word.removeprefix("--config.").startswith(_SETTABLE):
            raise BadInput(
                f"{word}: after training, only --config.eval.KEY=VALUE can be set, and where the "
                f"data are: {', '.join(f'--config.{key}' for key in PLACES)}"
            )
    config = from_config_dict(override(config.to_dict(), overrides))
    if config.data.foreground != read_config(workdir).data.foreground:
        _check_foreground(workdir, config)
    data = read_data_record(workdir)
    detection.check_calibration(config, len(data["held_out_names"]))
    step, params = _read_parameters(workdir, config)
    values = tuple(data["value_range"]) if "value_range" in data else None
    foreground = open_foreground(workdir, config)
    model = Model(config, params, step, data["channels"], values, foreground)
    return model._replace(calibration=_read_calibration(workdir, model))


def _read_calibration(workdir: AnyPath, model: Model) -> Calibration | None:
    """Returns the calibration on the device of the model; computes what the workdir lacks."""
    settings, shape = model.config.eval, model.config.data.shape
    if settings.calibration == "none":
        return None
    known = stored_calibration.read(workdir, model.params, model.step, settings, shape)
    if known is None:
        _, known = _measure_held_out(workdir, model)
    # On the device once, and not with every batch.
    return jax.device_put(known, jax.devices()[0])


def _read_parameters(workdir: AnyPath, config: Config) -> tuple[int, Any]:
    """Returns step and parameters of a packed model, or of the newest readable checkpoint."""
    if not (workdir / parameters.NAME).exists():
        step, state = restore(workdir, config)
        return step, state.eval_params
    step, params = parameters.read(workdir, _shapes(config).eval_params)
    return step, jax.device_put(params, jax.devices()[0])


def restore(
    workdir: AnyPath, config: Config, *, until: int | None = None
) -> tuple[int, train_step.TrainState]:
    """Restores the newest readable checkpoint to the first device.

    Args:
      workdir: the folder of a training run.
      config: the configuration of the run; it determines the shapes of the state.
      until: the largest step that may be restored; None for no limit.

    Returns:
      (updates done, state).

    Raises:
      BadInput: no readable checkpoint.
    """
    # A checkpoint may have been written from many devices; evaluation takes one.
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        _shapes(config),
    )
    with Checkpoints(workdir) as checkpoints:
        restored = checkpoints.restore(abstract, until=until)
    if restored is None:
        raise BadInput(f"{workdir}: holds no checkpoint yet")
    return restored


def _shapes(config: Config) -> train_step.TrainState:
    # Only the shapes are needed, so no parameter is drawn.
    return jax.eval_shape(lambda: train_step.init_state(config, jax.random.key(0)))


def open_split(workdir: AnyPath, config: Config) -> TrainingSplit:
    """Opens the training split of the run: the training images and those held out.

    Args:
      workdir: the folder of a training run.
      config: the configuration of the run.

    Raises:
      BadInput: the training images are missing, or differ from those of the run.
    """
    data, split = config.data, open_images(config)
    record = read_data_record(workdir)
    if record["fingerprint"] not in (split.fingerprint, split.earlier_fingerprint):
        raise BadInput(f"{data.root or data.source}: other training images than those of the run")
    # Earlier versions took this range for all images of more than 8 bits.
    values = tuple(record.get("value_range", (0.0, 65535.0)))
    if split.value_range not in (None, values):
        raise BadInput(
            f"{workdir}: trained on values {values} of images of more than 8 bits, and by "
            f"data.value_range they are {split.value_range} now; train in a new workdir"
        )
    return suppression.suppress_split(split, open_foreground(workdir, config), data.cache_dir)


def open_foreground(workdir: AnyPath, config: Config) -> Foreground | None:
    """Returns the network that suppresses the backgrounds of a run; None if it has none.

    It is read from the workdir of the run, which holds a copy.

    Args:
      workdir: the folder of a training run.
      config: the configuration of the run.

    Raises:
      BadInput: the copy is missing, damaged, or not the one of the training.
    """
    if not config.data.foreground:
        return None
    foreground = suppression.read(workdir, "copy it from the workdir of `pae foreground`")
    if foreground.fingerprint != read_data_record(workdir).get("foreground"):
        raise BadInput(
            f"{workdir / suppression.NAME}: another foreground network than that of the training; "
            "copy the file from the workdir of `pae foreground`"
        )
    return foreground


def _check_foreground(workdir: AnyPath, config: Config) -> None:
    """Checks that an override of `data.foreground` names the network of the run."""
    given, known = suppression.named_by(config), read_data_record(workdir).get("foreground")
    if (given and given.fingerprint) != known:
        raise BadInput(
            f"data.foreground: {config.data.foreground or 'none'} is not the foreground network "
            f"of the run in {workdir}; leave the key out, or train a run of its own with it"
        )


def open_textures(workdir: AnyPath, config: Config) -> Textures:
    """Opens the textures of the run, with a held-out part.

    Args:
      workdir: the folder of a training run.
      config: the configuration of the run.

    Raises:
      BadInput: the textures are missing, or differ from those of the run.
    """
    textures = open_run_textures(config)
    known = (textures.fingerprint, textures.earlier_fingerprint)
    if read_data_record(workdir).get("textures_fingerprint", known[0]) not in known:
        raise BadInput(f"{config.data.textures}: other textures than those of the run")
    return textures


def thresholds(
    workdir: AnyPath, model: Model, split: Callable[[], TrainingSplit] | None = None
) -> Thresholds:
    """Returns the thresholds of a model from the held-out normal images.

    What they are chosen from is stored in the workdir when training ends, so that the training
    images are needed only for maps that no call has asked for yet.

    Args:
      workdir: the folder of the training run.
      model: the model of the run.
      split: opens the training images, by default with `open_split`. It is called only if the
        workdir does not hold what is needed.

    Raises:
      BadInput: the training images are needed and cannot be opened.
    """
    key = workdir, model.params, model.step, model.config.eval
    if (known := stored_thresholds.read(*key)) is not None:
        return known
    held_out, _ = _measure_held_out(workdir, model, split)
    return choose_thresholds(held_out, model.config.eval)


def _measure_held_out(
    workdir: AnyPath, model: Model, split: Callable[[], TrainingSplit] | None = None
) -> tuple[HeldOut, Calibration | None]:
    """Applies a model to the held-out images, and stores what `detection.measure_held_out` returns.

    Args:
      workdir: where it is stored, if that can be written.
      model: the model; its calibration is not read.
      split: opens the training images, by default with `open_split`.

    Raises:
      BadInput: the training images cannot be opened.
    """
    try:
        training = split() if split else open_split(workdir, model.config)
    except BadInput as error:
        raise BadInput(
            f"{error}; thresholds for these settings need the training images, and "
            "--config.data.root=DIR names their folder"
        ) from error
    held_out, calibration = detection.measure_held_out(
        model.params, training.held_out, model.config
    )
    key = workdir, model.params, model.step, model.config.eval
    try:
        stored_thresholds.write(*key, held_out)
        if calibration is not None:
            stored_calibration.write(*key, calibration, images=len(held_out.maxima))
    except CannotWrite as error:
        # The workdir may be read-only, or that of another user.
        _logger.info("%s; the thresholds are chosen again at the next time", error)
    return held_out, calibration
