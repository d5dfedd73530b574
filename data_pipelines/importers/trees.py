"""Data sets of a folder per category: MVTec AD, MVTec AD 2, MVTec LOCO AD, BTAD and MPDD.

    mvtec_ad, mpdd  train/good            test/{good,TYPE}         ground_truth/TYPE/NAME_mask.png
    mvtec_ad_2      train,validation/good test_public/{good,bad}   test_public/ground_truth/bad/…
    mvtec_loco      train,validation/good test/{good,TYPE}         ground_truth/TYPE/NAME/*.png
    btad            train/ok              test/{ok,ko}             ground_truth/ko/NAME.*

The images of validation/good are held out. The private test sets of MVTec AD 2 have no labels and
are left out.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from data_pipelines.folder import Masks, is_normal
from data_pipelines.image_files import LeftOut, find_images, list_folder
from data_pipelines.importers.common import Options, require_folders
from data_pipelines.items import GOOD
from data_pipelines.lists.list_file import HOLDOUT, TEST, TRAIN, Row


class Tree(NamedTuple):
    """The folders of one category.

    Attributes:
      train: the training images.
      holdout: the validation images; "": there are none.
      test: a folder per type.
      truth: the masks, a folder per type.
      several: every image has a folder of masks.
    """

    train: str = "train/good"
    holdout: str = ""
    test: str = "test"
    truth: str = "ground_truth"
    several: bool = False


def read_tree(tree: Tree, base: Path, options: Options) -> list[Row]:
    """Returns the rows of one category.

    Args:
      tree: its folders.
      base: ROOT/CATEGORY.
      options: none applies.

    Raises:
      BadInput: a folder or a mask is missing, or a folder holds no image.
    """
    del options
    folders = [part for part in (tree.train, tree.holdout, tree.test, tree.truth) if part]
    require_folders(base, folders, f"ROOT/CATEGORY with {', '.join(folders)}")
    left_out = LeftOut(base)
    rows = [Row(path, TRAIN, GOOD) for path in find_images(base / tree.train, left_out)]
    if tree.holdout:
        rows += [Row(path, HOLDOUT, GOOD) for path in find_images(base / tree.holdout, left_out)]
    for folder in list_folder(base / tree.test)[1]:
        if folder.name[0] == "." or folder == base / tree.truth:
            continue
        images = find_images(folder, left_out)
        if is_normal(folder.name):
            rows += [Row(path, TEST, GOOD) for path in images]
            continue
        truth = base / tree.truth / folder.name
        take = _several(truth, left_out) if tree.several else _single(truth, left_out)
        rows += [Row(path, TEST, folder.name, take(path, folder)) for path in images]
    left_out.warn()
    return rows


def _single(truth: Path, left_out: LeftOut) -> Callable[[Path, Path], tuple[Path, ...]]:
    masks = Masks(truth, left_out)
    return lambda image, folder: (masks.take(image, folder),)


def _several(truth: Path, left_out: LeftOut) -> Callable[[Path, Path], tuple[Path, ...]]:
    return lambda image, folder: tuple(
        find_images(truth / image.relative_to(folder).with_suffix(""), left_out)
    )


TREES = {
    name: functools.partial(read_tree, tree)
    for name, tree in {
        "mvtec_ad": Tree(),
        "mvtec_ad_2": Tree(
            holdout="validation/good", test="test_public", truth="test_public/ground_truth"
        ),
        "mvtec_loco": Tree(holdout="validation/good", several=True),
        "btad": Tree(train="train/ok"),
        "mpdd": Tree(),
    }.items()
}
