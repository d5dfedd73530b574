"""The runs of RESULTS.md on the categories with masks, for example configs/results.py:mvtec_screw

    pae train --config=configs/results.py:NAME --config.data.root=DIR \
        --config.data.textures=DTD --workdir=runs/NAME

Half an hour each on two idle cores; what was decided on held-out images, and how, stands in
docs/recipe.md. On an accelerator the paper's size is configs/mvtec.py.
"""

from ml_collections import ConfigDict

from configs import folder

# What differs between the categories: height, width, augmentation, the output of the network; the
# map and the share of the side that smooths it, by the rule of docs/recipe.md; steps.
CATEGORIES = {
    # Lies as it fell; a mirrored thread is left-handed. Any other angle would resample the image
    # and cut off what it turns out of it.
    "mvtec_screw": (256, 256, "quarter_turns", "sigmoid", "mse", 1 / 48, 30_000),
    # Each tile under up to six exposures.
    "magnetic_tile": (192, 192, "flips", "sigmoid", "mse", 1 / 48, 10_000),
    # Camera and part keep their places.
    "ball_screw": (192, 448, "none", "sigmoid", "mse", 1 / 48, 10_000),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: one of CATEGORIES."""
    if arg not in CATEGORIES:
        raise ValueError(f"one of {', '.join(CATEGORIES)}, not {arg!r}")
    config = folder.get_config()
    height, width, augmentation, output, kind, share, steps = CATEGORIES[arg]
    config.data.size, config.data.width = height, width
    config.data.augmentation = augmentation
    config.model.output = output
    config.eval.map, config.eval.smoothing_share = kind, share
    config.data.crop = 128  # a quarter of the work a step, and more places in a batch
    config.train.steps = steps
    config.train.validate_every = steps // 10
    config.train.checkpoint_every = 1_000
    return config
