"""Texture images, from which the corruptions take their patterns (§2.1: DTD in the paper).

Sources, by name:
    builtin         photographs of scikit-image, in crops of several scales, and drawn patterns;
                    nothing is downloaded
    tfds:DATA_DIR   the TFDS data set `dtd`, prepared as array_record; all of its splits
    DIR             every image in a folder, at any depth
Images of the last two are resized by their short side and cropped to the central square.
"""

import functools
import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_pipelines import decode, patterns, tfds_source
from data_pipelines.cache import cached, content_key, default_cache, parallel
from data_pipelines.errors import BadInput
from data_pipelines.folder import image_files
from data_pipelines.holdout import held_out
from data_pipelines.rows import Rows

# Files inside scikit-image's wheel; its other photographs would be downloaded.
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
    "text.png",
)
PER_FAMILY = 12  # Crops of each photograph, and images of each drawn pattern.
# Part of the cache key: increase the number whenever the built-in images change.
_BUILTIN_VERSION = 1


class Textures(NamedTuple):
    """Texture images for the corruptions of training and validation.

    Attributes:
      train: uint8 (n, size, size, 3). Like `held_out`, these are rows of one memory-mapped file,
        which all seeds and fractions share.
      held_out: uint8 (m, size, size, 3), for the corruptions of validation; disjoint from
        `train`. Built-in images are held out by whole families (a photograph or a pattern).
      fingerprint: 32 hex digits, a hash of the encoded images, the size and the split.
      earlier_fingerprint: the same with the version of Pillow, as earlier versions recorded it.
    """

    train: Rows
    held_out: Rows
    fingerprint: str
    earlier_fingerprint: str


class _Source(NamedTuple):
    """Texture images that are not yet decoded.

    Attributes:
      families: the family of each image; a family is held out as a whole.
      digests: a hash for each image, of everything that it depends on.
      row: (index, size) -> uint8 (size, size, 3).
    """

    families: list[str]
    digests: list[str]
    row: Callable[[int, int], np.ndarray]


def open_textures(
    name: str, *, size: int, cache_dir: str, seed: int, holdout_fraction: float = 0.1
) -> Textures:
    """Opens a texture source, decoded and resized once and cached.

    Further calls read no file again until one has changed, for other seeds and fractions too.

    Args:
      name: "builtin", "tfds:DATA_DIR" or a folder.
      size: height and width of the returned images.
      cache_dir: folder of decoded arrays, or "" for `cache.default_cache()`.
      seed: the seed by which the held-out images are drawn.
      holdout_fraction: the fraction of the families held out; at least one family. In a folder
        and in DTD every image is a family.

    Returns:
      The textures for training and those held out.

    Raises:
      BadInput: one line naming the folder or file at fault.
    """
    cache_dir = cache_dir or str(default_cache())
    opened = _open(name, size=size, cache_dir=cache_dir, stamps=_file_stamps(name))
    families = sorted(set(opened.families))
    held_out_families = held_out(families, "none", fraction=holdout_fraction, seed=seed)
    is_held_out = [family in held_out_families for family in opened.families]
    # Each part keeps the order of the source.
    train, rest = (np.flatnonzero(np.equal(is_held_out, part)) for part in (False, True))
    fingerprints = [content_key(key, is_held_out) for key in (opened.content, opened.decoded)]
    return Textures(Rows(opened.images, train), Rows(opened.images, rest), *fingerprints)


def _file_stamps(name: str) -> tuple[tuple[str, int, int], ...]:
    """Returns path, size and time of change of every file of a source, to notice new content."""
    if name == "builtin":
        return ()
    root = Path(name.removeprefix("tfds:"))
    paths = sorted((root / "dtd").rglob("*")) if name.startswith("tfds:") else image_files(root)
    return tuple(map(_stamp, paths))


def _stamp(path: Path) -> tuple[str, int, int]:
    try:
        stat = path.stat()
    except OSError:  # reading the file gives the error that names it
        return str(path), -1, -1
    return str(path), stat.st_size, stat.st_mtime_ns


class _Opened(NamedTuple):
    """A source whose images are decoded.

    Attributes:
      families: see `_Source`.
      images: uint8 (n, size, size, 3), memory-mapped, in the order of the source.
      content: 32 hex digits, a hash of the encoded images and the size.
      decoded: the same with the version of the decoder.
    """

    families: list[str]
    images: np.ndarray
    content: str
    decoded: str


