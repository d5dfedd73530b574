"""Source: a list of images, one CSV or JSON-lines file (`list_file` describes it).

An image's name is its type and its path below the deepest folder that holds all images of this
type in the split: crack/003.png for test/crack/003.png. Training and held-out images are one split
in this sense.
"""

import functools
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines import decode
from data_pipelines.errors import BadInput, warn
from data_pipelines.items import GOOD, Item, read_file
from data_pipelines.lists.list_file import HOLDOUT, TEST, Row, read_list


def training_items(root: str, category: str) -> list[Item]:
    """Returns the images of the splits train and holdout.

    Args:
      root: the list.
      category: "".
    """
    return _items([row for row in _read(root, category) if row.split != TEST])


def foreground_masks(root: str, category: str) -> dict[str, tuple[Callable[[], bytes], str]]:
    """Returns the masks of the object in training images, by the name of the image.

    A mask is what reads its file, and its path.
    """
    rows = {str(row.image): row for row in _read(root, category) if row.split != TEST}
    masks = {}
    for item in training_items(root, category):
        if path := rows[item.origin].foreground:
            if not os.path.isfile(path):
                where = rows[item.origin].where
                raise BadInput(f"{where}: no file {path}; paths are relative to the list")
            masks[item.name] = functools.partial(read_file, path), str(path)
    return masks


def test_items(root: str, category: str) -> list[Item]:
    """Returns the images of the split test, with their masks."""
    rows = _read(root, category)
    test = [row for row in rows if row.split == TEST]
    defective = [row for row in test if row.type != GOOD]
    if test and len(defective) == len(test):
        warn(f"{root}: no good test image, so that no metric of whole images is defined")
    without = [row for row in defective if not row.masks]
    if 0 < len(without) < len(defective):
        warn(
            f"{without[0].where}: a defective image without a mask, as {len(without)} of "
            f"{len(defective)}; their pixels are left out of the metrics of pixels"
        )
    groups = {row.group for row in rows if row.group and row.split != TEST}
    if both := [row for row in test if row.group in groups]:
        warn(
            f"{both[0].where}: its group {both[0].group} has training images too, as that of "
            f"{len(both)} test images; results on these say little of new images"
        )
    return _items(test)


def _read(root: str, category: str) -> list[Row]:
    if category:
        raise BadInput(f"data.category: {category!r}, but a list has no categories; leave it empty")
    return read_list(Path(root))


def _items(rows: Sequence[Row]) -> list[Item]:
    """Returns the items of the rows of one split, sorted by name."""
    folders: dict[str, list[str]] = {}
    for row in rows:
        for path in (row.image, *row.masks):
            if not os.path.isfile(path):
                raise BadInput(f"{row.where}: no file {path}; paths are relative to the list")
        folders.setdefault(row.type, []).append(str(row.image.parent))
    common = {kind: os.path.commonpath(paths) for kind, paths in folders.items()}
    items = [_item(row, common[row.type]) for row in rows]
    return sorted(items, key=lambda item: item.name)


def _item(row: Row, folder: str) -> Item:
    mask = None
    if row.masks and row.type != GOOD:
        mask = functools.partial(_read_masks, row.masks)
    return Item(
        name=f"{row.type}/{row.image.relative_to(folder).as_posix()}",
        image=functools.partial(read_file, row.image),
        type=row.type,
        mask=mask,
        origin=str(row.image),
        group=row.group,
        held_out=row.split == HOLDOUT,
    )


def _read_masks(paths: Sequence[Path]) -> bytes:
    """Returns the file of one mask, or the union of several as a PNG.

    Raises:
      BadInput: the masks are of different sizes, or one of several cannot be read.
      OSError: the only one cannot be read.
    """
    if len(paths) == 1:
        return read_file(paths[0])
    masks = []
    for path in paths:
        data = decode.read_encoded(functools.partial(read_file, path), str(path))
        masks.append(decode.read_mask(data, str(path)).mask)
        if masks[-1].shape != masks[0].shape:
            raise BadInput(f"{path}: another size than {paths[0]}, a mask of the same image")
    return encode_mask(np.logical_or.reduce(masks))


def encode_mask(mask: np.ndarray) -> bytes:
    """Returns a PNG of 0 and 255 from bool (h, w)."""
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).save(buffer, "PNG")
    return buffer.getvalue()
