"""The small files of a workdir.

W/config.json       the configuration and its schema; `changes` says what may differ at a resumption
W/data.json         the training split: channels, counts, held-out names, fingerprints
W/thresholds.json   see `thresholds`
W/foreground.npz    see `suppression`
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from data_pipelines.errors import BadInput
from pae_jax.config import Config, from_config_dict
from pae_jax.config_schema import SCHEMA, upgrade
from pae_jax.workdir import changes, parameters, thresholds
from pae_jax.workdir.files import check_writable, read_json, remove, write_json
from pae_jax.workdir.lock import Check, lock
from pae_jax.workdir.paths import AnyPath, check_local, check_savable


def read_config(workdir: AnyPath) -> Config:
    """Returns the configuration of the run in the workdir; the file may have an older schema."""
    return from_config_dict(upgrade(read_json(workdir / "config.json")))


def read_data_record(workdir: AnyPath) -> dict[str, Any]:
    """Returns the contents of data.json.

    Raises:
      BadInput: the file is missing or damaged.
    """
    path = workdir / "data.json"
    content = read_json(path)
    try:
        low, high = map(float, content.get("value_range", (0, 255)))
        texts = content["fingerprint"], *content["held_out_names"]
        whole = (
            content["channels"] in (1, 3)
            and all(isinstance(text, str) for text in texts)
            and sum(content.get("textures", {}).values()) >= 0
            and low < high
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise BadInput(f"{path}: damaged; restore it from a copy, or train in another --workdir")
    return content


def check_workdir(workdir: AnyPath, config: Config) -> list[str]:
    """Checks that a run of this configuration can be started or resumed in the workdir.

    Args:
      workdir: the folder, which need not exist.
      config: the run's configuration.

    Returns:
      A line for each change of the configuration since the run began.

    Raises:
      BadInput: the workdir cannot be written, holds a run of another configuration or a packed
        model, or the data are on a URI.
    """
    if (workdir / parameters.NAME).exists():
        raise BadInput(
            f"{workdir}: holds a packed model, which has no state to train on; choose another "
            "--workdir"
        )
    for key in changes.PLACES:
        check_local(key, str(getattr(config.data, key.removeprefix("data.")) or ""))
    check_savable(workdir)
    check_writable(workdir)
    step = _newest_step(workdir)
    if step is not None:
        return changes.check(workdir, read_config(workdir), config, step)
    return []


@contextlib.contextmanager
def lock_workdir(
    workdir: AnyPath, config: Config, data_record: dict[str, Any], *earlier: dict[str, Any]
) -> Iterator[Check]:
    """Locks the workdir while the context is open; writes config.json and data.json.

    Args:
      workdir: the folder.
      config: the run's configuration.
      data_record: the contents of data.json.
      *earlier: the same in the forms of earlier versions.

    Yields:
      See `lock`.

    Raises:
      BadInput: another process trains in the workdir, or its run had other data.
    """
    with lock(workdir) as check_owner:
        if _newest_step(workdir) is not None:
            changes.compare_data(workdir, read_data_record(workdir), data_record, *earlier)
        else:
            # Thresholds of an earlier training in this folder belong to another model.
            remove(workdir / thresholds.NAME)
        write_json(workdir / "data.json", data_record)
        write_json(workdir / "config.json", {"schema": SCHEMA, **config.to_dict()})
        yield check_owner


def _newest_step(workdir: AnyPath) -> int | None:
    """Returns the step of the newest checkpoint, readable or not; None if there is none.

    Without a checkpoint there is nothing yet that another config or other data could spoil.
    """
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdecimal()), default=None)
