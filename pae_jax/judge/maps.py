"""Anomaly maps and image scores of another tool: where they are, and how they are read."""

import csv
import hashlib
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_pipelines.dataset import TestSplit
from data_pipelines.errors import BadInput, first_line, spell, warn
from pae_jax.config import DataConfig
from pae_jax.metrics.exact import as_scores
from pae_jax.workdir import eval_folder

SUFFIXES = (".tiff", ".tif", ".npy", ".png")
SCORES = "scores.csv"


class Maps(NamedTuple):
    """The maps of all images of a test split.

    Attributes:
      values: (h, w) float32 or float64 each, finite, in the order of the images.
      native: True if each map has the size of its image, False if each has the network's.
      digest: 32 hex digits, a hash of the names and bytes of the files.
    """

    values: list[np.ndarray]
    native: bool
    digest: str


def find_maps(folder: Path, data: DataConfig, names: Sequence[str]) -> list[Path]:
    """Returns the file of each image's map.

    Args:
      folder: holds CATEGORY/test/TYPE/NAME, the layout of MVTec's evaluation code, or test/… or
        TYPE/… of one category; with one of `SUFFIXES`.
      data: names the category.
      names: the names of the test images.

    Raises:
      BadInput: a map is missing, or two files could be the map of an image.
    """
    if not os.path.isdir(folder):  # `Path.is_dir` raises for a name that is too long
        raise BadInput(f"--maps={folder}: no such folder")
    relative = [Path(name).relative_to("maps") for name in eval_folder.map_names(data, names)]
    # Without the category, and without "test" as well.
    levels = [[Path(*path.parts[n:]) for path in relative] for n in range(3)]
    base = next((paths for paths in levels if (folder / paths[0]).parent.is_dir()), levels[0])
    found, missing = [], []
    for path in base:
        stem = path.name.removesuffix(".tiff")
        files = [
            place
            for suffix in SUFFIXES
            if (place := folder / path.with_name(f"{stem}{suffix}")).is_file()
        ]
        if len(files) > 1:
            raise BadInput(f"{files[0]}, {files[1].name}: two maps of one image; remove one")
        found += files
        if not files:
            missing.append(folder / path)
    if missing:
        raise BadInput(
            f"{missing[0].with_suffix('')}: no map {', '.join(SUFFIXES)} for this image, as for "
            f"{len(missing)} of {len(names)} test images"
        )
    _warn_surplus(found)
    return found


def read_maps(
    paths: Sequence[Path], test: TestSplit, network_shape: tuple[int, int], *, resample: bool
) -> Maps:
    """Reads the maps and checks them.

    Args:
      paths: one file per test image.
      test: knows the sizes of the images.
      network_shape: (h, w), the other size that maps may have.
      resample: whether maps of both sizes may stand side by side, because all are resampled.

    Raises:
      BadInput: a file that cannot be read, values that are not finite, or another size.
    """
    digest, values, coarse = hashlib.sha256(), [], []
    for path, name in zip(paths, test.names, strict=True):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BadInput(f"{path}: cannot be read ({error.strerror})") from error
        digest.update(f"{name}\0{path.suffix}\0{len(content)}\0".encode())
        digest.update(content)
        one = _read(path)
        if one.dtype.itemsize == 1:
            coarse.append(path)
        values.append(as_scores(one))
    shapes = [test.native_shape(i) for i in range(len(paths))]
    is_native = [one.shape == shape for one, shape in zip(values, shapes, strict=True)]
    for path, one, shape, fits in zip(paths, values, shapes, is_native, strict=True):
        if not fits and one.shape != network_shape:
            raise BadInput(
                f"{path}: a map of {_size(one.shape)}; its image has {_size(shape)}, and the size "
                f"in the config is {_size(network_shape)} (--config.data.size)"
            )
    is_network = [one.shape == network_shape for one in values]
    if not (all(is_native) or all(is_network) or resample):
        raise BadInput(
            f"{paths[is_native.index(False)]}: of the size in the config, while "
            f"{paths[is_network.index(False)].name} has that of its image; save all maps at one "
            "size, or set --config.eval.native_size=True, which resamples"
        )
    if coarse:
        warn(
            f"{coarse[0]}: values of 8 bits, as in {len(coarse)} of the maps; they have at most "
            "256 levels, so that many pixels are tied: save float32 TIFF or NPY"
        )
    return Maps(values, all(is_native), digest.hexdigest()[:32])


