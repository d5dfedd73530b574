"""A trained model that judges images of any size: `load`, `Model` and its `Result`."""

import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from data_pipelines import arrays, decode, new_images
from data_pipelines.cache import in_order
from data_pipelines.errors import BadInput
from data_pipelines.new_images import NewImage
from pae_jax import detection
from pae_jax.detection import Detection, Thresholds
from pae_jax.inference import stream
from pae_jax.inference import tiles as tiling
from pae_jax.inference.regions import Region, find_regions
from pae_jax.metrics import measure
from pae_jax.report import pictures
from pae_jax.workdir import suppression, trained_model
from pae_jax.workdir.paths import to_workdir

ImagePath = str | os.PathLike[str]


class Result(NamedTuple):
    """The result of a model for one image; arrays have the image's own size (h, w).

    Attributes:
      map: float32 (h, w), the smoothed anomaly map in [0, 1]; with `eval.calibration`, in standard
        deviations of normal images.
      score: the image score `eval.image_score`.
      decision: True if the score exceeds the threshold of the model: the image is defective.
      regions: the connected regions of the mask, the one with the highest peak first.
      mask: bool (h, w), True where the map exceeds the pixel threshold of the model.
      reconstruction: uint8 (h, w, 3), the nearest normal image that the model finds; None for a
        method without reconstructions.
      scores: all image scores by name.
    """

    map: np.ndarray
    score: float
    decision: bool
    regions: list[Region]
    mask: np.ndarray
    reconstruction: np.ndarray | None
    scores: dict[str, float]


class Model:
    """A trained model with its thresholds. Several threads may call it at once.

    Attributes:
      config: the configuration of the run, with the overrides.
      thresholds: the values above which an image is defective, and a pixel anomalous.
      trained: the parameters with the calibration, and what is known of the training images.
      tiles: judges images at their own size; None if they are resized to the network's.
    """

    def __init__(
        self, trained: trained_model.Model, thresholds: Thresholds, tile: str | int = "off"
    ):
        """Binds the thresholds to the model; `load` reads both from a workdir."""
        self.trained, self.thresholds, self.config = trained, thresholds, trained.config
        self._inference_config = detection.inference_config(trained.config)
        self._lock = threading.Lock()
        self.tiles: tiling.Tiles | None = None
        if (choice := tiling.parse(tile)) != "off":
            config = self._inference_config
            self.tiles = tiling.Tiles(trained.params, config, trained.channels, choice)

    @overload
    def __call__(self, images: ImagePath) -> Result: ...
    @overload
    def __call__(self, images: Sequence[Any]) -> list[Result]: ...
    @overload
    def __call__(self, images: Any) -> Any: ...

    def __call__(self, images: Any) -> Any:
        """Judges one image or several.

        Args:
          images: an array (h, w) or (h, w, c) of any size, with the type and the values that a
            file of such an image would have; or the path of a file. Several are a list of these,
            of different sizes if need be, or an array (n, h, w, c). The range of values of images
            of more than 8 bits is that of the training images. If these had 8 bits, it is chosen
            from all arrays of the call, or from all files.

        Returns:
          A `Result`; a list of them for several images.

        Raises:
          BadInput: one line that names the file or the number of the image at fault.
        """
        if isinstance(images, str | os.PathLike):
            return self._judge([images], ["the image"])[0]
        if not isinstance(images, list | tuple | Iterator):
            array = np.asarray(images)
            if array.ndim != 4:
                return self._judge([images], ["the image"])[0]
            images = array
        several = list(images)
        return self._judge(several, [f"image {i}" for i in range(len(several))])

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """Returns an image as f sees it, with a suppressed background if the run suppresses it.

        Args:
          pixels: uint8 (h, w, c) of any size; it becomes the network's, unless there are tiles.
        """
        if not self.tiles:
            pixels = decode.resize(pixels, self.config.data.shape)
        return suppression.suppress(pixels, self.trained.foreground)

    def batching(self, images: int) -> tuple[int, int]:
        """Returns the size of a batch, and how many images are prepared before they are needed.

        Args:
          images: their number.
        """
        if self.tiles:  # large images of any size
            return 1, 1
        size = stream.batch_size(images, self.config.eval.batch_size)
        return size, stream.ahead(size)

    def start(self, batch: np.ndarray, *, reconstruct: bool = True) -> Detection:
        """Starts the detection of uint8 (b, h, w, c) from `resize`; does not wait for it.

        Each size of a batch is compiled once. With tiles it is done when the function returns.

        Args:
          batch: the images.
          reconstruct: False leaves out the reconstructions.
        """
        # Two threads would both compile a new size.
        with self._lock:
            if self.tiles:
                return self.tiles.detect(batch, reconstruct=reconstruct)
            found = detection.start_batch(self.trained.detector, batch, self._inference_config)
            return found if reconstruct else found._replace(reconstruction=None)

    def result(self, found: Detection, shape: tuple[int, int]) -> Result:
        """Returns the detection of one image at the image's own size.

        The map is resampled first, and mask and regions are taken from it. Scores are those of the
        map at the network's size, for which the threshold was chosen.

        Args:
          found: the detection at the network's size.
          shape: (h, w) of the image.
        """
        values = measure.resize_map(found.map, shape)
        mask = values > self.thresholds.pixel
        reconstruction = None
        if found.reconstruction is not None:
            reconstruction = decode.resize(pictures.to_uint8(found.reconstruction), shape)
        scores = {name: float(value) for name, value in found.scores.items()}
        score = scores[self.config.eval.image_score]
        return Result(
            map=values,
            score=score,
            decision=score > self.thresholds.score,
            regions=find_regions(values, mask),
            mask=mask,
            reconstruction=reconstruction,
            scores=scores,
        )

    def _judge(self, images: list[Any], names: list[str]) -> list[Result]:
        model, data = self.trained, self.config.data
        opened = [
            NewImage(str(image), Path(image))
            if isinstance(image, str | os.PathLike)
            else arrays.as_image(image, name)
            for image, name in zip(images, names, strict=True)
        ]
        files = [image for image in opened if isinstance(image, NewImage)]
        given = {
            name: image
            for name, image in zip(names, opened, strict=True)
            if isinstance(image, np.ndarray)
        }
        ranges = data.value_range, model.value_range
        of_files = new_images.common_range(files, *ranges)
        of_arrays = arrays.common_range(given, *ranges)

        def load(image: NewImage | np.ndarray) -> tuple[tuple[int, int], np.ndarray]:
            if isinstance(image, NewImage):
                pixels = new_images.open_image(image, model.channels, of_files).pixels
            else:
                pixels = arrays.convert(image, model.channels, of_arrays).pixels
            return pixels.shape[:2], self.prepare(pixels)

        size, ahead = self.batching(len(opened))
        loaded = in_order(load, opened, ahead=ahead)

        def finish(pair: tuple[tuple[int, int], Detection | None]) -> Result:
            shape, found = pair
            assert found, "every image was decoded"
            return self.result(found, shape)

        pairs = stream.detect_in_batches(self.start, loaded, size)
        return list(in_order(finish, pairs, ahead=ahead))


