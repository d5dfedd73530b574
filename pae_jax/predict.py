"""`pae predict`: anomaly maps, scores, decisions and regions of new images.

O/scores.csv        a row for each image: scores, decision, threshold, number of regions, error
O/regions.csv       a row for each region above the pixel threshold: box, area, peak, mean
O/heatmaps/         the map over the image; all share one colour scale, up to twice the threshold
O/masks/            255 where the map exceeds the pixel threshold
O/maps/             with save_maps: the map as float32 TIFF; with eval.calibration it is signed, in
                    standard deviations of normal images, and heat maps show what is negative as 0
O/reconstructions/  with save_reconstructions: the nearest normal image that the model finds

Pictures and maps have the size of their image, and names as `errors.spell` writes them. Images
stream through in bounded memory, whatever their number.
"""

import contextlib
import hashlib
import io
import itertools
import os
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.cache import in_order, parallel
from data_pipelines.errors import BadInput, spell
from data_pipelines.new_images import NewImage, Notes, Opened, common_range, list_images, open_image
from data_pipelines.value_range import Range
from pae_jax.config_schema import SCHEMA
from pae_jax.detection import REPORTED_SCORES, Detection
from pae_jax.inference import stream
from pae_jax.inference.model import Model, Result, load
from pae_jax.inference.output import SCORES, check_free, is_result, open_output
from pae_jax.inference.regions import Region
from pae_jax.methods import METHODS
from pae_jax.report import pictures
from pae_jax.workdir import files, thresholds
from pae_jax.workdir.paths import AnyPath, check_local, to_path

COLUMNS = (
    "name",
    *(f"score_{key}" for key in REPORTED_SCORES),
    *("defective", "threshold", "regions", "error"),
)

# A larger image is decoded once more for its heat map, so that few large ones are in memory.
_KEPT_BYTES = 2**20


class _Loaded(NamedTuple):
    """An image on its way: its file, and what was decoded or the reason why not."""

    image: NewImage
    shape: tuple[int, int] = (0, 0)
    pixels: np.ndarray | None = None  # at its own size, unless it is large
    error: str = ""


class _Rows(NamedTuple):
    """The rows of one image."""

    row: dict[str, Any]
    regions: list[Region]


def predict(
    workdir: str | os.PathLike[str],
    images: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    threshold: float | None = None,
    pixel_threshold: float | None = None,
    save_maps: bool = False,
    save_reconstructions: bool = False,
    tile: str | int = "off",
) -> AnyPath:
    """Detects the anomalies in images; see the module for what is written.

    A file that cannot be read is a row with its error. An interrupted prediction that is repeated
    goes on with the images that are missing.

    Args:
      workdir: the folder of a training run, local or gs://.
      images: the local place of the images, see `new_images`: a folder, a file, a pattern or a
        list. Runs and results below a folder are left out.
      out: a folder or URI that does not exist yet, is empty, or holds the same prediction,
        unfinished.
      overrides: words --config.eval.KEY=VALUE, or places of the data, --config.data.root=DIR.
      threshold: the image score above which an image is defective; by default chosen from the
        held-out normal images.
      pixel_threshold: the value of the map above which a pixel is anomalous; by default the same.
      save_maps: also writes the maps.
      save_reconstructions: also writes the reconstructions.
      tile: "off", "auto" or a side in pixels: judges large images at their own size, see `load`.

    Returns:
      The path of scores.csv.

    Raises:
      BadInput: one line that names the file, folder or key. If it names files that cannot be read,
        the results of all others are written.
    """
    check_local("--images", str(images))
    out = to_path(out)
    # Checked first, because restoring the model takes longer.
    check_free(out)
    model = load(
        workdir, overrides, threshold=threshold, pixel_threshold=pixel_threshold, tile=tile
    )
    if save_reconstructions and METHODS[model.config.method].reconstruct is None:
        raise BadInput(f"--save_reconstructions: method={model.config.method} makes none")
    found = list_images(str(images), is_result)
    data = model.config.data
    values = common_range(found, data.value_range, model.trained.value_range)
    # After all that can be refused, so that a wrong word leaves no empty folder.
    files.check_writable(out)
    names = [spell(image.name) for image in found]
    job = _Job(model, values, out, save_maps, save_reconstructions)
    with open_output(out, _record(job, str(images), names), names, COLUMNS) as tables:
        notes = Notes(values)
        with contextlib.closing(_rows(job, found, tables.done, notes)) as rows:
            for row, regions in rows:
                tables.append(row, regions)
        notes.warn()
        if model.tiles:
            model.tiles.report()
        tables.finish()
    if tables.errors:
        raise BadInput(
            f"{tables.first_error}; {tables.errors} of {len(found)} files cannot be read, see the "
            f"column error of {out / SCORES}"
        )
    return out / SCORES


