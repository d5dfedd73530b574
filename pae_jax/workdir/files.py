"""Files of a run: atomic writing, JSON and CSV."""

import csv
import io
import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipelines.errors import BadInput, CannotWrite


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes a file at once or not at all, by renaming a temporary file beside it.

    Raises:
      CannotWrite: no space or no permission.
    """
    data = content.encode() if isinstance(content, str) else content
    # In the same folder, because only a rename within one file system is atomic. The process id
    # keeps the files of two processes apart.
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
    """Returns JSON, with null for NaN and infinity, which JSON cannot hold."""

    def with_nulls(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: with_nulls(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [with_nulls(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(with_nulls(value), allow_nan=False, **options)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file with sorted keys, at once or not at all."""
    write_atomically(path, to_json(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """Reads a JSON file of a workdir.

    Raises:
      BadInput: the file is missing or cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise BadInput(f"{path}: not found; is this the workdir of a training run?") from None
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from None


def check_writable(directory: Path) -> None:
    """Checks that files can be written to a directory; makes the directory if it is missing.

    Raises:
      BadInput: the directory cannot be made or written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # A file is created, because permissions alone do not show a full or read-only disk.
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise BadInput(f"{directory}: cannot be written ({error.strerror})") from None


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows of the same columns as CSV, at once or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    # The name of an image need not be valid text.
    write_atomically(path, text.getvalue().encode("utf-8", "backslashreplace"))
