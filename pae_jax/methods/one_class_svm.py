"""One-class support vector machine (Schölkopf et al. 2001) on the pixels of downscaled images.

It is fitted by scikit-learn to the images as they are stored, without augmentation.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from pae_jax import image_ops
from pae_jax.config import Config
from pae_jax.corruption import CorruptedBatch
from pae_jax.methods.method import (
    Images,
    Method,
    PerImage,
    StoredImages,
    image_level_map,
    map_stored,
)
from pae_jax.objective import Hyperparameters


def svm_features(x: Images, side: int) -> Float[Array, "b d"]:
    """Returns the pixels of the images, downscaled with antialiasing to side × side."""
    shape = (x.shape[0], side, side, image_ops.CHANNELS)
    return jax.image.resize(x, shape, "linear").reshape(x.shape[0], -1)


def init_svm(config: Config, key: Key[Array, ""]) -> dict[str, Array]:
    """Returns parameters of the right shapes, all 0; `fit_svm` replaces them.

    There is a row for every training image, because each may become a support vector.
    """
    del key
    count, side = config.baseline.svm_images, config.baseline.svm_side
    return {
        "vectors": jnp.zeros((count, side**2 * image_ops.CHANNELS)),
        "weights": jnp.zeros(count),
        "gamma": jnp.zeros(()),
        "offset": jnp.zeros(()),
    }


def fit_svm(
    params: dict[str, Array], images: StoredImages, config: Config
) -> dict[str, np.ndarray]:
    """Returns the parameters of scikit-learn's OneClassSVM, RBF kernel with gamma="scale".

    If there are more than `baseline.svm_images` images, a random subset is fitted.
    """
    # Imported here, because the package belongs to the extra "baselines".
    from sklearn.svm import OneClassSVM

    settings = config.baseline
    if len(images) > settings.svm_images:
        order = np.random.default_rng(config.train.seed).permutation(len(images))
        images = images[np.sort(order[: settings.svm_images])]
    features = map_stored(lambda x, _: svm_features(x, settings.svm_side), images)
    features = np.asarray(features, np.float64)
    # scikit-learn's "scale", computed here because the map needs the value.
    variance = features.var()
    gamma = 1 / (features.shape[1] * variance) if variance else 1.0
    options: Any = {"nu": settings.svm_nu, "gamma": gamma}
    fitted: Any = OneClassSVM(**options).fit(features)
    count = len(fitted.support_)
    # Rows beyond the support vectors keep the weight 0 and have no effect.
    vectors, weights = np.zeros(params["vectors"].shape), np.zeros(params["weights"].shape)
    vectors[:count], weights[:count] = fitted.support_vectors_, fitted.dual_coef_[0]
    values = {"vectors": vectors, "weights": weights, "gamma": gamma, "offset": fitted.offset_[0]}
    return {name: np.asarray(value, np.float32) for name, value in values.items()}


def svm_decision(params: dict[str, Array], features: Float[Array, "b d"]) -> PerImage:
    """Returns Σ αᵢ k(x, xᵢ) − ρ, scikit-learn's `decision_function`: negative for outliers."""
    kernel = jnp.exp(-params["gamma"] * _squared_distances(features, params["vectors"]))
    return jnp.sum(params["weights"][None] * kernel, axis=1) - params["offset"]


def _squared_distances(x: Float[Array, "b d"], y: Float[Array, "m d"]) -> Float[Array, "b m"]:
    # The differences are formed first, because |x|² − 2xy + |y|² would cancel in float32.
    return jnp.sum(jnp.square(x[:, None] - y[None]), axis=-1)


def svm_map(
    params: dict[str, Array], x: Images, config: Config
) -> tuple[None, Float[Array, "b 1 1"]]:
    """Returns −log of the weighted mean of k(x, xᵢ), which falls as the decision value rises.

    The logarithm separates images so far from the support vectors that the mean would be 0 in
    float32.
    """
    features = svm_features(x, config.baseline.svm_side)
    exponents = -params["gamma"] * _squared_distances(features, params["vectors"])
    weights = (params["weights"] / jnp.sum(params["weights"]))[None]
    mean = jax.nn.logsumexp(exponents, axis=1, b=weights)
    # A mean of values up to 1 has no positive logarithm, except by rounding.
    return None, image_level_map(jnp.maximum(-mean, 0))


def svm_loss(
    params: dict[str, Array],
    batch: CorruptedBatch,
    keys: Array,
    config: Config,
    step: Any,
    *,
    hyperparameters: Hyperparameters | None = None,
) -> tuple[PerImage, dict[str, Array]]:
    """Returns the slack max(0, −decision) of the clean images; 0 for inliers."""
    del keys, step, hyperparameters
    features = svm_features(batch.clean, config.baseline.svm_side)
    return jnp.maximum(-svm_decision(params, features), 0), {}


METHOD = Method(
    init=init_svm,
    loss=svm_loss,
    anomaly_map=svm_map,
    fit=fit_svm,
    localises=False,
    closed_form=True,
    requires="sklearn",
)
