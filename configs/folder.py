"""The recipe: a folder of images in MVTec layout, trained on two cores.

pae train --config=folder --config.data.root=DIR --config.data.textures=DTD --workdir=W

DIR holds train/good and, for the evaluation, test/{good,DEFECT} with ground_truth/DEFECT or
without. Textures are a folder of images unlike yours; the paper takes DTD. What you know of your
parts is set beside it:

    they may be turned or mirrored       data.augmentation=flips+quarter_turns, rotation, …
    the light varies                     … + exposure
    they lie in the same place always    eval.calibration=position; never: =all
    the images are grey                  model.grey=True
    the images are not square            data.height=192, data.width=448
    a surface or cell fills the frame    data.size=128, so that it is seen whole
    there are fewer than 40              data.holdout_fraction=0.2
    a quarter of the time is enough      train.steps=2500

No augmentation is the default, because a flip may itself be a defect. Whether parts lie in place is
found out from images that were held out. At its start the training prints a hint where the images
are grey or lose their shape, and the config does not say so.
"""

from ml_collections import ConfigDict

from pae_jax.configs import default

# A small part of the paper's multiplications; the bottleneck works on a map of size/16 and still
# sees the whole image.
TWO_CORES = {
    "data.source": "folder",
    "data.size": 256,
    "model.patch_size": 2,  # blocks of 2 × 2 pixels: a quarter of the positions
    "model.widths": (24, 48, 96),
    "model.branch_width": 32,
    "model.dilation_rates": (1, 2, 4),
    "model.dilated_kernel_size": 3,
    # A network without a norm preserves normal pixels soonest.
    "model.norm": "none",
    # A short training needs large steps, and small ones at its end to average out the noise.
    "optimizer.learning_rate": 1e-3,
    "optimizer.schedule": "cosine",
}
# Crops take a quarter of the work of a step and show more places in a batch.
CROPS = {"data.crop_size": 128}

# The one recipe for every category, chosen on four of them (docs/log/detection.md).
RECIPE = {
    # f projects; a second network g learns which of its changes were corruptions.
    "method": "discrepancy",
    # They calibrate the maps and choose the thresholds, for which neither f nor g may know them.
    "data.holdout_fraction": 0.08,
    # A defect need not be foreign matter.
    "corruption.kind": "varied",
    "corruption.mask": "shapes",
    "corruption.max_axis": 0.4,
    "corruption.placement": "edges",
    "corruption.clean_fraction": 0.5,
    # f has to paint what it sees. One that starts as the identity keeps small defects.
    "model.output": "sigmoid",
    "objective.mask_weight": 0.5,
    "optimizer.ema_decay": 0.999,
    # Maps that fail on different defects, on the common scale of normal images.
    "eval.anomaly_map": "ssim+ssim@2+logit@0.5",
    "eval.smoothing_fraction": 1 / 16,
    "eval.calibration": "auto",
    # Their mean over the flips and turns that data.augmentation names.
    "eval.symmetries": True,
    "eval.image_score": "topk",
}
STEPS = {
    "train.steps": 10_000,
    "train.validate_every": None,  # see derive
    "train.checkpoint_every": 1_000,
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config, in which `data.root` is still to be set; takes no argument."""
    config = default.get_config(arg)
    config.update_from_flattened_dict(TWO_CORES | CROPS | RECIPE | STEPS)
    return config


def derive(config: ConfigDict, arg: str | None = None) -> None:
    """Sets the interval between validations to a tenth of the training."""
    if config.train.validate_every is None:
        config.train.validate_every = max(config.train.steps // 10, 1)


# `baselines.py` and the questions of `experiments/recipe.py` start from f alone, as a small change
# of the identity, in a short training.
PROJECTION = {
    "model.output": "residual_logit",
    "objective.mask_weight": 0.05,
    "corruption.kind": "mixed",
    "train.steps": 2_500,
}


def projection() -> ConfigDict:
    """Returns the config of the projecting autoencoder alone on the same network."""
    config = default.get_config()
    config.update_from_flattened_dict(TWO_CORES | PROJECTION)
    return config
