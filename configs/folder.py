"""A folder of images in MVTec layout, with a recipe that trains on two cores.

pae train --config=folder --config.data.root=DIR --workdir=W

DIR holds train/good and, for the evaluation, test/{good,DEFECT} with ground_truth/DEFECT or
without. Keys that are worth setting: --config.data.textures=DIR (images unlike yours; the paper
takes DTD), --config.data.size=128 (a quarter of the time), --config.data.augmentation=… (the ways
in which your parts may be turned or lit; none by default, because a flip may itself be a defect).
"""

from ml_collections import ConfigDict

from pae_jax.configs import default

# docs/log/recipe.md has the measurements behind these settings.
SETTINGS = {
    "data.source": "folder",
    "data.size": 256,
    # A small part of the paper's multiplications; the bottleneck works on a map of size/16 and
    # still sees the whole image.
    "model.patch_size": 2,  # blocks of 2 × 2 pixels: a quarter of the positions
    "model.widths": (24, 48, 96),
    "model.branch_width": 32,
    "model.dilation_rates": (1, 2, 4),
    "model.dilated_kernel_size": 3,
    # A network without a norm that starts as the identity preserves normal pixels soonest, …
    "model.norm": "none",
    "model.output": "residual_logit",
    # … and a small λ keeps it so: with 0.5 a pixel of the mask weighs many times as much as one
    # outside, because a mask has few pixels.
    "objective.mask_weight": 0.05,
    # A defect need not be foreign matter.
    "corruption.kind": "mixed",
    # A short training needs large steps, and small ones at its end to average out the noise.
    "optimizer.learning_rate": 1e-3,
    "optimizer.schedule": "cosine",
    "train.steps": 2_500,
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config, in which `data.root` is still to be set; takes no argument."""
    config = default.get_config(arg)
    config.update_from_flattened_dict(SETTINGS)
    return config
