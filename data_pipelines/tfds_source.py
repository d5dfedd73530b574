"""Source: categories prepared as TFDS data sets, such as `mvtec_ad/CATEGORY`, `visa/CATEGORY`.

Any TFDS data set with the features of `data_pipelines.tfds_builder` can be read if its files are
array_record. Records are read as encoded bytes; TensorFlow is not needed.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipelines.errors import BadInput
from data_pipelines.items import GOOD, Item

_FEATURES = ("image", "mask", "type", "name")


def training_items(root: str, category: str) -> list[Item]:
    """Returns the split "train" of `category` ("DATASET/CATEGORY") in the TFDS folder `root`."""
    return _items(root, category, "train")


def test_items(root: str, category: str) -> list[Item]:
    """Returns the split "test", with a mask for every image that is not "good"."""
    return _items(root, category, "test")


def version_dir(root: str, name: str, command: str) -> Path:
    """Returns the folder of a TFDS data set's newest prepared version.

    Args:
      root: the folder of TFDS data sets.
      name: "DATASET" or "DATASET/CONFIG".
      command: a command that prepares the data set, for the error message.

    Raises:
      BadInput: no version is prepared.
    """
    versions = [path.parent for path in Path(root, name).glob("[0-9]*.*.*/dataset_info.json")]
    if not versions:
        raise BadInput(f"{Path(root, name)}: no prepared TFDS dataset; prepare it by: {command}")
    # Versions are compared as numbers, because as text "10.0.0" precedes "9.0.0".
    return max(versions, key=lambda path: [int(number) for number in path.name.split(".")])


@functools.cache
def records(directory: Path, split: str, features: tuple[str, ...]) -> Sequence[dict[str, bytes]]:
    """Returns a split of a prepared data set; a record is the stored bytes of these features."""
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(directory)
    missing = [name for name in features if name not in builder.info.features]
    if missing:
        raise BadInput(f"{directory}: a dataset without the feature {', '.join(missing)}")
    try:
        skip = dict.fromkeys(features, tfds.decode.SkipDecoding())
        return builder.as_data_source(split, decoders=skip)
    except NotImplementedError as error:
        file_format = builder.info.file_format
        raise BadInput(
            f"{directory}: prepared as {file_format.value if file_format else 'unknown'}, which "
            "has no random access; prepare it with file_format='array_record'"
        ) from error


def _items(root: str, category: str, split: str) -> list[Item]:
    if not category:
        raise BadInput("data.category: DATASET/CATEGORY for TFDS data, such as mvtec_ad/screw")
    command = f"python -m data_pipelines.prepare {category} --manual_dir=DIR --data_dir={root}"
    directory = version_dir(root, category, command)
    items = []
    # The names are read from the records themselves, because a separate list of names would have
    # to be kept consistent with them.
    for index, record in enumerate(records(directory, split, _FEATURES)):
        name, defect_type = record["name"].decode(), record["type"].decode()
        read = functools.partial(_read, directory, split, index)
        items.append(
            Item(
                name=name,
                image=functools.partial(read, "image"),
                type=defect_type,
                mask=None if defect_type == GOOD else functools.partial(read, "mask"),
                origin=f"{directory}/{split}/{name}",
            )
        )
    return items


def _read(directory: Path, split: str, index: int, field: str) -> bytes:
    # The arguments are plain values, no open reader, so that items can be pickled.
    return records(directory, split, _FEATURES)[index][field]
