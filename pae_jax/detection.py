"""Detection (§2.2): from images to reconstructions, anomaly maps, scores and thresholds.

This module neither reads nor writes files; `workdir.trained_model` does.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from data_pipelines import facts
from data_pipelines.errors import BadInput
from pae_jax import anomaly_map, augmentation, image_ops
from pae_jax.anomaly_map import Calibration
from pae_jax.config import Config, DataConfig, EvalConfig
from pae_jax.methods import METHODS

# The paper sums the map (§2.2). The other two depend less on the size of the defect.
REPORTED_SCORES = ("sum", "max", "topk")

# Each of them is standardised by the others, which need two for a standard deviation.
MIN_CALIBRATION_IMAGES = 3


class Detection(NamedTuple):
    """The result for a batch of images.

    Attributes:
      reconstruction: (b, h, w, 3), f(x̂), fⁿ(x̂) or the fixed point, float32 in [0, 1]; None for a
        method without reconstructions.
      map: (b, h, w), the smoothed anomaly map Δ(x̂, ·), float32 in [0, 1]; with a calibration, in
        standard deviations of normal images.
      scores: image scores by name, each (b,).
    """

    reconstruction: Any
    map: Any
    scores: dict[str, Any]


class Thresholds(NamedTuple):
    """The values above which an image is called defective, or a pixel of the map anomalous.

    Both are taken from held-out normal images, never from test images.

    Attributes:
      score: the threshold of the image score.
      pixel: the threshold of the anomaly map.
      images: the number of held-out normal images.
      false_positive_rate: the largest fraction of these images that may exceed each threshold.
    """

    score: float
    pixel: float
    images: int
    false_positive_rate: float


class HeldOut(NamedTuple):
    """Scores and maxima of the held-out normal images, from which thresholds are chosen.

    Attributes:
      scores: image scores by name, n each.
      maxima: the n largest values of the maps.
    """

    scores: dict[str, list[float]]
    maxima: list[float]


class Calibrated(NamedTuple):
    """Parameters of a model with the calibration of its maps; `detect` takes it as parameters.

    Attributes:
      params: the parameters.
      calibration: the statistics of the held-out normal images.
    """

    params: Any
    calibration: Calibration


def detect(params: Any, images: Array, config: Config) -> Detection:
    """Returns the detection of a batch of uint8 images (b, h, w, 1 or 3); a pure function.

    Args:
      params: the parameters, or `Calibrated` ones, by which the map is standardised. Without a
        calibration, as during the validation of a training, `eval.calibration` has no effect.
      images: the batch.
      config: the configuration.
    """
    return detect_float(params, image_ops.to_float(images), config)


def detect_float(params: Any, x: Float[Array, "b h w 3"], config: Config) -> Detection:
    """Returns the detection of a batch of float images in [0, 1]; see `detect`."""
    params, calibration = params if isinstance(params, Calibrated) else (params, None)
    reconstruction, maps = _averaged_map(params, x, config)
    if calibration is not None:
        maps = anomaly_map.standardise(maps, calibration)
    elif maps.ndim == 4:
        # Several maps have no common scale yet. A training is validated by the first.
        maps = maps[..., 0]
    if config.data.foreground and METHODS[config.method].localises:
        # After the smoothing, which spreads the map of the object over its border.
        maps = maps * image_ops.foreground(x)[..., 0]
    # A method that judges whole images returns maps of one value; every score is this value.
    shown = jnp.broadcast_to(maps, x.shape[:3])
    return Detection(reconstruction, shown, image_scores(maps, config.eval))


def image_scores(maps: Float[Array, "b h w"], settings: EvalConfig) -> dict[str, Array]:
    """Returns all image scores by name, each (b,)."""
    fraction = settings.topk_fraction
    return {name: anomaly_map.image_score(maps, name, fraction) for name in REPORTED_SCORES}


def unsmoothed_map(params: Any, images: Array, config: Config) -> tuple[Any, Array]:
    """Returns reconstructions and maps (b, h, w) before the smoothing, of uint8 (b, h, w, 1 or 3).

    A pure function.
    """
    plain = dataclasses.replace(config.eval, smoothing="none")
    return _averaged_map(
        params, image_ops.to_float(images), dataclasses.replace(config, eval=plain)
    )


def _averaged_map(params: Any, x: Array, config: Config) -> tuple[Any, Array]:
    """Returns the method's reconstruction and map; with `eval.symmetries` the mean map.

    The mean is over the flips and turns under which a normal image stays normal.
    """
    elements = [(False, 0)]
    if config.eval.symmetries:
        elements = augmentation.symmetries(config.data.augmentation, (x.shape[1], x.shape[2]))
    # One batch of all copies, so that the network is compiled once.
    copies = jnp.concatenate([augmentation.transform(x, *element) for element in elements])
    reconstructions, maps = METHODS[config.method].anomaly_map(params, copies, config)
    back = [
        augmentation.transform(part, *element, inverse=True)
        for part, element in zip(jnp.split(maps, len(elements)), elements, strict=True)
    ]
    if reconstructions is not None:
        reconstructions = reconstructions[: x.shape[0]]
    return reconstructions, sum(back[1:], start=back[0]) / len(back)


def detect_all(
    params: Any, images: UInt8[np.ndarray, "n h w c"], config: Config
) -> Iterator[Detection]:
    """Yields one `Detection` of numpy arrays for each image, computed in batches."""
    config = inference_config(config)
    for batch, count in _batches(images, config.eval.batch_size):
        yield from unstack(start_batch(params, batch, config), count)


def _batches(images: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yields batches of one size, and the number of images in each.

    The last batch is padded with the last image, so that one compiled program serves all.
    """
    size = min(size, len(images))
    for start in range(0, len(images), size or 1):
        rows = np.minimum(np.arange(start, start + size), len(images) - 1)
        yield images[rows], min(size, len(images) - start)


