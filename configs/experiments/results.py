"""The recipe on the development categories, for example experiments/results:mvtec_screw.

    pae train --config=experiments/results:NAME --config.data.root=DIR \
        --config.data.textures=DTD --workdir=runs/NAME

The recipe is folder.py. A category adds facts that its owner knows, and nothing else. Each run
takes less than an hour on two idle cores. For the paper's size on an accelerator: mvtec:NAME,best.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from pae_jax.configs import folder

FACTS: dict[str, Mapping[str, Any]] = {
    # It lies at any angle, and a mirrored thread is left-handed. Angles other than quarter turns
    # would resample the image and cut off its corners.
    "mvtec_screw": {"data.augmentation": "quarter_turns", "model.grey": True},
    # The surface fills the frame, and a strip of another grind is told only beside the rest. It has
    # no up and down.
    "magnetic_tile": {"data.size": 128, "data.augmentation": "flips", "model.grey": True},
    # Camera and part do not move.
    "ball_screw": {"data.height": 192, "data.width": 448, "eval.calibration": "position"},
    # Needs no data.root. A cell fills the frame. Its brightness depends on current and exposure.
    "elpv": {
        "data.source": "elpv",
        "data.size": 128,
        "data.augmentation": "flips+exposure",
        "model.grey": True,
    },
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config of the category `arg`."""
    if arg not in FACTS:
        raise ValueError(f"one of {', '.join(FACTS)}, not {arg!r}")
    config = folder.get_config()
    config.update_from_flattened_dict(FACTS[arg])
    return config


derive = folder.derive
