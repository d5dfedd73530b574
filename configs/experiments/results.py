"""The runs of RESULTS.md on two cores, for example configs/results.py:mvtec_screw

    pae train --config=configs/results.py:NAME --config.data.root=DIR \
        --config.data.textures=DTD --workdir=runs/NAME

Half an hour to an hour and a half each on two idle cores; what was decided on held-out images, and
how, stands in docs/recipe.md. On an accelerator the paper's size is configs/mvtec.py.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from pae_jax.configs import folder

# A quarter of the work a step and more places in a batch; the map by the rule of docs/recipe.md.
CROPS = {
    "data.crop_size": 128,
    "model.output": "sigmoid",
    "eval.anomaly_map": "mse",
    "eval.smoothing_fraction": 1 / 48,
}
CATEGORIES: dict[str, Mapping[str, Any]] = {
    # Lies as it fell; a mirrored thread is left-handed. Any other angle would resample the image
    # and cut off what it turns out of it.
    "mvtec_screw": CROPS
    | {
        "data.size": 256,
        "data.width": 256,
        "data.augmentation": "quarter_turns",
        "train.steps": 30_000,
    },
    # Each tile under up to six exposures.
    "magnetic_tile": CROPS
    | {"data.size": 192, "data.width": 192, "data.augmentation": "flips", "train.steps": 10_000},
    # Camera and part keep their places.
    "ball_screw": CROPS | {"data.size": 192, "data.width": 448, "train.steps": 10_000},
    # Needs no data.root. How bright a cell glows depends on the current and the exposure.
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
    """`arg`: one of CATEGORIES."""
    if arg not in CATEGORIES:
        raise ValueError(f"one of {', '.join(CATEGORIES)}, not {arg!r}")
    config = folder.get_config()
    config.update_from_flattened_dict(CATEGORIES[arg])
    config.train.validate_every = config.train.steps // 10
    config.train.checkpoint_every = 1_000
    return config
