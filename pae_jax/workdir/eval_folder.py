"""The folder of an evaluation: W/eval, or W/eval_KEY=VALUE,… for other settings than the run's.

`replace` serves the folders of a judgement and of a comparison as well.
"""

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipelines.errors import BadInput, CannotWrite
from pae_jax.config import DataConfig, EvalConfig
from pae_jax.workdir import files
from pae_jax.workdir.changes import differences
from pae_jax.workdir.files import output_path
from pae_jax.workdir.paths import AnyPath
from pae_jax.workdir.record import read_config

# The entries that evaluations write. Others, for example notes, stay when a folder is replaced.
ENTRIES = ("metrics.json", "scores.csv", "report.html", "maps", "cases.png")
# Settings that change neither a result nor which results there are.
_WITHOUT_A_PART = ("batch_size",)
_MAX_NAME = 120


def folder_name(own: EvalConfig, settings: EvalConfig) -> str:
    """Returns the name of the folder for an evaluation with `settings`.

    Args:
      own: the settings in the run's config.json.
      settings: those of the evaluation.
    """
    changed = [
        f"{change.key}={change.new}"
        for change in differences(vars(own), vars(settings))
        if change.key not in _WITHOUT_A_PART
    ]
    if not changed:
        return "eval"
    name = "eval_" + ",".join(changed)
    safe = re.sub(r"[^A-Za-z0-9_=,.+-]", "_", name)
    if safe == name and len(name) <= _MAX_NAME:
        return name
    return f"{safe[:_MAX_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def locate(workdir: AnyPath, settings: EvalConfig) -> AnyPath:
    """Returns the folder of an evaluation of a run with `settings`."""
    return workdir / folder_name(read_config(workdir).eval, settings)


def category(data: DataConfig) -> str:
    """Returns the name of the category whose test images a config names."""
    root = Path(data.root)
    name = root.stem if data.source == "list" else root.name
    return data.category.rpartition("/")[2] or name or data.source


def map_names(data: DataConfig, names: Sequence[str]) -> list[str]:
    """Returns where the official script looks for the maps of images: their names with `.tiff`.

    Args:
      data: names the category.
      names: the names of the images in the test split.

    Returns:
      maps/CATEGORY/test/TYPE/NAME.tiff for each image.

    Raises:
      BadInput: two images would share a map.
    """
    folder = Path("maps", category(data), "test")
    paths = [
        output_path(folder, name.removesuffix(Path(name).suffix), ".tiff").as_posix()
        for name in names
    ]
    owners: dict[str, str] = {}
    for path, name in zip(paths, names, strict=True):
        if path in owners:
            raise BadInput(f"{owners[path]}, {name}: the map of both would be {path}")
        owners[path] = name
    return paths


@contextlib.contextmanager
def replace(folder: AnyPath, entries: Sequence[str] = ENTRIES) -> Iterator[AnyPath]:
    """Yields an empty folder that takes the place of `folder` when the context ends.

    On a local disk everything is written to a hidden folder beside it, and the two are swapped at
    the end. After an error, or a kill at any moment, one of them is whole. In a bucket nothing can
    be renamed: the maps of an earlier evaluation are removed first, and each file replaces the
    earlier one when its upload is complete. An object says meanwhile that they are incomplete.

    Args:
      folder: the folder, which need not exist.
      entries: what it holds of its own. Anything else in it stays.

    Raises:
      CannotWrite: the folders cannot be swapped.
    """
    if not isinstance(folder, Path):
        maps = folder / "maps"
        try:
            maps.rmtree(missing_ok=True)
        except Exception as error:  # the drivers of buckets raise many types
            raise CannotWrite(maps, error) from error
        with files.incomplete(folder):
            yield folder
        return
    # A linked folder is replaced where it is.
    folder = Path(os.path.realpath(folder))
    new, old = (folder.with_name(f".{folder.name}.{word}") for word in ("new", "old"))
    try:
        restore(folder)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
    except OSError as error:
        raise CannotWrite(folder, error) from error
    try:
        yield new
        try:
            _swap(folder, new, old, entries)
        except OSError as error:
            raise CannotWrite(folder, error) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def restore(folder: AnyPath) -> None:
    """Finishes a swap of `replace` that was interrupted between its two steps."""
    if not isinstance(folder, Path):
        return
    folder = Path(os.path.realpath(folder))
    old = folder.with_name(f".{folder.name}.old")
    if old.exists():
        if folder.exists():
            shutil.rmtree(old)
        else:
            old.rename(folder)


def _swap(folder: Path, new: Path, old: Path, entries: Sequence[str]) -> None:
    if folder.exists():
        for path in folder.iterdir():
            if path.name not in entries:
                copy = shutil.copytree if path.is_dir() else shutil.copy2
                copy(path, new / path.name)
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        # The earlier evaluation comes back. If that fails as well, `restore` does it later.
        with contextlib.suppress(OSError):
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
