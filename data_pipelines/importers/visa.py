"""VisA: the official one-class split, split_csv/1cls.csv.

ROOT/CATEGORY/Data/Images/{Normal,Anomaly}, ROOT/CATEGORY/Data/Masks/Anomaly. All defects have the
type "anomaly".
"""

from pathlib import Path

from data_pipelines.errors import BadInput
from data_pipelines.importers.common import Options
from data_pipelines.items import GOOD
from data_pipelines.lists.list_file import Row
from data_pipelines.lists.table import read_csv

SPLIT_FILE = "split_csv/1cls.csv"
_COLUMNS = ("object", "split", "label", "image", "mask")
_TYPES = {"normal": GOOD, "anomaly": "anomaly"}


def read(base: Path, options: Options) -> list[Row]:
    """Returns the rows of one category.

    Args:
      base: ROOT/CATEGORY.
      options: none applies.

    Raises:
      BadInput: the split file is missing, or does not know the category.
    """
    del options
    root, path = base.parent, base.parent / SPLIT_FILE
    if not path.is_file():
        raise BadInput(f"{path}: no such file; expected is ROOT/CATEGORY beside ROOT/{SPLIT_FILE}")
    rows, categories = [], set()
    for line, record in read_csv(path, _COLUMNS):
        where = f"{path}, line {line}"
        categories.add(record["object"])
        if record["object"] != base.name:
            continue
        if record["label"] not in _TYPES:
            raise BadInput(f"{where}: label {record['label']!r}, neither normal nor anomaly")
        masks = (root / record["mask"],) if record["mask"] else ()
        image, kind = root / record["image"], _TYPES[record["label"]]
        rows.append(Row(image, record["split"], kind, masks, where=where))
    if not rows:
        raise BadInput(f"{path}: no object {base.name}; it has {', '.join(sorted(categories))}")
    return rows
