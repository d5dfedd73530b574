"""Masks of the object that the user gives for some of the training images.

A source with such masks has the function foreground_masks(root, category), which returns the
encoded file of each mask by the name of its training image. The other sources have none.
"""

from collections.abc import Sequence

import numpy as np

from data_pipelines import checks, decode
from data_pipelines.dataset import open_source
from data_pipelines.errors import BadInput
from data_pipelines.spec import DatasetSpec


def open_foregrounds(spec: DatasetSpec, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Opens the masks of the object.

    Args:
      spec: the data set.
      names: the names of the training images, held out or not.

    Returns:
      bool (h, w) by the name of the image, at the size of `spec`, resized as other masks are.

    Raises:
      BadInput: one line that names the file: it is damaged, of another size than its image, marks
        nothing or everything.
    """
    source = open_source(spec)
    if not hasattr(source, "foreground_masks"):
        return {}
    encoded = source.foreground_masks(spec.root, spec.category)
    chosen = [name for name in names if name in encoded]
    images = {item.name: item for item in source.training_items(spec.root, spec.category)}
    masks = checks.read_headers([encoded[name] for name in chosen])
    files = checks.read_headers([(images[name].image, images[name].origin) for name in chosen])
    opened = {}
    for name, mask, image in zip(chosen, masks, files, strict=True):
        if mask.shape != image.shape:
            (h, w), (height, width) = mask.shape, image.shape
            raise BadInput(f"{mask.origin}: {w}×{h} pixels, its image is {width}×{height} pixels")
        data = decode.read_encoded(mask.read, mask.origin)
        opened[name] = decode.decode_mask(data, mask.origin, spec.shape)
        if opened[name].all() or not opened[name].any():
            amount = "everything" if opened[name].all() else "nothing"
            raise BadInput(
                f"{mask.origin}: marks {amount}; a mask of the object is 0 on the background only"
            )
    return opened
