"""The runs of RESULTS.md on the categories with masks, for example configs/results.py:mvtec_screw

    pae train --config=configs/results.py:NAME --config.data.root=DIR \
        --config.data.textures=DTD --workdir=runs/NAME

About half an hour each on two cores; what was decided on held-out images, and how, stands in
docs/recipe.md. On an accelerator the paper's size is configs/mvtec.py.
"""

from ml_collections import ConfigDict

from configs import folder

# Height, width, augmentation: what else differs between the categories.
CATEGORIES = {
    "mvtec_screw": (256, 256, "rotation"),  # lies as it fell; a mirrored thread is left-handed
    "magnetic_tile": (192, 192, "flips+exposure"),  # each tile under up to six exposures
    "ball_screw": (192, 448, "exposure"),  # camera and part keep their places
}


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: one of CATEGORIES."""
    if arg not in CATEGORIES:
        raise ValueError(f"one of {', '.join(CATEGORIES)}, not {arg!r}")
    config = folder.get_config()
    config.data.size, config.data.width, config.data.augmentation = CATEGORIES[arg]
    config.corruption.kind = "structural"
    config.data.crop = 128  # a quarter of the work a step, and more places in a batch
    config.train.steps = 4_000
    config.train.validate_every = 1_000
    config.train.checkpoint_every = 1_000
    return config
