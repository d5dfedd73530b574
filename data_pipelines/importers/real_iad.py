"""Real-IAD: the split of its JSON file of a category.

    ROOT/CATEGORY/{OK,NG/TYPE}/SAMPLE/*.jpg, *_mask.png     ROOT is realiad_1024 or another size
    realiad_jsons/realiad_jsons/CATEGORY.json               in ROOT, or beside it

The five views of a sample are one group.
"""

from pathlib import Path

from data_pipelines.errors import BadInput, inform
from data_pipelines.importers.common import Options, described, read_json, require_folders
from data_pipelines.items import GOOD
from data_pipelines.lists.list_file import TEST, TRAIN, Row

_JSONS = ("realiad_jsons/realiad_jsons", "realiad_jsons", ".")


def read(base: Path, options: Options) -> list[Row]:
    """Returns the rows of one category; defective training images are left out.

    Args:
      base: ROOT/CATEGORY.
      options: none applies.

    Raises:
      BadInput: there is no folder OK or JSON file, or the file is of another form.
    """
    del options
    require_folders(base, ["OK"], "ROOT/CATEGORY with OK and NG, ROOT being realiad_1024, …")
    places = [root / name for root in (base.parent, base.parent.parent) for name in _JSONS]
    files = [place / f"{base.name}.json" for place in places]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise BadInput(f"{files[3]}: no such file, nor {files[0]}; it gives the split")
    data, rows = read_json(path), []
    with described(str(path), "a JSON file of Real-IAD"):
        normal = data["meta"]["normal_class"]
        for split in (TRAIN, TEST):
            for number, record in enumerate(data[split]):
                image, mask = base / record["image_path"], record.get("mask_path")
                defective = record["anomaly_class"] != normal
                row = Row(
                    image=image,
                    split=split,
                    type=record["anomaly_class"] if defective else GOOD,
                    masks=(base / mask,) if mask and defective else (),
                    group=image.parent.relative_to(base).as_posix(),
                    where=f"{path}, {split} {number}",
                )
                rows.append(row)
    kept = [row for row in rows if row.split == TEST or row.type == GOOD]
    if len(kept) < len(rows):
        inform(f"{path}: {len(rows) - len(kept)} defective training images are left out")
    return kept
