"""The training objective: the reconstruction loss of eq. 1 plus the penalties of appendix A.3.

To add a penalty: a section with a `weight` in `config.ObjectiveConfig`, a field of the same name
in `Hyperparameters`, and an entry of `penalties` in `objective`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from pae_jax import anomaly_map, augmentation, projection, rng
from pae_jax.config import Config, JacobianConfig, ObjectiveConfig
from pae_jax.corruption import CorruptedBatch


class Hyperparameters(NamedTuple):
    """Scalars that a training step reads.

    In a single run they are Python floats, so they are constants of the compiled program. In a
    population they are traced scalars, one value per member. Whether a term is part of the
    program is decided by the config alone: a weight that is 0 there removes its term.

    Attributes:
      mask_weight: λ of eq. 1.
      noise: σ of the noise that is added to input and target.
      ssim: the weight of the SSIM loss.
      jacobian: the weight of the penalty on the Jacobian.
      idempotency: the weight of the idempotency penalty.
      identity: the weight of the identity penalty.
      learning_rate: the peak of the schedule.
    """

    mask_weight: Any
    noise: Any
    ssim: Any
    jacobian: Any
    idempotency: Any
    identity: Any
    learning_rate: Any

    @classmethod
    def from_config(cls, config: Config) -> "Hyperparameters":
        """Returns the values of a config."""
        objective = config.objective
        return cls(
            mask_weight=objective.mask_weight,
            noise=objective.noise,
            ssim=objective.ssim.weight,
            jacobian=objective.jacobian.weight,
            idempotency=objective.idempotency.weight,
            identity=objective.identity.weight,
            learning_rate=config.optimizer.learning_rate,
        )


class Objective(NamedTuple):
    """The objective of a batch, one value per image.

    Attributes:
      loss: the value to be averaged and minimised.
      reconstruction: f(x̂).
      terms: the terms of the loss by name, before they are weighted.
    """

    loss: Float[Array, " b"]
    reconstruction: Float[Array, "b h w c"]
    terms: dict[str, Float[Array, " b"]]


def objective(
    f: Callable,
    batch: CorruptedBatch,
    key: Key[Array, "*keys"],
    config: ObjectiveConfig,
    step: int | Int[Array, ""],
    *,
    weights: Hyperparameters | None = None,
) -> Objective:
    """Returns eq. 1 plus the weighted penalties, per image.

    The noise form (σ > 0) adds the same Gaussian noise σε to x̂ and to x in eq. 1, and nowhere
    else; neither sum is clipped to [0, 1]. For a plain squared error,
      E‖f(x̂+σε) − (x+σε)‖² = ‖f(x̂)−x‖² + σ²(‖J_f(x̂)−I‖²_F + (f(x̂)−x)·Δf(x̂)) + O(σ⁴).
    This is the squared Jacobian penalty, computed without a Jacobian, and an extra term: Δf is
    the Laplacian of every output value over all input values. The extra term vanishes with the
    residual or where f is piecewise linear. Eq. 1 weights every value of the three norms by
    (1−λ)(1−M)²/‖1−M‖₁ + λM²/‖M‖₁.

    Args:
      f: a function from images to images that closes over its parameters.
      batch: x̂, x (batch, h, w, c) and M (batch, h, w, 1).
      key: for the noise, the probes and the tangents. One key, from which a key per image is
        derived independently of the batch size; or keys (batch,), one per image.
      config: decides which terms are computed, and how. A term of weight 0 is not traced.
      step: the training step, which may be traced; the Jacobian penalty may skip steps.
      weights: λ, σ and the weights of the penalties, which may be traced. None takes those of
        the config.

    Returns:
      The objective. Its terms are "reconstruction" (eq. 1) and each penalty whose weight in the
      config is not 0; loss = reconstruction + Σ weight·penalty.
    """
    if weights is None:
        weights = Hyperparameters.from_config(Config(objective=config))
    corrupted, clean, mask = batch
    values = clean[0].size
    target = clean
    # The config decides, because `weights.noise` may be traced, and then Python cannot branch on
    # it. A key per image makes the noise independent of the batch size.
    if config.noise:
        draw = jax.vmap(lambda k: jax.random.normal(k, clean.shape[1:], clean.dtype))
        noise = weights.noise * draw(rng.example_keys(rng.stream_key(key, "noise"), len(clean)))
        corrupted, target = corrupted + noise, clean + noise

    # Order matters: the Jacobian penalty runs first, because `jvp` also returns f(x), which later
    # terms reuse.
    penalties = {}
    fx = f_clean = None
    if config.jacobian.weight:
        at_clean = config.jacobian.at == "clean"
        x = clean if at_clean else corrupted
        # The directions come from `batch`, because the noise belongs to eq. 1.
        value, penalties["jacobian"] = _jacobian(
            f, x, batch, key, config=config.jacobian, step=step
        )
        fx, f_clean = (None, value) if at_clean else (value, None)
    if fx is None:
        fx = f(corrupted)
    # Squared norms are divided by the number of values, so that one weight serves all image sizes.
    if config.idempotency.weight:
        residual = projection.idempotency(f, fx, gradient=config.idempotency.gradient)
        penalties["idempotency"] = residual / values
    if config.identity.weight:
        f_clean = f(clean) if f_clean is None else f_clean
        penalties["identity"] = projection.identity(f_clean, clean) / values
    if config.ssim.weight:
        # The mean of 1 − SSIM(f(x̂), x), the loss of Bergmann et al. (arXiv 1807.02011, §3.2).
        dissimilarity = anomaly_map.structural_dissimilarity(fx, clean)
        penalties["ssim"] = jnp.mean(dissimilarity, axis=(1, 2, 3))

    reconstruction = reconstruction_loss(fx, target, mask, weight=weights.mask_weight)
    loss = reconstruction
    for name, penalty in penalties.items():
        loss = loss + getattr(weights, name) * penalty
    return Objective(loss, fx, {"reconstruction": reconstruction, **penalties})


def without_penalties(config: ObjectiveConfig) -> ObjectiveConfig:
    """Returns the config with only the terms that compare f(x̂) with x, and without noise."""
    return ObjectiveConfig(mask_weight=config.mask_weight, ssim=config.ssim)


def reconstruction_loss(
    reconstruction: Float[Array, "b h w c"],
    target: Float[Array, "b h w c"],
    mask: Float[Array, "b h w 1"],
    *,
    weight: float | Float[Array, ""] = 0.5,
) -> Float[Array, " b"]:
    """Returns (1−λ)/‖1−M‖₁·‖(1−M)⊙(f(x̂)−x)‖² + λ/‖M‖₁·‖M⊙(f(x̂)−x)‖² per image (eq. 1).

    Args:
      reconstruction: f(x̂).
      target: x.
      mask: M in [0, 1], the same for all channels; ‖·‖₁ still sums over h·w·c.
      weight: λ in [0, 1], the weight of the corrupted region.

    Returns:
      (batch,) losses. A term whose norm is 0 is 0, and so is its gradient.
    """
    residual = reconstruction - target

    def term(region: Float[Array, "b h w 1"]) -> Float[Array, " b"]:
        norm = residual.shape[-1] * jnp.sum(region, axis=(1, 2, 3))
        error = jnp.sum((region * residual) ** 2, axis=(1, 2, 3))
        # If the norm is 0, so is the error, and any positive divisor gives 0 instead of 0/0.
        return error / jnp.where(norm > 0, norm, 1)

    return (1 - weight) * term(1 - mask) + weight * term(mask)


def _jacobian(
    f: Callable,
    x: Float[Array, "b h w c"],
    batch: CorruptedBatch,
    key: Key[Array, "*keys"],
    *,
    config: JacobianConfig,
    step: int | Int[Array, ""],
) -> tuple[Float[Array, "b h w c"], Float[Array, " b"]]:
    """Returns f(x) and ‖J_f(x) − I‖, or how far J_f(x) is from a projection along directions.

    With `every` = k the penalty is k times the norm at steps divisible by k and 0 at the others,
    so that its mean over the steps does not depend on k.
    """
    options: dict[str, Any] = {
        "form": config.form,
        "normalize": config.normalize,
        # None leaves the branch out of the program.
        "active": None if config.every == 1 else jnp.asarray(step) % config.every == 0,
    }
    if config.directions == "random":
        value, penalty = projection.jacobian_identity(
            f,
            x,
            rng.stream_key(key, "jacobian"),
            probes=config.probes,
            distribution=config.distribution,
            **options,
        )
    else:
        value, penalty = projection.jacobian_along(
            f,
            x,
            tangents=None if config.directions == "normal" else _tangents(batch.clean, key),
            # Eq. 14: y − x is mostly normal to ℳ. The mask scales it pixel by pixel.
            normals=None if config.directions == "tangent" else batch.corrupted - batch.clean,
            **options,
        )
    return value, config.every * penalty


def _tangents(clean: Float[Array, "b h w c"], key: Key[Array, "*keys"]) -> Float[Array, "b h w c"]:
    """Draws a direction along ℳ for each normal image: small motions of the camera.

    The difference to another image of the batch would depend on the other examples, and so on the
    number of devices; and to the nearest of a few images it is long and cuts through ℳ.
    """
    keys = rng.example_keys(rng.stream_key(key, "tangents"), len(clean))
    return jax.vmap(augmentation.motion)(keys, clean)