def load(
    workdir: str | os.PathLike[str],
    overrides: Iterable[str] = (),
    *,
    threshold: float | None = None,
    pixel_threshold: float | None = None,
    tile: str | int = "off",
) -> Model:
    """Loads the model of a training run, ready to judge images.

    >>> model = pae_jax.load(workdir)
    >>> found = model(image)  # an array (h, w, 3) or (h, w); or the path of a file
    >>> found.decision, found.map.shape == image.shape[:2]
    (True, True)
    >>> [result.decision for result in model([image, path])]
    [True, True]

    Args:
      workdir: the folder of the run, local or gs://.
      overrides: words --config.eval.KEY=VALUE, or places of the data, --config.data.root=DIR.
      threshold: the image score above which an image is defective; by default chosen from the
        held-out normal images.
      pixel_threshold: the value of the map above which a pixel is anomalous; by default the same.
      tile: "off" resizes every image to the network's size. Otherwise it is judged at its own size
        in tiles: "auto", or their side in pixels; see `tiles`. Thresholds stay those of the
        network's size.

    Raises:
      BadInput: one line that names the file, folder or key.
    """
    tiling.parse(tile)  # before the model is restored, which takes longer
    for name, value in (("threshold", threshold), ("pixel_threshold", pixel_threshold)):
        if value is not None and not math.isfinite(value):
            raise BadInput(f"{name}: a finite number, not {value}")
    place = to_workdir(workdir)
    trained = trained_model.load(place, list(overrides))
    given = {"score": threshold, "pixel": pixel_threshold}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) == 2:  # what is stored is not needed
        rate = trained.config.eval.false_positive_rate
        return Model(trained, Thresholds(**given, images=0, false_positive_rate=rate), tile)
    return Model(trained, trained_model.thresholds(place, trained)._replace(**given), tile)
