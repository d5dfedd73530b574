"""The splits of a data set as resized images, opened so that training cannot see the test split.

Training imports `open_training` alone. It returns arrays and names of the training split and
nothing that leads to the test split. `open_test` opens the test split from the specification.
"""

import hashlib
import importlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from data_pipelines import decode
from data_pipelines.cache import cached, content_key, parallel
from data_pipelines.errors import BadInput
from data_pipelines.folder import image_files
from data_pipelines.holdout import held_out
from data_pipelines.items import GOOD, Item
from data_pipelines.spec import DatasetSpec

# A source is a module with training_items(root, category) and test_items(root, category). Its
# optional HOLDOUT_GROUPS is the rule of `holdout` that holdout_groups="auto" stands for.
SOURCES = {
    "folder": "data_pipelines.folder",
    "elpv": "data_pipelines.elpv",
    "tfds": "data_pipelines.tfds_source",
    "procedural": "data_pipelines.procedural",
}


class TrainingSplit(NamedTuple):
    """Normal images, without any reference to the test split.

    Attributes:
      images: uint8 (n, h, w, c); memory-mapped, or in memory where `max_images` takes a part.
      names: n names.
      held_out: uint8 (m, h, w, c), for validation and thresholds; memory-mapped.
      held_out_names: m names.
      channels: c, which is 1 when every training image of the source is grey, else 3.
      fingerprint: 32 hex digits, a hash of the names and encoded bytes of all training images
        of the source.
    """

    images: np.ndarray
    names: list[str]
    held_out: np.ndarray
    held_out_names: list[str]
    channels: int
    fingerprint: str


class TestSplit(NamedTuple):
    """Test images with their labels and masks.

    Attributes:
      images: uint8 (n, h, w, c), memory-mapped.
      names: n names.
      types: n defect types; "good" for normal images.
      labels: bool (n,), true for defective images.
      masks: bool (n, h, w), true for anomalous pixels; None when the source has none.
      native_mask: i -> bool array of the image's own size; ValueError without masks.
      native_shape: i -> (h, w) of image i before resizing.
    """

    __test__ = False  # Pytest would collect the class because of its name.

    images: np.ndarray
    names: list[str]
    types: list[str]
    labels: np.ndarray
    masks: np.ndarray | None
    native_mask: Callable[[int], np.ndarray]
    native_shape: Callable[[int], tuple[int, int]]


class _File(NamedTuple):
    """One encoded file whose header has been read, and which is not yet decoded."""

    read: Callable[[], bytes]
    origin: str
    digest: str
    shape: tuple[int, int]


def open_training(
    spec: DatasetSpec, *, holdout_fraction: float, seed: int, max_images: int = 0
) -> TrainingSplit:
    """Opens the training images, decoded and resized once and cached.

    Args:
      spec: the data set.
      holdout_fraction: the fraction of the images held out for validation, by whole groups; at
        least one group.
      seed: the seed by which groups are drawn, and images where `max_images` takes a part.
      max_images: the largest number of images that are not held out; 0: all. A smaller number
        takes a subset of what a larger one takes. Nothing else depends on the number.

    Returns:
      The training images and those held out.

    Raises:
      BadInput: one line naming the file, folder or key at fault.
    """
    source = _source(spec)
    items = sorted(source.training_items(spec.root, spec.category), key=lambda item: item.name)
    if len(items) < 2:
        where = items[0].origin if items else spec.root or spec.source
        raise BadInput(f"{where}: {len(items)} training images, at least two needed")
    rule = spec.holdout_groups
    if rule == "auto":
        rule = getattr(source, "HOLDOUT_GROUPS", "auto")
    held_out_names = held_out(
        [item.name for item in items], rule, fraction=holdout_fraction, seed=seed
    )

    files = _read_headers([(item.image, item.origin) for item in items])
    # The fingerprint covers the whole source, so that it depends neither on the seed nor on the
    # fraction: it tells whether a run's training images have changed.
    fingerprint = content_key(
        [(item.name, file.digest) for item, file in zip(items, files, strict=True)]
    )
    # The held-out images come last, so that both parts are slices of one memory-mapped array.
    order = sorted(range(len(items)), key=lambda i: items[i].name in held_out_names)
    names = [items[i].name for i in order]
    pixels = _decoded_images(spec, names, [files[i] for i in order], channels=None)
    n = len(items) - len(held_out_names)
    kept = range(n)
    training = pixels[:n]
    if 0 < max_images < n:
        # The part is taken after decoding, so that one cached file serves every max_images.
        kept = sorted(sorted(kept, key=lambda i: _draw_key(names[i], seed))[:max_images])
        training = pixels[kept]
        # Read-only, as the memory-mapped array is.
        training.flags.writeable = False
    return TrainingSplit(
        images=training,
        names=[names[i] for i in kept],
        held_out=pixels[n:],
        held_out_names=names[n:],
        channels=pixels.shape[-1],
        fingerprint=fingerprint,
    )


