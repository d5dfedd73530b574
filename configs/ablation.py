"""A sweep that compares the penalties of appendix A.3, for example ablation:smoke.

pae sweep --config=ablation --workdir=W

The argument is one of
    elpv    the default: the demo's network and data, three seeds
    brief   five of the variants, a sixth of the steps (docs/ablation.md)
    directions   the same steps: the Jacobian by random, tangent and normal directions
    tile    a folder in MVTec layout: add --config.data.root=DIR
    smoke   a few short runs on ELPV, to check that it works
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
FEW = ("none", "jacobian", "noise", "idempotency")
# Argument → names of the variants that it trains.
SELECTIONS = {
    "elpv": tuple(VARIANTS),
    "brief": (*FEW, "jacobian x10"),
    "directions": (
        "none",
        "jacobian x10",
        "jacobian tangent",
        "jacobian normal",
        "jacobian both",
    ),
    "tile": tuple(VARIANTS),
    "smoke": FEW,
}
COMMON = {
    # The paper's corruption and equal regions, because the penalties' weights are meant for them.
    "corruption.kind": "texture",
    "objective.mask_weight": 0.5,
    "train.tensorboard": False,
}
CHANGES: dict[str, dict[str, Any]] = {
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
    config = folder.get_config() if arg == "tile" else elpv.get_config()
    config.update_from_flattened_dict(COMMON | CHANGES.get(arg, {}))
    return config


def sweep(add: Callable[..., None], arg: str | None = None) -> None:
    """Calls add(variant, seed, changes) for every run; changes map dotted keys to values."""
    for seed in (0,) if arg == "smoke" else (0, 1, 2):
        for name in SELECTIONS[arg or "elpv"]:
            add(name, seed, {"train.seed": seed, **VARIANTS[name]})
