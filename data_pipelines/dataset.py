"""The splits of a data set as resized images, opened so that training cannot see the test split.

Training imports `open_training` alone. It returns arrays and names of the training split and
nothing that leads to the test split. `open_test` opens the test split from the specification.
"""

import hashlib
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np

from data_pipelines import checks, decode, facts, holdout, ranges, value_range
from data_pipelines.cache import cached, content_key, parallel
from data_pipelines.checks import File
from data_pipelines.errors import BadInput
from data_pipelines.items import GOOD, Item
from data_pipelines.spec import DatasetSpec
from data_pipelines.value_range import Range

# A source is a module with training_items(root, category) and test_items(root, category). Its
# optional HOLDOUT_GROUPS is the rule of `holdout` that holdout_groups="auto" stands for.
SOURCES = {
    "folder": "data_pipelines.folder",
    "list": "data_pipelines.lists.source",
    "elpv": "data_pipelines.elpv",
    "tfds": "data_pipelines.tfds_source",
    "procedural": "data_pipelines.procedural",
}


# Part of the keys of masks: increase the number whenever the rule of masks changes.
_MASK_RULE = 2


class TrainingSplit(NamedTuple):
    """Normal images, without any reference to the test split.

    Attributes:
      images: uint8 (n, h, w, c); memory-mapped, or in memory where `max_images` takes a part.
      reserved: how many of `images`, at their end, are reserved for a second network.
      names: n names.
      held_out: uint8 (m, h, w, c), for validation and thresholds; memory-mapped.
      held_out_names: m names.
      channels: c, which is 1 when every training image of the source is grey, else 3.
      fingerprint: 32 hex digits, a hash of the names and encoded bytes of all training images
        of the source; of drawn images, a hash of what they show.
      earlier_fingerprint: a hash of the bytes in both cases, as earlier versions recorded it.
      value_range: the values that became 0 and 255 in images of more than 8 bits; None if there
        are none. Test images and new images need the same.
      holdout_rule: the rule of `holdout` by which images were held out together.
      aspect_ratio: width over height of the files, the median.
    """

    images: np.ndarray
    reserved: int
    names: list[str]
    held_out: np.ndarray
    held_out_names: list[str]
    channels: int
    fingerprint: str
    earlier_fingerprint: str
    value_range: Range | None
    holdout_rule: str
    aspect_ratio: float


class TestSplit(NamedTuple):
    """Test images with their labels and masks.

    Attributes:
      images: uint8 (n, h, w, c), memory-mapped.
      names: n names.
      types: n defect types; "good" for normal images.
      labels: bool (n,), true for defective images.
      masks: bool (n, h, w), true for anomalous pixels; None when the source has none.
      has_pixel_labels: bool (n,), false for a defective image whose mask marks no pixel of
        `masks`. Its pixels are neither normal nor anomalous: metrics leave them out.
      has_native_labels: the same of `native_mask`.
      native_mask: i -> bool array of the image's own size; ValueError without masks.
      native_shape: i -> (h, w) of image i before resizing.
    """

    __test__ = False  # Pytest would collect the class because of its name.

    images: np.ndarray
    names: list[str]
    types: list[str]
    labels: np.ndarray
    masks: np.ndarray | None
    has_pixel_labels: np.ndarray
    has_native_labels: np.ndarray
    native_mask: Callable[[int], np.ndarray]
    native_shape: Callable[[int], tuple[int, int]]


