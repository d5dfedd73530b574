"""The list of a data set's images: one CSV or JSON-lines file.

    image,split,type,mask,group
    images/a.png,train,good,,part 1
    images/b.png,test,scratch,masks/b_1.png|masks/b_2.png,

| column       | content                                                                     |
| ------------ | --------------------------------------------------------------------------- |
| `image`      | the path of the image                                                       |
| `split`      | `train`, `test`, or `holdout` for training images that are held out         |
| `type`       | `good`, or the name of the defect                                           |
| `mask`       | the path of the mask, or nothing; several are united                        |
| `group`      | optional: training images of one group are held out together                |
| `foreground` | optional: a mask of the object in a training image, for `pae foreground`    |

Paths are relative to the folder of the list. Several masks are separated by `|` in CSV and are an
array in JSON lines, where every line is one object with the columns as keys. Other words for good
that the source `folder` knows count as good.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.errors import BadInput, CannotWrite, warn
from data_pipelines.folder import is_normal
from data_pipelines.items import GOOD
from data_pipelines.lists.table import read_csv
from data_pipelines.writing import atomic_file, short_name

TRAIN, HOLDOUT, TEST = SPLITS = ("train", "holdout", "test")
COLUMNS = ("image", "split", "type", "mask")
OPTIONAL = ("group", "foreground")
SUFFIXES = (".csv", ".jsonl")
_SEPARATOR = "|"


class Row(NamedTuple):
    """One image of a list.

    Attributes:
      image: its path.
      split: one of `SPLITS`.
      type: "good" for a normal image, else the name of its defect.
      masks: the paths of its masks, which are united.
      group: training images of one group are held out together; "": no group.
      foreground: the path of a mask of the object, which `pae foreground` reads.
      drawn: a mask as PNG, in place of `masks`, that `write_list` writes beside the list.
      where: the file and the line or record, for error messages.
    """

    image: Path
    split: str
    type: str
    masks: tuple[Path, ...] = ()
    group: str = ""
    foreground: Path | None = None
    drawn: bytes | None = None
    where: str = ""


def read_list(path: Path) -> list[Row]:
    """Returns the rows of a list, checked, without looking at the files that it names.

    Raises:
      BadInput: one line naming the list, the line at fault and what to do.
    """
    _check_suffix(path)
    # A link to a folder is resolved, because ".." in a row leads out of the real one.
    folder = Path(os.path.realpath(path.parent))
    records = _csv_rows(path) if path.suffix.lower() == ".csv" else _json_lines(path)
    rows, unknown = [], set()
    for line, record in records:
        unknown |= record.keys() - {*COLUMNS, *OPTIONAL}
        rows.append(_row(record, folder, f"{path}, line {line}"))
    if unknown:
        warn(f"{path}: columns that are not read: {', '.join(sorted(unknown))}")
    check_rows(rows, path)
    return rows


def check_rows(rows: Sequence[Row], path: Path) -> None:
    """Checks what can be said of rows without the files that they name.

    Raises:
      BadInput: see `read_list`.
    """
    seen: dict[Path, Row] = {}
    for row in rows:
        if row.split not in SPLITS:
            raise BadInput(
                f"{row.where}: split {row.split!r}, which must be one of {', '.join(SPLITS)}"
            )
        if not row.type or {"/", "\\"} & {*row.type} or row.type in (".", ".."):
            raise BadInput(f"{row.where}: type {row.type!r}, which must be good or a defect's name")
        if row.split != TEST and row.type != GOOD:
            raise BadInput(
                f"{row.where}: type {row.type!r} in split {row.split}, which takes only good "
                "images; make it test, or leave the row out"
            )
        other = seen.setdefault(row.image, row)
        if other is not row:
            raise BadInput(
                f"{row.where}: {row.image} in split {row.split}, and in split {other.split} at "
                f"{other.where.rpartition(', ')[2]}; leave one of the rows out"
            )
    if not any(row.split == TRAIN for row in rows):
        raise BadInput(f"{path}: no row of split train, so that there is nothing to train on")
    if unread := [row for row in rows if row.type == GOOD and (row.masks or row.drawn)]:
        warn(
            f"{unread[0].where}: a good image with a mask, as {len(unread)} rows; these masks are "
            "not read"
        )


def write_list(path: Path, rows: Sequence[Row]) -> None:
    """Writes a list, and the masks that were drawn, below masks/ beside it.

    Args:
      path: the file, whose suffix .csv or .jsonl decides its form. Its folder is made if it is
        missing. Nothing happens if the same list is there.
      rows: with absolute paths.

    Raises:
      BadInput: another list is there, or CSV cannot hold a path.
      CannotWrite: the disk is full or broken.
    """
    _check_suffix(path)
    check_rows(rows, path)
    folder = Path(os.path.realpath(path.parent))
    above = os.path.commonpath([row.image.parent for row in rows])
    masks = {}
    for row in rows:
        if row.drawn:
            name = Path(os.path.relpath(row.image, above))
            # The suffix stays, because a.png and a.jpg are two images.
            file = name.with_name(f"{short_name(name.name, len('.png'))}.png")
            masks[row.image] = folder / "masks" / path.stem / file
    files = {masks[row.image]: row.drawn for row in rows if row.drawn}
    rows = [row._replace(masks=(masks[row.image],)) if row.drawn else row for row in rows]
    # The list comes last, so that no list names a mask that is missing.
    files[folder / path.name] = _encode(path, [_record(row, folder) for row in rows])
    try:
        missing = [file for file in files if not file.exists()]
        for file in files.keys() - missing:
            if file.read_bytes() != files[file]:
                raise BadInput(f"{file}: exists with other content; name another file by --out")
        for file in missing:
            with atomic_file(file) as stream:
                stream.write(files[file])
    except OSError as error:
        raise CannotWrite(path, error) from error


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise BadInput(f"{path}: a list is a file whose name ends in {' or '.join(SUFFIXES)}")


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, row in read_csv(path, COLUMNS):
        yield line, row | {"mask": row["mask"].split(_SEPARATOR)}


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not JSON lines in UTF-8 ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise BadInput(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise BadInput(f"{path}, line {number}: not an object with the keys of a row")
        if missing := [name for name in COLUMNS if name not in record]:
            raise BadInput(f"{path}, line {number}: no key {', '.join(missing)}")
        yield number, record


def _row(record: dict[str, Any], folder: Path, where: str) -> Row:
    """Returns the row of one record, whose values are those of JSON or strings."""
    masks = record["mask"] if isinstance(record["mask"], list) else [record["mask"] or ""]
    values = {name: record.get(name) or "" for name in ("image", "split", "type", *OPTIONAL)}
    texts = [*values.values(), *masks]
    if not all(isinstance(text, str) and "\0" not in text for text in texts):
        raise BadInput(f"{where}: every value must be a string, and mask may be an array of them")
    if not values["image"]:
        raise BadInput(f"{where}: no image")
    kind = values["type"].strip()

    def absolute(path: str) -> Path:
        return Path(os.path.normpath(folder / path))

    return Row(
        image=absolute(values["image"]),
        split=values["split"].strip(),
        type=GOOD if is_normal(kind) else kind,
        masks=tuple(absolute(mask) for mask in masks if mask),
        group=values["group"],
        foreground=absolute(values["foreground"]) if values["foreground"] else None,
        where=where,
    )


def _record(row: Row, folder: Path) -> dict[str, Any]:
    def relative(path: Path) -> str:
        return Path(os.path.relpath(path, folder)).as_posix()

    return {
        "image": relative(row.image),
        "split": row.split,
        "type": row.type,
        "mask": [relative(mask) for mask in row.masks],
        "group": row.group,
        "foreground": relative(row.foreground) if row.foreground else "",
    }


def _encode(path: Path, records: Iterable[dict[str, Any]]) -> bytes:
    records = list(records)
    unused = [name for name in OPTIONAL if not any(record[name] for record in records)]
    records = [{k: v for k, v in record.items() if k not in unused} for record in records]
    if path.suffix.lower() == ".jsonl":
        return "".join(f"{json.dumps(record)}\n" for record in records).encode()
    text = io.StringIO()
    writer = csv.DictWriter(text, records[0].keys(), lineterminator="\n")
    writer.writeheader()
    for record in records:
        if any(_SEPARATOR in mask for mask in record["mask"]):
            raise BadInput(f"{record['mask'][0]}: has a {_SEPARATOR}; end --out in .jsonl")
        writer.writerow(record | {"mask": _SEPARATOR.join(record["mask"])})
    try:
        return text.getvalue().encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{path}: a file's name is not UTF-8; end --out in .jsonl") from error
