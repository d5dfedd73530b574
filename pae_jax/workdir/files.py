"""Files of a run: atomic writing, JSON and CSV; on a local disk or a URI."""

import contextlib
import csv
import io
import json
import math
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.cache_folder import unwritable
from data_pipelines.errors import BadInput, CannotWrite, first_line
from data_pipelines.writing import atomic_file, short_name
from pae_jax.workdir.paths import AnyPath

_INCOMPLETE = ".incomplete"


def write_atomically(path: AnyPath, content: bytes | str) -> None:
    """Writes a file at once or not at all; makes its folder.

    A local file is written beside its place and renamed. An object of a bucket needs no renaming,
    because it appears when its upload is complete.

    Raises:
      CannotWrite: no space or no permission.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        if isinstance(path, Path):
            with atomic_file(path) as file:
                file.write(data)
        else:
            path.write_bytes(data)
    except Exception as error:  # the drivers of buckets raise many types
        raise CannotWrite(path, error) from error


def check_new(*paths: AnyPath) -> None:
    """Checks that no result has one of these names, except what a kill in `new_files` has left.

    Args:
      paths: those of `new_files`.

    Raises:
      BadInput: one of them exists.
    """
    if _marker(paths).exists():
        return
    for path in paths:
        if path.exists():
            raise BadInput(f"{path}: exists; results are never overwritten")


@contextlib.contextmanager
def new_files(*paths: AnyPath) -> Iterator[None]:
    """Keeps results together that are written in the context: all of them stand, or none.

    A hidden file beside them says until the end that they are unfinished. After a kill the same
    command finds it and replaces what stands. After an error what stands is removed.

    Args:
      paths: the results, in one folder.

    Raises:
      BadInput: one of them exists, although it did not when the command began.
      CannotWrite: no space or no permission.
    """
    check_new(*paths)
    marker = _marker(paths)
    write_atomically(marker, "Unfinished: the same command, repeated, writes these results anew.\n")
    try:
        yield
    except BaseException:
        # If something stays, the marker stays too, and a failure to clean up hides no cause.
        with contextlib.suppress(CannotWrite):
            for path in (*paths, marker):
                remove(path)
        raise
    remove(marker)


def _marker(paths: Sequence[AnyPath]) -> AnyPath:
    name = short_name(paths[-1].name, len("..unfinished"))
    return paths[-1].with_name(f".{name}.unfinished")


def to_json(value: Any, **options: Any) -> str:
    """Returns JSON, with null for NaN and infinity, which JSON cannot hold."""

    def with_nulls(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: with_nulls(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [with_nulls(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(with_nulls(value), allow_nan=False, **options)


def write_json(path: AnyPath, value: Any) -> None:
    """Writes a JSON file with sorted keys, at once or not at all."""
    write_atomically(path, to_json(value, indent=2, sort_keys=True) + "\n")


def read_json(path: AnyPath) -> Any:
    """Reads a JSON file of a workdir.

    Raises:
      BadInput: the file is missing or cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BadInput(f"{path}: not found; is this the workdir of a training run?") from None
    except Exception as error:  # the drivers of buckets raise many types
        raise BadInput(f"{path}: cannot be read ({first_line(error, 300)})") from error


def output_path(folder: AnyPath, name: str, suffix: str) -> AnyPath:
    """Returns the path of a file that belongs to an image.

    Args:
      folder: the folder of such files.
      name: the name of the image, a posix path as `errors.spell` returns it. Parts that are too
        long for a file are cut and get a part of their hash.
      suffix: is appended.
    """
    *folders, last = name.split("/")
    return folder.joinpath(*map(short_name, folders)) / f"{short_name(last, len(suffix))}{suffix}"


def check_writable(directory: AnyPath) -> None:
    """Checks that files can be written to a directory; makes a local one if it is missing.

    Raises:
      BadInput: the directory cannot be made or written.
    """
    if isinstance(directory, Path):
        if reason := unwritable(directory):
            raise BadInput(f"{directory}: cannot be written ({reason})")
        return
    try:
        trial = directory / f".trial-{uuid.uuid4().hex}"
        trial.write_bytes(b"")
        trial.unlink()
    except FileNotFoundError as error:
        # In a bucket, folders are made with the first object.
        raise BadInput(f"{directory}: cannot be written (no such bucket)") from error
    except Exception as error:  # the drivers of buckets raise many types
        reason = getattr(error, "strerror", None) or first_line(error, 300)
        raise BadInput(f"{directory}: cannot be written ({reason})") from error


def remove(path: AnyPath) -> None:
    """Removes a file, if there is one.

    Raises:
      CannotWrite: it cannot be removed.
    """
    try:
        path.unlink()
    except FileNotFoundError:
        pass
    except Exception as error:  # the drivers of buckets raise many types
        raise CannotWrite(path, error) from error


def check_empty(folder: AnyPath) -> None:
    """Checks that a folder for results is empty, or holds what a kill in `incomplete` has left.

    Raises:
      BadInput: it holds anything else. A folder that does not exist is empty.
    """
    try:
        names = {path.name for path in folder.iterdir()}
    except (FileNotFoundError, NotADirectoryError):
        return
    if names and _INCOMPLETE not in names:
        raise BadInput(f"{folder}: not empty; results are never overwritten")


@contextlib.contextmanager
def incomplete(folder: AnyPath) -> Iterator[None]:
    """Marks a folder of a bucket as incomplete until the context ends without an error.

    A local folder gets its name when it is complete, but objects of a bucket cannot be renamed.

    Raises:
      CannotWrite: no permission.
    """
    marker = folder / _INCOMPLETE
    write_atomically(marker, "Incomplete: the same command, repeated, writes this folder anew.\n")
    yield
    remove(marker)


def remove_tree(path: AnyPath) -> None:
    """Removes a folder with its content.

    Raises:
      CannotWrite: it cannot be removed.
    """
    try:
        shutil.rmtree(path) if isinstance(path, Path) else path.rmtree()
    except Exception as error:  # the drivers of buckets raise many types
        raise CannotWrite(path, error) from error


def write_csv(
    path: AnyPath, rows: Sequence[dict[str, Any]], columns: Sequence[str] | None = None
) -> None:
    """Writes rows as CSV, at once or not at all.

    Args:
      path: the file.
      rows: cells by column; a missing one is empty.
      columns: by default those of the first row.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    # The name of an image need not be valid text.
    write_atomically(path, text.getvalue().encode("utf-8", "backslashreplace"))
