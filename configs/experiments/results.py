"""The runs of RESULTS.md on two cores, for example experiments/results:mvtec_screw.

    pae train --config=experiments/results:NAME --config.data.root=DIR \
        --config.data.textures=DTD --workdir=runs/NAME

Each takes half an hour to an hour and a half on two idle cores. docs/log/recipe.md tells how the
settings were chosen on held-out images. For the paper's size on an accelerator use mvtec.py.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from pae_jax.configs import folder

# Crops take a quarter of the work of a step and show more places in a batch. The anomaly map
# follows the rule of docs/log/recipe.md.
CROPS = {
    "data.crop_size": 128,
    "model.output": "sigmoid",
    "eval.anomaly_map": "mse",
    "eval.smoothing_fraction": 1 / 48,
}
CATEGORIES: dict[str, Mapping[str, Any]] = {
    # The screw lies at any angle, and a mirrored thread is left-handed. Angles other than quarter
    # turns would resample the image and cut off its corners.
    "mvtec_screw": CROPS | {"data.augmentation": "quarter_turns", "train.steps": 30_000},
    # Each tile was photographed under up to six exposures.
    "magnetic_tile": CROPS
    | {"data.size": 192, "data.augmentation": "flips", "train.steps": 10_000},
    # Camera and part do not move.
    "ball_screw": CROPS | {"data.height": 192, "data.width": 448, "train.steps": 10_000},
    # Needs no data.root. The brightness of a cell depends on the current and the exposure.
    "elpv": {
        "data.source": "elpv",
        "data.size": 128,
        "data.augmentation": "flips+exposure",
        "model.output": "sigmoid",
        "eval.smoothing_fraction": 1 / 48,
        "eval.image_score": "topk",
        "train.steps": 10_000,
    },
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config of the category `arg`."""
    if arg not in CATEGORIES:
        raise ValueError(f"one of {', '.join(CATEGORIES)}, not {arg!r}")
    config = folder.get_config()
    config.update_from_flattened_dict(
        {**CATEGORIES[arg], "train.validate_every": None, "train.checkpoint_every": 1_000}
    )
    return config


def derive(config: ConfigDict, arg: str | None = None) -> None:
    """Sets the interval between validations to a tenth of the training."""
    if config.train.validate_every is None:
        config.train.validate_every = max(config.train.steps // 10, 1)
