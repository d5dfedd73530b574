"""TensorBoard's event file of a run, W/tensorboard/events.out.tfevents.*: scalars and panels.

tensorboardX's SummaryWriter writes from a thread behind a queue of ten entries. On a full disk that
thread ends with a traceback, and the run waits for ever for a place in the queue. Here the caller
writes, and learns of a failure.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.errors import CannotWrite

FLUSH_SECONDS = 120


class Board:
    """The event file of one start of a run.

    Args:
      folder: where the file is written; made if it is missing.
      purge_step: TensorBoard hides what earlier files have from this step on; None hides nothing.

    Raises:
      CannotWrite: no space or no permission; the methods raise it as well.
    """

    def __init__(self, folder: Path, *, purge_step: int | None = None):
        # pyright does not see what the module makes of the protocol's description.
        from tensorboardX.proto.event_pb2 import SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.record_writer import RecordWriter

        # TensorBoard reads the files in the order of their names. With the process and the
        # nanosecond, no start empties the file of another one.
        now = time.time_ns()
        unique = f"{now // 10**9}.{socket.gethostname()}.{os.getpid()}.{now}"
        self._path = folder / f"events.out.tfevents.{unique}"
        self._flushed = time.monotonic()
        with self._reporting():
            folder.mkdir(parents=True, exist_ok=True)
            self._records = RecordWriter(str(self._path))
        # These stay in the buffer, so that nothing can fail once the file is open.
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, name: str, value: float, step: int) -> None:
        """Writes one number."""
        from tensorboardX import summary

        self._write(step=step, summary=summary.scalar(name, value))

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Writes one picture, uint8 (h, w, 3)."""
        from tensorboardX import summary

        self._write(step=step, summary=summary.image(name, pixels, dataformats="HWC"))

    def flush(self) -> None:
        """Puts everything that was written on the disk."""
        with self._reporting():
            self._records.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Puts everything on the disk and closes the file, also if that fails."""
        try:
            self.flush()
        finally:
            with contextlib.suppress(OSError):
                self._records.close()

    def _write(self, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

        with self._reporting():
            self._records.write(Event(wall_time=time.time(), **content).SerializeToString())
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CannotWrite(self._path, error) from error
