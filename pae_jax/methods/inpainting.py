"""Inpainting (RIAD, Zavrtanik et al. 2021): every pixel is reconstructed without being seen."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pae_jax import anomaly_map, unet
from pae_jax.config import Config
from pae_jax.methods.method import Images, Method
from pae_jax.methods.projection import bind_network, init_network, projection_loss

SIDES = (2, 4, 8, 16)  # of RIAD's cells, in pixels
SETS = 3

SETS = 3


def inpainting_sets(shape: tuple[int, int], side: int) -> Bool[np.ndarray, "sets h w"]:
    """The image's square cells in disjoint sets of equal size (±1), always the same ones."""
    rows, columns = (-(-size // side) for size in shape)
    cells = np.random.default_rng(side).permutation(rows * columns) % SETS
    cells = cells.reshape(rows, columns).repeat(side, axis=0).repeat(side, axis=1)
    return cells[None, : shape[0], : shape[1]] == np.arange(SETS)[:, None, None]


def inpainting_map(params: Any, x: Images, config: Config) -> tuple[Images, Float[Array, "b h w"]]:
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
        maps.append(anomaly_map.MAPS[config.eval.anomaly_map](x, pictures[-1]))
    mean = jnp.mean(jnp.stack(maps), axis=0)
    return jnp.mean(jnp.stack(pictures), axis=0), anomaly_map.smooth_map(mean, config.eval)


# The network learns to fill in what `corruption.kind` blacks out; "riad" is meant. There is no
# `reconstruct`, because f at test time is twelve masked passes and no projection.
METHOD = Method(init=init_network, loss=projection_loss(bind_network), anomaly_map=inpainting_map)
