"""One run: what belongs to one config and one workdir, whoever drives its steps."""

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from data_pipelines.dataset import TrainingSplit, open_training
from data_pipelines.textures import Textures, open_textures
from pae_jax import augmentation, methods
from pae_jax.config import Config
from pae_jax.devices.batches import Batches, is_resident, open_batches, steps_per_call
from pae_jax.workdir import checkpoint, logs, record, validation

FINISHED, STOPPED, DIVERGED = "finished", "stopped", "diverged"


class TrainResult(NamedTuple):
    """How a run ended.

    Attributes:
      outcome: FINISHED; STOPPED by SIGTERM or Ctrl-C, its state saved; or DIVERGED: the loss, the
        gradient or the parameters of `step` were not finite; the last good checkpoint is kept.
      step: updates done, or the number of the update that diverged.
      validation: metrics of the last validation on held-out corruptions.
    """

    outcome: str
    step: int
    validation: dict[str, float]


class Run(contextlib.ExitStack):
    """A run's data, checkpoints, log and result; a context that takes the workdir for itself.

    Where several processes drive one run, the first alone validates and logs; all of them save.
    """

    def __init__(self, config: Config, workdir: str | Path):
        super().__init__()
        self.config, self.workdir = config, Path(workdir)
        self.is_main_process = jax.process_index() == 0
        self.result: TrainResult | None = None
        self.scores: dict[str, float] = {}
        augmentation.check_policy(config.data.augmentation, config.data.shape)
        methods.check(config)
        record.check_workdir(self.workdir, config)
        self.data, self.textures = open_data(config)
        self.on_device = is_resident(config, self.data.images, self.textures.train)
        self.steps_per_call = 1

    def __enter__(self) -> "Run":
        super().__enter__()
        if self.is_main_process:
            description = _describe(self.data, self.textures)
            self.enter_context(record.lock_workdir(self.workdir, self.config, description))
        self.checkpoints = self.enter_context(
            checkpoint.Checkpoints(self.workdir, keep=self.config.train.keep_checkpoints)
        )
        return self

    def begin(self, start: int) -> Batches:
        """Opens the log and the data for the steps from `start` on; sets `steps_per_call`."""
        self.steps_per_call = steps_per_call(self.config, on_device=self.on_device, start=start)
        if self.is_main_process:
            self.log = self.enter_context(logs.RunLog(self.workdir, self.config, start=start))
            examples = validation.fixed_examples(
                self.data.held_out, self.textures.held_out, self.config
            )
            self._validate = validation.make_validate(self.config, examples)
        return open_batches(
            self.config,
            self.data.images,
            self.textures.train,
            start=start,
            steps=self.steps_per_call,
            on_device=self.on_device,
        )

    def validate(self, step: int, params: Any) -> None:
        """Metrics and panel on held-out corruptions; `params` on one device of this process."""
        if self.is_main_process:
            self.scores, panel = self._validate(params)
            self.log.validation(step, self.scores, panel)

    def log_steps(
        self, step: int, metrics: Mapping[str, np.ndarray], waited: float, flops: float | None
    ) -> None:
        """Logs the steps of one call that began at `step`; `metrics` have shape (steps,).

        Where they are not finite the run's result is DIVERGED from then on.
        """
        count = len(metrics["loss"])
        for i in range(count):
            values = {name: float(value[i]) for name, value in metrics.items()}
            if self.is_main_process:
                self.log.step(step + i + 1, values, waited / count, flops)
            if not all(map(math.isfinite, values.values())):
                self.result = TrainResult(DIVERGED, step + i + 1, self.scores)
                return

    def save(self, step: int, state: Any) -> None:
        self.checkpoints.save(step, state)

    def finish(self, outcome: str, step: int) -> None:
        self.result = TrainResult(outcome, step, self.scores)


def open_data(config: Config) -> tuple[TrainingSplit, Textures]:
    """The training images with those held out, and the textures likewise."""
    data = config.data
    split = open_training(
        data.spec, holdout=data.holdout_fraction, seed=config.train.seed, images=data.max_images
    )
    return split, open_run_textures(config)


def open_run_textures(config: Config) -> Textures:
    """The textures, with those held out."""
    data, seed = config.data, config.train.seed
    return open_textures(data.textures, size=data.texture_size, cache=data.cache_dir, seed=seed)


def _describe(data: TrainingSplit, textures: Textures) -> dict[str, Any]:
    """What evaluation must know of the training split, and what a reader wants to."""
    return {
        "channels": data.channels,
        "training_images": len(data.images),
        "held_out_names": list(data.held_out_names),
        "fingerprint": data.fingerprint,
        "textures": {"training": len(textures.train), "held_out": len(textures.held_out)},
        "textures_fingerprint": textures.fingerprint,
    }
