"""Methods to compare the projection with, in the same frame: data, loop, evaluation, report.

Each is a handful of functions that `methods.METHODS` puts together; what they mean stands
there. The recipes are in `configs/baselines.py`, and what was left out of a publication is said
at its function. Methods that are fitted to the training images do that on the host, once,
before the first step; the shapes of what they learn follow from the config alone.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Key, UInt8

from pae_jax import anomaly_map, preprocess, unet
from pae_jax.config import Config, EvalConfig, ModelConfig
from pae_jax.corruption import CorruptedBatch
from pae_jax.detection import VISIBLE

Images = Float[Array, "b h w 3"]
Stored = UInt8[np.ndarray, "n h w c"]
PerImage = Float[Array, " b"]

_EXACT = jax.lax.Precision.HIGHEST


def map_stored(function: Callable[..., Array], images: Stored, params: Any = None) -> Any:
    """`function(x, params)` of stored images (n, h, w, c), in batches; (n, …) on the host."""
    run = jax.jit(lambda stored, params: function(preprocess.to_float(stored), params))
    size, parts = min(64, len(images)), []
    for start in range(0, len(images), size):
        rows = np.minimum(np.arange(start, start + size), len(images) - 1)
        parts.append(jax.device_get(run(images[rows], params))[: len(images) - start])
    return np.concatenate(parts)


def _of_images(score: PerImage) -> Float[Array, "b 1 1"]:
    """Scores ≥ 0 → maps of one value in [0, 1), in the same order."""
    return (score / (1 + score))[:, None, None]


# Principal components: f is the orthogonal projection onto an affine space.


def init_pca(config: Config, key: Key[Array, ""]) -> dict[str, Array]:
    """Empty: nothing varies about an image of zeros."""
    del key
    height, width = config.data.shape
    size = height * width * preprocess.CHANNELS
    return {
        "mean": jnp.zeros(size),
        "components": jnp.zeros((size, config.baseline.pca_components)),
    }


def fit_pca(params: dict[str, Array], images: Stored, config: Config) -> dict[str, np.ndarray]:
    """Mean and leading principal directions of the training images, not augmented.

    From the eigenvectors of their Gram matrix (n, n) in float64, since an image has many more
    values than there are images. Directions beyond the images' rank are 0.
    """
    del params
    n, wanted = len(images), config.baseline.pca_components
    rows = images.reshape(n, -1)
    mean = rows.mean(axis=0, dtype=np.float64)
    columns = [slice(i, i + 8192) for i in range(0, rows.shape[1], 8192)]
    gram = np.zeros((n, n))
    for part in columns:
        centred = rows[:, part] - mean[part]
        gram += centred @ centred.T
    values, vectors = (a[..., ::-1][..., :wanted] for a in np.linalg.eigh(gram))
    kept = values > 1e-12 * values[0]
    scaled = vectors[:, kept] / np.sqrt(values[kept])
    components = np.zeros((rows.shape[1], wanted))
    for part in columns:
        components[part, : kept.sum()] = (rows[:, part] - mean[part]).T @ scaled

    # A grey image has its channel three times, and so has a direction, of length 1 again.
    copies = preprocess.CHANNELS // images.shape[-1]
    return {
        "mean": np.repeat(mean / 255, copies).astype(np.float32),
        "components": np.repeat(components / np.sqrt(copies), copies, axis=0).astype(np.float32),
    }


def bind_pca(params: dict[str, Array], config: Config) -> Callable[[Images], Images]:
    """f(x) = mean + VVᵀ(x − mean), clipped to [0, 1]."""
    del config

    def f(x: Images) -> Images:
        mean, components = params["mean"][None], params["components"]
        scores = jnp.matmul(x.reshape(len(x), -1) - mean, components, precision=_EXACT)
        values = mean + jnp.matmul(scores, components.T, precision=_EXACT)
        return jnp.clip(values, 0, 1).reshape(x.shape)

    return f


# One-class support vector machine (Schölkopf et al. 2001) on shrunk images.


def svm_features(x: Images, side: int) -> Float[Array, "b d"]:
    """The pixels of images shrunk to side × side; each output pixel averages what it covers."""
    shape = (len(x), side, side, preprocess.CHANNELS)
    return jax.image.resize(x, shape, "linear").reshape(len(x), -1)


def init_svm(config: Config, key: Key[Array, ""]) -> dict[str, Array]:
    """Room for every training image as a support vector."""
    del key
    count, side = config.baseline.svm_images, config.baseline.svm_side
    return {
        "vectors": jnp.zeros((count, side**2 * preprocess.CHANNELS)),
        "weights": jnp.zeros(count),
        "gamma": jnp.zeros(()),
        "offset": jnp.zeros(()),
    }


def fit_svm(params: dict[str, Array], images: Stored, config: Config) -> dict[str, np.ndarray]:
    """scikit-learn's OneClassSVM with the RBF kernel, gamma="scale"; not augmented."""
    from sklearn.svm import OneClassSVM

    settings = config.baseline
    if len(images) > settings.svm_images:
        drawn = np.random.default_rng(config.train.seed).permutation(len(images))
        images = images[np.sort(drawn[: settings.svm_images])]
    features = map_stored(lambda x, _: svm_features(x, settings.svm_side), images)
    features = np.asarray(features, np.float64)
    variance = features.var()
    gamma = 1 / (features.shape[1] * variance) if variance else 1.0
    options: Any = {"nu": settings.svm_nu, "gamma": gamma}
    fitted: Any = OneClassSVM(**options).fit(features)
    count = len(fitted.support_)
    vectors, weights = np.zeros(params["vectors"].shape), np.zeros(params["weights"].shape)
    vectors[:count], weights[:count] = fitted.support_vectors_, fitted.dual_coef_[0]
    found = {"vectors": vectors, "weights": weights, "gamma": gamma, "offset": fitted.offset_[0]}
    return {name: np.asarray(value, np.float32) for name, value in found.items()}


