"""A sweep that compares the penalties of appendix A.3, for example ablation:smoke.

pae sweep --config=ablation --workdir=W

The argument is one of
    elpv         the default: the demo's network and data, all steps, three seeds
    full         the same steps and seeds: every penalty at two weights (docs/ablation.md)
    brief        five of the variants of elpv, a sixth of the steps
    directions   the same steps: the Jacobian by random, tangent and normal directions
    tile         a folder in MVTec layout: add --config.data.root=DIR
    tile_full    the same folder: no penalty, and three of the penalties of full
    smoke        a few short runs on ELPV, to check that it works

Two weights and three seeds of a penalty can be trained as one program. An accelerator is faster
with --config.population.members_per_program=6.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from pae_jax.configs import elpv, folder

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "jacobian": {"objective.jacobian.weight": 0.01},
    "jacobian squared": {
        "objective.jacobian.weight": 0.01,
        "objective.jacobian.form": "squared",
    },
    "noise": {"objective.noise": 0.05},
    "idempotency": {"objective.idempotency.weight": 1.0},
    "idempotency outer": {
        "objective.idempotency.weight": 1.0,
        "objective.idempotency.gradient": "outer",
    },
    "idempotency inner": {
        "objective.idempotency.weight": 1.0,
        "objective.idempotency.gradient": "inner",
    },
    "identity": {"objective.identity.weight": 1.0},
    "jacobian + idempotency": {
        "objective.jacobian.weight": 0.01,
        "objective.idempotency.weight": 1.0,
    },
    "jacobian x10": {"objective.jacobian.weight": 0.1},
    **{
        f"jacobian {directions}": {
            "objective.jacobian.weight": 0.1,
            "objective.jacobian.directions": directions,
        }
        for directions in ("tangent", "normal", "both")
    },
}
# Each penalty at two weights, with names that say both.
WEIGHTED: dict[str, dict[str, Any]] = {
    "none": {},
    **{
        f"{directions} {weight}": {
            "objective.jacobian.weight": weight,
            "objective.jacobian.directions": directions,
        }
        for directions in ("random", "tangent", "normal", "both")
        for weight in (0.01, 0.1)
    },
    **{
        f"idempotency {gradient} {weight:g}": {
            "objective.idempotency.weight": weight,
            "objective.idempotency.gradient": gradient,
        }
        for gradient in ("both", "outer", "inner")
        for weight in (1.0, 10.0)
    },
    **{f"noise {sigma}": {"objective.noise": sigma} for sigma in (0.05, 0.1)},
}
FEW = ("none", "jacobian", "noise", "idempotency")


def _select(*names: str) -> dict[str, dict[str, Any]]:
    return {name: (VARIANTS | WEIGHTED)[name] for name in names}


# Argument → the variants that it trains.
SELECTIONS = {
    "elpv": VARIANTS,
    "full": WEIGHTED,
    "brief": _select(*FEW, "jacobian x10"),
    "directions": _select(
        "none", "jacobian x10", "jacobian tangent", "jacobian normal", "jacobian both"
    ),
    "tile": VARIANTS,
    "tile_full": _select("none", "random 0.01", "both 0.01", "idempotency both 1"),
    "smoke": _select(*FEW),
}
COMMON = {
    # The paper's corruption and equal regions, because the penalties' weights are meant for them.
    "corruption.kind": "texture",
    "objective.mask_weight": 0.5,
    # f may not start as the identity, which is the minimum of the penalty along random directions:
    # there it would stay.
    "model.output": "sigmoid",
    "train.tensorboard": False,
}
CHANGES: dict[str, dict[str, Any]] = {
    # The floor is the same for all variants of a seed, so that long sweeps leave it out.
    "full": {"eval.floor": False},
    "tile_full": {"eval.floor": False},
    "brief": {"train.steps": 800},
    "directions": {"train.steps": 800},
    "smoke": {
        "data.size": 32,
        "data.texture_size": 32,
        "model.widths": (8, 16),
        "model.branch_width": 8,
        "model.dilation_rates": (1, 2),
        "train.steps": 60,
        "train.log_every": 10,
        "train.validate_every": 60,
        "train.checkpoint_every": 60,
        "train.validation_examples": 16,
        "eval.bootstrap_resamples": 0,
        "eval.max_steps": 10,
    },
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the settings that all runs of the sweep share."""
    arg = arg or "elpv"
    if arg not in SELECTIONS:
        raise ValueError(f"one of {', '.join(SELECTIONS)}, not {arg!r}")
    config = folder.projection() if arg in ("tile", "tile_full") else elpv.get_config()
    config.update_from_flattened_dict(COMMON | CHANGES.get(arg, {}))
    return config


def sweep(add: Callable[..., None], arg: str | None = None) -> None:
    """Calls add(variant, seed, changes) for every run; changes map dotted keys to values."""
    for seed in (0,) if arg == "smoke" else (0, 1, 2):
        for name, changes in SELECTIONS[arg or "elpv"].items():
            add(name, seed, {"train.seed": seed, **changes})
