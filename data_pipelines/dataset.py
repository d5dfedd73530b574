"""What training and evaluation are given: resized images, and nothing that they must not see.

Training imports `open_training` alone. The object it gets holds arrays and names of the
training split; the test split is opened by `open_test`, from the specification.
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

# A source is a module with training_items(root, category) and test_items(root, category). It
# may name in GROUPS the rule of `holdout` that suits its names, for groups="auto".
SOURCES = {
    "folder": "data_pipelines.folder",
    "elpv": "data_pipelines.elpv",
    "tfds": "data_pipelines.tfds_source",
    "procedural": "data_pipelines.procedural",
}


class TrainingSplit(NamedTuple):
    """Normal images; has no way to the test split.

    Attributes:
      images: uint8 (n, h, w, c), memory-mapped; in memory where only a part was asked for.
      names: n names.
      held_out: uint8 (m, h, w, c), for validation and thresholds; memory-mapped.
      held_out_names: m names.
      channels: c: 1 when every training image of the source is grey, else 3.
      fingerprint: 32 hex digits over the names and encoded bytes of all images of the source.
    """

    images: np.ndarray
    names: list[str]
    held_out: np.ndarray
    held_out_names: list[str]
    channels: int
    fingerprint: str


class TestSplit(NamedTuple):
    """Images to judge.

    Attributes:
      images: uint8 (n, h, w, c), memory-mapped.
      names: n names.
      types: n defect types; "good" for normal images.
      labels: bool (n,), true for defective images.
      masks: bool (n, h, w), true for anomalous pixels; None when the source has none.
      native_mask: i -> bool array of the image's own size; ValueError without masks.
      native_shape: i -> (h, w) of image i before resizing.
    """

    __test__ = False  # not a class of tests, whatever pytest makes of its name

    images: np.ndarray
    names: list[str]
    types: list[str]
    labels: np.ndarray
    masks: np.ndarray | None
    native_mask: Callable[[int], np.ndarray]
    native_shape: Callable[[int], tuple[int, int]]


class _File(NamedTuple):
    """One encoded file after a look at its header: not yet decoded."""

    read: Callable[[], bytes]
    origin: str
    digest: str
    shape: tuple[int, int]


def open_training(
    spec: DatasetSpec, *, holdout: float, seed: int, images: int = 0
) -> TrainingSplit:
    """Opens the training images, decoded and resized once and cached.

    Args:
      spec: the dataset.
      holdout: share of the images held out for validation, by whole groups; at least one group.
      seed: draws the groups, and the images where not all are taken.
      images: takes at most so many of those not held out; 0: all. A smaller number takes a part
        of what a larger one takes. All else stays as it is, whatever the number.

    Raises:
      BadInput: one line naming the file, folder or key at fault.
    """
    source = _source(spec)
    items = sorted(source.training_items(spec.root, spec.category), key=lambda item: item.name)
    if len(items) < 2:
        where = items[0].origin if items else spec.root or spec.source
        raise BadInput(f"{where}: {len(items)} training images, at least two needed")
    rule = getattr(source, "GROUPS", "auto") if spec.groups == "auto" else spec.groups
    chosen = held_out([item.name for item in items], rule, share=holdout, seed=seed)

    files = _look_at([(item.image, item.origin) for item in items])
    fingerprint = content_key(
        [(item.name, file.digest) for item, file in zip(items, files, strict=True)]
    )
    # The held-out images stand last in the array, so that both parts are slices of one map.
    order = sorted(range(len(items)), key=lambda i: items[i].name in chosen)
    names = [items[i].name for i in order]
    pixels = _images(spec, names, [files[i] for i in order], channels=None)
    n = len(items) - len(chosen)
    kept = range(n)
    training = pixels[:n]
    if 0 < images < n:
        # The cache holds all of them in any case, so that it serves every number.
        kept = sorted(sorted(kept, key=lambda i: _draw(names[i], seed))[:images])
        training = pixels[kept]
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
      spec: the dataset.
      channels: of the training images.

    Raises:
      BadInput: one line naming the file, folder or key at fault.
    """
    items = _source(spec).test_items(spec.root, spec.category)
    if not items:
        raise BadInput(f"{spec.root or spec.source}: no test images")
    names = [item.name for item in items]
    files = _look_at([(item.image, item.origin) for item in items])
    masked = [i for i, item in enumerate(items) if item.mask is not None]
    mask_files = dict(zip(masked, _look_at([_mask_of(items[i]) for i in masked]), strict=True))
    for i, mask in mask_files.items():
        if mask.shape != files[i].shape:
            raise BadInput(
                f"{mask.origin}: {_size(mask.shape)}, its image is {_size(files[i].shape)}"
            )

    def native_mask(i: int) -> np.ndarray:
        if not mask_files:
            raise ValueError(f"{spec.source}: this dataset has no masks")
        return _mask(mask_files.get(i), files[i].shape, None)

    return TestSplit(
        images=_images(spec, names, files, channels=channels),
        names=names,
        types=[item.type for item in items],
        labels=np.array([item.type != GOOD for item in items]),
        masks=_masks(spec, names, mask_files) if mask_files else None,
        native_mask=native_mask,
        native_shape=lambda i: files[i].shape,
    )