def svm_decision(params: dict[str, Array], features: Float[Array, "b d"]) -> PerImage:
    """Σ αᵢ k(x, xᵢ) − ρ, scikit-learn's `decision_function`: negative for outliers."""
    kernel = jnp.exp(-params["gamma"] * _squared_distances(features, params["vectors"]))
    return jnp.sum(params["weights"][None] * kernel, axis=1) - params["offset"]


def _squared_distances(x: Float[Array, "b d"], y: Float[Array, "m d"]) -> Float[Array, "b m"]:
    # Differences first: |x|² − 2xy + |y|² would cancel in float32.
    return jnp.sum(jnp.square(x[:, None] - y[None]), axis=-1)


def localise_svm(
    params: dict[str, Array], x: Images, config: Config
) -> tuple[None, Float[Array, "b 1 1"]]:
    """−log of the weighted mean of k(x, xᵢ), which falls as the decision value rises.

    The logarithm keeps images apart that are so far off that the mean is 0 in float32.
    """
    features = svm_features(x, config.baseline.svm_side)
    exponents = -params["gamma"] * _squared_distances(features, params["vectors"])
    weights = (params["weights"] / jnp.sum(params["weights"]))[None]
    mean = jax.nn.logsumexp(exponents, axis=1, b=weights)
    return None, _of_images(jnp.maximum(-mean, 0))


def svm_loss(
    params: dict[str, Array], batch: CorruptedBatch, keys: Array, config: Config, step: Any
) -> tuple[PerImage, dict[str, Array]]:
    """The slack max(0, −decision) of clean images: 0 for those inside."""
    del keys, step
    features = svm_features(batch.clean, config.baseline.svm_side)
    return jnp.maximum(-svm_decision(params, features), 0), {}


# Deep SVDD (Ruff et al. 2018), one-class: normal images are mapped close to a centre.


class Encoder(nn.Module):
    """The U-Net's encoder, then one dense layer: (b, h, w, c) → (b, dimensions).

    As published, without biases and with unbounded activations (leaky ReLU), since a network
    that can make a constant maps everything to the centre. Its batch norm is left out.
    """

    config: ModelConfig
    dimensions: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        y = unet.pad_to_multiple(x, config.stem * 2 ** len(config.widths))
        y = unet.space_to_depth(2 * y.astype(dtype) - 1, config.stem)
        options = {"use_bias": False, "dtype": dtype, "kernel_init": nn.initializers.he_normal()}
        for width in config.widths:
            for _ in range(config.convolutions):
                y = nn.leaky_relu(nn.Conv(width, (3, 3), **options)(y), 0.1)
            y = unet.max_pool(y)
        y = nn.Dense(self.dimensions, **options)(y.reshape(len(y), -1))
        return y.astype(jnp.float32)


def encode(params: dict[str, Any], x: Images, config: Config) -> Float[Array, "b d"]:
    """φ(x)."""
    encoder = Encoder(config.model, config.baseline.svdd_dimensions)
    return cast(Array, encoder.apply(params["encoder"], x))


def init_svdd(config: Config, key: Key[Array, ""]) -> dict[str, Any]:
    """A random network; the centre is still to be fitted."""
    example = jnp.zeros((1, *config.data.shape, preprocess.CHANNELS))
    dimensions = config.baseline.svdd_dimensions
    encoder = Encoder(config.model, dimensions).init(key, example)
    return {"encoder": encoder, "centre": jnp.zeros(dimensions)}


