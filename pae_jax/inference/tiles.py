"""Large images in tiles: the network sees parts of an image, and one map is made of theirs.

The network is applied to the image at its own size; it is not resized to that of the training.
The maps of the tiles are joined before they are smoothed, and image scores are those of the whole
map. There are two ways to join them:

halo      If each value of the map follows from a neighbourhood of known width (`model.norm` = none,
          an f that is applied a fixed number of times), a tile reaches so far beyond what is taken
          of its map, and lies on the grid of the network. The map is that of the whole image.
blending  Otherwise tiles of the training size overlap by half of their side, and their maps are
          averaged with weights that fall linearly from a tile's centre. How far the maps of
          overlapping tiles differ is measured.

The smoothing has the width in pixels that it has at the training size, so that a defect has the
same values in a large image as in one of the training size.
"""

import functools
import logging
import math
import os
from typing import Any

import jax
import numpy as np
import scipy.ndimage
from jaxtyping import Float, UInt8

from data_pipelines.errors import BadInput
from pae_jax import anomaly_map, augmentation, detection, unet
from pae_jax.config import Config
from pae_jax.detection import Detection
from pae_jax.inference.stitching import Differences, Plan, stitch
from pae_jax.methods import METHODS

# Without a limit of the device: larger tiles save little of the halo.
_MEMORY = 2**30
_LARGEST = 2**14

_logger = logging.getLogger(__name__)

# A threshold comes from images of the training size. These lines say, by the score that decides,
# whether it still holds.
_SCORE_NOTES = {
    "sum": "that of score sum does not, because a sum grows with the area: give a threshold",
    "max": "that of score max too, with more false alarms the larger an image is",
    "topk": "that of score topk only for defects that grow with the image: give a threshold",
}


def neighbourhood(config: Config) -> tuple[int, int] | None:
    """Returns how many pixels away the unsmoothed map depends on the image, and its grid.

    Returns:
      (pixels, grid): moving an image by a multiple of `grid` moves its map. None if the map
      depends on the whole image: through a norm, a stopping rule, or the copies of
      `eval.symmetries`, whose grid is that of the opposite border.
    """
    settings, networks = config.eval, _networks(config)
    whole = any(network.norm != "none" for network in networks)
    copies = augmentation.symmetries(config.data.augmentation, config.data.shape)
    if whole or settings.apply == "fixed_point" or (settings.symmetries and len(copies) > 1):
        return None
    times = {"once": 1, "tangent": 2, "iterate": settings.iterations}[settings.apply]
    first, *others = networks
    reach = times * unet.reach(first) + sum(unet.reach(network) for network in others)
    grids = [unet.stride(network) for network in networks]
    # The segmentation's network has no image to compare with.
    if METHODS[config.method].reconstruct is not None:
        names = {part.name for part in settings.parts}
        reach += max(anomaly_map.REACH[name] for name in names)
        if "msgms" in names:
            grids.append(2 ** (anomaly_map.MSGMS_SCALES - 1))
    return reach, math.lcm(*grids)


def parse(tile: str | int) -> str | int:
    """Returns the choice of the tiles, "off", "auto" or a number of pixels.

    Raises:
      BadInput: it is none of these.
    """
    if tile in ("off", "auto"):
        return tile
    if isinstance(tile, bool) or not str(tile).isdecimal() or not 8 <= int(tile) <= _LARGEST:
        raise BadInput(f"tile: off, auto or a side of 8 to {_LARGEST} pixels, not {tile}")
    return int(tile)


def plan(params: Any, config: Config, channels: int, tile: str | int) -> Plan:
    """Returns how images are divided.

    Args:
      params: the parameters of the model.
      config: a result of `detection.inference_config`.
      channels: those of the images.
      tile: the side of a tile in pixels. "auto" takes the largest that fits in the memory if the
        halo is at most a quarter of its side, otherwise the training size with blending.

    Raises:
      BadInput: the method or the calibration is one of whole images.
    """
    _networks(config)
    if config.eval.calibration != "none":
        raise BadInput(
            f"tile: eval.calibration={config.eval.calibration} knows maps of the training size; "
            "leave out the tiles, or set --config.eval.calibration=none"
        )
    blended = Plan(config.data.train_shape, None, 1, config.eval.batch_size)
    if (known := neighbourhood(config)) is None:
        return blended if tile == "auto" else blended._replace(side=(int(tile),) * 2)
    reach, grid = known
    halo = math.ceil(reach / grid) * grid
    side = _largest_side(params, config, channels) if tile == "auto" else int(tile)
    side -= side % grid
    if side - 2 * halo < (side / 2 if tile == "auto" else grid):
        return blended if tile == "auto" else blended._replace(side=(int(tile),) * 2)
    return Plan((side, side), halo, grid, 1)


