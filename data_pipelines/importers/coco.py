"""COCO JSON: images with polygons or RLE, which become the masks of defects.

The images are sought by their file_name in the folder of the JSON file, in `images` in it or
beside it, and in the folder above. An image without annotations is good. One with annotations is a
test image whose type is the names of their categories, joined by +.
"""

from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.errors import BadInput
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

_FORM = "COCO JSON with images, annotations and categories"
_MIN_POLYGON = 6  # three points


def read(root: Path, options: Options) -> list[Row]:
    """Returns the rows of a JSON file.

    Args:
      root: the file, or a folder with one JSON file.
      options: the fraction of good images for testing.

    Raises:
      BadInput: no COCO JSON, an annotation without a mask, no images, or no pycocotools.
    """
    path = json_file(root)
    data = read_json(path)
    with described(str(path), _FORM):
        names = {record["id"]: str(record["name"]) for record in data["categories"]}
        images = {record["id"]: record for record in data["images"]}
        annotations: dict[Any, list[dict[str, Any]]] = {key: [] for key in images}
        for record in data["annotations"]:
            if record["image_id"] not in images:
                raise BadInput(f"{path}, annotation {record['id']}: no image {record['image_id']}")
            annotations[record["image_id"]].append(record)
        folder = _folder(path, [record["file_name"] for record in images.values()])
        rows = []
        for key, image in images.items():
            where = f"{path}, image {key}"
            row = Row(folder / image["file_name"], TRAIN, GOOD, where=where)
            if found := annotations[key]:
                shape = (int(image["height"]), int(image["width"]))
                masks = [
                    _mask(record["segmentation"], shape, f"{path}, annotation {record['id']}")
                    for record in found
                ]
                kind = type_name([names[record["category_id"]] for record in found])
                row = row._replace(type=kind, drawn=encode_mask(np.logical_or.reduce(masks)))
            rows.append(row)
    return divide_good(rows, options.test_fraction)


def _folder(path: Path, names: list[str]) -> Path:
    """Returns the folder in which the first image lies."""
    if not names:
        raise BadInput(f"{path}: no images")
    above = path.parent.parent
    folders = [path.parent, path.parent / "images", above / "images", above]
    for folder in folders:
        if (folder / names[0]).is_file():
            return folder
    raise BadInput(f"{path}: image {names[0]} in none of {', '.join(map(str, folders))}")


def _mask(segmentation: Any, shape: tuple[int, int], where: str) -> np.ndarray:
    """Returns the mask of one annotation, bool (h, w)."""
    try:
        from pycocotools import mask as coco_mask
    except ImportError as error:
        line = "coco: needs pycocotools; pip install pycocotools, or the extra import"
        raise BadInput(line) from error
    if not segmentation:
        raise BadInput(f"{where}: no segmentation; only polygons and RLE make a mask, no boxes")
    with described(where, "polygons or RLE of the image's size"):
        if isinstance(segmentation, list):
            # A list of four numbers would be taken for a box.
            if any(len(part) < _MIN_POLYGON or len(part) % 2 for part in segmentation):
                raise BadInput(f"{where}: a polygon needs x and y of at least three points")
            parts = coco_mask.frPyObjects(segmentation, *shape)
        else:
            counts = segmentation["counts"]
            if tuple(segmentation["size"]) != shape:
                raise ValueError(f"size {segmentation['size']}, its image {list(shape)}")
            if isinstance(counts, list):
                if sum(counts) != shape[0] * shape[1]:
                    raise ValueError(f"RLE of {sum(counts)} pixels")
                segmentation = coco_mask.frPyObjects(segmentation, *shape)
            parts = [segmentation]
        return coco_mask.decode(coco_mask.merge(parts)).astype(bool)
