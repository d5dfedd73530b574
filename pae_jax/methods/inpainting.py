"""Inpainting (RIAD, Zavrtanik et al. 2021): every pixel is reconstructed without being seen.

The network learns to fill in square cells that are blacked out, `corruption.kind` = "riad". Two
parts of the publication are left out: a training step draws one set of cells instead of all, and
the loss has no MSGMS term.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pae_jax import anomaly_map, unet
from pae_jax.config import Config
from pae_jax.methods.method import Images, Method
from pae_jax.methods.projection import bind_network, init_network, projection_loss

CELL_SIDES = (2, 4, 8, 16)  # pixels, as published
SETS = 3


def inpainting_sets(shape: tuple[int, int], side: int) -> Bool[np.ndarray, "sets h w"]:
    """Returns disjoint sets of square cells that cover the image, equal in size up to one cell.

    The sets are the same at every call.
    """
    rows, columns = (-(-size // side) for size in shape)
    cells = np.random.default_rng(side).permutation(rows * columns) % SETS
    cells = cells.reshape(rows, columns).repeat(side, axis=0).repeat(side, axis=1)
    return cells[None, : shape[0], : shape[1]] == np.arange(SETS)[:, None, None]


def inpainting_map(params: Any, x: Images, config: Config) -> tuple[Images, Float[Array, "b h w"]]:
    """Returns the mean reconstruction and the mean anomaly map over the cell sizes.

    For each cell size, each set of cells is blacked out and filled in by the network. Sizes are
    left out if the image is less than two cells high or wide. The publication takes MSGMS maps, a
    mean filter and the maximum as image score.
    """
    f = unet.bind(config.model, params)
    shape = x.shape[1], x.shape[2]
    sides = [side for side in CELL_SIDES if 2 * side <= min(shape)] or CELL_SIDES[:1]
    reconstructions = []
    for side in sides:
        hidden = jnp.asarray(inpainting_sets(shape, side), x.dtype)[:, None, :, :, None]
        visible = (x[None] * (1 - hidden)).reshape(-1, *x.shape[1:])
        # An f may leave [0, 1] by a little, as in `projection_map`.
        filled = jnp.clip(f(visible), 0, 1).reshape(SETS, *x.shape)
        # The sets are disjoint and cover the image, so every pixel comes from the one pass in
        # which it was hidden.
        reconstructions.append(jnp.sum(hidden * filled, axis=0))

    def compare(name: str) -> Array:
        return jnp.mean(jnp.stack([anomaly_map.MAPS[name](x, r) for r in reconstructions]), axis=0)

    maps = anomaly_map.smoothed_maps(compare, config.eval)
    return jnp.mean(jnp.stack(reconstructions), axis=0), maps


# There is no `reconstruct`, because the reconstruction at test time takes up to twelve masked
# passes of the network and is not a projection.
METHOD = Method(init=init_network, loss=projection_loss(bind_network), anomaly_map=inpainting_map)
