"""From stored uint8 images to what the network sees."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

CHANNELS = 3  # f_θ: [0,1]^{h×w×3} → [0,1]^{h×w×3} (§2); grey images repeat their channel


def to_float(images: Shaped[Array, "b h w c"]) -> Float[Array, "b h w 3"]:
    """uint8 (b, h, w, 1 or 3) as float32 in [0, 1] with three channels."""
    x = images.astype(jnp.float32) / 255
    return jnp.broadcast_to(x, (*x.shape[:3], CHANNELS))


def to_grey(images: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Luma (ITU-R BT.601) in all three channels."""
    luma = images @ jnp.array([0.299, 0.587, 0.114], images.dtype)
    return jnp.broadcast_to(luma[..., None], images.shape)