def fit_svdd(params: dict[str, Any], images: Stored, config: Config) -> dict[str, Any]:
    """c = the mean output of the initial network, values near 0 moved to ±0.1.

    Published: a value that a network reaches with weights of 0 invites it to do so. The network
    is not pretrained as an autoencoder.
    """
    codes = map_stored(lambda x, params: encode(params, x, config), images, params)
    centre = codes.mean(axis=0, dtype=np.float64)
    centre = np.where(np.abs(centre) < 0.1, np.copysign(0.1, centre), centre)
    return {**params, "centre": centre.astype(np.float32)}


def svdd_distance(params: dict[str, Any], x: Images, config: Config) -> PerImage:
    """‖φ(x) − c‖²; the centre is not trained."""
    centre = jax.lax.stop_gradient(params["centre"])[None]
    return jnp.sum(jnp.square(encode(params, x, config) - centre), axis=1)


def svdd_loss(
    params: dict[str, Any], batch: CorruptedBatch, keys: Array, config: Config, step: Any
) -> tuple[PerImage, dict[str, Array]]:
    """‖φ(x) − c‖² of clean images; the published weight decay is left out."""
    del keys, step
    return svdd_distance(params, batch.clean, config), {}


def localise_svdd(
    params: dict[str, Any], x: Images, config: Config
) -> tuple[None, Float[Array, "b 1 1"]]:
    """The distance to the centre in units of the centre's own length."""
    length = jnp.sum(jnp.square(params["centre"]))
    return None, _of_images(svdd_distance(params, x, config) / length)


# Segmentation: the U-Net says where the corruption is.


def _probability(params: Any, x: Images, config: Config) -> Float[Array, "b h w"]:
    model = dataclasses.replace(config.model, output="sigmoid")
    return jnp.mean(unet.bind(model, params)(x), axis=-1)


def segmentation_loss(
    params: Any, batch: CorruptedBatch, keys: Array, config: Config, step: Any
) -> tuple[PerImage, dict[str, Array]]:
    """Binary cross-entropy of M > 0.1, mean over the pixels, plus the soft Dice loss."""
    del keys, step
    probability = _probability(params, batch.corrupted, config)
    target = (batch.mask[..., 0] > VISIBLE).astype(probability.dtype)
    p = jnp.clip(probability, 1e-6, 1 - 1e-6)
    entropy = -jnp.mean(target * jnp.log(p) + (1 - target) * jnp.log1p(-p), axis=(1, 2))
    overlap = jnp.sum(probability * target, axis=(1, 2))
    total = jnp.sum(probability + target, axis=(1, 2))
    dice = 1 - (2 * overlap + 1) / (total + 1)
    return entropy + dice, {"cross_entropy": entropy, "dice": dice}


def localise_segmentation(
    params: Any, x: Images, config: Config
) -> tuple[None, Float[Array, "b h w"]]:
    """The probability of a corruption, smoothed as other maps are."""
    return None, _smooth(_probability(params, x, config), config.eval)


def _smooth(maps: Float[Array, "b h w"], config: EvalConfig) -> Float[Array, "b h w"]:
    return anomaly_map.smooth(maps, config.smoothing, config.smoothing_share)


# Inpainting (RIAD, Zavrtanik et al. 2021): every pixel is reconstructed without being seen.

SIDES = (2, 4, 8, 16)  # of RIAD's cells, in pixels
SETS = 3


def inpainting_sets(shape: tuple[int, int], side: int) -> Bool[np.ndarray, "sets h w"]:
    """The image's square cells in disjoint sets of equal size (±1), always the same ones."""
    rows, columns = (-(-size // side) for size in shape)
    cells = np.random.default_rng(side).permutation(rows * columns) % SETS
    cells = cells.reshape(rows, columns).repeat(side, axis=0).repeat(side, axis=1)
    return cells[None, : shape[0], : shape[1]] == np.arange(SETS)[:, None, None]


def localise_inpainting(
    params: Any, x: Images, config: Config
) -> tuple[Images, Float[Array, "b h w"]]:
    """Each set of cells is blacked out and filled in; one map of each cell size, averaged.

    Sizes of which the image holds less than two cells a side are left out. The reconstruction is
    the mean of the sizes' too. Published: maps MSGMS, mean filter, score = maximum.
    """
    f = unet.bind(config.model, params)
    shape = x.shape[1], x.shape[2]
    sides = [side for side in SIDES if 2 * side <= min(shape)] or SIDES[:1]
    pictures, maps = [], []
    for side in sides:
        hidden = jnp.asarray(inpainting_sets(shape, side), x.dtype)[:, None, :, :, None]
        seen = (x[None] * (1 - hidden)).reshape(-1, *x.shape[1:])
        filled = f(seen).reshape(SETS, *x.shape)
        pictures.append(jnp.sum(hidden * filled, axis=0))
        maps.append(anomaly_map.MAPS[config.eval.map](x, pictures[-1]))
    mean = jnp.mean(jnp.stack(maps), axis=0)
    return jnp.mean(jnp.stack(pictures), axis=0), _smooth(mean, config.eval)