def open_images(
    directory: str, shape: tuple[int, int], channels: int
) -> tuple[list[str], np.ndarray]:
    """All images under a folder, for prediction; not cached.

    Returns:
      Names (posix paths inside the folder, sorted) and uint8 (n, h, w, channels).

    Raises:
      BadInput: the folder is missing or holds no image, or a file cannot be decoded.
    """
    paths = image_files(Path(directory))
    files = _look_at([(path.read_bytes, str(path)) for path in paths])
    row = partial(_decode, shape=shape, channels=channels)
    images = np.stack(list(parallel(row, files, "decoding")))
    return [path.relative_to(directory).as_posix() for path in paths], images


def _source(spec: DatasetSpec) -> ModuleType:
    if spec.source not in SOURCES:
        raise BadInput(f"data.source: one of {', '.join(SOURCES)}, not {spec.source!r}")
    return importlib.import_module(SOURCES[spec.source])


def _draw(name: str, seed: int) -> bytes:
    """What names are sorted by to draw some: no matter which others there are, on any machine."""
    return hashlib.sha256(f"{seed}/images/{name}".encode()).digest()


def _look_at(encoded: Sequence[tuple[Callable[[], bytes], str]]) -> list[_File]:
    """Reads every file and its header, so that most bad files are met before any decoding."""

    def look(pair: tuple[Callable[[], bytes], str]) -> _File:
        read, origin = pair
        data = decode.read_encoded(read, origin)
        return _File(
            read, origin, hashlib.sha256(data).hexdigest(), decode.image_shape(data, origin)
        )

    return list(parallel(look, encoded, "reading"))


def _images(
    spec: DatasetSpec, names: Sequence[str], files: Sequence[_File], *, channels: int | None
) -> np.ndarray:
    """uint8 (n, h, w, c) from the cache; channels=None: 1 if all files are grey, else 3."""

    def build() -> tuple[tuple[int, ...], Callable[[int], np.ndarray]]:
        c = channels or (1 if all(parallel(_grey, files, "looking for colour")) else 3)
        return (len(files), *spec.shape, c), lambda i: _decode(files[i], spec.shape, c)

    digests = [file.digest for file in files]
    key = content_key("images", decode.VERSION, spec.shape, channels, list(names), digests)
    shapes = [(len(files), *spec.shape, c) for c in ((channels,) if channels else (1, 3))]
    return cached(spec.cache, key, shapes, build)


def _masks(spec: DatasetSpec, names: Sequence[str], files: dict[int, _File]) -> np.ndarray:
    """bool (n, h, w) from the cache; `files` by the image's index, normal images have none."""
    shape = (len(names), *spec.shape)
    digests = [(i, file.digest) for i, file in files.items()]
    key = content_key("masks", decode.VERSION, spec.shape, list(names), digests)

    def row(i: int) -> np.ndarray:
        return _mask(files.get(i), spec.shape, spec.shape)

    return cached(spec.cache, key, [shape], lambda: (shape, row)).view(np.bool_)


def _grey(file: _File) -> bool:
    return decode.is_grey(decode.read_encoded(file.read, file.origin), file.origin)


def _decode(file: _File, shape: tuple[int, int], channels: int) -> np.ndarray:
    data = decode.read_encoded(file.read, file.origin)
    return decode.decode_image(data, file.origin, shape, channels)


def _mask(file: _File | None, empty: tuple[int, int], shape: tuple[int, int] | None) -> np.ndarray:
    """The decoded mask, or one of shape `empty` without anomalies where there is no file."""
    if file is None:
        return np.zeros(empty, np.bool_)
    data = decode.read_encoded(file.read, file.origin)
    return decode.decode_mask(data, file.origin, shape)


def _mask_of(item: Item) -> tuple[Callable[[], bytes], str]:
    assert item.mask is not None
    return item.mask, f"mask of {item.origin}"


def _size(shape: tuple[int, int]) -> str:
    return f"{shape[1]}×{shape[0]} pixels"
