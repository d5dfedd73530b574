"""Anomaly maps Δ(x, f(x)), their smoothing and calibration, and image scores (§2.2).

The paper is arXiv 2606.15280.

A map compares an image with its reconstruction pixel by pixel: 0 where they agree, towards 1 where
they differ. Maps are symmetric in their arguments and exactly 0 for equal images.

`MAPS`, `SMOOTHINGS` and `IMAGE_SCORES` hold the choices by name. To try another, add a function to
the registry and its name to `config.EvalConfig`.

Borders are continued by reflection with the edge pixel repeated (d c b a | a b c d | d c b a), as
often as a window needs. A map therefore has its image's size, down to one pixel.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

from pae_jax import image_ops
from pae_jax.config import EvalConfig
from pae_jax.config_schema import LEARNED_MAPS

Images = Float[Array, "b h w c"]
Maps = Float[Array, "b h w"]
HostMaps = Float32[np.ndarray, "n h w *parts"]

SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # (K₁L)², (K₂L)² for the data range L = 1
SSIM_SIGMA, SSIM_RADIUS = 1.5, 5  # the Gaussian window has 11×11 pixels
GMS_C = 170 / 255**2  # published as 170 for data in [0, 255]
MSGMS_SCALES = 4


@jax.jit
def mse(x: Images, reconstruction: Images) -> Maps:
    """Returns the squared difference, averaged over the channels."""
    return jnp.mean(jnp.square(x - reconstruction), axis=-1)


@jax.jit
def ssim(x: Images, reconstruction: Images) -> Maps:
    """Returns 1 − SSIM (Wang et al. 2004), averaged over the channels, clamped to [0, 1].

    The window is an 11×11 Gaussian with σ = 1.5, the covariance that of the population and the
    data range 1.
    """
    dissimilarity = structural_dissimilarity(x, reconstruction)
    return jnp.clip(jnp.mean(dissimilarity, axis=-1), 0.0, 1.0)


@jax.jit
def gms(x: Images, reconstruction: Images) -> Maps:
    """Returns 1 − the gradient magnitude similarity (Xue et al. 2014), averaged over the channels.

    It equals 1 − (2 g₁g₂ + c)/(g₁² + g₂² + c) = (g₁ − g₂)²/(g₁² + g₂² + c), where g is the
    magnitude of the Prewitt gradient and c = 170/255². Xue et al. use the luminance at half the
    size; this function uses each channel at full size.
    """
    return _gradient_dissimilarity(jnp.concatenate([x, reconstruction]))


@jax.jit
def msgms(x: Images, reconstruction: Images) -> Maps:
    """Returns the mean of `gms` over a pyramid of four scales (RIAD, Zavrtanik et al. 2021).

    Each scale halves the previous one by 2×2 averages, and its map is enlarged by linear
    interpolation. A small image has fewer scales: both sides keep at least 3 pixels, the size of
    the Prewitt filter.
    """
    height, width = x.shape[1:3]
    pair = jnp.concatenate([x, reconstruction])
    maps = [_gradient_dissimilarity(pair)]
    while len(maps) < MSGMS_SCALES and min(pair.shape[1:3]) >= 5:  # its half has 3 pixels
        pair = _halve(pair)
        values = _gradient_dissimilarity(pair)
        # Enlarged to whole multiples, then cut, so that the pixel centres stay aligned.
        batch, rows, columns = values.shape
        size = (batch, rows << len(maps), columns << len(maps))
        maps.append(jax.image.resize(values, size, "linear")[:, :height, :width])
    return sum(maps[1:], start=maps[0]) / len(maps)


MAPS: dict[str, Callable[[Images, Images], Maps]] = {
    "mse": mse,
    "ssim": ssim,
    "gms": gms,
    "msgms": msgms,
}


# How many pixels away a map still depends on the images, by the name of the map. The grid of msgms
# repeats after 2 ** (MSGMS_SCALES - 1) pixels.
REACH = {"mse": 0, "ssim": SSIM_RADIUS, "gms": 1, "msgms": 2**MSGMS_SCALES} | dict.fromkeys(
    LEARNED_MAPS, 0
)


def _mean_kernel(width: float) -> np.ndarray:
    """Returns the weights of a window `width` pixels wide, which may be fractional."""
    radius = int(np.ceil((width - 1) / 2))
    overlap = width / 2 + 0.5 - np.abs(np.arange(-radius, radius + 1))
    return np.clip(overlap, 0.0, 1.0) / width


def _gaussian_kernel(width: float) -> np.ndarray:
    """Returns a Gaussian with the window's standard deviation, σ = width/√12, cut at 4σ."""
    sigma = width / np.sqrt(12)
    return image_ops.gaussian_kernel(sigma)


