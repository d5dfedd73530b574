"""Any category in MVTec layout, by a recipe that two cores can train.

pae train --config=configs/folder.py --config.data.root=DIR --workdir=W

DIR holds train/good and, for evaluating, test/{good,DEFECT} with ground_truth/DEFECT or without.
Worth setting: --config.data.textures=DIR (images unlike yours; the paper takes DTD),
--config.data.size=128 (a quarter of the time), --config.data.augmentation=… (what your parts
may do in front of the camera; left out by default, since a flip may itself be a defect).
"""

from ml_collections import ConfigDict

from pae_jax.configs import default


def get_config(arg: str | None = None) -> ConfigDict:
    """Takes no argument; data.root must be set."""
    config = default.get_config(arg)
    config.data.source = "folder"
    config.data.size = 256
    # A small part of the paper's multiplications; the bottleneck, on a map of size/16, still
    # sees the whole image.
    config.model.patch_size = 2  # blocks of 2 × 2 pixels: a quarter of the positions
    config.model.widths = (24, 48, 96)
    config.model.branch_width = 32
    config.model.dilation_rates = (1, 2, 4)
    config.model.dilated_kernel_size = 3
    # What follows is what short trainings want; docs/recipe.md has the numbers. Without a norm and
    # from the identity on f keeps normal pixels soonest …
    config.model.norm = "none"
    config.model.output = "residual_logit"
    # … and a small λ leaves them alone: at .5 a pixel of the mask, of which there are few, weighs
    # many times as much as one outside.
    config.objective.mask_weight = 0.05
    # Foreign matter is not all that a defect may be.
    config.corruption.kind = "mixed"
    config.optimizer.learning_rate = 1e-3  # a short run wants large steps …
    config.optimizer.schedule = "cosine"  # … and an end without noise
    config.train.steps = 2_500
    return config
