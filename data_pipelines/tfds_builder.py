"""The TFDS builder that `mvtec_ad` and `visa` share: its features and the loop over the items.

Features of one example:
  image: the official file, byte for byte.
  mask: PNG of the image's size, one channel, 0 = normal and 255 = anomalous. Normal images have
    one too, all 0, so that every example has the same structure.
  label: 0 = "normal", 1 = "anomalous".
  type: "good" or the defect type.
  name: the file's path inside the split, for example "crack/003.png".
The splits are train (normal images only) and test, in the order of the official files.

Importing this module imports TFDS, which takes a second; nothing here needs TensorFlow.
"""

import abc
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from data_pipelines.decode import decode_mask, image_shape, read_encoded
from data_pipelines.errors import BadInput, printable
from data_pipelines.items import GOOD, Item

LABELS = ["normal", "anomalous"]


class OneClassBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS builder of one category, which is the name of the builder's configuration."""

    VERSION = tfds.core.Version("1.0.0")
    HOMEPAGE: str
    CITATION: str

    @abc.abstractmethod
    def items(self, root: str, category: str) -> dict[str, list[Item]]:
        """Returns the items of "train" and "test" below the manual directory `root`."""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(),
                    "mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=LABELS),
                    "type": tfds.features.Text(),
                    "name": tfds.features.Text(),
                }
            ),
            # TFDS otherwise orders the examples by a hash of their keys.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):  # type: ignore[override]
        root, category = dl_manager.manual_dir, str(self.builder_config_name)
        if not Path(root, category).is_dir():
            raise BadInput(f"{root}: no folder {category} in this manual directory")
        # The items are listed before anything is written, because a wrong directory shows here.
        splits = self.items(str(root), category)
        return {split: self._generate_examples(items) for split, items in splits.items()}

    def _generate_examples(self, items: list[Item]) -> Iterator[tuple[str, dict[str, Any]]]:  # type: ignore[override]
        for item in items:
            if printable(item.name) != item.name:
                raise BadInput(f"{item.origin}: TFDS stores names in UTF-8; rename this file")
            image = read_encoded(item.image, item.origin)
            yield (
                item.name,
                {
                    # TFDS stores bytes as they are, while it would encode an array anew.
                    "image": image,
                    "mask": _mask(item, image_shape(image, item.origin)),
                    "label": LABELS[item.type != GOOD],
                    "type": item.type,
                    "name": item.name,
                },
            )


def _mask(item: Item, shape: tuple[int, int]) -> bytes:
    """Returns the item's mask as a PNG file, after a check of its size."""
    origin = f"mask of {item.origin}"
    if item.type == GOOD:
        mask = np.zeros(shape, bool)
    elif item.mask is None:
        raise BadInput(f"{origin}: missing")
    else:
        mask = decode_mask(read_encoded(item.mask, origin), origin, None)
        if mask.shape != shape:
            sizes = [f"{width}×{height} pixels" for height, width in (mask.shape, shape)]
            raise BadInput(f"{origin}: {sizes[0]}, its image is {sizes[1]}")
    file = io.BytesIO()
    Image.fromarray(255 * mask.astype(np.uint8)).save(file, "png")
    return file.getvalue()
