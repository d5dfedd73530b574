"""The log of a run: scalars, panels and the progress bar.

W/metrics.jsonl    one JSON object per line: {"step": …, name: value, …}
W/tensorboard/     the same scalars and the panels for TensorBoard
W/panels/          the panels as PNG files

If W is a URI, the first two are written to a local folder (staging.py) and uploaded.
"""

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from data_pipelines.errors import CannotWrite
from pae_jax import methods
from pae_jax.config import Config
from pae_jax.devices import hardware
from pae_jax.report import pictures
from pae_jax.workdir.board import Board
from pae_jax.workdir.files import to_json, write_atomically
from pae_jax.workdir.paths import AnyPath
from pae_jax.workdir.staging import Staging


def configure_logging() -> None:
    """Writes the messages of the package to stderr; for the command line.

    If several processes train together, each message begins with the index of its process.
    """
    logger = logging.getLogger("pae_jax")
    if logger.handlers:
        return
    count = jax.process_count()
    prefix = f"[process {jax.process_index()} of {count}] " if count > 1 else ""
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    # Some dependencies give the root logger a handler, which would print the messages again.
    logger.propagate = False


class _StderrHandler(logging.Handler):
    """Writes to the present `sys.stderr`, while `logging.StreamHandler` keeps the first one."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


class RunLog:
    """The log of a run that starts, or resumes, after `start` steps; a context manager.

    Args:
      workdir: the folder of the run.
      config: the run's configuration.
      start: the number of updates done.
      staging: where the log is written; by default in the workdir, which is local then.
    """

    def __init__(
        self, workdir: AnyPath, config: Config, *, start: int, staging: Staging | None = None
    ):
        staging = staging or Staging(workdir)
        self._config = config.train
        self._last_step = methods.steps(config)
        self._panels = workdir / "panels"
        self._path = staging.fetch("metrics.jsonl")
        with contextlib.ExitStack() as stack:  # closes the first file if the second one fails
            self._lines = stack.enter_context(_open_lines(self._path, start))
            self._board = None
            if config.train.tensorboard:
                purge_step = start + 1 if start else None
                self._board = Board(staging.folder / "tensorboard", purge_step=purge_step)
            stack.pop_all()
        self._bar: Any = None
        self._restart_clock()

    def __enter__(self) -> "RunLog":
        """Returns the log."""
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Closes the files and the bar."""
        if self._bar is not None:
            self._bar.close()
        # Every line was flushed when it was written, and a failure was reported then.
        with contextlib.suppress(OSError):
            self._lines.close()
        if self._board:
            # After another exception, that one is the cause and is already being raised.
            with contextlib.suppress(*[] if kind is None else [OSError]):
                self._board.close()

    def flush(self) -> None:
        """Writes everything that was logged to the local files."""
        # Lines are flushed when they are written.
        if self._board:
            self._board.flush()

    def step(
        self,
        step: int,
        metrics: Mapping[str, float],
        data_seconds: float,
        flops: float | None = None,
    ) -> None:
        """Counts an update, and logs its metrics every `train.log_every` updates.

        Args:
          step: the number of updates done.
          metrics: the metrics of this update.
          data_seconds: the time that the loop waited for the data of this update.
          flops: FLOP of one step on one device, if known.
        """
        if self._bar is None:
            # The bar begins after the first step, because the time that XLA takes to compile
            # would spoil its estimate of the time left.
            self._bar = _progress(self._last_step, step - 1)
        self._bar.update()
        self._data_seconds, self._steps = self._data_seconds + data_seconds, self._steps + 1
        if not self.is_due(step):
            return
        seconds = time.perf_counter() - self._since
        speed = {
            "step_seconds": seconds / self._steps,
            "images_per_second": self._steps * self._config.batch_size / seconds,
            "data_wait_fraction": self._data_seconds / seconds,
        }
        peak = hardware.peak_flops()
        if flops and peak:
            speed["model_flop_utilisation"] = flops * self._steps / seconds / peak
        self._restart_clock()
        scalars = {f"train/{name}": value for name, value in metrics.items()}
        self._write(step, scalars | {f"speed/{name}": value for name, value in speed.items()})
        self._bar.set_postfix(loss=f"{metrics['loss']:.5f}", refresh=False)

    def is_due(self, step: int) -> bool:
        """Returns whether the metrics of this update make a line."""
        return step % self._config.log_every == 0

    def validation(
        self,
        step: int,
        values: Mapping[str, float],
        panel: np.ndarray,
        *,
        waited: float | None = None,
    ) -> None:
        """Logs a validation, and its panel every `train.panel_every` steps and at the end.

        Args:
          step: the number of updates done.
          values: metrics on held-out corruptions.
          panel: uint8 (h, w, 3).
          waited: the seconds that training waited for a validation beside it; None for one that
            it waited for from start to end.
        """
        self._write(step, {f"validation/{name}": value for name, value in values.items()})
        if step % self._config.panel_every == 0 or step == self._last_step:
            pictures.save_png(self._panels / f"step_{step:07d}.png", panel)
            if self._board:
                self._board.image("panel", panel, step)
        # The time of the validation does not count as time of steps.
        if waited is None:
            self._restart_clock()
        else:
            self._since += waited

    def _restart_clock(self) -> None:
        self._since, self._data_seconds, self._steps = time.perf_counter(), 0.0, 0

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        try:
            self._lines.write(to_json({"step": step, **values}) + "\n")
            self._lines.flush()
        except OSError as error:
            raise CannotWrite(self._path, error) from error
        if self._board:
            for name, value in values.items():
                # NaN marks an undefined value, such as an AP without any corruption.
                if not math.isnan(value):
                    self._board.scalar(name, value, step)


def _open_lines(path: Path, start: int) -> IO[str]:
    """Opens `path` for appending, without the lines that a run from `start` writes again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _is_kept(line, start)]
        write_atomically(path, "".join(line + "\n" for line in kept))
    try:
        return path.open("a")
    except OSError as error:
        raise CannotWrite(path, error) from error


def _is_kept(line: str, start: int) -> bool:
    try:
        record = json.loads(line)
        # The run from `start` begins with the validation of that step.
        validation = any(name.startswith("validation/") for name in record)
        return record["step"] < start or (record["step"] == start and not validation)
    except (ValueError, KeyError, TypeError):  # a line torn by an interruption
        return False


def _progress(total: int, start: int) -> Any:
    """Returns a progress bar on stderr: a live bar on a terminal, else a line every 30 seconds."""
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, initial=start, unit="step", desc="train", mininterval=interval)
