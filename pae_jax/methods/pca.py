"""Principal components: f is the orthogonal projection onto an affine space."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from pae_jax import image_ops
from pae_jax.config import Config
from pae_jax.methods.method import Images, Method, Stored
from pae_jax.methods.projection import projection_loss, projection_map

_EXACT = jax.lax.Precision.HIGHEST


def init_pca(config: Config, key: Key[Array, ""]) -> dict[str, Array]:
    """Empty: nothing varies about an image of zeros."""
    del key
    height, width = config.data.shape
    size = height * width * image_ops.CHANNELS
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
    copies = image_ops.CHANNELS // images.shape[-1]
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


METHOD = Method(
    init=init_pca,
    loss=projection_loss(bind_pca),
    anomaly_map=projection_map(bind_pca),
    reconstruct=bind_pca,
    fit=fit_pca,
    whole=True,
    closed_form=True,
)