def start_batch(params: Any, images: UInt8[np.ndarray, "b h w c"], config: Config) -> Detection:
    """Starts the detection of a batch on the device of the parameters, and does not wait for it.

    Args:
      params: the parameters of the model.
      images: the batch; each of its sizes is compiled once.
      config: a result of `inference_config`.
    """
    return _detect(params, _beside(params, images), config=config)


def _beside(params: Any, images: np.ndarray) -> Array:
    """Returns images on the device of the parameters."""
    # A member of a population may have its parameters on another device than the default one.
    arrays = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
    # Put explicitly, because the training loop allows no other transfer.
    return jax.device_put(images, arrays[0].sharding if arrays else None)


def unstack(batch: Detection, count: int) -> Iterator[Detection]:
    """Waits for a batch, and yields the detections of its first `count` images, numpy arrays."""
    batch = jax.device_get(batch)
    for i in range(count):
        yield jax.tree.map(lambda leaf, i=i: leaf[i], batch)


def _maps(params: Any, images: Array, config: Config) -> Float[Array, "b h w *parts"]:
    """Returns the smoothed maps before any calibration."""
    return _averaged_map(params, image_ops.to_float(images), config)[1]


# One jitted function each for the module, so that it compiles once per config and shape.
_detect = jax.jit(detect, static_argnames="config")
_jitted_maps = jax.jit(_maps, static_argnames="config")


def inference_config(config: Config) -> Config:
    """Returns the config without the settings that only training and the data pipelines read.

    A jitted function with a static config is compiled once per config. With this one it is
    compiled once for all models of one architecture.
    """
    data = DataConfig(
        height=config.data.height,
        width=config.data.width,
        crop_size=config.data.crop_size,
        augmentation=config.data.augmentation,
        # Which network suppressed the background is not part of the program.
        foreground="suppressed" if config.data.foreground else "",
    )
    return Config(
        method=config.method,
        data=data,
        corruption=config.corruption,
        model=config.model,
        head=config.head,
        eval=config.eval,
        baseline=config.baseline,
    )


