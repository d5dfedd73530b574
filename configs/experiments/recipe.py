"""Variants of the recipe by question, for example experiments/recipe:output.

    python experiments/recipe.py --config=experiments/recipe:output --workdir=W \
        --config.data.root=DIR --config.data.textures=DTD
"""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from pae_jax.configs import folder

# The settings with which the questions began; `folder.PROJECTION` holds the answers.
PLAIN = {
    "model.output": "sigmoid",
    "objective.mask_weight": 0.5,
    "corruption.kind": "texture",
}
RESIDUAL = PLAIN | {"model.output": "residual_logit"}
LIGHT = RESIDUAL | {"objective.mask_weight": 0.05}
MIXED = {"corruption.kind": "mixed"}
GROUP = {"model.norm": "group"}
ROTATION = {"data.augmentation": "rotation"}
TURNS = {"data.augmentation": "quarter_turns"}
ON_EDGES = {"corruption.placement": "edges"}
FAST = {"optimizer.learning_rate": 3e-3}

QUESTIONS: dict[str, dict[str, Mapping[str, Any]]] = {
    "output": {
        "sigmoid": PLAIN,
        "residual": RESIDUAL,
    },
    "rate": {
        "base": RESIDUAL,
        "group": RESIDUAL | GROUP,
        "fast": RESIDUAL | FAST,
        "group fast": RESIDUAL | GROUP | FAST,
        "crops": RESIDUAL | {"data.crop_size": 64, "train.batch_size": 32},
    },
    "weight": {
        "batch 4": RESIDUAL | {"train.batch_size": 4, "train.steps": 900},
        "weight 0.2": RESIDUAL | {"objective.mask_weight": 0.2},
        "weight 0.05": LIGHT,
    },
    "light": {
        "weight 0.05": LIGHT,
        "weight 0.01": RESIDUAL | {"objective.mask_weight": 0.01},
        "sigmoid, 0.05": LIGHT | {"model.output": "sigmoid"},
    },
    "kind": {
        "residual, 0.05": LIGHT | MIXED,
        "sigmoid, 0.5": PLAIN | MIXED,
        "sigmoid, 0.05": PLAIN | MIXED | {"objective.mask_weight": 0.05},
    },
    # For parts that lie at any angle; with --config.data.crop_size=128.
    "view": {
        "rotation": ROTATION,
        "rotation, placed": ROTATION | ON_EDGES,
        "rotation, placed, exposure": {"data.augmentation": "rotation+exposure"} | ON_EDGES,
        "turns": TURNS,
        "turns, placed": TURNS | ON_EDGES,
        "turns, whole images": TURNS | {"data.crop_size": 0, "train.batch_size": 2},
        "turns, sigmoid": TURNS | {"model.output": "sigmoid"},
    },
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns `folder.projection`; `arg` is one of QUESTIONS."""
    if arg not in QUESTIONS:
        raise ValueError(f"one of {', '.join(QUESTIONS)}, not {arg!r}")
    return folder.projection()


def sweep(add: Callable[[str, int, Mapping[str, Any]], None], arg: str | None = None) -> None:
    """Calls add(variant, 0, changes) for every variant of the question `arg`."""
    for variant, changes in QUESTIONS[arg or ""].items():
        add(variant, 0, changes)
