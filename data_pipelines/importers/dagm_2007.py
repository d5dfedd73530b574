"""DAGM 2007: ROOT/ClassN/{Train,Test}/NAME.PNG, with Label/NAME_label.PNG for a defective image.

The defective training images are left out, because training takes only good ones. All defects have
the type "defect". The masks are coarse ellipses.
"""

from pathlib import Path

from data_pipelines.errors import BadInput, inform
from data_pipelines.importers.common import Options, images_in, require_folders
from data_pipelines.items import GOOD
from data_pipelines.lists.list_file import TEST, TRAIN, Row

DEFECT = "defect"
_FOLDERS = {TRAIN: "Train", TEST: "Test"}


def read(base: Path, options: Options) -> list[Row]:
    """Returns the rows of one class.

    Args:
      base: ROOT/ClassN.
      options: none applies.

    Raises:
      BadInput: a folder is missing or holds no image, or a label belongs to no image.
    """
    del options
    needed = [f"{name}{label}" for name in _FOLDERS.values() for label in ("", "/Label")]
    require_folders(base, needed, "ROOT/ClassN with Train and Test, and Label in each")
    rows = []
    for split, name in _FOLDERS.items():
        folder = base / name
        labels = {path.stem.casefold(): path for path in images_in(folder / "Label")}
        images = images_in(folder)
        if not images:
            raise BadInput(f"{folder}: no images in this folder")
        masks = [labels.pop(f"{path.stem}_label".casefold(), None) for path in images]
        if labels:
            raise BadInput(f"{next(iter(labels.values()))}: no image of this name in {folder}")
        if split == TRAIN:
            count = len(images) - masks.count(None)
            inform(f"{folder}: {count} defective training images are left out")
        for image, mask in zip(images, masks, strict=True):
            if mask is None:
                rows.append(Row(image, split, GOOD))
            elif split == TEST:
                rows.append(Row(image, split, DEFECT, (mask,)))
    return rows
