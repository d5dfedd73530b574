"""Methods for comparison, for example baselines:draem or baselines:pca,elpv.

They share the data, steps, optimizer and evaluation of the projecting autoencoder alone:

pae train --config=baselines:draem --config.data.root=DIR --workdir=W    # folder.projection
pae train --config=baselines:all --config.data.root=DIR --workdir=W      # each in W/NAME
pae train --config=baselines:draem,elpv --workdir=W                      # elpv.py

ae_ssim       Bergmann et al. 2018: an autoencoder with a bottleneck, trained on SSIM
riad          Zavrtanik et al. 2021: cells are blacked out and filled in; all of them at test time
cutpaste      the corruption of Li et al. 2021, removed by our network
draem         Zavrtanik et al. 2021: its corruption, removed by our network, and a second network
              that finds it in the image and the reconstruction
pca           the affine space of the principal components: a projection in closed form
one_class_svm Schölkopf et al. 2001, on shrunk images; image scores only
deep_svdd     Ruff et al. 2018; image scores only
segmentation  our network, trained to segment our corruptions instead of removing them

Each isolates one idea and is not the published system: the network, the loss (eq. 1 unless stated
otherwise) and the score are ours. Further differences are listed below and in pae_jax/methods.
"""

from typing import Any

from ml_collections import ConfigDict

from pae_jax.configs import elpv, folder

CHANGES: dict[str, dict[str, Any]] = {
    "ae_ssim": {
        "model.widths": None,  # see derive
        # All information passes through the bottleneck.
        "model.skip": "none",
        "model.output": "sigmoid",
        "model.bottleneck_layers": 0,
        "model.dilation_rates": (1,),
        "corruption.clean_fraction": 1.0,
        # Without corruptions M is 0, so λ = 1 removes eq. 1 and leaves the SSIM term.
        "objective.mask_weight": 1.0,
        "objective.ssim.weight": 1.0,
        "eval.anomaly_map": "ssim",
    },
    # One set of cells a step, for a third of the cost; SSIM without the published MSGMS term.
    "riad": {
        "method": "inpainting",
        "corruption.kind": "riad",
        # A residual output would start from cells that are blacked out.
        "model.output": "sigmoid",
        "corruption.clean_fraction": 0.0,
        "objective.ssim.weight": 1.0,
        "eval.anomaly_map": "msgms",
        "eval.smoothing": "mean",  # 21 pixels at 256²
        "eval.image_score": "max",
        "eval.batch_size": 4,  # each image becomes twelve
    },
    # Published: a classifier of normal and corrupted images, and a density of its features.
    "cutpaste": {
        "corruption.kind": "cutpaste",
    },
    # Both networks are smaller. The second also sees the difference of image and reconstruction,
    # and its target follows the visible change.
    "draem": {
        "method": "discrepancy",
        "corruption.kind": "draem",
        "corruption.clean_fraction": 0.5,
        "objective.ssim.weight": 1.0,
        "eval.anomaly_map": "learned",
        "eval.smoothing": "mean",  # 21 pixels at 256²
        "eval.image_score": "max",
    },
    # Fitted to the stored images, without augmentation.
    "pca": {
        "method": "pca",
        "eval.anomaly_map": "mse",
    },
    # Fitted to the stored images, without augmentation.
    "one_class_svm": {
        "method": "one_class_svm",
    },
    "deep_svdd": {
        "method": "deep_svdd",
        "corruption.clean_fraction": 1.0,
    },
    "segmentation": {
        "method": "segmentation",
    },
}
RECIPES = {"folder": folder.projection, "elpv": elpv.get_config}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config of NAME or NAME,RECIPE; `pae train` also takes "all" for NAME."""
    name, _, recipe = (arg or "").partition(",")
    if name not in CHANGES:
        raise ValueError(f"no baseline {name!r}; {', '.join(CHANGES)}")
    recipe = recipe or "folder"
    if recipe not in RECIPES:
        raise ValueError(f"no recipe {recipe!r}; {', '.join(RECIPES)}")
    config = RECIPES[recipe]()
    config.update_from_flattened_dict(CHANGES[name])
    return config


def derive(config: ConfigDict, arg: str | None = None) -> None:
    """Sets the widths of ae_ssim so that its bottleneck has 2 × 2 × 32 = 128 values.

    The published bottleneck has 100 values for images of 128².
    """
    if config.model.widths is None:
        side = min(config.data.height, config.data.width) // config.model.patch_size
        poolings = (side // 2).bit_length() - 1  # until a side of two or three is left
        # One width for each pooling. Large images get more narrow stages at the fine end.
        widths = (16,) * poolings + (24, 32, 48, 64)
        config.model.widths = (*widths[5:], 32)


def members(arg: str) -> list[str] | None:
    """Returns the arguments that "all" stands for: every method, each in its own workdir."""
    name, comma, recipe = arg.partition(",")
    return [f"{method}{comma}{recipe}" for method in CHANGES] if name == "all" else None
