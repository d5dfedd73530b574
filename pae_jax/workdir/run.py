"""One run: the data, checkpoints, log and result of one config in one workdir."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np

from data_pipelines.dataset import TrainingSplit, open_training
from data_pipelines.errors import BadInput, printable
from data_pipelines.textures import Textures, open_textures
from pae_jax import augmentation, detection, methods
from pae_jax.config import Config
from pae_jax.devices import batches, process
from pae_jax.workdir import (
    calibration,
    changes,
    logs,
    record,
    suppression,
    thresholds,
    validation,
)
from pae_jax.workdir.checkpoint import Checkpoints
from pae_jax.workdir.lock import Check
from pae_jax.workdir.paths import AnyPath, to_workdir
from pae_jax.workdir.staging import Staging

_logger = logging.getLogger(__name__)

FINISHED, STOPPED, DIVERGED = "finished", "stopped", "diverged"


class TrainResult(NamedTuple):
    """The outcome of a run.

    Attributes:
      outcome: FINISHED; STOPPED by SIGTERM or Ctrl-C, with the state saved; or DIVERGED, when the
        loss, the gradient or the parameters of `step` were not finite. The last good checkpoint
        is kept in that case.
      step: the number of updates done, or the number of the update that diverged.
      validation: metrics of the last validation on held-out corruptions.
    """

    outcome: str
    step: int
    validation: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Run:
    """An opened run; see `open_run`.

    Attributes:
      config: the configuration.
      workdir: the folder, locked by this process.
      data: training and held-out images.
      textures: training and held-out textures.
      on_device: whether images and textures are kept on the device.
      checkpoints: the checkpoints in the workdir.
      is_main_process: whether this process validates and logs. All processes save.
      staging: the local folder of the log and of traces; the workdir itself if it is local.
      check_owner: raises CannotWrite if another process has taken the workdir over.
    """

    config: Config
    workdir: AnyPath
    data: TrainingSplit
    textures: Textures
    on_device: bool
    checkpoints: Checkpoints
    is_main_process: bool
    staging: Staging
    check_owner: Check

    def steps_per_call(self, start: int) -> int:
        """Returns how many steps run per compiled call if the run starts after `start` steps."""
        return batches.steps_per_call(self.config, on_device=self.on_device, start=start)

    def open_batches(self, start: int, rows: Sequence[int] | None = None) -> batches.Batches:
        """Opens the batches of the steps from `start` on.

        Args:
          start: the number of steps done.
          rows: the rows of each batch that this process needs; None for all.
        """
        return batches.open_batches(
            self.config,
            self.data.images,
            self.textures.train,
            start=start,
            steps=self.steps_per_call(start),
            on_device=self.on_device,
            rows=rows,
            reserved=self.data.reserved,
        )

    @contextlib.contextmanager
    def open_recorder(self, start: int) -> Iterator["Recorder"]:
        """Opens the log for the steps from `start` on, and prepares the validation.

        Args:
          start: the number of steps done. Lines of later steps in the log are dropped.

        Yields:
          The recorder, which logs only in the main process.
        """
        if not self.is_main_process:
            yield Recorder(self.checkpoints)
            return
        examples = validation.fixed_examples(
            self.data.held_out, self.textures.held_out, self.config
        )
        validate = validation.make_validate(self.config, examples)
        with logs.RunLog(self.workdir, self.config, start=start, staging=self.staging) as log:

            def prepare_save() -> None:
                self.check_owner()
                # First, so that a run that is killed has the log of its newest checkpoint.
                log.flush()
                self.staging.upload()

            yield Recorder(self.checkpoints, log, validate, prepare_save, self._write_thresholds)

    def _write_thresholds(self, step: int, params: Any) -> None:
        """Writes what the thresholds of `pae evaluate` and `pae predict` are chosen from.

        The calibration of the maps is written with it, if the config asks for one.
        """
        settings = self.config.eval
        key = self.workdir, params, step, settings
        with contextlib.suppress(BadInput):  # a damaged file is replaced
            if thresholds.read(*key) is not None and (
                settings.calibration == "none"
                or calibration.read(*key, self.config.data.shape) is not None
            ):
                return
        held_out, statistics = detection.measure_held_out(params, self.data.held_out, self.config)
        thresholds.write(*key, held_out)
        if statistics is not None:
            calibration.write(*key, statistics, images=len(held_out.maxima))


@dataclasses.dataclass
class Recorder:
    """Validates, logs and saves a run, and keeps its result.

    Attributes:
      checkpoints: the run's checkpoints.
      log: the run's log in the main process, None in the others.
      validate_params: parameters → metrics and a panel; None with `log`.
      prepare_save: is called before each save; None with `log`.
      measure_held_out: step and parameters → writes W/thresholds.json, and W/calibration/ if the
        maps are calibrated; None with `log`.
      scores: metrics of the last validation.
      result: how the run ended; None until then.
      beside: the step and the outcome of a validation beside the training, until it is logged.
    """

    checkpoints: Checkpoints
    log: logs.RunLog | None = None
    validate_params: Callable[[Any], tuple[dict[str, float], np.ndarray]] | None = None
    prepare_save: Callable[[], None] | None = None
    measure_held_out: Callable[[int, Any], None] | None = None
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    result: TrainResult | None = None
    beside: tuple[int, futures.Future[tuple[dict[str, float], np.ndarray]]] | None = None

    def validate(self, step: int, params: Any) -> None:
        """Computes and logs metrics and a panel on held-out corruptions.

        Args:
          step: the number of updates done.
          params: parameters on one device of this process.
        """
        self.finish_validation()
        if self.log and self.validate_params:
            self.scores, panel = self.validate_params(params)
            self.log.validation(step, self.scores, panel)

    def validate_beside(self, thread: futures.Executor, step: int, params: Any) -> None:
        """Starts `validate` in a thread, while training goes on.

        It is logged before anything else is written, so that the log and the checkpoints are those
        of a validation that training waits for.

        Args:
          thread: runs the validation.
          step: the number of updates done.
          params: as in `validate`; the training must not change them meanwhile.
        """
        if self.validate_params:
            self.beside = step, thread.submit(self.validate_params, params)

    def finish_validation(self) -> None:
        """Waits for the validation beside the training, if there is one, and logs it."""
        if self.log and self.beside:
            step, outcome = self.beside
            self.beside, began = None, time.perf_counter()
            self.scores, panel = outcome.result()
            self.log.validation(step, self.scores, panel, waited=time.perf_counter() - began)

    def log_steps(
        self,
        step: int,
        metrics: Mapping[str, np.ndarray],
        data_seconds: float,
        flops: float | None,
    ) -> None:
        """Logs the steps of one call; sets the result to DIVERGED if a metric is not finite.

        Args:
          step: the number of updates done before the call.
          metrics: the metrics of the call's steps, (steps,) each.
          data_seconds: the time that the call waited for its data.
          flops: FLOP of one step on one device, if known.
        """
        count = len(metrics["loss"])
        for i in range(count):
            values = {name: float(value[i]) for name, value in metrics.items()}
            if self.log:
                if self.log.is_due(step + i + 1) or (self.beside and self.beside[1].done()):
                    self.finish_validation()
                self.log.step(step + i + 1, values, data_seconds / count, flops)
            if not all(map(math.isfinite, values.values())):
                self.finish(DIVERGED, step + i + 1)
                return

    def save(self, step: int, state: Any) -> None:
        """Saves a checkpoint in the background, after the log that belongs to it."""
        self.finish_validation()
        if self.prepare_save:
            self.prepare_save()
        self.checkpoints.save(step, state)

    def write_thresholds(self, step: int, params: Any) -> None:
        """Writes what thresholds are chosen from, so that predicting needs no training images.

        Args:
          step: the number of updates done, which are all.
          params: parameters on one device of this process.
        """
        if self.measure_held_out:
            self.measure_held_out(step, params)

    def finish(self, outcome: str, step: int) -> None:
        """Sets the result."""
        self.finish_validation()
        self.result = TrainResult(outcome, step, self.scores)


@contextlib.contextmanager
def open_run(config: Config, workdir: str | os.PathLike[str]) -> Iterator[Run]:
    """Checks a config, opens its data, and locks the workdir while the context is open.

    If several processes train one run, each opens it, and the main process holds the lock. What
    one of them cannot use, all refuse, and so do processes with different configs or data.

    Args:
      config: the run's configuration.
      workdir: a new folder, or one that holds a run of the same configuration; local or gs://.

    Yields:
      The run.

    Raises:
      BadInput: the config or its data cannot be used, or the workdir holds another run.
    """
    is_main_process = jax.process_index() == 0
    with process.fail_together():
        workdir = to_workdir(workdir)
        augmentation.check_policy(config.data.augmentation, config.data.shape)
        methods.check(config)
        detection.check_calibration(config)
        lines = record.check_workdir(workdir, config)
        data, textures = open_data(config)
        detection.check_calibration(config, len(data.held_out))
        foreground = suppression.named_by(config)
        data_record, *earlier = _data_records(data, textures, foreground)
    _compare_processes(workdir, config, data_record)
    with contextlib.ExitStack() as stack:
        check_owner = _no_check
        with process.fail_together():
            if is_main_process:
                locked = record.lock_workdir(workdir, config, data_record, *earlier)
                check_owner = stack.enter_context(locked)
                if foreground:
                    suppression.write(workdir, foreground)
                for line in lines:
                    _logger.info("%s", printable(f"{workdir}: {line}"))
        staging = stack.enter_context(Staging(workdir))
        checkpoints = stack.enter_context(Checkpoints(workdir, keep=config.train.keep_checkpoints))
        on_device = batches.is_resident(config, data.images, textures.train)
        yield Run(
            config,
            workdir,
            data,
            textures,
            on_device,
            checkpoints,
            is_main_process,
            staging,
            check_owner,
        )


def _no_check() -> None:
    """Takes the place of `lock` in the processes that do not hold the lock."""


def _compare_processes(workdir: AnyPath, config: Config, data_record: Mapping[str, Any]) -> None:
    """Checks that all processes have the same config and data and see the same checkpoints.

    Raises:
      BadInput: they do not; the same line in all of them.
    """
    checkpoints = sorted(path.name for path in (workdir / "checkpoints").glob("[0-9]*"))
    settings = changes.without_places(config)
    values = {"config": settings, "data": data_record, "checkpoints": checkpoints}
    first, *others = map(json.loads, process.gather_texts(json.dumps(values)))
    for i, other in enumerate(others, start=1):
        for key, value, other_value in changes.differences(first, other):
            raise BadInput(
                f"process {i} differs from process 0: {key} is {value!r} in process 0 and "
                f"{other_value!r} in process {i}; all need one command, the same data and a "
                "shared workdir"
            )


def open_data(config: Config) -> tuple[TrainingSplit, Textures]:
    """Opens the training images and textures, each with a held-out part.

    The images have suppressed backgrounds if `data.foreground` names a network.
    """
    foreground = suppression.named_by(config)  # refused before the images are read
    split = suppression.suppress_split(open_images(config), foreground, config.data.cache_dir)
    return split, open_run_textures(config)


def open_images(config: Config) -> TrainingSplit:
    """Opens the training images as they are, with a held-out part."""
    data = config.data
    return open_training(
        data.spec,
        holdout_fraction=data.holdout_fraction,
        seed=config.train.seed,
        max_images=data.max_images,
        reserved_fraction=methods.METHODS[config.method].reserved_fraction(config),
    )


def open_run_textures(config: Config) -> Textures:
    """Opens the textures, with a held-out part."""
    data, seed = config.data, config.train.seed
    return open_textures(data.textures, size=data.texture_size, cache_dir=data.cache_dir, seed=seed)


def _data_records(
    data: TrainingSplit,
    textures: Textures,
    foreground: suppression.Foreground | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields the contents of data.json, and then those that earlier versions would have written."""
    suppressed = {} if foreground is None else {"foreground": foreground.fingerprint}
    # Only where it has a part: a record without it is that of images of 8 bits.
    values = {} if data.value_range is None else {"value_range": list(data.value_range)}
    prints = (
        (data.fingerprint, textures.fingerprint),
        (data.earlier_fingerprint, textures.earlier_fingerprint),
    )
    for fingerprint, textures_fingerprint in prints:
        yield {
            "channels": data.channels,
            **values,
            **suppressed,
            "training_images": len(data.images),
            "held_out_names": list(data.held_out_names),
            "fingerprint": fingerprint,
            "textures": {"training": len(textures.train), "held_out": len(textures.held_out)},
            "textures_fingerprint": textures_fingerprint,
        }