SMOOTHINGS: dict[str, Callable[[float], np.ndarray]] = {
    "gaussian": _gaussian_kernel,
    "mean": _mean_kernel,
    "none": lambda width: np.ones(1),
}


@partial(jax.jit, static_argnames=("kind", "fraction"))
def smooth(maps: Maps, kind: str = "gaussian", fraction: float = 1 / 12) -> Maps:
    """Smooths maps (b, h, w) spatially; keeps their range and mean.

    Args:
      maps: anomaly maps.
      kind: a name in `SMOOTHINGS`. "mean" averages over a square window, "gaussian" has the same
        standard deviation, "none" returns the maps.
      fraction: the window's side as a fraction of the map's shorter side; at least one pixel.

    Raises:
      KeyError: `kind` is unknown.
    """
    kernel = SMOOTHINGS[kind](max(1.0, fraction * min(maps.shape[1:])))
    if kernel.size == 1:
        return maps
    return image_ops.filter_axes(maps, kernel)


def smoothed_maps(
    compare: Callable[[str], Maps], config: EvalConfig
) -> Float[Array, "b h w *parts"]:
    """Returns the smoothed maps that `config.anomaly_map` names.

    Args:
      compare: name → the map of this name, (b, h, w), not smoothed.
      config: the settings of the evaluation.

    Returns:
      (b, h, w) of one map; (b, h, w, parts) of several, which a calibration adds.
    """
    fraction, kind = config.smoothing_fraction, config.smoothing
    maps = [smooth(compare(name), kind, width * fraction) for name, width in config.parts]
    return maps[0] if len(maps) == 1 else jnp.stack(maps, axis=-1)


def smoothed_map(
    x: Images, reconstruction: Images, config: EvalConfig
) -> Float[Array, "b h w *parts"]:
    """Returns the smoothed anomaly map Δ(x, f(x)) of §2.2; see `smoothed_maps`."""
    return smoothed_maps(lambda name: MAPS[name](x, reconstruction), config)


class Calibration(NamedTuple):
    """The statistics of the smoothed maps of normal images.

    Attributes:
      mean: (h, w), or (h, w, parts) of several maps: the mean of the maps, at each position or
        over all.
      deviation: like `mean`, positive. At each position it is σ̃ + 0.2·g. σ̃ is the standard
        deviation, smoothed by a Gaussian of twice the width of the map's window. g is the root mean
        square of the standard deviation over all positions, towards which the value of a position
        is shrunk. Over all positions it is the standard deviation.
    """

    mean: Any
    deviation: Any

    @property
    def by_position(self) -> bool:
        """True if each position has statistics of its own."""
        return any(bool(np.ptp(np.asarray(values), axis=(0, 1)).any()) for values in self)


SHRINKAGE = 0.2  # the weight of g
MIN_DEVIATION = 1e-8  # equal maps are not divided by 0
# The logit of g is far below its mean where g is sure that nothing changed. There it would hide
# what the other maps show.
LOWEST = -3.0


def standardise(maps: Any, calibration: Calibration) -> Any:
    """Returns maps, of JAX or numpy, in standard deviations from the mean of normal ones.

    Args:
      maps: (b, h, w), or (b, h, w, parts).
      calibration: their statistics.

    Returns:
      (b, h, w). The values have no upper limit; those below the mean are negative. Of several maps
      it is the sum, in which no part counts less than −3.
    """
    values = (maps - calibration.mean[None]) / calibration.deviation[None]
    return values if values.ndim == 3 else values.clip(LOWEST).sum(axis=-1)


def calibration_of(maps: HostMaps, config: EvalConfig) -> Calibration:
    """Returns the calibration from smoothed maps of normal images; float32, on the host.

    Args:
      maps: (n, h, w), or (n, h, w, parts) of several maps; at least two.
      config: `calibration` says whether the statistics are those of each position.
    """
    return _Statistics(maps, config).calibration()