def open_training(
    spec: DatasetSpec,
    *,
    holdout_fraction: float,
    seed: int,
    max_images: int = 0,
    reserved_fraction: float = 0.0,
) -> TrainingSplit:
    """Opens the training images, decoded and resized once and cached.

    Args:
      spec: the data set.
      holdout_fraction: the fraction of the images held out for validation, by whole groups; at
        least one group. A source that holds images out itself takes its place.
      seed: the seed by which groups are drawn, and images where `max_images` takes a part.
      max_images: the largest number of images that are not held out; 0: all. A smaller number
        takes a subset of what a larger one takes. Nothing else depends on the number.
      reserved_fraction: the fraction of the images that are not held out, by whole groups, that
        comes last among them, for a second network; at least one group unless it is 0.

    Returns:
      The training images and those held out.

    Raises:
      BadInput: one line naming the file, folder or key at fault.
    """
    value_range.parse(spec.value_range)
    source = open_source(spec)
    items = sorted(source.training_items(spec.root, spec.category), key=lambda item: item.name)
    if len(items) < 2:
        where = items[0].origin if items else spec.root or spec.source
        raise BadInput(f"{where}: {len(items)} training images, at least two needed")
    asked_rule = _holdout_rule(spec, source)
    held_out_names, rule = holdout.held_out_items(
        items, asked_rule, fraction=holdout_fraction, seed=seed
    )
    files = checks.read_headers([(item.image, item.origin) for item in items])
    values = ranges.training_range(spec, files)
    # The fingerprint covers the whole source, so that it depends neither on the seed nor on the
    # fraction: it tells whether a run's training images have changed.
    pairs = list(zip(items, files, strict=True))
    fingerprint = content_key([(item.name, item.content or file.digest) for item, file in pairs])
    earlier_fingerprint = content_key([(item.name, file.digest) for item, file in pairs])
    reserved_names: set[str] = set()
    if reserved_fraction:
        reserved_names = holdout.reserved_items(
            items, asked_rule, held_out_names, fraction=reserved_fraction, seed=seed
        )
    # The held-out images come last, so that both parts are slices of one memory-mapped array, and
    # the reserved ones before them.
    order = sorted(
        range(len(items)),
        key=lambda i: (items[i].name in held_out_names, items[i].name in reserved_names),
    )
    names = [items[i].name for i in order]
    ordered = [files[i] for i in order]
    pixels = _decoded_images(spec, names, ordered, channels=None, values=values)
    checks.check_levels(pixels, ordered, "training")
    n = len(items) - len(held_out_names)
    kept = range(n)
    training = pixels[:n]
    if 0 < max_images < n:
        # The part is taken after decoding, so that one cached file serves every max_images.
        kept = sorted(sorted(kept, key=lambda i: _draw_key(names[i], seed))[:max_images])
        training = pixels[kept]
        # Read-only, as the memory-mapped array is.
        training.flags.writeable = False
    training_names = [names[i] for i in kept]
    reserved = sum(name in reserved_names for name in training_names)
    if reserved_fraction and reserved in (0, len(kept)):
        raise BadInput(
            f"data.max_images: of {max_images} images {reserved} are reserved for the second "
            "network; both networks need at least one, so raise it"
        )
    return TrainingSplit(
        images=training,
        reserved=reserved,
        names=training_names,
        held_out=pixels[n:],
        held_out_names=names[n:],
        channels=pixels.shape[-1],
        fingerprint=fingerprint,
        earlier_fingerprint=earlier_fingerprint,
        value_range=values,
        holdout_rule=rule,
        aspect_ratio=facts.aspect_ratio([file.shape for file in files]),
    )


def open_test(spec: DatasetSpec, *, channels: int, value_range: Range | None = None) -> TestSplit:
    """Opens the test images and masks, decoded and resized once and cached.

    Args:
      spec: the data set.
      channels: the number of channels of the training images.
      value_range: that of the training images.

    Returns:
      The test images with their labels and masks.

    Raises:
      BadInput: one line naming the file, folder or key at fault.
    """
    source = open_source(spec)
    items = source.test_items(spec.root, spec.category)
    if not items:
        raise BadInput(f"{spec.root or spec.source}: no test images")
    names = [item.name for item in items]
    files = checks.read_headers([(item.image, item.origin) for item in items])
    masked = [i for i, item in enumerate(items) if item.mask is not None]
    masks = checks.read_headers([_encoded_mask(items[i]) for i in masked])
    mask_files = dict(zip(masked, masks, strict=True))
    for i, mask in mask_files.items():
        if mask.shape != files[i].shape:
            raise BadInput(
                f"{mask.origin}: {_pixels(mask.shape)}, its image is {_pixels(files[i].shape)}"
            )
    checks.check_equal_files(source, spec, files)
    values = ranges.test_range(files, ranges.extrema(spec, files), spec.value_range, value_range)
    images = _decoded_images(spec, names, files, channels=channels, values=values)
    checks.check_levels(images, files, "test")
    labels = np.array([item.type != GOOD for item in items])
    decoded_masks = _decoded_masks(spec, names, mask_files) if mask_files else None
    native, small = np.zeros_like(labels), np.zeros_like(labels)
    if decoded_masks is not None:
        native[masked] = checks.check_masks(masks, _mask_facts(spec, masks))
        small = decoded_masks.any(axis=(1, 2))
        checks.check_small_masks(files, labels & native & ~small, spec.shape)

    # Decoded on demand, because native masks of all images may not fit in memory.
    def native_mask(i: int) -> np.ndarray:
        if not mask_files:
            raise ValueError(f"{spec.source}: this dataset has no masks")
        return _decode_mask(mask_files.get(i), files[i].shape, None)

    return TestSplit(
        images=images,
        names=names,
        types=[item.type for item in items],
        labels=labels,
        masks=decoded_masks,
        has_pixel_labels=~labels | small,
        has_native_labels=~labels | native,
        native_mask=native_mask,
        native_shape=lambda i: files[i].shape,
    )