def open_test(spec: DatasetSpec, *, channels: int) -> TestSplit:
    """Opens the test images and masks, decoded and resized once and cached.

    Args:
      spec: the data set.
      channels: the number of channels of the training images.

    Returns:
      The test images with their labels and masks.

    Raises:
      BadInput: one line naming the file, folder or key at fault.
    """
    items = _source(spec).test_items(spec.root, spec.category)
    if not items:
        raise BadInput(f"{spec.root or spec.source}: no test images")
    names = [item.name for item in items]
    files = _read_headers([(item.image, item.origin) for item in items])
    masked = [i for i, item in enumerate(items) if item.mask is not None]
    masks = _read_headers([_encoded_mask(items[i]) for i in masked])
    mask_files = dict(zip(masked, masks, strict=True))
    for i, mask in mask_files.items():
        if mask.shape != files[i].shape:
            raise BadInput(
                f"{mask.origin}: {_pixels(mask.shape)}, its image is {_pixels(files[i].shape)}"
            )

    # Decoded on demand, because native masks of all images may not fit in memory.
    def native_mask(i: int) -> np.ndarray:
        if not mask_files:
            raise ValueError(f"{spec.source}: this dataset has no masks")
        return _decode_mask(mask_files.get(i), files[i].shape, None)

    return TestSplit(
        images=_decoded_images(spec, names, files, channels=channels),
        names=names,
        types=[item.type for item in items],
        labels=np.array([item.type != GOOD for item in items]),
        masks=_decoded_masks(spec, names, mask_files) if mask_files else None,
        native_mask=native_mask,
        native_shape=lambda i: files[i].shape,
    )


def open_images(
    directory: str, shape: tuple[int, int], channels: int
) -> tuple[list[str], np.ndarray]:
    """Opens all images under a folder, for prediction, without a cache.

    Args:
      directory: the folder.
      shape: (h, w) to which all images are resized.
      channels: the number of channels of the training images.

    Returns:
      Names (posix paths inside the folder, sorted) and uint8 (n, h, w, channels).

    Raises:
      BadInput: the folder is missing or holds no image, or a file cannot be decoded.
    """
    paths = image_files(Path(directory))
    files = _read_headers([(path.read_bytes, str(path)) for path in paths])
    decode_file = partial(_decode_image, shape=shape, channels=channels)
    images = np.stack(list(parallel(decode_file, files, "decoding")))
    return [path.relative_to(directory).as_posix() for path in paths], images


def _source(spec: DatasetSpec) -> ModuleType:
    if spec.source not in SOURCES:
        raise BadInput(f"data.source: one of {', '.join(SOURCES)}, not {spec.source!r}")
    return importlib.import_module(SOURCES[spec.source])


def _draw_key(name: str, seed: int) -> bytes:
    """Returns the key by which names are sorted to draw some of them.

    The key of a name does not depend on the other names, nor on the machine.
    """
    return hashlib.sha256(f"{seed}/images/{name}".encode()).digest()


def _read_headers(encoded: Sequence[tuple[Callable[[], bytes], str]]) -> list[_File]:
    """Reads every file and its header, because most bad files show before any is decoded."""

    def read_header(pair: tuple[Callable[[], bytes], str]) -> _File:
        read, origin = pair
        data = decode.read_encoded(read, origin)
        return _File(
            read, origin, hashlib.sha256(data).hexdigest(), decode.image_shape(data, origin)
        )

    return list(parallel(read_header, encoded, "reading"))


def _decoded_images(
    spec: DatasetSpec, names: Sequence[str], files: Sequence[_File], *, channels: int | None
) -> np.ndarray:
    """Returns uint8 (n, h, w, c) from the cache; channels=None: 1 if all are grey, else 3."""

    def build() -> tuple[tuple[int, ...], Callable[[int], np.ndarray]]:
        c = channels or (1 if all(parallel(_grey, files, "looking for colour")) else 3)
        return (len(files), *spec.shape, c), lambda i: _decode_image(files[i], spec.shape, c)

    digests = [file.digest for file in files]
    key = content_key("images", decode.VERSION, spec.shape, channels, list(names), digests)
    # With channels=None a cached array may have 1 or 3 channels: it is read without decoding any
    # file to find out which.
    shapes = [(len(files), *spec.shape, c) for c in ((channels,) if channels else (1, 3))]
    return cached(spec.cache_dir, key, shapes, build)


def _decoded_masks(spec: DatasetSpec, names: Sequence[str], files: dict[int, _File]) -> np.ndarray:
    """Returns bool (n, h, w) from the cache; `files` by image index, without normal images."""
    shape = (len(names), *spec.shape)
    digests = [(i, file.digest) for i, file in files.items()]
    key = content_key("masks", decode.VERSION, spec.shape, list(names), digests)

    def row(i: int) -> np.ndarray:
        return _decode_mask(files.get(i), spec.shape, spec.shape)

    # The cache holds uint8; a view as bool copies nothing.
    return cached(spec.cache_dir, key, [shape], lambda: (shape, row)).view(np.bool_)


def _grey(file: _File) -> bool:
    return decode.is_grey(decode.read_encoded(file.read, file.origin), file.origin)


def _decode_image(file: _File, shape: tuple[int, int], channels: int) -> np.ndarray:
    data = decode.read_encoded(file.read, file.origin)
    return decode.decode_image(data, file.origin, shape, channels)


def _decode_mask(
    file: _File | None, empty: tuple[int, int], shape: tuple[int, int] | None
) -> np.ndarray:
    """Decodes a mask; without a file, returns one of shape `empty` that marks no pixel."""
    if file is None:
        return np.zeros(empty, np.bool_)
    data = decode.read_encoded(file.read, file.origin)
    return decode.decode_mask(data, file.origin, shape)


def _encoded_mask(item: Item) -> tuple[Callable[[], bytes], str]:
    assert item.mask is not None
    return item.mask, f"mask of {item.origin}"


def _pixels(shape: tuple[int, int]) -> str:
    return f"{shape[1]}×{shape[0]} pixels"