def _networks(config: Config) -> tuple[Any, ...]:
    networks = METHODS[config.method].networks
    if networks is None:
        size = "{} × {}".format(*config.data.shape)
        raise BadInput(f"tile: method={config.method} judges whole images, resized to {size}")
    return networks(config)


def _largest_side(params: Any, config: Config, channels: int) -> int:
    """Returns the side of the largest tile whose program fits in the memory.

    The memory is half of the device's, or where this is not known a quarter of the machine's, at
    most 1 GiB. What the program takes is counted by the compiler for the training size; it is
    proportional to the pixels.
    """
    shape = config.data.train_shape
    example = jax.ShapeDtypeStruct((1, *shape, channels), np.uint8)
    sizes: Any = _apply.lower(params, example, config, True).compile().memory_analysis()
    taken = sizes.temp_size_in_bytes + sizes.output_size_in_bytes
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0) // 2
    if not limit:
        limit = min(_MEMORY, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)
    return min(_LARGEST, math.isqrt(limit * math.prod(shape) // max(1, taken)))


@functools.partial(jax.jit, static_argnames=("config", "reconstruct"))
def _apply(params: Any, images: Any, config: Config, reconstruct: bool) -> tuple[Any, Any]:
    reconstruction, maps = detection.unsmoothed_map(params, images, config)
    return (reconstruction if reconstruct else None), maps


class Tiles:
    """Judges images of any size in tiles.

    Attributes:
      plan: how they are divided.
      differences: those of all images so far, if tiles are blended.
    """

    def __init__(self, params: Any, config: Config, channels: int, tile: str | int):
        """Chooses the plan and says it in one line.

        Args:
          params: the parameters of the model.
          config: a result of `detection.inference_config`.
          channels: those of the images.
          tile: "auto" or a number of pixels, see `plan`.
        """
        self._params, self._config = params, config
        self.plan, self.differences = plan(params, config, channels, tile), Differences()
        height, width = self.plan.side
        size = "{} × {}".format(*config.data.shape)
        how = "overlapping by half, blended"
        if self.plan.halo is not None:
            how = f"with a halo of {self.plan.halo}; the map is that of the whole image"
        _logger.info("tiles of %d × %d pixels, %s", height, width, how)
        _logger.info(
            "images are judged at their own scale, which should be that of the %s training images;"
            " thresholds are of this size: that of pixels holds at this scale, %s",
            size,
            _SCORE_NOTES[config.eval.image_score],
        )

    def detect(self, image: UInt8[np.ndarray, "1 h w c"], *, reconstruct: bool = True) -> Detection:
        """Returns the detection of one image at its own size, numpy arrays.

        Args:
          image: a batch of one.
          reconstruct: False saves the memory of the reconstruction, which is None then.
        """
        started = functools.partial(self._start, reconstruct=reconstruct)
        found, values, differences = stitch(started, image[0], self.plan)
        old = self.differences
        self.differences = Differences(
            max(old.largest, differences.largest),
            old.total + differences.total,
            old.pixels + differences.pixels,
        )
        settings = self._config.eval
        width = max(1.0, settings.smoothing_fraction * min(self._config.data.shape))
        values = smooth(values, anomaly_map.SMOOTHINGS[settings.smoothing](width))
        if self._config.data.foreground:
            values = values * image[0].any(axis=-1)  # as in `detection.detect_float`
        scores = detection.image_scores(jax.numpy.asarray(values[None]), settings)
        return Detection(
            None if found is None else found[None], values[None], jax.device_get(scores)
        )

    def report(self) -> None:
        """Says in one line how far overlapping tiles differed."""
        largest, total, pixels = self.differences
        if pixels:
            _logger.info(
                "where tiles overlap, their maps differ by %.2g on average and by at most %.2g "
                "before they are blended and smoothed",
                total / pixels,
                largest,
            )

    def _start(self, batch: np.ndarray, *, reconstruct: bool) -> tuple[Any, Any]:
        return _apply(self._params, batch, self._config, reconstruct)


def smooth(
    values: Float[np.ndarray, "h w"], kernel: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "h w"]:
    """Returns `image_ops.filter_axes` of one map, without its matrices of the image's size."""
    if kernel.size == 1:
        return values
    for axis in (0, 1):
        # This mode repeats the pixel at the border, as `filter_axes` does.
        values = scipy.ndimage.correlate1d(values, kernel, axis, mode="reflect")
    return values
