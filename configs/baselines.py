"""Other methods in the same frame: data, steps, batch, optimiser and evaluation of folder.py.

pae train --config=configs/baselines.py:draem --config.data.root=DIR --workdir=W
pae train --config=configs/baselines.py:all --config.data.root=DIR --workdir=W    # each in W/NAME
pae train --config=configs/baselines.py:draem,elpv --workdir=W                    # on elpv.py

ae_ssim       Bergmann et al. 2018: an autoencoder with a bottleneck, trained on SSIM
riad          Zavrtanik et al. 2021: cells blacked out and filled in, all of them at test time
cutpaste      the corruption of Li et al. 2021, undone by our network
draem         the corruption of Zavrtanik et al. 2021, undone by our network
pca           the affine space of the principal components: a projection, in closed form
one_class_svm Schölkopf et al. 2001, on shrunk images; image scores only
deep_svdd     Ruff et al. 2018; image scores only
segmentation  our network trained to find our corruptions, not to undo them

They isolate one idea each and are not the published systems: the network, the loss (eq. 1 where
nothing else is said) and the score are ours. What else differs stands below and at the functions
of pae_jax/baselines.py.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from pae_jax.configs import elpv, folder


def ae_ssim(config: ConfigDict) -> None:
    """No skips and a bottleneck of 2 × 2 × 32 = 128 numbers at the recipe's size (100 at 128²)."""
    poolings = (config.data.size // config.model.patch_size // 2).bit_length() - 1
    config.model.widths = (*(16, 24, 32, 48, 64)[1 - poolings :], 32)
    config.model.skip = "none"
    config.model.output = "sigmoid"  # nothing of the image goes around the bottleneck
    config.model.bottleneck_layers = 0
    config.model.dilation_rates = (1,)
    config.corruption.clean_fraction = 1.0
    config.objective.mask_weight = 1.0  # of M, which is 0: of the loss, the SSIM term is left
    config.objective.ssim.weight = 1.0
    config.eval.anomaly_map = "ssim"


def riad(config: ConfigDict) -> None:
    """One set of cells a step, for a third of its cost; SSIM, without the loss's MSGMS term."""
    config.method = "inpainting"
    config.corruption.kind = "riad"
    config.model.output = "sigmoid"  # what is blacked out is no start
    config.corruption.clean_fraction = 0.0
    config.objective.ssim.weight = 1.0
    config.eval.anomaly_map = "msgms"
    config.eval.smoothing = "mean"  # of 21 pixels at 256²
    config.eval.image_score = "max"
    config.eval.batch_size = 4  # an image is twelve


def cutpaste(config: ConfigDict) -> None:
    """Published: a classifier of the two, and a density of its features."""
    config.corruption.kind = "cutpaste"


def draem(config: ConfigDict) -> None:
    """Published: a second network segments the image and its reconstruction."""
    config.corruption.kind = "draem"
    config.corruption.clean_fraction = 0.5
    config.eval.image_score = "max"


def pca(config: ConfigDict) -> None:
    """On images as they are stored: it sees no augmentation."""
    config.method = "pca"
    config.eval.anomaly_map = "mse"


def one_class_svm(config: ConfigDict) -> None:
    """On images as they are stored: it sees no augmentation."""
    config.method = "one_class_svm"


def deep_svdd(config: ConfigDict) -> None:
    config.method = "deep_svdd"
    config.corruption.clean_fraction = 1.0


def segmentation(config: ConfigDict) -> None:
    config.method = "segmentation"


CHANGES: dict[str, Callable[[ConfigDict], None]] = {
    function.__name__: function
    for function in (ae_ssim, riad, cutpaste, draem, pca, one_class_svm, deep_svdd, segmentation)
}
RECIPES = {"folder": folder, "elpv": elpv}


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: NAME or NAME,RECIPE; `pae train` also takes "all" for NAME."""
    name, _, recipe = (arg or "").partition(",")
    if name not in CHANGES:
        raise ValueError(f"no baseline {name!r}; {', '.join(CHANGES)}")
    recipe = recipe or "folder"
    if recipe not in RECIPES:
        raise ValueError(f"no recipe {recipe!r}; {', '.join(RECIPES)}")
    config = RECIPES[recipe].get_config()
    CHANGES[name](config)
    return config


def members(arg: str) -> list[str] | None:
    """What "all" stands for: every method, in a workdir of its own."""
    name, comma, recipe = arg.partition(",")
    return [f"{one}{comma}{recipe}" for one in CHANGES] if name == "all" else None
