"""The small files of a workdir, and its lock.

W/config.json       the configuration and its schema; a run with another one is refused
W/data.json         the training split: channels, counts, held-out names
W/.lock             locked by the process that trains in W
"""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipelines.errors import BadInput
from pae_jax.config import Config, from_config_dict
from pae_jax.config_schema import SCHEMA, upgrade
from pae_jax.workdir.files import check_writable, read_json, write_json


def read_config(workdir: Path) -> Config:
    """Returns the configuration of the run in the workdir; the file may have an older schema."""
    return from_config_dict(upgrade(read_json(workdir / "config.json")))


def read_data_record(workdir: Path) -> dict[str, Any]:
    """Returns the contents of data.json."""
    return read_json(workdir / "data.json")


def check_workdir(workdir: Path, config: Config) -> None:
    """Checks that a run of this configuration can be started or resumed in the workdir.

    Args:
      workdir: the folder, which need not exist.
      config: the run's configuration.

    Raises:
      BadInput: the workdir cannot be written, or holds a run of another configuration.
    """
    check_writable(workdir)
    if _holds_checkpoints(workdir):
        difference = _first_difference(read_config(workdir).to_dict(), config.to_dict())
        if difference:
            raise BadInput(f"{workdir}: holds a run of another config: {difference}")


@contextlib.contextmanager
def lock_workdir(workdir: Path, config: Config, data_record: dict[str, Any]) -> Iterator[None]:
    """Locks the workdir while the context is open; writes config.json and data.json.

    Args:
      workdir: the folder.
      config: the run's configuration.
      data_record: the contents of data.json.

    Yields:
      Nothing.

    Raises:
      BadInput: another process trains in the workdir, or its run had other data.
    """
    with (workdir / ".lock").open("a") as lock:
        try:
            # The system releases this lock when the process ends, even if it is killed.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput(f"{workdir}: another process is training there") from None
        if _holds_checkpoints(workdir):
            difference = _first_difference(read_data_record(workdir), data_record)
            if difference:
                raise BadInput(f"{workdir}: holds a run on other data: {difference}")
        write_json(workdir / "data.json", data_record)
        write_json(workdir / "config.json", {"schema": SCHEMA, **config.to_dict()})
        yield


def _holds_checkpoints(workdir: Path) -> bool:
    # Without a checkpoint there is nothing yet that another config or other data could spoil.
    return any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


def differences(first: Any, other: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields the dotted keys in which two nested dicts differ, with both values."""
    if isinstance(first, dict) and isinstance(other, dict):
        for name in sorted({*first, *other}):
            full_key = f"{key}.{name}" if key else name
            yield from differences(first.get(name), other.get(name), full_key)
    elif first != other:
        yield key, first, other


def _first_difference(old: Any, new: Any) -> str | None:
    for key, old_value, new_value in differences(old, new):
        return f"{key} is {old_value!r} there and {new_value!r} now"
    return None