def open_source(spec: DatasetSpec) -> ModuleType:
    """Returns the module of the source.

    Raises:
      BadInput: there is none of this name.
    """
    if spec.source not in SOURCES:
        raise BadInput(f"data.source: one of {', '.join(SOURCES)}, not {spec.source!r}")
    return importlib.import_module(SOURCES[spec.source])


def _holdout_rule(spec: DatasetSpec, source: ModuleType) -> str:
    """Returns the rule of `holdout` by which images are held out together."""
    rule = spec.holdout_groups
    return getattr(source, "HOLDOUT_GROUPS", "auto") if rule == "auto" else rule


def _draw_key(name: str, seed: int) -> bytes:
    """Returns the key by which names are sorted to draw some of them.

    The key of a name does not depend on the other names, nor on the machine.
    """
    # A name that is not UTF-8 is hashed by its own bytes.
    return hashlib.sha256(f"{seed}/images/{name}".encode(errors="surrogateescape")).digest()


def _decoded_images(
    spec: DatasetSpec,
    names: Sequence[str],
    files: Sequence[File],
    *,
    channels: int | None,
    values: Range | None,
) -> np.ndarray:
    """Returns uint8 (n, h, w, c) from the cache; channels=None: 1 if all are grey, else 3."""

    def build() -> tuple[tuple[int, ...], Callable[[int], np.ndarray]]:
        c = channels or (1 if all(parallel(_grey, files, "looking for colour")) else 3)
        return (len(files), *spec.shape, c), lambda i: decode_file(files[i], spec.shape, c, values)

    # The array depends on this beside the content. It is empty for images of 8 bits without alpha.
    rules = {decode.PLAIN: (), decode.INTEGER: ("range", values), decode.FLOAT: ("range", values)}
    digests = [
        (file.digest, *rule) if (rule := rules.get(file.kind, ("alpha", 2))) else file.digest
        for file in files
    ]
    key = content_key("images", decode.VERSION, spec.shape, channels, list(names), digests)
    # With channels=None a cached array may have 1 or 3 channels: it is read without decoding any
    # file to find out which.
    shapes = [(len(files), *spec.shape, c) for c in ((channels,) if channels else (1, 3))]
    purpose = f"images of {spec.root or spec.source}"
    return cached(spec.cache_dir, key, shapes, build, purpose=purpose)


def _decoded_masks(spec: DatasetSpec, names: Sequence[str], files: dict[int, File]) -> np.ndarray:
    """Returns bool (n, h, w) from the cache; `files` by image index, without normal images."""
    shape = (len(names), *spec.shape)
    digests = [(i, file.digest) for i, file in files.items()]
    key = content_key("masks", _MASK_RULE, decode.VERSION, spec.shape, list(names), digests)

    def row(i: int) -> np.ndarray:
        return _decode_mask(files.get(i), spec.shape, spec.shape)

    purpose = f"masks of {spec.root or spec.source}"
    # The cache holds uint8; a view as bool copies nothing.
    return cached(spec.cache_dir, key, [shape], lambda: (shape, row), purpose=purpose).view(
        np.bool_
    )


def _mask_facts(spec: DatasetSpec, masks: Sequence[File]) -> np.ndarray:
    """Returns uint8 (n, 2) from the cache: the rule of `decode.read_mask`, and 1 for any pixel."""
    key = content_key("mask facts", _MASK_RULE, decode.VERSION, [file.digest for file in masks])
    shape = (len(masks), 2)

    def row(i: int) -> np.ndarray:
        data = decode.read_encoded(masks[i].read, masks[i].origin)
        native = decode.read_mask(data, masks[i].origin)
        return np.array([decode.MASK_RULES.index(native.rule), native.mask.any()], np.uint8)

    return cached(spec.cache_dir, key, [shape], lambda: (shape, row))


def _grey(file: File) -> bool:
    return decode.is_grey(decode.read_encoded(file.read, file.origin), file.origin)


def decode_file(
    file: File, shape: tuple[int, int], channels: int, values: Range | None
) -> np.ndarray:
    """Reads and decodes one file; see `decode.decode_image`."""
    data = decode.read_encoded(file.read, file.origin)
    return decode.decode_image(data, file.origin, shape, channels, values)


def _decode_mask(
    file: File | None, empty: tuple[int, int], shape: tuple[int, int] | None
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