def _record(job: "_Job", place: str, names: list[str]) -> dict[str, Any]:
    """Returns what the results of a prediction depend on."""
    settings, trained = job.model.config.eval, job.model.trained
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:32]
    # Without tiles the record is that of earlier versions, whose predictions go on.
    tiles = {"tiles": list(job.model.tiles.plan)} if job.model.tiles else {}
    return tiles | {
        "schema": SCHEMA,
        "model": thresholds.identify(trained.params, trained.step),
        "settings": thresholds.dependencies(settings) | {"image_score": settings.image_score},
        "threshold": job.model.thresholds.score,
        "pixel_threshold": job.model.thresholds.pixel,
        "value_range": job.values,
        "save_maps": job.save_maps,
        "save_reconstructions": job.save_reconstructions,
        "images": {"place": os.path.realpath(place), "count": len(names), "names": digest},
    }


def _rows(
    job: "_Job", images: Sequence[NewImage], done: int, notes: Notes
) -> Generator[_Rows, None, None]:
    """Yields the rows of the images from number `done` on, after their pictures were written."""
    size, ahead = job.model.batching(len(images))

    def resized(images: Sequence[NewImage]) -> Iterator[tuple[_Loaded, np.ndarray | None]]:
        for loaded, opened in parallel(job.read, images, "predicting", ahead=ahead):
            if opened:
                notes.add(str(loaded.image.path), opened)
            yield loaded, opened and opened.pixels

    # A batch holds the same images as without the interruption, so that each gets the same numbers.
    first = done - done % size
    pairs = stream.detect_in_batches(job.start, resized(images[first:]), size)
    return in_order(job.write, itertools.islice(pairs, done - first, None), ahead=ahead)


class _Job(NamedTuple):
    """The work on each image; several threads call its methods."""

    model: Model
    values: Range | None
    out: AnyPath
    save_maps: bool
    save_reconstructions: bool

    def read(self, image: NewImage) -> tuple[_Loaded, Opened | None]:
        """Decodes a file; the second part of the result has the size that is judged."""
        try:
            opened = self._open(image)
        except BadInput as error:
            return _Loaded(image, error=str(error)), None
        kept = opened.pixels if opened.pixels.nbytes <= _KEPT_BYTES else None
        loaded = _Loaded(image, opened.pixels.shape[:2], kept)
        return loaded, opened._replace(pixels=self.model.prepare(opened.pixels))

    def start(self, batch: np.ndarray) -> Detection:
        """Starts the detection of a batch, without what is not written."""
        return self.model.start(batch, reconstruct=self.save_reconstructions)

    def write(self, pair: tuple[_Loaded, Detection | None]) -> _Rows:
        """Writes the pictures of an image; returns its rows."""
        loaded, found = pair
        name = spell(loaded.image.name)
        empty = dict.fromkeys(COLUMNS, "")
        try:
            if found is None:
                raise BadInput(loaded.error)
            pixels = self._open(loaded.image).pixels if loaded.pixels is None else loaded.pixels
        except BadInput as error:
            return _Rows(empty | {"name": name, "error": str(error)}, [])
        result = self.model.result(found, loaded.shape)
        self._write_pictures(name, pixels, result)
        row = {
            "name": name,
            **{f"score_{key}": value for key, value in result.scores.items()},
            "defective": int(result.decision),
            "threshold": self.model.thresholds.score,
            "regions": len(result.regions),
        }
        return _Rows(empty | row, result.regions)

    def _open(self, image: NewImage) -> Opened:
        return open_image(image, self.model.trained.channels, self.values)

    def _write_pictures(self, name: str, pixels: np.ndarray, result: Result) -> None:
        def path(folder: str, suffix: str) -> AnyPath:
            return files.output_path(self.out / folder, name, suffix)

        # Grey images are stored with one channel, and a picture has three.
        picture = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
        heat = pictures.overlay_map(picture, result.map, 2 * self.model.thresholds.pixel)
        pictures.save_png(path("heatmaps", ".png"), heat)
        pictures.save_png(path("masks", ".png"), result.mask)
        if self.save_maps:
            import tifffile

            buffer = io.BytesIO()
            tifffile.imwrite(buffer, result.map)
            files.write_atomically(path("maps", ".tiff"), buffer.getvalue())
        if result.reconstruction is not None:
            pictures.save_png(path("reconstructions", ".png"), result.reconstruction)
