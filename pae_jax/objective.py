"""The training objective: eq. 1 and the penalties of appendix A.3, from a registry.

A new penalty is one function under `@_penalty(NAME)` and one section NAME with a `weight` in
`config.ObjectiveConfig`. A penalty of weight 0 is not traced at all.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from pae_jax import anomaly_map, projection, rng
from pae_jax.config import (
    IdempotencyConfig,
    IdentityConfig,
    JacobianConfig,
    ObjectiveConfig,
    SsimConfig,
)
from pae_jax.corruption import CorruptedBatch


class Objective(NamedTuple):
    """Per image: the loss to average, f(x̂), and each term of the loss before its weight."""

    loss: Float[Array, " b"]
    reconstruction: Float[Array, "b h w c"]
    terms: dict[str, Float[Array, " b"]]


def objective(
    f: Callable,
    batch: CorruptedBatch,
    key: Key[Array, "*keys"],
    config: ObjectiveConfig,
    step: int | Int[Array, ""],
) -> Objective:
    """Eq. 1 plus the weighted penalties of `config`, per image.

    The noise form (`config.noise` = σ > 0) adds the same Gaussian noise σε to x̂ and to x in
    eq. 1, and nowhere else; neither sum is clipped to [0, 1]. For a plain squared error,
      E‖f(x̂+σε) − (x+σε)‖² = ‖f(x̂)−x‖² + σ²(‖J_f(x̂)−I‖²_F + (f(x̂)−x)·Δf(x̂)) + O(σ⁴),
    the squared Jacobian penalty for the price of the noise, with an extra term: Δf is the
    Laplacian of every output value over all input values. The extra term vanishes with the
    residual or where f is piecewise linear. Eq. 1 weights every value of the three norms by
    (1−λ)(1−M)²/‖1−M‖₁ + λM²/‖M‖₁.

    Args:
      f: images → images, a closure over its parameters.
      batch: x̂, x (batch, h, w, c) and M (batch, h, w, 1).
      key: of the noise and the probes: one, from which every image's is derived whatever the
        batch size, or one per image (batch,).
      config: λ, σ and the penalties with their weights.
      step: the training step, which may be traced; penalties may act at some steps only.

    Returns:
      `terms` holds "reconstruction" (eq. 1) and each penalty of non-zero weight by its name;
      loss = reconstruction + Σ weight·penalty.
    """
    corrupted, clean, mask = batch
    target = clean
    if _present(config.noise):
        draw = jax.vmap(lambda k: jax.random.normal(k, clean.shape[1:], clean.dtype))
        noise = config.noise * draw(rng.example_keys(rng.stream_key(key, "noise"), clean.shape[0]))
        corrupted, target = corrupted + noise, clean + noise

    evaluations = _Evaluations(f, {"corrupted": corrupted, "clean": clean})
    terms = {}
    for name, penalty in _PENALTIES.items():
        section = getattr(config, name)
        if _present(section.weight):
            terms[name] = penalty(evaluations, rng.stream_key(key, name), section, step)
    reconstruction = evaluations("corrupted")
    loss = reconstruction_loss(reconstruction, target, mask, weight=config.mask_weight)
    loss_and_penalties = sum((getattr(config, k).weight * v for k, v in terms.items()), start=loss)
    return Objective(loss_and_penalties, reconstruction, {"reconstruction": loss, **terms})


def without_penalties(config: ObjectiveConfig) -> ObjectiveConfig:
    """What compares f(x̂) with x, without noise and without what is asked of f as a function."""
    return ObjectiveConfig(mask_weight=config.mask_weight, ssim=config.ssim)


def reconstruction_loss(
    reconstruction: Float[Array, "b h w c"],
    target: Float[Array, "b h w c"],
    mask: Float[Array, "b h w 1"],
    *,
    weight: float | Float[Array, ""] = 0.5,
) -> Float[Array, " b"]:
    """Eq. 1 per image: (1−λ)/‖1−M‖₁·‖(1−M)⊙(f(x̂)−x)‖² + λ/‖M‖₁·‖M⊙(f(x̂)−x)‖².

    Args:
      reconstruction: f(x̂).
      target: x.
      mask: M in [0, 1], the same for all channels; ‖·‖₁ still sums over h·w·c.
      weight: λ in [0, 1], the share of the corrupted region.

    Returns:
      (batch,) losses. A term whose norm is 0 is 0, and so is its gradient.
    """
    residual = reconstruction - target

    def term(region: Float[Array, "b h w 1"]) -> Float[Array, " b"]:
        norm = residual.shape[-1] * jnp.sum(region, axis=(1, 2, 3))
        error = jnp.sum((region * residual) ** 2, axis=(1, 2, 3))
        return error / jnp.where(norm > 0, norm, 1)

    return (1 - weight) * term(1 - mask) + weight * term(mask)


def _present(weight: float | Float[Array, ""]) -> bool:
    """Whether a term is in the program; a traced weight belongs to a term that is."""
    return isinstance(weight, jax.Array) or weight != 0


class _Evaluations:
    """f at the named points of a batch, each computed once, by whoever asks first."""

    def __init__(self, f: Callable, points: dict[str, Array]):
        self.f = f
        self.points = points
        self.values: dict[str, Array] = {}

    def __call__(self, at: str) -> Float[Array, "b h w c"]:
        if at not in self.values:
            self.values[at] = self.f(self.points[at])
        return self.values[at]

    @property
    def size(self) -> int:
        """Values of one image, h·w·c."""
        return self.points["clean"][0].size


_PENALTIES: dict[str, Callable] = {}
"""By the names of their config sections. What differentiates f at a point comes first, since
the derivative brings the value along and the value does not bring the derivative."""


def _penalty(name: str) -> Callable[[Callable], Callable]:
    """Registers (evaluations, key, section of the config, step) → (batch,) under `name`."""

    def register(function: Callable) -> Callable:
        _PENALTIES[name] = function
        return function

    return register


@_penalty("jacobian")
def _jacobian(
    evaluations: _Evaluations,
    key: Key[Array, "*keys"],
    config: JacobianConfig,
    step: int | Int[Array, ""],
) -> Float[Array, " b"]:
    """‖J_f − I‖ at x̂ or x. With `every` = k it is k times the norm at the steps that k divides
    and 0 at the others, so that its mean over the steps does not depend on k."""
    evaluations.values[config.at], penalty = projection.jacobian_identity(
        evaluations.f,
        evaluations.points[config.at],
        key,
        probes=config.probes,
        form=config.form,
        distribution=config.distribution,
        normalize=config.normalize,
        active=None if config.every == 1 else jnp.asarray(step) % config.every == 0,
    )
    return config.every * penalty


@_penalty("idempotency")
def _idempotency(
    evaluations: _Evaluations,
    key: Key[Array, "*keys"],
    config: IdempotencyConfig,
    step: int | Int[Array, ""],
) -> Float[Array, " b"]:
    """‖f(f(x̂)) − f(x̂)‖² per value of the image, so that one weight serves all sizes."""
    del key, step
    fx = evaluations("corrupted")
    return projection.idempotency(evaluations.f, fx, gradient=config.gradient) / evaluations.size


@_penalty("identity")
def _identity(
    evaluations: _Evaluations,
    key: Key[Array, "*keys"],
    config: IdentityConfig,
    step: int | Int[Array, ""],
) -> Float[Array, " b"]:
    """‖f(x) − x‖² per value of the image."""
    del key, step, config
    fx = evaluations("clean")
    return projection.identity(fx, evaluations.points["clean"]) / evaluations.size


@_penalty("ssim")
def _ssim(
    evaluations: _Evaluations,
    key: Key[Array, "*keys"],
    config: SsimConfig,
    step: int | Int[Array, ""],
) -> Float[Array, " b"]:
    """Mean of 1 − SSIM(f(x̂), x), the loss of Bergmann et al. (arXiv 1807.02011, §3.2)."""
    del key, config, step
    fx, x = evaluations("corrupted"), evaluations.points["clean"]
    return jnp.mean(anomaly_map.structural_dissimilarity(fx, x), axis=(1, 2, 3))
