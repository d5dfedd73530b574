"""The folder of a prediction: two tables that grow, and how an interrupted prediction goes on.

O/scores.csv    a row for each image, in the order of the images
O/regions.csv   a row for each region, in the same order
O/.unfinished   until all rows are there: what they depend on

The row of an image is appended to scores.csv after everything else of this image was written. The
rows that stand after an interruption are therefore those of the first images, and a repetition
begins with the next one. What an interruption has cut off, and regions without the row of their
image, are dropped.
"""

import contextlib
import csv
import io
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.errors import BadInput, CannotWrite
from pae_jax.inference.regions import Region
from pae_jax.workdir import changes, files
from pae_jax.workdir.lock import lock
from pae_jax.workdir.paths import AnyPath
from pae_jax.workdir.staging import Staging

SCORES, REGIONS, UNFINISHED = "scores.csv", "regions.csv", ".unfinished"
PICTURES = ("heatmaps", "masks", "maps", "reconstructions")
REGION_COLUMNS = ("name", "region", *Region._fields)

LOCK, OWNER = ".lock", ".owner"
# How often the tables are uploaded to a bucket, whose objects cannot grow.
_UPLOAD_SECONDS = 30


def is_result(folder: Path) -> bool:
    """Returns whether a folder holds a run, or results, whose pictures are no images to judge."""
    try:
        names = set(os.listdir(folder))
    except OSError:
        return False
    prediction = SCORES in names and not names.isdisjoint((REGIONS, *PICTURES))
    run = "config.json" in names and not names.isdisjoint(("checkpoints", "data.json"))
    evaluation = {"metrics.json", SCORES} <= names
    sweep = {"results.csv", "results.md"} <= names
    return UNFINISHED in names or prediction or run or evaluation or sweep


def check_free(out: AnyPath) -> None:
    """Checks that a folder is empty, does not exist, or holds an unfinished prediction.

    Raises:
      BadInput: it holds anything else.
    """
    try:
        names = {path.name for path in out.iterdir()}
    except (FileNotFoundError, NotADirectoryError):
        return
    if not names <= {LOCK, OWNER} and UNFINISHED not in names:
        raise BadInput(f"{out}: not empty; results are never overwritten")


