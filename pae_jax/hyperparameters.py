"""The scalar settings of a run that may differ between the members of one population."""

from typing import Any, NamedTuple

from pae_jax.config import Config


class Hyperparameters(NamedTuple):
    """Scalars that a training step reads.

    In a single run they are Python floats, so they are constants of the compiled program. In a
    population they are traced scalars, one value per member. Whether a term is part of the
    program is decided by the config alone: a weight that is 0 there removes its term.

    Attributes:
      mask_weight: λ of eq. 1.
      noise: σ of the noise that is added to input and target.
      ssim: the weight of the SSIM loss.
      jacobian: the weight of the Jacobian-identity penalty.
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


def from_config(config: Config) -> Hyperparameters:
    """Returns the values that the config holds."""
    objective = config.objective
    return Hyperparameters(
        mask_weight=objective.mask_weight,
        noise=objective.noise,
        ssim=objective.ssim.weight,
        jacobian=objective.jacobian.weight,
        idempotency=objective.idempotency.weight,
        identity=objective.identity.weight,
        learning_rate=config.optimizer.learning_rate,
    )
