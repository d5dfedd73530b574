"""Source: a folder in the layout of MVTec AD.

    ROOT[/CATEGORY]/train/good/NAME.png               normal training images
    ROOT[/CATEGORY]/test/{good,DEFECT}/NAME.png       test images
    ROOT[/CATEGORY]/ground_truth/DEFECT/NAME_mask.png masks, or NAME.png
    ROOT[/CATEGORY]/foreground/good/NAME_mask.png     masks of the object, for some images of
                                                      train/good; only `pae foreground` reads them

Images are found by `image_files`. Good, OK, normal and other words for it (`NORMAL_TYPES`), in
lower or upper case, count as good. Without a folder `ground_truth` there are no masks; with one,
every defective image must have a mask. The names of image and mask may be spelled in NFC or NFD,
the two ways to write an accented letter. What is left out is told in one line.
"""

import difflib
import functools
import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

from data_pipelines.errors import BadInput, warn
from data_pipelines.image_files import LeftOut, find_images, image_files, is_image, list_folder
from data_pipelines.items import GOOD, Item, read_file

__all__ = ["foreground_masks", "image_files", "test_items", "training_items"]

# The words without case, spaces, hyphens, underscores and dots.
_WORDS = ("ok", "okay", "normal", "pass", "passed", "healthy", "intact")
_NO_DEFECT = ("nodefect", "nodefects", "defectfree", "nondefective")
NORMAL_TYPES = frozenset((GOOD, *_WORDS, *_NO_DEFECT))


def training_items(root: str, category: str) -> list[Item]:
    """Returns the images of train/good, sorted by name. Reads no other folder."""
    train = _category(root, category) / "train"
    folders = _subfolders(train)
    good = _good_folders(train, folders)
    advice = f"training images belong in {train / GOOD}"
    _warn_outside(train, advice)
    if other := [path.name for path in folders if path not in good]:
        warn(f"{train}: folders left out: {_listed(other)}; {advice}")
    left_out = LeftOut(train)
    items = [
        _item(path, train, GOOD, None) for folder in good for path in find_images(folder, left_out)
    ]
    left_out.warn()
    return sorted(items, key=lambda item: item.name)


def foreground_masks(root: str, category: str) -> dict[str, tuple[Callable[[], bytes], str]]:
    """Returns the masks of the object in training images, by the name of the image.

    A mask is what reads its file, and its path.
    """
    base = _category(root, category)
    train, truth, masks = base / "train", base / "foreground", {}
    if not truth.is_dir():
        return {}
    _warn_outside(truth, f"masks of training images belong in {truth}/{GOOD}")
    for folder in _good_folders(train, _subfolders(train)):
        if not (given := _entry(truth, folder.name)).is_dir():
            continue
        found = Masks(given, LeftOut(truth))
        for path in find_images(folder, LeftOut(train)):
            if mask := found.find(path, folder):
                name = path.relative_to(train).as_posix()
                masks[name] = functools.partial(read_file, mask), str(mask)
        if unused := found.unused():
            names = _listed([path.name for path in unused])
            warn(f"{given}: {len(unused)} masks belong to no training image: {names}")
    if not masks:
        raise BadInput(f"{truth}: no mask of a training image; it belongs in {truth}/{GOOD}")
    return masks


def test_items(root: str, category: str) -> list[Item]:
    """Returns the test images, sorted by name, with their masks where the category has any."""
    base = _category(root, category)
    test, truth = base / "test", base / "ground_truth"
    folders = _subfolders(test)
    _warn_outside(test, f"test images belong in {test / GOOD} or {test}/DEFECT")
    if not folders:
        raise BadInput(f"{test}: no folders of images (good, DEFECT)")
    _warn_types(test, folders)
    left_out, left_out_masks = LeftOut(test), LeftOut(truth)
    items, unused = [], []
    for folder in folders:
        masks = None
        if truth.is_dir() and not _is_good(folder):
            masks = Masks(_entry(truth, folder.name), left_out_masks)
        defect_type = GOOD if _is_good(folder) else folder.name
        for path in find_images(folder, left_out):
            mask = masks.take(path, folder) if masks else None
            items.append(_item(path, test, defect_type, mask))
        if masks:
            unused += masks.unused()
    left_out.warn()
    left_out_masks.warn()
    if truth.is_dir():
        _warn_outside(truth, f"masks belong in {truth}/DEFECT")
        known = {_nfc(folder.name) for folder in folders}
        unused += [path for path in _subfolders(truth) if _nfc(path.name) not in known]
    if unused:
        names = [path.relative_to(truth).as_posix() for path in unused]
        warn(f"{truth}: {len(names)} masks or folders belong to no test image: {_listed(names)}")
    return sorted(items, key=lambda item: item.name)


