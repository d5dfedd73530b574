"""The small files of a workdir, and the lock on it.

W/config.json       the configuration; a run with another one is refused
W/data.json         what the training split was: channels, counts, held-out names
W/.lock             held by the process that trains in W
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
    """The configuration with which the workdir's model was trained."""
    return from_config_dict(upgrade(read_json(workdir / "config.json")))


def read_data_record(workdir: Path) -> dict[str, Any]:
    """What `data.json` says of the training split."""
    return read_json(workdir / "data.json")


def check_workdir(workdir: Path, config: Config) -> None:
    """Refuses a workdir that cannot be written or holds a run of another configuration."""
    check_writable(workdir)
    if _holds_checkpoints(workdir):
        difference = _first_difference(read_config(workdir).to_dict(), config.to_dict())
        if difference:
            raise BadInput(f"{workdir}: holds a run of another config: {difference}")


@contextlib.contextmanager
def lock_workdir(workdir: Path, config: Config, data_record: dict[str, Any]) -> Iterator[None]:
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
        write_json(workdir / "config.json", {"schema": SCHEMA, **config.to_dict()})
        yield


def _holds_checkpoints(workdir: Path) -> bool:
    """Before its first checkpoint a run has nothing that another config or data could spoil."""
    return any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


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
