"""Checkpoints of {state, data position} in a workdir, and the workdir's own small files.

W/config.json       the configuration; a run with another one is refused
W/data.json         what the training split was: channels, counts, held-out names
W/checkpoints/N     Orbax checkpoint after N steps
W/.lock             held by the process that trains in W
"""

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from data_pipelines.errors import BadInput, CannotWrite, first_line

_training: Any = ocp.training  # its annotations contradict its own classes


def silence_background_errors() -> None:
    """For the command line: a save that fails is reported once, by `CannotWrite`.

    TensorStore's threads go on for a moment, and each finds its event loop closed; coroutines
    that never ran are warned of when they are thrown away.
    """
    report = sys.unraisablehook

    def unraisablehook(found: Any) -> None:
        closed = isinstance(found.exc_value, RuntimeError)
        if not (closed and str(found.exc_value) == "Event loop is closed"):
            report(found)

    sys.unraisablehook = unraisablehook
    never_ran = r"coroutine '.*(serialize|_background).*' was never awaited"
    warnings.filterwarnings("ignore", never_ran, RuntimeWarning)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """False for the tracebacks, a thousand lines, of errors that Orbax logs and then raises."""
    return not (record.exc_info and "orbax" in Path(record.pathname).parts)


class Checkpoints:
    """The checkpoints of one workdir; a context manager that waits for pending saves.

    `keep` of the newest are kept. None opens them to be read: nothing is removed, not even what
    looks like a save that broke off, since another process may just be writing it.
    """

    def __init__(self, workdir: Path, *, keep: int | None = None):
        logging.getLogger("absl").addFilter(_not_of_orbax)
        self.directory = workdir.absolute() / "checkpoints"
        self._orbax = _training.Checkpointer(
            self.directory,
            save_decision_policy=_training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=_training.preservation_policies.LatestN(keep or 1),
            cleanup_tmp_directories=keep is not None,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self._orbax.close()
        except Exception as error:
            if kind is None:  # else what failed first is already on its way
                raise CannotWrite(self.directory, error) from error

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    def save(self, step: int, state: Any) -> None:
        """Saves in the background; returns once the arrays are copied off the device.

        Raises:
          CannotWrite: this save failed, or the one before it in the background; so do `wait` and
            the end of the context. The checkpoints before stay as they are.
        """
        # Orbax writes to a temporary directory and renames it when all is on disk. A torn
        # checkpoint of the same step, from an earlier run, is replaced.
        checkpoint = {"state": state, "data": {"position": np.asarray(step)}}
        overwrite = step in self.steps
        try:
            self._orbax.save_checkpointables_async(
                step, checkpoint, force=True, overwrite=overwrite
            )
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise CannotWrite(self.directory, error) from error

    def wait(self) -> None:
        """Returns when every pending save is on disk."""
        try:
            self._orbax.wait()
        except Exception as error:
            raise CannotWrite(self.directory, error) from error

    def restore(self, state: Any, *, until: int | None = None) -> tuple[int, Any] | None:
        """The newest readable checkpoint as (data position, state), or None without one.

        Args:
          state: arrays or `jax.ShapeDtypeStruct`s with the shapes, types and shardings wanted;
            the shardings may differ from those under which the checkpoint was written.
          until: leaves out the checkpoints of later steps.

        A checkpoint that cannot be read is named on stderr and the one before it is taken;
        where none can be read, `BadInput` names the directory.
        """
        abstract = {
            "state": jax.tree.map(ocp.arrays.to_shape_dtype_struct, state),
            "data": {"position": np.asarray(0)},
        }
        steps = [step for step in self.steps if until is None or step <= until]
        for step in reversed(steps):
            try:
                found = self._orbax.load_checkpointables(step, abstract)
            except Exception as error:  # Orbax and TensorStore raise many kinds
                directory, reason = self.directory / str(step), first_line(error, 120)
                print(f"{directory}: unreadable, skipped ({reason})", file=sys.stderr)
                continue
            return int(found["data"]["position"]), found["state"]
        if steps:
            raise BadInput(f"{self.directory}: none of the checkpoints can be read")
        return None
