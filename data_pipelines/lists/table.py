"""The rows of a CSV file with their line numbers."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipelines.errors import BadInput

# A spreadsheet writes semicolons where the comma is the decimal sign.
_DELIMITERS = ",;\t"


def read_csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (line number, row) of a CSV file whose first line names the columns.

    Args:
      path: a file in UTF-8.
      columns: the columns that the file must have. Others are read too.

    Raises:
      BadInput: the file cannot be read, or lacks a column; a row has too few or too many cells.
    """
    try:
        # "utf-8-sig" also reads a file that a spreadsheet has saved with a byte order mark.
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, delimiter=max(_DELIMITERS, key=header.count))
            if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
                raise BadInput(
                    f"{path}: no column {', '.join(missing)}; the first line names the columns, "
                    f"among them {', '.join(columns)}"
                )
            for row in reader:
                if None in row.values() or None in row:
                    number = "few" if None in row.values() else "many"
                    raise BadInput(f"{path}, line {reader.line_num}: too {number} columns")
                yield reader.line_num, row
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror or error})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path}: not a CSV file in UTF-8 ({error})") from error
