"""The penalties of appendix A.3 against each other: `pae sweep --config=configs/ablation.py[:arg]`.

`arg`: "elpv" (the default; the demo's network and data, three seeds), "brief" (the same, half of
the variants and a sixth of the steps: docs/ablation.md), "tile" (a folder in MVTec layout: add
--config.data.root=DIR) or "smoke" (a few short runs on ELPV, to see that it works).
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
}
SMOKE = ("none", "jacobian", "noise", "idempotency")
CHOSEN = {
    "elpv": tuple(VARIANTS),
    "brief": (*SMOKE, "jacobian x10"),
    "tile": tuple(VARIANTS),
    "smoke": SMOKE,
}


def get_config(arg: str | None = None) -> ConfigDict:
    """What all members share."""
    arg = arg or "elpv"
    if arg not in CHOSEN:
        raise ValueError(f"one of {', '.join(CHOSEN)}, not {arg!r}")
    config = folder.get_config() if arg == "tile" else elpv.get_config()
    # The paper's corruption and equal regions: the penalties' weights are meant for it.
    config.corruption.kind = "texture"
    config.objective.mask_weight = 0.5
    config.train.tensorboard = False
    if arg == "brief":
        config.train.steps = 800
    if arg == "smoke":
        config.data.size = 32
        config.data.texture_size = 32
        config.model.widths = (8, 16)
        config.model.branch_width = 8
        config.model.dilation_rates = (1, 2)
        config.train.steps = 60
        config.train.log_every = 10
        config.train.validate_every = 60
        config.train.checkpoint_every = 60
        config.train.validation_examples = 16
        config.eval.bootstrap_resamples = 0
        config.eval.max_steps = 10
    return config


def sweep(add: Callable[..., None], arg: str | None = None) -> None:
    """Calls add(variant, seed, changes) for every member: changes are dotted keys to values."""
    for seed in (0,) if arg == "smoke" else (0, 1, 2):
        for name in CHOSEN[arg or "elpv"]:
            add(name, seed, {"train.seed": seed, **VARIANTS[name]})
