"""Corruption x̂ = M⊙y + (1−M)⊙x (§2.1, eq. 13): masks, opacity, textures."""

from typing import NamedTuple

from jaxtyping import Array, Float


class CorruptedBatch(NamedTuple):
    """x̂, x and M of one batch, float32 in [0, 1]."""

    corrupted: Float[Array, "b h w c"]
    clean: Float[Array, "b h w c"]
    mask: Float[Array, "b h w 1"]
