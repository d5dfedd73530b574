"""Scalars, pictures and the progress line of a run.

W/metrics.jsonl    one JSON object a line: {"step": …, name: value, …}
W/tensorboard/     the same scalars, and the panels, for TensorBoard
W/panels/          the panels as PNG files
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_pipelines.errors import CannotWrite
from pae_jax import methods
from pae_jax.config import Config
from pae_jax.devices import hardware
from pae_jax.report import pictures
from pae_jax.workdir.files import to_json, write_atomically


class RunLog:
    """The logs and the progress bar of a run that starts, or resumes, after `start` steps."""

    def __init__(self, workdir: Path, config: Config, *, start: int):
        self._config, self._last = config.train, methods.steps(config)
        self._panels = workdir / "panels"
        self._path = workdir / "metrics.jsonl"
        self._lines = _open_lines(self._path, start)
        self._board = None
        if config.train.tensorboard:
            from tensorboardX import SummaryWriter

            purge = start + 1 if start else None
            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=purge)
        self._bar = _progress(self._last, start)
        self._since, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        with contextlib.suppress(OSError):  # every line is flushed; a failed one was told of
            self._lines.close()
        if self._board:
            self._board.close()

    def step(
        self, step: int, metrics: Mapping[str, float], waited: float, flops: float | None = None
    ) -> None:
        """After each update.

        Args:
          step: updates done.
          metrics: of this update.
          waited: seconds for which the loop waited for its data.
          flops: of one step on one device, where that is known.
        """
        self._bar.update()
        self._waited, self._steps = self._waited + waited, self._steps + 1
        if step % self._config.log_every:
            return
        now = time.perf_counter()
        seconds = now - self._since
        speed = {
            "step_seconds": seconds / self._steps,
            "images_per_second": self._steps * self._config.batch_size / seconds,
            "data_wait_share": self._waited / seconds,
        }
        peak = hardware.peak_flops()
        if flops and peak:
            speed["model_flop_utilisation"] = flops * self._steps / seconds / peak
        self._since, self._waited, self._steps = now, 0.0, 0
        named = {f"train/{k}": v for k, v in metrics.items()}
        self._scalars(step, named | {f"speed/{k}": v for k, v in speed.items()})
        self._bar.set_postfix(loss=f"{metrics['loss']:.5f}", refresh=False)

    def validation(self, step: int, values: Mapping[str, float], panel: np.ndarray) -> None:
        """Metrics on held-out corruptions, and now and then their uint8 (h, w, 3) picture."""
        self._scalars(step, {f"validation/{k}": v for k, v in values.items()})
        if step % self._config.panel_every == 0 or step == self._last:
            pictures.save_png(self._panels / f"step_{step:07d}.png", panel)
            if self._board:
                self._board.add_image("panel", panel, step, dataformats="HWC")
        # The time that validating takes is not the step's.
        self._since, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        try:
            self._lines.write(to_json({"step": step, **values}) + "\n")
            self._lines.flush()
        except OSError as error:
            raise CannotWrite(self._path, error) from error
        if self._board:
            for name, value in values.items():
                if not math.isnan(value):  # undefined, as what needs corruptions without any
                    self._board.add_scalar(name, value, step)


def _open_lines(path: Path, start: int) -> IO[str]:
    """`path` for appending, without the lines that a run from `start` writes again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _lasts(line, start)]
        write_atomically(path, "".join(line + "\n" for line in kept))
    return path.open("a")


def _lasts(line: str, start: int) -> bool:
    try:
        record = json.loads(line)
        # The run from `start` begins with validating there.
        validation = any(name.startswith("validation/") for name in record)
        return record["step"] < start or (record["step"] == start and not validation)
    except (ValueError, KeyError, TypeError):  # a line torn by an interruption
        return False


def _progress(total: int, start: int) -> Any:
    """Rate and time left on stderr: a bar, or where there is no terminal a line now and then."""
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, initial=start, unit="step", desc="train", mininterval=interval)
