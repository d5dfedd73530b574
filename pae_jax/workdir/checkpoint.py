"""The checkpoints of a workdir W: W/checkpoints/N holds state and data position after N steps."""

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from data_pipelines.errors import BadInput, CannotWrite, first_line
from pae_jax.workdir.files import read_json, remove_tree
from pae_jax.workdir.paths import AnyPath

# Orbax's names of the types of arrays; other entries of a tree are empty.
_ARRAYS = ("jax.Array", "np.ndarray", "scalar")
# Any, because Orbax's annotations contradict its own classes.
_training: Any = ocp.training


class Checkpoints:
    """The checkpoints of one workdir; a context manager that waits for pending saves.

    Args:
      workdir: the folder of the run, local or gs://.
      keep: how many of the newest checkpoints are kept. None opens the checkpoints for reading
        only and removes nothing, because a save that looks interrupted may be one that another
        process is writing.

    Attributes:
      directory: the folder of the checkpoints.
    """

    def __init__(self, workdir: AnyPath, *, keep: int | None = None):
        # The last save has Orbax's response, and its step with the number of arrays.
        self._response: Any = None
        self._unverified: tuple[int, int] | None = None
        logging.getLogger("absl").addFilter(_is_not_orbax_traceback)
        # Orbax needs an absolute path, which a URI is; `absolute` would prepend the local folder.
        root = workdir.absolute() if isinstance(workdir, Path) else workdir
        self.directory = root / "checkpoints"
        self._orbax = self._open(keep)
        # A kill may have left an old checkpoint, or a part of it. With several processes it stays,
        # because they would remove it from under each other.
        surplus = self.steps[:-keep] if keep and jax.process_count() == 1 else []
        for step in surplus:
            remove_tree(self.directory / str(step))
        if surplus:  # Orbax keeps a list of what was there
            self._orbax.close()
            self._orbax = self._open(keep)

    def _open(self, keep: int | None) -> Any:
        try:
            return _training.Checkpointer(
                self.directory,
                # The training loop decides when to save, so Orbax may save at every step.
                save_decision_policy=_training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=_training.preservation_policies.LatestN(keep or 1),
                cleanup_tmp_directories=keep is not None,
            )
        except OSError as error:
            if keep is None:
                raise
            # It makes the folder, and removes what an interruption has left.
            raise CannotWrite(self.directory, error) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            # After another exception, that one is the cause and is already being raised.
            if kind is None and self._unverified:
                self.wait()
        finally:
            try:
                self._orbax.close()
            except Exception as error:
                if kind is None:
                    raise CannotWrite(self.directory, error) from error

    @property
    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in ascending order."""
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    def save(self, step: int, state: Any) -> None:
        """Starts a save in the background; returns when the arrays are copied off the device.

        The save before it is verified first, see `wait`.

        Args:
          step: the number of updates done; the name of the checkpoint.
          state: a tree of arrays.

        Raises:
          CannotWrite: this save failed, or the one before it in the background. `wait` and the
            end of the context raise it as well. Earlier checkpoints are not changed.
        """
        self.wait()
        # Orbax writes to a temporary directory and renames it when everything is on disk. In a
        # bucket it marks the directory as complete instead.
        checkpoint = {"state": state, "data": {"position": np.asarray(step)}}
        # An unreadable checkpoint of this step may be left from an earlier run.
        overwrite = step in self.steps
        try:
            self._response = self._orbax.save_checkpointables_async(
                step, checkpoint, force=True, overwrite=overwrite
            )
        except Exception as error:  # Orbax and TensorStore raise many types
            raise CannotWrite(self.directory, error) from error
        self._unverified = step, len(jax.tree.leaves(checkpoint))

    def wait(self) -> None:
        """Waits until the pending save is on disk, and verifies it.

        Raises:
          CannotWrite: the save failed, or its checkpoint is not listed or lacks an array.
        """
        response, self._response = self._response, None
        try:
            # Only this ends the thread of the save and closes its three files.
            if response is not None:
                response.result()
            self._orbax.wait()
        except Exception as error:
            self._unverified = None
            raise CannotWrite(self.directory, error) from error
        if self._unverified:
            (step, count), self._unverified = self._unverified, None
            if reason := self._fault(step, count):
                raise CannotWrite(self.directory / str(step), RuntimeError(reason))

    def _fault(self, step: int, count: int) -> str | None:
        """Returns what is wrong with a saved checkpoint of `count` arrays; None if nothing is."""
        # Orbax only logs some failures of its background thread.
        if step not in self.steps:
            return "after saving it, it is not listed"
        found = 0
        for part in ("state", "data"):
            folder = self.directory / str(step) / part
            try:
                # Not from TensorStore, which loses memory for every array that it describes.
                entries = read_json(folder / "_METADATA")["tree_metadata"].values()
                found += sum(x["value_metadata"]["value_type"] in _ARRAYS for x in entries)
                if not (folder / "manifest.ocdbt").exists():
                    return f"after saving it, {part}/manifest.ocdbt is not there"
            except Exception as error:  # the drivers of buckets raise many types
                return f"after saving it, it cannot be read: {first_line(error, 120)}"
        return None if found == count else f"after saving it, {found} of {count} arrays are there"

    def restore(self, state: Any, *, until: int | None = None) -> tuple[int, Any] | None:
        """Reads the newest readable checkpoint.

        A checkpoint that cannot be read is named on stderr, and the one before it is tried.

        Args:
          state: arrays or `jax.ShapeDtypeStruct`s with the shapes, types and shardings wanted.
            The shardings may differ from those under which the checkpoint was written.
          until: the last step to consider; None for all.

        Returns:
          (data position, state); None without a checkpoint.

        Raises:
          BadInput: there are checkpoints, and none of them can be read.
        """
        abstract = {
            "state": jax.tree.map(ocp.arrays.to_shape_dtype_struct, state),
            "data": {"position": np.asarray(0)},
        }
        steps = [step for step in self.steps if until is None or step <= until]
        for step in reversed(steps):
            try:
                restored = self._orbax.load_checkpointables(step, abstract)
            except Exception as error:  # Orbax and TensorStore raise many types
                directory, reason = self.directory / str(step), first_line(error, 120)
                print(f"{directory}: unreadable, skipped ({reason})", file=sys.stderr)
                continue
            return int(restored["data"]["position"]), restored["state"]
        if steps:
            raise BadInput(f"{self.directory}: none of the checkpoints can be read")
        return None


def silence_background_errors() -> None:
    """Suppresses the messages of Orbax's threads after a failed save, for the command line.

    `CannotWrite` reports a failed save once. TensorStore's threads continue for a moment and each
    reports that its event loop is closed. Python warns of their coroutines that never ran.
    """
    report = sys.unraisablehook

    def unraisablehook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            report(unraisable)

    sys.unraisablehook = unraisablehook
    # This package has no coroutines, so these are Orbax's.
    never_ran = r"coroutine '.*' was never awaited"
    warnings.filterwarnings("ignore", never_ran, RuntimeWarning)


def _is_not_orbax_traceback(record: logging.LogRecord) -> bool:
    """Returns False for what Orbax logs of errors that it then raises.

    A traceback of it has about a thousand lines and repeats the exception.
    """
    of_error = record.exc_info or str(record.msg).startswith("Metadata file does not exist")
    return not (of_error and "orbax" in Path(record.pathname).parts)