class Output:
    """The tables of a prediction, to which `open_output` gives access.

    Attributes:
      done: the number of images whose rows stand.
      errors: the number of rows with an error.
      first_error: the error of the first of them.
    """

    def __init__(self, folder: AnyPath, staging: Staging, stack: contextlib.ExitStack):
        """Opens the tables, which have their headers.

        Args:
          folder: the folder of the prediction.
          staging: the folder of the tables.
          stack: closes them.
        """
        self.done = self.errors = 0
        self.first_error = ""
        self._folder, self._staging = folder, staging
        self._tables = {
            name: stack.enter_context(_open(staging.folder / name)) for name in (REGIONS, SCORES)
        }
        self._uploaded = time.monotonic()

    def append(self, row: dict[str, Any], regions: Sequence[Region]) -> None:
        """Appends the rows of the next image.

        Args:
          row: that of scores.csv, all columns.
          regions: those of the image.
        """
        # First the regions, because the row of the image says that all is there.
        self._write(REGIONS, [(row["name"], i, *region) for i, region in enumerate(regions, 1)])
        self._write(SCORES, [row.values()])
        self.count(row)
        if time.monotonic() - self._uploaded > _UPLOAD_SECONDS:
            self._staging.upload()
            self._uploaded = time.monotonic()

    def count(self, row: dict[str, Any]) -> None:
        """Counts a row that stands."""
        self.done += 1
        if row["error"]:
            self.errors += 1
            self.first_error = self.first_error or row["error"]

    def finish(self) -> None:
        """Marks the prediction as finished."""
        for table in self._tables.values():
            os.fsync(table.fileno())
        self._staging.upload()
        # The lock is held until its file is closed. This order leaves nothing behind in a folder
        # that counts as finished.
        with contextlib.suppress(CannotWrite):  # Windows removes no open file
            files.remove(self._folder / LOCK)
        files.remove(self._folder / UNFINISHED)

    def _write(self, name: str, rows: Sequence[Any]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        data = memoryview(text.getvalue().encode("utf-8", "backslashreplace"))
        table = self._tables[name]
        end = os.fstat(table.fileno()).st_size
        try:
            while data:
                data = data[table.write(data) :]
        except OSError as error:
            # A part of a line would only be dropped later, if the disk allows to drop it now.
            with contextlib.suppress(OSError):
                table.truncate(end)
            raise CannotWrite(self._staging.folder / name, error) from error


@contextlib.contextmanager
def open_output(
    out: AnyPath, record: dict[str, Any], names: Sequence[str], columns: Sequence[str]
) -> Iterator[Output]:
    """Begins a prediction, or goes on with an unfinished one; the folder is locked meanwhile.

    Args:
      out: a folder that can be written.
      record: what the rows depend on.
      names: the names of all images, as they stand in the rows.
      columns: those of scores.csv, with name, regions and error.

    Yields:
      The tables. A prediction that does not call `finish` stays unfinished.

    Raises:
      BadInput: the folder holds something else, or an unfinished prediction that depends on
        something else; or another process predicts there.
      CannotWrite: no space or no permission.
    """
    with lock(out, "predicting"), Staging(out) as staging, contextlib.ExitStack() as stack:
        check_free(out)
        _compare(out, json.loads(files.to_json(record)))
        scores = staging.fetch(SCORES)
        rows = _restore(scores, staging.fetch(REGIONS), names, columns)
        output = Output(out, staging, stack)
        for row in rows:
            output.count(row)
        yield output


def _compare(out: AnyPath, record: dict[str, Any]) -> None:
    """Writes what the rows depend on, or compares it with what an unfinished prediction wrote."""
    marker = out / UNFINISHED
    if not marker.exists():
        files.write_json(marker, record)
        return
    stored = files.read_json(marker)
    if differing := list(changes.differences(stored, record)):
        raise BadInput(
            f"{out}: holds an unfinished prediction by other settings: "
            f"{'; '.join(map(str, differing))}; repeat its command, or choose another --out"
        )


def _restore(
    scores: Path, regions: Path, names: Sequence[str], columns: Sequence[str]
) -> list[dict[str, str]]:
    """Returns the rows of scores.csv that stand; drops all others from both tables."""
    lines, parsed = _whole_lines(scores, columns)
    region_lines, _ = _whole_lines(regions, REGION_COLUMNS)
    rows: list[dict[str, str]] = []
    end = 0  # of the regions
    for cells, name in zip(parsed, names, strict=False):
        row = dict(zip(columns, cells, strict=True))
        count = int(row["regions"] or 0) if row["regions"].isdecimal() or not row["regions"] else -1
        if row["name"] != name or count < 0 or end + count > len(region_lines):
            break
        rows.append(row)
        end += count
    _rewrite(regions, REGION_COLUMNS, region_lines[:end])
    _rewrite(scores, columns, lines[: len(rows)])
    return rows


def _whole_lines(path: Path, columns: Sequence[str]) -> tuple[list[bytes], list[list[str]]]:
    """Returns the lines of a table below its header that are whole, and their cells."""
    if not path.exists():
        return [], []
    # The text after the last line end is a part of a line. No cell holds a line end.
    header, *lines = path.read_bytes().split(b"\n")[:-1] or [b""]
    if header != _line(columns):
        return [], []
    cells = [next(csv.reader([line.decode(errors="replace")]), []) for line in lines]
    whole = list(itertools.takewhile(lambda row: len(row) == len(columns), cells))
    return lines[: len(whole)], whole


def _rewrite(path: Path, columns: Sequence[str], lines: Sequence[bytes]) -> None:
    content = b"".join(line + b"\n" for line in (_line(columns), *lines))
    if not path.exists() or path.read_bytes() != content:
        files.write_atomically(path, content)


def _line(columns: Sequence[str]) -> bytes:
    return ",".join(columns).encode()


def _open(path: Path) -> io.FileIO:
    try:
        # Without a buffer, so that every row is with the system when `append` returns.
        return io.FileIO(path, "a")
    except OSError as error:
        raise CannotWrite(path, error) from error
