"""One-class support vector machine (Schölkopf et al. 2001) on shrunk images."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from pae_jax import image_ops
from pae_jax.config import Config
from pae_jax.corruption import CorruptedBatch
from pae_jax.methods.method import Images, Method, PerImage, Stored, image_level_map, map_stored


def svm_features(x: Images, side: int) -> Float[Array, "b d"]:
    """The pixels of images shrunk to side × side; each output pixel averages what it covers."""
    shape = (len(x), side, side, image_ops.CHANNELS)
    return jax.image.resize(x, shape, "linear").reshape(len(x), -1)


def init_svm(config: Config, key: Key[Array, ""]) -> dict[str, Array]:
    """Room for every training image as a support vector."""
    del key
    count, side = config.baseline.svm_images, config.baseline.svm_side
    return {
        "vectors": jnp.zeros((count, side**2 * image_ops.CHANNELS)),
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


def svm_map(
    params: dict[str, Array], x: Images, config: Config
) -> tuple[None, Float[Array, "b 1 1"]]:
    """−log of the weighted mean of k(x, xᵢ), which falls as the decision value rises.

    The logarithm keeps images apart that are so far off that the mean is 0 in float32.
    """
    features = svm_features(x, config.baseline.svm_side)
    exponents = -params["gamma"] * _squared_distances(features, params["vectors"])
    weights = (params["weights"] / jnp.sum(params["weights"]))[None]
    mean = jax.nn.logsumexp(exponents, axis=1, b=weights)
    return None, image_level_map(jnp.maximum(-mean, 0))


def svm_loss(
    params: dict[str, Array], batch: CorruptedBatch, keys: Array, config: Config, step: Any
) -> tuple[PerImage, dict[str, Array]]:
    """The slack max(0, −decision) of clean images: 0 for those inside."""
    del keys, step
    features = svm_features(batch.clean, config.baseline.svm_side)
    return jnp.maximum(-svm_decision(params, features), 0), {}


METHOD = Method(
    init=init_svm,
    loss=svm_loss,
    anomaly_map=svm_map,
    fit=fit_svm,
    pixels=False,
    closed_form=True,
    needs="sklearn",
)
