"""The small files of a workdir.

W/config.json       the configuration and its schema; a run with another one is refused
W/data.json         the training split: channels, counts, held-out names
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from data_pipelines.errors import BadInput
from pae_jax.config import Config, from_config_dict
from pae_jax.config_schema import SCHEMA, upgrade
from pae_jax.workdir.files import check_writable, read_json, write_json
from pae_jax.workdir.lock import Check, lock
from pae_jax.workdir.paths import AnyPath, check_local


def read_config(workdir: AnyPath) -> Config:
    """Returns the configuration of the run in the workdir; the file may have an older schema."""
    return from_config_dict(upgrade(read_json(workdir / "config.json")))


def read_data_record(workdir: AnyPath) -> dict[str, Any]:
    """Returns the contents of data.json."""
    return read_json(workdir / "data.json")


def check_workdir(workdir: AnyPath, config: Config) -> None:
    """Checks that a run of this configuration can be started or resumed in the workdir.

    Args:
      workdir: the folder, which need not exist.
      config: the run's configuration.

    Raises:
      BadInput: the workdir cannot be written, holds a run of another configuration, or the data
        are on a URI.
    """
    for key in ("root", "textures", "cache_dir"):
        check_local(f"data.{key}", str(getattr(config.data, key) or ""))
    check_writable(workdir)
    if _holds_checkpoints(workdir):
        difference = _first_difference(without_places(read_config(workdir)), without_places(config))
        if difference:
            raise BadInput(f"{workdir}: holds a run of another config: {difference}")


def without_places(config: Config) -> dict[str, Any]:
    """Returns the config without the folders of its data.

    They may differ between hosts and change between starts. Fingerprints tell whether the data are
    the same.
    """
    values = config.to_dict()
    places = ("root", "textures", "cache_dir")
    values["data"] = {name: x for name, x in values["data"].items() if name not in places}
    return values


@contextlib.contextmanager
def lock_workdir(workdir: AnyPath, config: Config, data_record: dict[str, Any]) -> Iterator[Check]:
    """Locks the workdir while the context is open; writes config.json and data.json.

    Args:
      workdir: the folder.
      config: the run's configuration.
      data_record: the contents of data.json.

    Yields:
      See `lock`.

    Raises:
      BadInput: another process trains in the workdir, or its run had other data.
    """
    with lock(workdir) as check_owner:
        if _holds_checkpoints(workdir):
            difference = _first_difference(read_data_record(workdir), data_record)
            if difference:
                raise BadInput(f"{workdir}: holds a run on other data: {difference}")
        write_json(workdir / "data.json", data_record)
        write_json(workdir / "config.json", {"schema": SCHEMA, **config.to_dict()})
        yield check_owner


def _holds_checkpoints(workdir: AnyPath) -> bool:
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