def check_calibration(config: Config, held_out: int | None = None) -> None:
    """Checks that the maps of a config can be calibrated, if it asks for that.

    Args:
      config: the configuration.
      held_out: the number of held-out images; None if it is not known yet.

    Raises:
      BadInput: the method has no maps, or there are too few images.
    """
    choice = config.eval.calibration
    if choice == "none":
        return
    if not METHODS[config.method].localises:
        raise BadInput(
            f"eval.calibration: {choice} needs maps, and the method {config.method} scores whole "
            "images; set it to none"
        )
    if held_out is not None and held_out < MIN_CALIBRATION_IMAGES:
        raise BadInput(
            f"eval.calibration: {choice} needs at least {MIN_CALIBRATION_IMAGES} held-out images, "
            f"and there are {held_out}; raise data.holdout_fraction (another training), or set it "
            "to none"
        )


def measure_held_out(
    params: Any, images: UInt8[np.ndarray, "n h w c"], config: Config
) -> tuple[HeldOut, Calibration | None]:
    """Returns what thresholds are chosen from, and the calibration if the config asks for one.

    With a calibration, the scores and maxima of each image are those of its map standardised by the
    maps of the others, so that no image is judged by statistics that contain it.

    Args:
      params: the parameters of the model, without a calibration.
      images: the held-out normal images.
      config: the configuration.

    Raises:
      BadInput: see `check_calibration`.
    """
    check_calibration(config, len(images))
    if config.eval.calibration == "none":
        return summarise(detect_all(params, images, config)), None
    smoothed, settings = [], inference_config(config)
    for batch, count in _batches(images, config.eval.batch_size):
        maps = _jitted_maps(params, _beside(params, batch), config=settings)
        smoothed.append(jax.device_get(maps)[:count])
    maps = np.concatenate(smoothed)
    resolved = _resolve_calibration(config.eval, images)
    standardised: Iterable[np.ndarray] = anomaly_map.leave_one_out(maps, resolved)
    if config.data.foreground:
        objects = np.any(images > 0, axis=-1)
        standardised = (values * mask for values, mask in zip(standardised, objects, strict=True))
    held_out = summarise(_rescore(values, config.eval) for values in standardised)
    return held_out, anomaly_map.calibration_of(maps, resolved)


def _resolve_calibration(settings: EvalConfig, images: UInt8[np.ndarray, "n h w c"]) -> EvalConfig:
    """Returns the settings in which `calibration` is all or position."""
    if settings.calibration != "auto":
        return settings
    choice = "position" if facts.in_place(images) else "all"
    return dataclasses.replace(settings, calibration=choice)


def _rescore(values: Float[np.ndarray, "h w"], settings: EvalConfig) -> Detection:
    """Returns the detection of one image from its standardised map."""
    # Put explicitly, because the training loop allows no other transfer.
    scores = jax.device_get(image_scores(jax.device_put(values[None]), settings))
    return Detection(None, values, {name: value[0] for name, value in scores.items()})


def summarise(detections: Iterable[Detection]) -> HeldOut:
    """Returns what thresholds are chosen from, of the detections of single images."""
    scores: dict[str, list[float]] = {name: [] for name in REPORTED_SCORES}
    maxima = []
    for detection in detections:
        for name, value in detection.scores.items():
            scores[name].append(float(value))
        maxima.append(float(detection.map.max()))
    return HeldOut(scores, maxima)


def choose_thresholds(held_out: HeldOut, settings: EvalConfig) -> Thresholds:
    """Returns the thresholds that at most `false_positive_rate` of the images exceed.

    Args:
      held_out: that of the held-out normal images.
      settings: `image_score` names the score that decides.
    """
    level = 1 - settings.false_positive_rate
    scores = held_out.scores[settings.image_score]
    return Thresholds(
        # The next observed value is taken, not an interpolated one, so that the rate holds on
        # these images.
        score=float(np.quantile(scores, level, method="higher")),
        pixel=float(np.quantile(held_out.maxima, level, method="higher")),
        images=len(held_out.maxima),
        false_positive_rate=settings.false_positive_rate,
    )
