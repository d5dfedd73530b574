"""KolektorSDD2: ROOT/{train,test}/NAME.png, each with a mask NAME_GT.png, black if it is good.

The defective training images are left out, because training takes only good ones. All defects have
the type "defect".
"""

import functools
from pathlib import Path

from data_pipelines import decode
from data_pipelines.cache import parallel
from data_pipelines.errors import BadInput, inform, warn
from data_pipelines.importers.common import Options, images_in, require_folders
from data_pipelines.items import GOOD, read_file
from data_pipelines.lists.list_file import TEST, TRAIN, Row

DEFECT = "defect"
_SUFFIX = "_GT"


def read(base: Path, options: Options) -> list[Row]:
    """Returns the rows.

    Args:
      base: ROOT.
      options: none applies.

    Raises:
      BadInput: a folder is missing, or holds no image with a mask; a mask cannot be read.
    """
    del options
    require_folders(base, [TRAIN, TEST], f"ROOT with train and test, NAME.png with NAME{_SUFFIX}")
    rows = []
    for split in (TRAIN, TEST):
        files = {path.stem: path for path in images_in(base / split)}
        images = [name for name in files if not name.endswith(_SUFFIX)]
        pairs = [(files[name], files[name + _SUFFIX]) for name in images if name + _SUFFIX in files]
        if not pairs:
            raise BadInput(f"{base / split}: no image NAME.png with a mask NAME{_SUFFIX}.png")
        if len(pairs) < len(images):
            warn(f"{base / split}: {len(images) - len(pairs)} images without {_SUFFIX} left out")
        defective = list(parallel(_marks, [mask for _, mask in pairs], "reading masks"))
        if split == TRAIN:
            inform(f"{base / split}: {sum(defective)} defective training images are left out")
        for (image, mask), bad in zip(pairs, defective, strict=True):
            if bad and split == TEST:
                rows.append(Row(image, split, DEFECT, (mask,)))
            elif not bad:
                rows.append(Row(image, split, GOOD))
    return rows


def _marks(mask: Path) -> bool:
    """Returns whether a mask marks any pixel."""
    data = decode.read_encoded(functools.partial(read_file, mask), str(mask))
    return bool(decode.read_mask(data, str(mask)).mask.any())