def read_scores(paths: Sequence[Path], folder: Path, names: Sequence[str]) -> np.ndarray | None:
    """Returns the image scores (n,) of scores.csv; None if there is no such file.

    Args:
      paths: the maps of the images. The file is sought in the folders above the first.
      folder: the value of --maps, the highest of these folders.
      names: the names of the test images, as the column `name` has them.

    Raises:
      BadInput: the file has not the columns `name` and `score`, an image is missing or stands
        there twice, or a score is not a finite number.
    """
    above = [place for place in paths[0].parents if place == folder or folder in place.parents]
    file = next((place / SCORES for place in above if (place / SCORES).is_file()), None)
    if file is None:
        return None
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            columns, rows = reader.fieldnames or [], list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{file}: cannot be read ({first_line(error, 300)})") from error
    if not {"name", "score"} <= set(columns):
        raise BadInput(
            f"{file}: needs the columns name and score, not {', '.join(columns) or 'none'}"
        )
    scores: dict[str, float] = {}
    for number, row in enumerate(rows, start=2):
        name, text = row["name"] or "", row["score"] or ""
        try:
            score = float(text)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise BadInput(f"{file}: line {number}: score {text!r} is no finite number")
        if name in scores:
            raise BadInput(f"{file}: line {number}: {name} stands there twice")
        scores[name] = score
    missing = [name for name in names if name not in scores]
    if missing:
        raise BadInput(
            f"{file}: no row for {missing[0]}, as for {len(missing)} of {len(names)} test images; "
            "names are TYPE/FILE, for example good/000.png"
        )
    if surplus := [spell(name) for name in scores if name not in set(names)]:
        warn(f"{file}: {len(surplus)} rows belong to no test image (first: {surplus[0]})")
    return np.array([scores[name] for name in names])


def _read(path: Path) -> np.ndarray:
    """Returns the values (h, w) of one file, real and finite."""
    try:
        values = _DECODERS[path.suffix](path)
    except Exception as error:  # each reader has errors of many types for a damaged file
        raise BadInput(f"{path}: cannot be read ({first_line(error, 300)})") from error
    if values.dtype.kind not in "fiub":
        raise BadInput(f"{path}: values of type {values.dtype}; a map has real numbers")
    if values.ndim == 3 and 1 in values.shape:
        values = values.squeeze(values.shape.index(1))
    if values.ndim != 2:
        raise BadInput(
            f"{path}: an array of {_size(values.shape)}; a map has one value per pixel (h, w)"
        )
    if not np.isfinite(values).all():
        raise BadInput(f"{path}: infinite values or NaN; replace them by numbers")
    return values


def _read_tiff(path: Path) -> np.ndarray:
    import tifffile

    return tifffile.imread(path)


def _read_npy(path: Path) -> np.ndarray:
    # Pickled objects could run code.
    return np.load(path, allow_pickle=False)


def _read_png(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


_DECODERS = {".tiff": _read_tiff, ".tif": _read_tiff, ".npy": _read_npy, ".png": _read_png}


def _warn_surplus(paths: Sequence[Path]) -> None:
    """Tells which maps beside those found belong to no test image."""
    known = set(paths)
    surplus = [
        place
        for folder in sorted({path.parent for path in paths})
        for place in sorted(folder.iterdir())
        if place.suffix in SUFFIXES and place not in known
    ]
    if surplus:
        counts = Counter(place.parent.name for place in surplus)
        warn(
            f"{surplus[0]}: no test image of this name, as for {len(surplus)} maps in "
            f"{', '.join(counts)}; they are left out"
        )


def _size(shape: tuple[int, ...]) -> str:
    """Returns a shape as text; (h, w) in the order width × height of image viewers."""
    if len(shape) == 2:
        return f"{shape[1]}×{shape[0]} pixels"
    return "×".join(map(str, shape)) + " values"
