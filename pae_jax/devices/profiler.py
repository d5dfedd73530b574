"""Traces of training steps for `config.profile`, by jax.profiler."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax


class Profiler:
    """Traces the steps from `first` to `end`, exclusive, in calls of one or several steps.

    JAX returns from a call before the devices have finished it. The profiler therefore waits for
    the calls before the trace, and for the last call in it.

    Attributes:
      first: the number of updates done when the trace starts; `end` if there is none.
      end: the number of updates done when the trace ends.
      folder: where the trace is written.
    """

    def __init__(self, first: int, end: int, folder: Path):
        self.first, self.end, self.folder = first, end, folder
        self._running = False

    @contextlib.contextmanager
    def call(self, step: int, state: Any) -> Iterator[None]:
        """Starts the trace, if it is due, and marks a call in it.

        Args:
          step: the number of updates done before the call.
          state: the state before the call.

        Yields:
          Nothing.
        """
        # A run may resume inside the range.
        if self.first <= step < self.end and not self._running:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.folder))
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def finish_call(self, step: int, state: Any) -> None:
        """Ends the trace, if it is due.

        Args:
          step: the number of updates done after the call.
          state: the state after the call.
        """
        if self._running and step >= self.end:
            jax.block_until_ready(state)
            self.stop()

    def stop(self) -> None:
        """Ends the trace if it is running."""
        if self._running:
            jax.profiler.stop_trace()
        self._running = False


@contextlib.contextmanager
def open_profiler(steps: tuple[int, ...], folder: Path, *, last: int) -> Iterator[Profiler]:
    """Opens the profiler of a run; a trace that is running at the end is written.

    Args:
      steps: (first, end) of `config.profile`, or empty for no trace.
      folder: where the trace is written.
      last: the number of steps of the run.

    Yields:
      The profiler.
    """
    first, end = steps or (last, last)
    profiler = Profiler(first, min(end, last), folder)
    try:
        yield profiler
    finally:
        profiler.stop()
