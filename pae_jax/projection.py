"""Projections: the penalties of appendix A.3, and the application of f to test images.

Every function takes any f: images → images of the same shape that treats the images of a batch
independently. A result for one image therefore never depends on the other images of its batch.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from pae_jax import image_ops, rng
from pae_jax.config import EvalConfig
from pae_jax.fixed_point import FixedPoint, fixed_point, iterate

# The fixed point is exported here too, so that callers find every application of f in one module.
__all__ = [
    "FixedPoint",
    "fixed_point",
    "idempotency",
    "identity",
    "iterate",
    "jacobian_along",
    "jacobian_identity",
    "project",
    "tangent_projection",
]

_DISTRIBUTIONS = {"rademacher": jax.random.rademacher, "gaussian": jax.random.normal}


def project(
    f: Callable, x: Float[Array, "b *image"], config: EvalConfig
) -> Float[Array, "b *image"]:
    """Returns the images that x is compared with in the anomaly map, as `config.apply` says.

    "once" is f(x), "iterate" is fⁿ(x) with n = `config.iterations`, "fixed_point" is the fixed
    point of f from x (§3.2), with the solver, tolerance and step limit of the config, and
    "tangent" is `tangent_projection`.
    """
    if config.apply == "once":
        return f(x)
    if config.apply == "tangent":
        return tangent_projection(f, x)
    if config.apply == "iterate":
        return iterate(f, x, config.iterations)
    return fixed_point(
        f,
        x,
        tolerance=config.fixed_point_tolerance,
        max_steps=config.max_steps,
        solver=config.solver,
    ).value


def tangent_projection(f: Callable, x: Float[Array, "b *image"]) -> Float[Array, "b *image"]:
    """Returns f(x) + J_f(f(x))·(x − f(x)), the projection of x to the tangent space at f(x).

    For an exact projection f the Jacobian on the manifold projects to the tangent space. What f
    takes for normal variation in the residual x − f(x) is thus added to f(x), and the rest of the
    residual is what f removes. One `jax.jvp` computes it.
    """
    fx = f(x)
    _, tangent = jax.jvp(f, (fx,), (x - fx,))
    return fx + tangent


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
    """Returns f(x) and an estimate of ‖J_f(x) − I‖_F per image, in forward mode (A.3).

    For a probe v with E[vvᵀ] = I, E‖(J−I)v‖² = ‖J−I‖²_F. The images of a batch are independent,
    so one Jacobian-vector product with a batch of probes holds the product of every image. f(x)
    is the primal output of that product; as the reconstruction it costs nothing more.

    Args:
      f: images → images; smooth almost everywhere.
      x: (batch, …) images.
      key: one key, from which the probes of each image are derived independently of the batch
        size; or keys (batch,), one per image.
      probes: the number of probes. One is a plain `jax.jvp`; several share one linearisation.
      form: "squared" returns the mean of ‖(J−I)v‖² over the probes, an unbiased estimate of
        ‖J−I‖²_F; "frobenius" returns its root, the paper's unsquared norm, which for few probes
        is a little too small on average (Jensen). The root's gradient at 0 is taken as 0.
      distribution: the distribution of the entries of v, "rademacher" (the smaller variance) or
        "gaussian".
      normalize: divides the norm by √d (the square by d), d = the number of values of an image,
        so that one weight serves all image sizes.
      active: a traced condition; where it is False the probes are skipped and the penalty is 0.
        f(x) is computed either way. None means always active.

    Returns:
      f(x), with the shape of x, and the penalty (batch,) ≥ 0.
    """
    _check_form(form)
    if distribution not in _DISTRIBUTIONS:
        raise ValueError(f"distribution: rademacher or gaussian, not {distribution!r}")

    def draw(image_key: Key[Array, ""]) -> Float[Array, "probes *image"]:
        return _DISTRIBUTIONS[distribution](image_key, (probes, *x.shape[1:]), x.dtype)

    # Drawn per image, so that probes do not depend on the batch size. The axis of the probes then
    # comes first, because f maps a batch.
    tangents = jnp.moveaxis(jax.vmap(draw)(rng.example_keys(key, x.shape[0])), 1, 0)

    def penalty(products: Float[Array, "probes b *image"]) -> Float[Array, " b"]:
        squared = jnp.mean(jax.vmap(_squared_norm)(products - tangents), axis=0)
        squared = squared / x[0].size if normalize else squared
        return squared if form == "squared" else _safe_sqrt(squared)

    return _value_and_penalty(f, x, tangents, penalty, active)


def jacobian_along(
    f: Callable,
    x: Float[Array, "b *image"],
    *,
    tangents: Float[Array, "b *image"] | None = None,
    normals: Float[Array, "b *image"] | None = None,
    form: str = "frobenius",
    normalize: bool = True,
    active: Bool[Array, ""] | None = None,
) -> tuple[Float[Array, "b *image"], Float[Array, " b"]]:
    """Returns f(x) and how far J_f(x) is from a projection along given directions, per image.

    The Jacobian of a projection keeps tangents of ℳ and removes normals: ‖J t − t‖² + ‖J n‖² is 0
    for unit vectors t and n. `jacobian_identity` is smallest for the identity instead, because
    nearly all of its random directions are normal. One Jacobian-vector product per direction
    computes it, and f(x) comes with it.

    Args:
      f: images → images; smooth almost everywhere.
      x: (batch, …) images.
      tangents: (batch, …) directions t that J should keep, of any length; None leaves out their
        term, and so does a direction 0 for its image.
      normals: the same of directions n that J should remove. One of the two must be given.
      form: "squared" returns the sum of the terms, "frobenius" its root, whose gradient at 0 is
        taken as 0.
      normalize: takes t and n as unit vectors; False gives them the norm √d of a random probe, d =
        the number of values of an image, as in `jacobian_identity`.
      active: as in `jacobian_identity`.

    Returns:
      f(x), with the shape of x, and the penalty (batch,) ≥ 0.
    """
    _check_form(form)
    if tangents is None and normals is None:
        raise ValueError("tangents or normals, one of them at least")
    kept = [] if tangents is None else [image_ops.unit(tangents)]
    removed = [] if normals is None else [image_ops.unit(normals)]
    targets = jnp.stack([*kept, *map(jnp.zeros_like, removed)])

    def penalty(products: Float[Array, "directions b *image"]) -> Float[Array, " b"]:
        squared = jnp.sum(jax.vmap(_squared_norm)(products - targets), axis=0)
        squared = squared if normalize else squared * x[0].size
        return squared if form == "squared" else _safe_sqrt(squared)

    directions = jnp.stack(kept + removed)
    if active is None:
        # Each direction differentiates f anew, because on a CPU a step with two products of one
        # linearisation took a quarter longer.
        values, products = zip(*(jax.jvp(f, (x,), (v,)) for v in directions), strict=True)
        return values[0], penalty(jnp.stack(products))
    return _value_and_penalty(f, x, directions, penalty, active)


def idempotency(
    f: Callable, fx: Float[Array, "b *image"], *, gradient: str = "both"
) -> Float[Array, " b"]:
    """Returns ‖f(f(x̂)) − f(x̂)‖² per image, the squared idempotency residual of eq. 19.

    Args:
      f: images → images; closes over its parameters.
      fx: (batch, …) f(x̂), as computed for the reconstruction.
      gradient: "both" differentiates through the two applications of f; "outer" treats f(x̂) as a
        constant and trains the second application to keep it; "inner" freezes the parameters
        of the second application, so that f(x̂) moves to where f already acts as the identity.
        The value is the same.

    Returns:
      (batch,) squared norms, not normalised: sums over all values of an image.
    """
    if gradient == "both":
        return _squared_norm(f(fx) - fx)
    if gradient == "outer":
        fx = jax.lax.stop_gradient(fx)
        return _squared_norm(f(fx) - fx)
    if gradient == "inner":
        # f closes over its parameters. `closure_convert` exposes them as arguments, so that
        # gradients through this application can be stopped.
        f_of_parameters, parameters = jax.closure_convert(f, fx)
        return _squared_norm(f_of_parameters(fx, *jax.lax.stop_gradient(parameters)) - fx)
    raise ValueError(f"gradient: both, outer or inner, not {gradient!r}")


def identity(fx: Float[Array, "b *image"], x: Float[Array, "b *image"]) -> Float[Array, " b"]:
    """Returns ‖f(x) − x‖² per image at normal images x: the squared bias on ℳ of eq. 19."""
    return _squared_norm(fx - x)


def _value_and_penalty(
    f: Callable,
    x: Float[Array, "b *image"],
    directions: Float[Array, "directions b *image"],
    penalty: Callable,
    active: Bool[Array, ""] | None,
) -> tuple[Float[Array, "b *image"], Float[Array, " b"]]:
    """Returns f(x) and `penalty` of the products J_f(x)·direction; 0 where it is not active."""
    if len(directions) == 1 and active is None:
        value, product = jax.jvp(f, (x,), (directions[0],))
        return value, penalty(product[None])
    # The linearisation separates f(x), which is always needed, from the products, which all
    # directions share and an inactive step skips.
    value, jvp = jax.linearize(f, x)
    if active is None:
        return value, penalty(jax.vmap(jvp)(directions))
    return value, jax.lax.cond(
        active,
        lambda: penalty(jax.vmap(jvp)(directions)),
        lambda: jnp.zeros(x.shape[0], x.dtype),
    )


def _check_form(form: str) -> None:
    if form not in ("frobenius", "squared"):
        raise ValueError(f"form: frobenius or squared, not {form!r}")


def _squared_norm(x: Float[Array, "b *image"]) -> Float[Array, " b"]:
    return jnp.sum(x.reshape(x.shape[0], -1) ** 2, axis=1)


def _safe_sqrt(x: Float[Array, " b"]) -> Float[Array, " b"]:
    """Returns √x with gradient 0 at 0."""
    # The inner `where` keeps the infinite slope of the root out of the backward pass, where
    # 0 · ∞ would be NaN.
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)
