"""Lists of public data sets and of annotations: `pae import NAME ROOT --out=LIST`.

| module          | NAME                                                                   |
| --------------- | ---------------------------------------------------------------------- |
| `trees`         | `mvtec_ad`, `mvtec_ad_2`, `mvtec_loco`, `btad`, `mpdd`                 |
| `visa`          | `visa`                                                                 |
| `real_iad`      | `real_iad`                                                             |
| `kolektor_sdd2` | `kolektor_sdd2`                                                        |
| `dagm_2007`     | `dagm_2007`                                                            |
| `coco`          | `coco`: COCO JSON, polygons and RLE                                    |
| `label_studio`  | `label_studio`: its JSON export, brush masks                           |

An importer is a function from a path and `Options` to the rows of a list. It writes nothing.
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipelines.errors import BadInput
from data_pipelines.importers import coco, dagm_2007, kolektor_sdd2, label_studio, real_iad, visa
from data_pipelines.importers.common import Options
from data_pipelines.importers.trees import TREES
from data_pipelines.items import GOOD
from data_pipelines.lists.list_file import SPLITS, Row, write_list

__all__ = ["IMPORTERS", "Options", "import_list"]

IMPORTERS: dict[str, Callable[[Path, Options], list[Row]]] = {
    **TREES,
    "visa": visa.read,
    "real_iad": real_iad.read,
    "kolektor_sdd2": kolektor_sdd2.read,
    "dagm_2007": dagm_2007.read,
    "coco": coco.read,
    "label_studio": label_studio.read,
}


def import_list(name: str, root: str, out: str, options: Options | None = None) -> str:
    """Writes the list of a data set.

    Args:
      name: a key of `IMPORTERS`.
      root: the folder of the data set, with that of the category if it has any; a JSON file of
        annotations, or its folder.
      out: the list, outside `root`; its suffix .csv or .jsonl decides its form.
      options: those of annotations without a split.

    Returns:
      One line that counts the images.

    Raises:
      BadInput: one line that says what was expected and where.
      CannotWrite: the list cannot be written.
    """
    if name not in IMPORTERS:
        raise BadInput(f"{name}: no such data set; one of {', '.join(IMPORTERS)}")
    options = options or Options()
    if not 0 < options.test_fraction < 1:
        raise BadInput(f"--test_fraction: {options.test_fraction}, which must be between 0 and 1")
    if "://" in out:
        raise BadInput(f"--out: {out}: a list is a local file")
    # Rows are relative to the list, so that links above the data set must not come between them.
    base, path = Path(os.path.realpath(root)), Path(out)
    if not base.exists():
        raise BadInput(f"{root}: no such file or folder")
    folder = base if base.is_dir() else base.parent
    if Path(os.path.realpath(path)).is_relative_to(folder):
        raise BadInput(f"--out: {out}: inside the data set's folder, which stays as it is")
    rows = IMPORTERS[name](base, options)
    for row in rows:
        for file in (row.image, *row.masks):
            if not file.is_file():
                raise BadInput(f"{file}: no such file; {row.where or name} names it")
    write_list(path, rows)
    return f"{path}: {_summary(rows)}"


def _summary(rows: Sequence[Row]) -> str:
    splits = Counter(row.split for row in rows)
    types = Counter(row.type for row in rows if row.type != GOOD)
    counts = ", ".join(f"{splits[split]} {split}" for split in SPLITS if splits[split])
    listed = ", ".join(f"{number} {kind}" for kind, number in sorted(types.items()))
    return f"{counts} images; defects: {listed or 'none'}"