class Masks:
    """The masks of one folder, found by the name of an image."""

    def __init__(self, folder: Path, left_out: LeftOut):
        self._folder = folder
        files = find_images(folder, left_out)
        self._files = {_name_without_suffix(path, folder): path for path in files}
        self._by_nfc = {_nfc(name): path for name, path in self._files.items()}
        self._taken: set[Path] = set()

    def take(self, image: Path, folder: Path) -> Path:
        """Returns the mask of an image below `folder`.

        Raises:
          BadInput: there is none.
        """
        if mask := self.find(image, folder):
            return mask
        name = _name_without_suffix(image, folder)
        raise BadInput(f"{image}: no mask, neither {name}_mask.* nor {name}.* in {self._folder}")

    def find(self, image: Path, folder: Path) -> Path | None:
        """Returns the mask of an image below `folder`, or None."""
        name = _name_without_suffix(image, folder)
        for candidate in (f"{name}_mask", name):
            mask = self._files.get(candidate) or self._by_nfc.get(_nfc(candidate))
            if mask:
                self._taken.add(mask)
                return mask
        return None

    def unused(self) -> list[Path]:
        """Returns the masks that no image has taken."""
        return [path for path in self._files.values() if path not in self._taken]


def is_normal(name: str) -> bool:
    """Returns whether a word for a type means normal images."""
    return re.sub(r"[\s_.-]", "", name.casefold()) in NORMAL_TYPES


def _good_folders(train: Path, folders: list[Path]) -> list[Path]:
    # A folder that is missing gives the error that names it.
    return [path for path in folders if _is_good(path)] or [train / GOOD]


def _is_good(folder: Path) -> bool:
    return is_normal(folder.name)


def _resembles_good(folder: Path) -> bool:
    word = re.split(r"[\s_.-]", folder.name.casefold())[0]
    close = difflib.get_close_matches(word, [GOOD, "normal"], n=1, cutoff=0.75)
    # A slip of the fingers keeps the first letter; wood and abnormal are other words.
    return word in NORMAL_TYPES or bool(close and close[0][0] == word[:1])


def _warn_types(test: Path, folders: list[Path]) -> None:
    """Tells which folders count as good, and which only look as if they might."""
    good, defects = [p for p in folders if _is_good(p)], [p for p in folders if not _is_good(p)]
    if other := [path.name for path in good if path.name != GOOD]:
        warn(f"{test}: {_listed(other)}: counts as {GOOD}, as normal images")
    if not good:
        warn(
            f"{test}: no folder {GOOD}, so that no metric of whole images is defined; types of "
            f"defects: {_listed([path.name for path in defects])}"
        )
    for path in filter(_resembles_good, defects):
        warn(f"{path}: counts as a type of defect; if it holds normal images, rename it to {GOOD}")


def _warn_outside(folder: Path, advice: str) -> None:
    """Tells which images lie directly in a folder of folders."""
    if images := [path.name for path in list_folder(folder)[0] if is_image(path.name)]:
        warn(
            f"{folder}: {len(images)} images left out, directly in it: {_listed(images)}; {advice}"
        )


def _listed(names: list[str]) -> str:
    """Returns the first three names, and dots for the others."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _category(root: str, category: str) -> Path:
    base = _entry(Path(root), category) if category else Path(root)
    if not os.path.isdir(base):
        raise BadInput(f"{base}: no such folder (data.root, data.category)")
    return base


def _entry(directory: Path, name: str) -> Path:
    """Returns directory/name, or the entry of this name in another Unicode spelling."""
    path = directory / name
    # Unlike `Path.exists` and `Path.is_dir`, these do not raise for a name that is too long.
    if os.path.exists(path) or not os.path.isdir(directory):
        return path
    same = [entry for entry in directory.iterdir() if _nfc(entry.name) == _nfc(name)]
    return same[0] if same else path


def _subfolders(directory: Path) -> list[Path]:
    return [path for path in list_folder(directory)[1] if path.name[0] != "."]


def _name_without_suffix(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _item(path: Path, split: Path, defect_type: str, mask: Path | None) -> Item:
    return Item(
        name=path.relative_to(split).as_posix(),
        image=functools.partial(read_file, path),
        type=defect_type,
        mask=functools.partial(read_file, mask) if mask else None,
        origin=str(path),
    )