@functools.lru_cache(maxsize=16)
def _open(
    name: str, *, size: int, cache_dir: str, stamps: tuple[tuple[str, int, int], ...]
) -> _Opened:
    """Opens the images of a source; `stamps` are a part of the key only."""
    del stamps
    if name == "builtin":
        source = _builtin()
    elif name.startswith("tfds:"):
        source = _dtd(name.removeprefix("tfds:"))
    else:
        source = _folder(name)
    if (count := len(set(source.families))) < 2:
        raise BadInput(f"{name}: {count} texture image, at least two needed")
    # The order of the file is that of the source, not that of a split, so that there is one file
    # for all splits.
    content = content_key("textures", size, source.digests)
    decoded = content_key("textures", decode.VERSION, size, source.digests)
    shape = (len(source.families), size, size, 3)
    build = functools.partial(_build, shape, source.row)
    images = cached(cache_dir, decoded, [shape], build, purpose="textures")
    return _Opened(source.families, images, content, decoded)


def _build(shape: tuple[int, ...], row: Callable[[int, int], np.ndarray]):
    """Returns what `cached` expects of its argument `build`."""
    return shape, lambda i: row(i, shape[1])


def _folder(directory: str) -> _Source:
    """Lists every image in a folder."""
    paths = image_files(Path(directory))
    names = [path.relative_to(directory).as_posix() for path in paths]
    return _from_files(names, [path.read_bytes for path in paths], [str(path) for path in paths])


def _dtd(root: str) -> _Source:
    """Lists all images of the prepared TFDS data set `dtd`."""
    command = (
        "tfds build dtd --file_format=array_record --data_dir=DATA_DIR "
        "(needs TensorFlow and the network; reading does not)"
    )
    directory = tfds_source.version_dir(root, "dtd", command)
    records = tfds_source.records(directory, "all", ("image", "file_name"))
    names = [record["file_name"].decode() for record in records]
    reads = [functools.partial(_read_image, records, i) for i in range(len(names))]
    return _from_files(names, reads, [f"{directory}/{name}" for name in names])


def _read_image(records, index: int) -> bytes:
    return records[index]["image"]


def _from_files(names: list[str], reads: list[Callable[[], bytes]], origins: list[str]) -> _Source:
    """Describes encoded files, each of which is a family."""

    def data(i: int) -> bytes:
        return decode.read_encoded(reads[i], origins[i])

    def digest(i: int) -> str:
        return hashlib.sha256(data(i)).hexdigest()

    digests = list(parallel(digest, range(len(names)), "reading"))
    return _Source(names, digests, lambda i, size: _square(data(i), origins[i], size))


def _square(data: bytes, origin: str, size: int) -> np.ndarray:
    """Decodes the central square of an image, resized so that its short side is `size`."""
    height, width = decode.image_shape(data, origin)
    short = min(height, width)
    height, width = round(height * size / short), round(width * size / short)
    image = decode.decode_image(data, origin, (height, width), 3)
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def _builtin() -> _Source:
    """Describes the crops of photographs and the drawn patterns."""
    photographs = [name for name in PHOTOGRAPHS if _photograph_path(name).is_file()]
    families = [name for name in (*photographs, *patterns.FAMILIES) for _ in range(PER_FAMILY)]
    # Photographs are hashed, because another version of scikit-image may contain other files.
    content = {
        name: hashlib.sha256(_photograph_path(name).read_bytes()).hexdigest()
        for name in photographs
    }
    digests = [
        content_key(_BUILTIN_VERSION, family, content.get(family), i % PER_FAMILY)
        for i, family in enumerate(families)
    ]

    def row(i: int, size: int) -> np.ndarray:
        draw = _crop if families[i] in content else patterns.draw
        return draw(families[i], i % PER_FAMILY, size)

    return _Source(families, digests, row)


def _crop(name: str, index: int, size: int) -> np.ndarray:
    """Draws a random square of a photograph, 1/4 to 1 times as long as its short side."""
    image = _photograph(name)
    rng = np.random.default_rng([zlib.crc32(name.encode()), index])
    # The side is log-uniform, so that every octave of scale is equally likely.
    side = min(image.size) * np.exp(rng.uniform(np.log(0.25), 0))
    left, top = rng.uniform(0, 1, 2) * (np.array(image.size) - side)
    box = (float(left), float(top), float(left + side), float(top + side))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


@functools.lru_cache(maxsize=4)  # Successive crops are of the same photograph.
def _photograph(name: str) -> Image.Image:
    data = _photograph_path(name).read_bytes()
    return Image.fromarray(decode.decode_image(data, name, decode.image_shape(data, name), 3))


def _photograph_path(name: str) -> Path:
    import skimage

    return Path(skimage.__file__).parent / "data" / name
