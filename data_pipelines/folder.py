"""Source: a folder in the layout of MVTec AD.

    ROOT[/CATEGORY]/train/good/NAME.png               normal training images
    ROOT[/CATEGORY]/test/{good,DEFECT}/NAME.png       test images
    ROOT[/CATEGORY]/ground_truth/DEFECT/NAME_mask.png masks, or NAME.png

Any suffix of `decode.SUFFIXES` is accepted, in lower or upper case; folders may be nested. Other
files and hidden ones are ignored. Without a folder `ground_truth` there are no masks; with one,
every defective image must have a mask.
"""

import os
from pathlib import Path

from data_pipelines.decode import SUFFIXES
from data_pipelines.errors import BadInput
from data_pipelines.items import GOOD, Item


def training_items(root: str, category: str) -> list[Item]:
    """Returns the images of train/good, sorted by name. Reads no other folder."""
    train = _category(root, category) / "train"
    return [_item(path, train, GOOD, None) for path in image_files(train / GOOD)]


def test_items(root: str, category: str) -> list[Item]:
    """Returns the test images, sorted by name, with their masks where the category has any."""
    base = _category(root, category)
    test, truth = base / "test", base / "ground_truth"
    items = []
    for folder in _subfolders(test):
        masks = _masks(truth / folder.name) if truth.is_dir() and folder.name != GOOD else None
        for path in image_files(folder):
            mask = None
            if masks is not None:
                stem = path.relative_to(folder).with_suffix("").as_posix()
                mask = masks.get(f"{stem}_mask") or masks.get(stem)
                if mask is None:
                    where = truth / folder.name
                    raise BadInput(
                        f"{path}: no mask, neither {stem}_mask.* nor {stem}.* in {where}"
                    )
            items.append(_item(path, test, folder.name, mask))
    return sorted(items, key=lambda item: item.name)


def image_files(directory: Path) -> list[Path]:
    """Returns all image files under `directory`, sorted by posix path, without hidden ones.

    Raises:
      BadInput: the directory is missing, cannot be listed, or holds no image.
    """
    paths = []
    # Without `onerror`, folders that cannot be listed would be skipped without a message.
    for parent, folders, files in os.walk(directory, onerror=_cannot_list):
        # An entry with an image's suffix counts as an image even if it is no regular file:
        # reading it fails later with an error that names it.
        images = [name for name in folders + files if _is_image(name)]
        # Changed in place, because `os.walk` descends into the folders that remain in this list.
        folders[:] = [name for name in folders if name[0] != "." and name not in images]
        paths += [Path(parent, name) for name in images]
    if not paths:
        raise BadInput(f"{directory}: no images in this folder")
    return sorted(paths, key=lambda path: path.relative_to(directory).as_posix())


def _is_image(name: str) -> bool:
    return name[0] != "." and os.path.splitext(name)[1].lower() in SUFFIXES


def _cannot_list(error: OSError) -> None:
    raise BadInput(f"{error.filename}: {error.strerror or error}") from error


def _category(root: str, category: str) -> Path:
    base = Path(root, category)
    if not base.is_dir():
        raise BadInput(f"{base}: no such folder (data.root, data.category)")
    return base


def _subfolders(directory: Path) -> list[Path]:
    try:
        paths = [path for path in directory.iterdir() if path.is_dir() and path.name[0] != "."]
    except OSError as error:
        raise BadInput(f"{directory}: {error.strerror or error}") from error
    if not paths:
        raise BadInput(f"{directory}: no folders of images (good, DEFECT)")
    return paths


def _masks(directory: Path) -> dict[str, Path]:
    """Returns the mask files by their posix path without the suffix."""
    files = image_files(directory)
    return {path.relative_to(directory).with_suffix("").as_posix(): path for path in files}


def _item(path: Path, split: Path, defect_type: str, mask: Path | None) -> Item:
    return Item(
        name=path.relative_to(split).as_posix(),
        image=path.read_bytes,
        type=defect_type,
        mask=mask.read_bytes if mask else None,
        origin=str(path),
    )
