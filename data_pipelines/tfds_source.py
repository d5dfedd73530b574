"""Categories prepared as TFDS datasets: `mvtec_ad/CATEGORY`, `visa/CATEGORY` and the like.

Any TFDS dataset with the features of `data_pipelines.tfds_builder` serves, if its files are
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
    """The split "train" of `category` ("DATASET/CATEGORY") under the TFDS folder `root`."""
    return _items(root, category, "train")


def test_items(root: str, category: str) -> list[Item]:
    """The split "test", with masks for every type but "good"."""
    return _items(root, category, "test")


def version_dir(root: str, name: str, command: str) -> Path:
    """The newest prepared version of the TFDS dataset `name` ("DATASET[/CONFIG]") in `root`.

    Raises:
      BadInput: there is none; the message offers `command`.
    """
    found = [path.parent for path in Path(root, name).glob("[0-9]*.*.*/dataset_info.json")]
    if not found:
        raise BadInput(f"{Path(root, name)}: no prepared TFDS dataset; prepare it by: {command}")
    return max(found, key=lambda path: [int(number) for number in path.name.split(".")])


@functools.cache
def records(directory: Path, split: str, features: tuple[str, ...]) -> Sequence[dict[str, bytes]]:
    """A split of a prepared dataset, each record as the stored bytes of these features."""
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(directory)
    missing = [name for name in features if name not in builder.info.features]
    if missing:
        raise BadInput(f"{directory}: a dataset without the feature {', '.join(missing)}")
    try:
        skip = dict.fromkeys(features, tfds.decode.SkipDecoding())
        return builder.as_data_source(split, decoders=skip)
    except NotImplementedError as error:
        kind = builder.info.file_format
        raise BadInput(
            f"{directory}: prepared as {kind.value if kind else 'unknown'}, which has no random "
            "access; prepare it with file_format='array_record'"
        ) from error


def _items(root: str, category: str, split: str) -> list[Item]:
    if not category:
        raise BadInput("data.category: DATASET/CATEGORY for TFDS data, such as mvtec_ad/screw")
    command = f"python -m data_pipelines.prepare {category} --manual_dir=DIR --data_dir={root}"
    directory = version_dir(root, category, command)
    items = []
    # One pass over the whole file for the names: cheaper than a second file to keep in step.
    for index, record in enumerate(records(directory, split, _FEATURES)):
        name, kind = record["name"].decode(), record["type"].decode()
        read = functools.partial(_read, directory, split, index)
        items.append(
            Item(
                name=name,
                image=functools.partial(read, "image"),
                type=kind,
                mask=None if kind == GOOD else functools.partial(read, "mask"),
                origin=f"{directory}/{split}/{name}",
            )
        )
    return items


def _read(directory: Path, split: str, index: int, field: str) -> bytes:
    # By value, not by a handle, so that items can be sent to worker processes.
    return records(directory, split, _FEATURES)[index][field]