def leave_one_out(maps: HostMaps, config: EvalConfig) -> Iterator[Float32[np.ndarray, "h w"]]:
    """Yields each map standardised by the calibration from all others, (h, w) float32 each.

    A map is never far from statistics that contain it: a value of n is at most (n − 1)/√n of their
    standard deviations from their mean, whatever it is. Thresholds chosen so would be too low.

    Args:
      maps: (n, h, w), or (n, h, w, parts) of several maps; at least three.
      config: see `calibration_of`.
    """
    statistics = _Statistics(maps, config)
    for values in maps:
        yield standardise(values[None], statistics.calibration(without=values))[0]


class _Statistics:
    """Mean and sum of squares of maps, from which one map can be taken out."""

    def __init__(self, maps: HostMaps, config: EvalConfig):
        self._count = len(maps)
        self._mean = maps.mean(axis=0, dtype=np.float64)
        self._squares = np.zeros_like(self._mean)
        for values in maps:  # map by map, so that no copy of all of them in float64 is made
            self._squares += (values - self._mean) ** 2
        self._by_position = config.calibration == "position"
        self._smoothings = [
            _Smoothing(maps.shape[1:3], part.width * config.smoothing_fraction)
            for part in config.parts
        ]

    def calibration(self, without: np.ndarray | None = None) -> Calibration:
        """Returns the calibration from all maps, or from all but one of them."""
        count, mean, squares = self._count, self._mean, self._squares
        if without is not None:
            offset = without - mean
            # Without this map the mean moves by offset/(n − 1), and the sum of squares about the
            # mean loses offset²·n/(n − 1).
            squares = np.maximum(squares - offset**2 * count / (count - 1), 0)
            mean, count = mean - offset / (count - 1), count - 1
        if self._by_position:
            deviation = self._by_part(squares / (count - 1))
        else:
            average = mean.mean(axis=(0, 1), keepdims=True)
            # About the mean of all positions: within them, and between them.
            variance = (squares / count + (mean - average) ** 2).mean(axis=(0, 1), keepdims=True)
            deviation = np.broadcast_to(np.sqrt(variance), mean.shape)
            mean = np.broadcast_to(average, mean.shape)
        deviation = np.maximum(deviation, MIN_DEVIATION)
        return Calibration(mean.astype(np.float32), deviation.astype(np.float32))

    def _by_part(self, variance: np.ndarray) -> np.ndarray:
        parts = variance.reshape(*variance.shape[:2], -1)
        deviations = [
            smoothing(np.sqrt(part)) + SHRINKAGE * np.sqrt(part.mean())
            for smoothing, part in zip(self._smoothings, np.moveaxis(parts, -1, 0), strict=True)
        ]
        return np.stack(deviations, axis=-1).reshape(variance.shape)


class _Smoothing:
    """The filter of standard deviations: a Gaussian of twice the width of the maps' window."""

    def __init__(self, shape: tuple[int, ...], fraction: float):
        kernel = _gaussian_kernel(max(1.0, 2 * fraction * min(shape)))
        self._rows, self._columns = (image_ops.filter_matrix(kernel, size) for size in shape)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return self._rows @ values @ self._columns.T


def _sum(maps: Maps, topk_fraction: float) -> Float[Array, " b"]:
    return maps.sum(axis=(1, 2))


def _max(maps: Maps, topk_fraction: float) -> Float[Array, " b"]:
    return maps.max(axis=(1, 2))


def _topk(maps: Maps, topk_fraction: float) -> Float[Array, " b"]:
    pixels = maps.reshape(maps.shape[0], -1)
    count = max(1, round(topk_fraction * pixels.shape[1]))
    return lax.top_k(pixels, count)[0].mean(axis=1)


def _mean(maps: Maps, topk_fraction: float) -> Float[Array, " b"]:
    return _sum(maps, topk_fraction) / (maps.shape[1] * maps.shape[2])


IMAGE_SCORES: dict[str, Callable[[Maps, float], Float[Array, " b"]]] = {
    "sum": _sum,
    "max": _max,
    "topk": _topk,
    "mean": _mean,
}


