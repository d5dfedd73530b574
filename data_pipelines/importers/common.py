"""Helpers that several importers share: required folders and JSON files, divisions, images."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.errors import BadInput
from data_pipelines.image_files import is_image, list_folder
from data_pipelines.items import GOOD
from data_pipelines.lists.list_file import TEST, TRAIN, Row


class Options(NamedTuple):
    """The options of importers.

    Attributes:
      test_fraction: the fraction of the good images that become test images, where the annotations
        have no split.
    """

    test_fraction: float = 0.3


def require_folders(base: Path, folders: Sequence[str], expected: str) -> None:
    """Checks that folders are there.

    Args:
      base: the folder that the user named.
      folders: paths inside `base`.
      expected: a description of the layout, for the message.

    Raises:
      BadInput: one line that names the first missing folder, and categories inside `base`.
    """
    for name in folders:
        if not (base / name).is_dir():
            inside = list_folder(base)[1] if base.is_dir() else []
            categories = [path.name for path in inside if (path / folders[0]).is_dir()]
            hint = f"; name a category: {', '.join(categories)}" if categories else ""
            raise BadInput(f"{base / name}: no such folder; expected is {expected}{hint}")


def images_in(folder: Path) -> list[Path]:
    """Returns the images directly in a folder, sorted by name."""
    return [path for path in list_folder(folder)[0] if is_image(path.name)]


def json_file(root: Path) -> Path:
    """Returns the JSON file that `root` is, or the only one in the folder `root`.

    Raises:
      BadInput: the folder holds none or several.
    """
    if not root.is_dir():
        return root
    files = [path for path in list_folder(root)[0] if path.suffix.lower() == ".json"]
    if len(files) != 1:
        names = f" ({', '.join(path.name for path in files)})" if files else ""
        raise BadInput(f"{root}: {len(files)} JSON files{names}; name the file")
    return files[0]


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
      BadInput: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise BadInput(f"{path}: not a JSON file ({error})") from error


@contextmanager
def described(where: str, form: str) -> Iterator[None]:
    """Turns errors of missing keys and wrong types inside JSON into one line."""
    try:
        yield
    except BadInput:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise BadInput(f"{where}: not {form} ({reason})") from error


def type_name(labels: Sequence[str]) -> str:
    """Returns the type of an image with these labels."""
    return "+".join(sorted({label.replace("/", "_").replace("\\", "_") for label in labels}))


def divide_good(rows: Sequence[Row], fraction: float) -> list[Row]:
    """Moves a fraction of the good rows to the test split, drawn by a hash of the file's name."""

    def order(row: Row) -> bytes:
        return hashlib.sha256(row.image.name.encode(errors="surrogateescape")).digest()

    good = sorted((row for row in rows if row.type == GOOD), key=order)
    test = {row.image for row in good[: round(fraction * len(good))]}
    return [
        row._replace(split=TEST if row.type != GOOD or row.image in test else TRAIN) for row in rows
    ]
