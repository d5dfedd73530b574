"""Label Studio: its export as JSON, with brush masks and choices.

The image of a task is sought by its path or name in the folder of the JSON file and in `images` in
it. A brush mask is a defect of its label; a choice is the type of the whole image. A task that was
annotated without either is good; one that was not annotated is left out.
"""

import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from data_pipelines.errors import BadInput, inform
from data_pipelines.folder import is_normal
from data_pipelines.image_files import is_image
from data_pipelines.importers.common import (
    Options,
    described,
    divide_good,
    json_file,
    read_json,
    type_name,
)
from data_pipelines.items import GOOD
from data_pipelines.lists.list_file import TRAIN, Row
from data_pipelines.lists.source import encode_mask

_FORM = 'a task of the JSON export ("JSON", not "JSON-MIN")'
# Regions that are no brush masks, without which a defect would be taken for good.
_OTHER_REGIONS = ("rectangle", "polygon", "ellipse", "keypoint", "bitmask", "vector")
_UNNAMED = "defect"
_CHANNELS = 4


def read(root: Path, options: Options) -> list[Row]:
    """Returns the rows of an export.

    Args:
      root: the JSON file, or a folder with one JSON file.
      options: the fraction of good images for testing.

    Raises:
      BadInput: another export, a region that is no brush mask, or an image that is not there.
    """
    path = json_file(root)
    tasks = read_json(path)
    if not isinstance(tasks, list):
        raise BadInput(f"{path}: not an array of tasks, the JSON export of Label Studio")
    rows, unlabelled, several = [], 0, 0
    for number, task in enumerate(tasks):
        where = f"{path}, task {task.get('id', number) if isinstance(task, dict) else number}"
        with described(where, _FORM):
            annotations = [a for a in task["annotations"] if not a.get("was_cancelled")]
            if not annotations:
                unlabelled += 1
                continue
            several += len(annotations) > 1
            # The one that was marked as the truth, else the first.
            annotation = max(annotations, key=lambda a: bool(a.get("ground_truth")))
            image = _image(path.parent, task["data"], where)
            rows.append(_row(image, annotation["result"], where))
    if unlabelled:
        inform(f"{path}: {unlabelled} tasks without an annotation are left out")
    if several:
        inform(f"{path}: {several} tasks with several annotations, of which one is taken")
    return divide_good(rows, options.test_fraction)


def decode_rle(data: bytes, count: int) -> np.ndarray:
    """Decodes the run-length code of brush masks (rle-pack of thi.ng/umbrella).

    Bits, the highest first: 32 of the number of values, 5 of the bits per value less one, four
    times 4 of the bits per length less one. Then blocks: one bit that says whether all values of
    the block are equal, two that choose among the four, the length less one, and one value or as
    many as the length.

    Args:
      data: the code.
      count: the number of values that it must have.

    Returns:
      The values, int64 (count,).

    Raises:
      ValueError: the code ends too early, or has another number of values.
    """
    bits = "".join(f"{byte:08b}" for byte in data)
    position = 0

    def take(size: int) -> int:
        nonlocal position
        position += size
        if position > len(bits):
            raise ValueError("the RLE ends too early")
        return int(bits[position - size : position], 2)

    if (number := take(32)) != count:
        raise ValueError(f"an RLE of {number} values where {count} are needed")
    value_size = take(5) + 1
    length_sizes = [take(4) + 1 for _ in range(4)]
    values = np.zeros(count, np.int64)
    i = 0
    while i < count:
        is_run = take(1)
        end = i + 1 + take(length_sizes[take(2)])
        if end > count:
            raise ValueError("the RLE has more values than it says")
        values[i:end] = take(value_size) if is_run else [take(value_size) for _ in range(i, end)]
        i = end
    return values


def _row(image: Path, results: list[dict[str, Any]], where: str) -> Row:
    labels, masks = [], []
    for result in results:
        value, kind = result["value"], result["type"]
        if kind == "choices":
            labels += [label for label in value["choices"] if not is_normal(label)]
        elif value.get("format") == "rle" or "rle" in value:
            if result.get("image_rotation", 0) % 360:
                raise BadInput(f"{where}: a mask of a rotated image; rotate the file instead")
            shape = (int(result["original_height"]), int(result["original_width"]))
            values = decode_rle(bytes(value["rle"]), shape[0] * shape[1] * _CHANNELS)
            # The last of four channels is the opacity of the brush.
            masks.append(values.reshape(*shape, _CHANNELS)[..., -1] > 0)
            labels += value.get("brushlabels") or value.get("labels") or [_UNNAMED]
        elif kind.startswith(_OTHER_REGIONS):
            raise BadInput(f"{where}: a region of type {kind}; export it as COCO, and import coco")
    row = Row(image, TRAIN, type_name(labels) or GOOD, where=where)
    return row._replace(drawn=encode_mask(np.logical_or.reduce(masks))) if masks else row


def _image(folder: Path, data: dict[str, Any], where: str) -> Path:
    """Returns the file of a task: /data/local-files/?d=PATH, /data/upload/…/HASH-NAME or a URL."""
    for reference in data.values():
        if not isinstance(reference, str):
            continue
        url = urlsplit(reference)
        path = Path(parse_qs(url.query).get("d", [unquote(url.path)])[0].lstrip("/"))
        if not is_image(path.name or "."):
            continue
        names = (path, path.name, re.sub(r"^[0-9a-f]{8}-", "", path.name))
        for place in (folder, folder / "images"):
            for name in names:
                if (place / name).is_file():
                    return place / name
        raise BadInput(f"{where}: image {path.name} is neither in {folder} nor in images/ in it")
    raise BadInput(f"{where}: names no image in data")
