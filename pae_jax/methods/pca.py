"""Principal component analysis: f is the orthogonal projection onto an affine subspace.

It is fitted in closed form to the images as they are stored, without augmentation.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from pae_jax import image_ops
from pae_jax.config import Config
from pae_jax.methods.method import Images, Method, StoredImages
from pae_jax.methods.projection import projection_loss, projection_map

# Accelerators otherwise round the factors of a product to fewer bits.
_EXACT = jax.lax.Precision.HIGHEST


def init_pca(config: Config, key: Key[Array, ""]) -> dict[str, Array]:
    """Returns parameters of the right shapes, all 0; `fit_pca` replaces them."""
    del key
    height, width = config.data.shape
    size = height * width * image_ops.CHANNELS
    return {
        "mean": jnp.zeros(size),
        "components": jnp.zeros((size, config.baseline.pca_components)),
    }


def fit_pca(
    params: dict[str, Array], images: StoredImages, config: Config
) -> dict[str, np.ndarray]:
    """Returns the mean and the leading principal directions of the training images.

    They follow from the eigenvectors of the Gram matrix (n, n) in float64, because an image has
    many more values than there are images. Directions beyond the rank of the images are 0.
    """
    del params
    n, count = len(images), config.baseline.pca_components
    rows = images.reshape(n, -1)
    mean = rows.mean(axis=0, dtype=np.float64)
    # Blocks of columns keep the float64 copies of the images small.
    columns = [slice(i, i + 8192) for i in range(0, rows.shape[1], 8192)]
    gram = np.zeros((n, n))
    for block in columns:
        centred = rows[:, block] - mean[block]
        gram += centred @ centred.T
    values, vectors = (a[..., ::-1][..., :count] for a in np.linalg.eigh(gram))
    # Smaller eigenvalues are rounding errors, from directions beyond the rank of the images.
    kept = values > 1e-12 * values[0]
    scaled = vectors[:, kept] / np.sqrt(values[kept])
    components = np.zeros((rows.shape[1], count))
    for block in columns:
        components[block, : kept.sum()] = (rows[:, block] - mean[block]).T @ scaled

    # The network's images repeat a grey channel three times. The directions are repeated
    # likewise and divided by √3, so that their length is 1 again.
    copies = image_ops.CHANNELS // images.shape[-1]
    return {
        "mean": np.repeat(mean / 255, copies).astype(np.float32),
        "components": np.repeat(components / np.sqrt(copies), copies, axis=0).astype(np.float32),
    }


def bind_pca(params: dict[str, Array], config: Config) -> Callable[[Images], Images]:
    """Returns f(x) = mean + VVᵀ(x − mean), clipped to [0, 1]."""
    del config

    def f(x: Images) -> Images:
        mean, components = params["mean"][None], params["components"]
        scores = jnp.matmul(x.reshape(x.shape[0], -1) - mean, components, precision=_EXACT)
        values = mean + jnp.matmul(scores, components.T, precision=_EXACT)
        return jnp.clip(values, 0, 1).reshape(x.shape)

    return f


METHOD = Method(
    init=init_pca,
    loss=projection_loss(bind_pca),
    anomaly_map=projection_map(bind_pca),
    reconstruct=bind_pca,
    fit=fit_pca,
    fixed_size=True,
    closed_form=True,
)
