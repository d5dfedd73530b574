"""Checkpoints of {state, data position} in a workdir, and the workdir's own small files.

W/config.json       the configuration; a run with another one is refused
W/data.json         what the training split was: channels, counts, held-out names
W/checkpoints/N     Orbax checkpoint after N steps
W/.lock             held by the process that trains in W
"""

import contextlib
import fcntl
import json
import logging
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from data_pipelines.errors import BadInput, CannotWrite, first_line
from pae_jax.config import Config, from_config_dict

_training: Any = ocp.training  # its annotations contradict its own classes


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes to a temporary name in the same directory, then renames; or `CannotWrite`."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise CannotWrite(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def to_json(value: Any, **options: Any) -> str:
    """JSON, with null for every number that JSON cannot hold."""

    def nulls(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: nulls(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [nulls(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(nulls(value), allow_nan=False, **options)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, to_json(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise BadInput(f"{path}: not found; is this the workdir of a training run?") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from None


def read_config(workdir: Path) -> Config:
    """The configuration with which the workdir's model was trained."""
    return from_config_dict(read_json(workdir / "config.json"))


def read_data_record(workdir: Path) -> dict[str, Any]:
    """What `data.json` says of the training split."""
    return read_json(workdir / "data.json")


def _first_difference(old: Any, new: Any, key: str = "") -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            found = _first_difference(
                old.get(name), new.get(name), f"{key}.{name}" if key else name
            )
            if found:
                return found
        return None
    return None if old == new else f"{key} is {old!r} there and {new!r} now"


def check_writable(directory: Path) -> None:
    """Makes the directory where it does not exist; `BadInput` if it cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise BadInput(f"{directory}: cannot be written ({error.strerror})") from None


def check_workdir(workdir: Path, config: Config) -> None:
    """Refuses a workdir that cannot be written or holds a run of another configuration."""
    check_writable(workdir)
    if _holds_checkpoints(workdir):
        difference = _first_difference(read_config(workdir).to_dict(), config.to_dict())
        if difference:
            raise BadInput(f"{workdir}: holds a run of another config: {difference}")


def _holds_checkpoints(workdir: Path) -> bool:
    """Before its first checkpoint a run has nothing that another config or data could spoil."""
    return any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


@contextlib.contextmanager
def claim_workdir(workdir: Path, config: Config, data_record: dict[str, Any]) -> Iterator[None]:
    """Takes the workdir for this process and writes config.json and data.json.

    Refuses a workdir where another process is training, and one whose run had other data.
    """
    with (workdir / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput(f"{workdir}: another process is training there") from None
        if _holds_checkpoints(workdir):
            difference = _first_difference(read_data_record(workdir), data_record)
            if difference:
                raise BadInput(f"{workdir}: holds a run on other data: {difference}")
        write_json(workdir / "data.json", data_record)
        write_json(workdir / "config.json", config.to_dict())
        yield


def leave_out_echoes() -> None:
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