@partial(jax.jit, static_argnames=("kind", "topk_fraction"))
def image_score(maps: Maps, kind: str = "sum", topk_fraction: float = 0.01) -> Float[Array, " b"]:
    """Returns one score per image, (b,).

    Args:
      maps: anomaly maps, smoothed or not.
      kind: a name in `IMAGE_SCORES`. The paper's is "sum"; "topk" is the mean of the largest
        values.
      topk_fraction: the fraction of the pixels that "topk" averages, in (0, 1]; at least one
        pixel.

    Raises:
      KeyError: `kind` is unknown.
    """
    return IMAGE_SCORES[kind](maps, topk_fraction)


def _window(x: Images, radius: int, axis: int) -> list[Images]:
    """Returns the 2·radius + 1 shifted copies of `x` along `axis` with reflected ends."""
    size = x.shape[axis]
    padding = [(radius, radius) if i == axis else (0, 0) for i in range(x.ndim)]
    padded = jnp.pad(x, padding, mode="symmetric")
    return [lax.slice_in_dim(padded, k, k + size, axis=axis) for k in range(2 * radius + 1)]


def structural_dissimilarity(x: Images, y: Images) -> Images:
    """Returns 1 − SSIM per channel, in [0, 2]; differentiable everywhere."""
    # With d = x − y, SSIM = (1 − E[d]²/(E[x]² + E[y]² + C₁)) (1 − V[d]/(V[x] + V[y] + C₂)). This
    # is the usual product of luminance and contrast-structure without its cancellation near 1.
    mean, variance = _moments(jnp.concatenate([x, y, x - y]))
    mean_x, mean_y, mean_d = jnp.split(mean, 3)
    variance_x, variance_y, variance_d = jnp.split(variance, 3)
    luminance = mean_d**2 / (mean_x**2 + mean_y**2 + SSIM_C1)
    structure = variance_d / (variance_x + variance_y + SSIM_C2)
    return luminance + structure - luminance * structure


def _moments(x: Images) -> tuple[Images, Images]:
    """Returns the mean and the variance under SSIM's Gaussian window at each pixel."""
    # Law of total variance, axis by axis: the variance of a window is the mean of its lines'
    # variances plus the variance of their means. In float32 E[x²] − E[x]² has errors of 1e-4 in
    # SSIM on a bright, smooth image; this form has 1e-6. On a CPU it takes 115 ms for four 256²
    # RGB images; E[x²] − E[x]² takes 36 ms as matrix products.
    weights = [float(w) for w in image_ops.gaussian_kernel(SSIM_SIGMA, SSIM_RADIUS)]

    def weighted(values: list[Images]) -> Images:
        return sum(
            (w * v for w, v in zip(weights[1:], values[1:], strict=True)),
            start=weights[0] * values[0],
        )

    mean, variance = x, jnp.zeros_like(x)
    for axis in (1, 2):
        means = _window(mean, SSIM_RADIUS, axis)
        variances = _window(variance, SSIM_RADIUS, axis)
        mean = weighted(means)
        variance = weighted([v + (m - mean) ** 2 for m, v in zip(means, variances, strict=True)])
    return mean, variance


def _gradient_dissimilarity(
    pair: Float[Array, "two_b h w c"],
) -> Float[Array, "b h w"]:
    """Returns (g₁ − g₂)²/(g₁² + g₂² + c), averaged over the channels.

    The first half of `pair` holds the images, the second half those they are compared with. g² is
    the squared magnitude of the Prewitt gradient: differences of values two pixels apart, averaged
    over three lines.
    """
    padded = jnp.pad(pair, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="symmetric")
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    columns = padded[:, :, :-2] + padded[:, :, 1:-1] + padded[:, :, 2:]
    along_rows = rows[:, :, 2:] - rows[:, :, :-2]
    along_columns = columns[:, 2:] - columns[:, :-2]
    first, second = jnp.split((along_rows**2 + along_columns**2) / 9, 2)
    # In this form the map of equal images is exactly 0; in the form 1 − quotient it is rounded.
    difference = jnp.sqrt(first) - jnp.sqrt(second)
    return jnp.mean(difference**2 / (first + second + GMS_C), axis=-1)


def _halve(x: Images) -> Float[Array, "b half_h half_w c"]:
    """Averages 2×2 blocks; the last pixel of an odd side is repeated."""
    batch, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    x = x.reshape(batch, (height + 1) // 2, 2, (width + 1) // 2, 2, channels)
    return x.mean(axis=(2, 4))
