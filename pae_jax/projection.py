"""Is f a projection? Jacobian-identity and idempotency (appendix A.3), fixed points (A.2).

Every function takes any f: images → images of the same shape that treats the images of a batch
independently. Per-image results therefore never depend on the batch mates.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from pae_jax import rng
from pae_jax.config import EvalConfig
from pae_jax.fixed_point import FixedPoint, fixed_point, iterate

__all__ = [
    "FixedPoint",
    "fixed_point",
    "idempotency",
    "identity",
    "iterate",
    "jacobian_identity",
    "project",
]

_DISTRIBUTIONS = {"rademacher": jax.random.rademacher, "gaussian": jax.random.normal}


def jacobian_identity(
    f: Callable,
    x: Float[Array, "b *image"],
    key: Key[Array, "*keys"],
    *,
    probes: int = 1,
    form: str = "frobenius",
    distribution: str = "rademacher",
    normalize: bool = False,
    active: Bool[Array, ""] | None = None,
) -> tuple[Float[Array, "b *image"], Float[Array, " b"]]:
    """f(x) and an estimate of ‖J_f(x) − I‖_F per image, from one forward-mode sweep (A.3).

    For a probe v with E[vvᵀ] = I, E‖(J−I)v‖² = ‖J−I‖²_F. The images of a batch are independent,
    so one Jacobian-vector product with a batch of probes holds every image's own product. f(x)
    is the primal of that sweep: use it as the reconstruction and it costs nothing more.

    Args:
      f: images → images; smooth almost everywhere.
      x: (batch, …) images.
      key: one, from which each image's probes are drawn whatever the batch size, or one per
        image (batch,).
      probes: the number of probes. One is a plain `jax.jvp`; several share one linearisation.
      form: "squared" returns the mean of ‖(J−I)v‖² over the probes, an unbiased estimate of
        ‖J−I‖²_F; "frobenius" returns its root, the paper's unsquared norm, which for few probes
        is a little too small on average (Jensen). The root's gradient at 0 is taken as 0.
      distribution: of the entries of v, "rademacher" (the smaller variance) or "gaussian".
      normalize: divides the norm by √d (the square by d), d = the values of one image, so that
        one weight serves all sizes.
      active: a traced condition; where it is False the probes are skipped and the penalty is 0.
        The primal is computed either way. None stands for always.

    Returns:
      f(x), with the shape of x, and the penalty (batch,) ≥ 0.
    """
    if form not in ("frobenius", "squared"):
        raise ValueError(f"form: frobenius or squared, not {form!r}")
    if distribution not in _DISTRIBUTIONS:
        raise ValueError(f"distribution: rademacher or gaussian, not {distribution!r}")

    def draw(image_key: Key[Array, ""]) -> Float[Array, "probes *image"]:
        return _DISTRIBUTIONS[distribution](image_key, (probes, *x.shape[1:]), x.dtype)

    tangents = jnp.moveaxis(jax.vmap(draw)(rng.example_keys(key, x.shape[0])), 1, 0)

    def penalty(products: Float[Array, "probes b *image"]) -> Float[Array, " b"]:
        squared = jnp.mean(jax.vmap(_squared_norm)(products - tangents), axis=0)
        squared = squared / _values(x) if normalize else squared
        return squared if form == "squared" else _safe_sqrt(squared)

    if probes == 1 and active is None:
        value, product = jax.jvp(f, (x,), (tangents[0],))
        return value, penalty(product[None])
    value, push = jax.linearize(f, x)
    if active is None:
        return value, penalty(jax.vmap(push)(tangents))
    return value, jax.lax.cond(
        active,
        lambda: penalty(jax.vmap(push)(tangents)),
        lambda: jnp.zeros(x.shape[0], x.dtype),
    )


def idempotency(
    f: Callable, fx: Float[Array, "b *image"], *, gradient: str = "both"
) -> Float[Array, " b"]:
    """‖f(f(x̂)) − f(x̂)‖² per image, the squared idempotency residual of eq. 19.

    Args:
      f: images → images, a closure over its parameters.
      fx: (batch, …) f(x̂), as computed for the reconstruction.
      gradient: "both" differentiates through the two applications of f; "outer" takes f(x̂) as a
        constant and trains the second application to keep it; "inner" freezes the parameters
        of the second application, so that f(x̂) moves to where f already acts as the identity.
        The value is the same.

    Returns:
      (batch,) the plain squared norm, a sum over all values of the image.
    """
    if gradient == "both":
        return _squared_norm(f(fx) - fx)
    if gradient == "outer":
        fx = jax.lax.stop_gradient(fx)
        return _squared_norm(f(fx) - fx)
    if gradient == "inner":
        # f's parameters are known to it alone: hoist what it closes over, and freeze that.
        hoisted, parameters = jax.closure_convert(f, fx)
        return _squared_norm(hoisted(fx, *jax.lax.stop_gradient(parameters)) - fx)
    raise ValueError(f"gradient: both, outer or inner, not {gradient!r}")


def identity(fx: Float[Array, "b *image"], x: Float[Array, "b *image"]) -> Float[Array, " b"]:
    """‖f(x) − x‖² per image at normal images x: the squared bias on ℳ of eq. 19."""
    return _squared_norm(fx - x)


def _values(x: Float[Array, "b *image"]) -> int:
    return x[0].size


def _squared_norm(x: Float[Array, "b *image"]) -> Float[Array, " b"]:
    return jnp.sum(x.reshape(x.shape[0], -1) ** 2, axis=1)


def _safe_sqrt(x: Float[Array, " b"]) -> Float[Array, " b"]:
    """√x with gradient 0 at 0."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def project(
    f: Callable, x: Float[Array, "b *image"], config: EvalConfig
) -> Float[Array, "b *image"]:
    """Returns what x is compared with in the anomaly map, as `config.apply` says.

    "once" is f(x), "iterate" is fⁿ(x) with n = `config.iterations`, "fixed_point" is the fixed
    point of f from x (§3.2), with the solver, tolerance and step limit of the config.
    """
    if config.apply == "once":
        return f(x)
    if config.apply == "iterate":
        return iterate(f, x, config.iterations)
    return fixed_point(
        f,
        x,
        tolerance=config.fixed_point_tolerance,
        max_steps=config.max_steps,
        solver=config.solver,
    ).value
