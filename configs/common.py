"""The shared part of the paper's benchmarks (§4); not a config file itself."""

import os
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

from ml_collections import ConfigDict

from pae_jax.configs import default, folder

OBJECT = {
    "data.size": 256,
    # The bottleneck works at an eighth of the side. Dilations double until one tap reaches
    # half of its map; beyond that a convolution sees little else than padding.
    "model.dilation_rates": (1, 2, 4, 8),
    "model.dilated_kernel_size": 5,
}
TEXTURE = {
    "data.size": 512,
    "model.dilation_rates": (1, 2, 4, 8, 16, 32),
    "model.dilated_kernel_size": 3,
}


def category_config(
    dataset: str,
    arg: str | None,
    policies: Mapping[str, str],
    *,
    textures: Container[str] = (),
    aligned: Container[str] = (),
) -> ConfigDict:
    """Returns the config of one category, prepared as a TFDS dataset, at the paper's size.

    A config file that uses it also needs `derive`.

    Args:
      dataset: "mvtec_ad" or "visa".
      arg: the argument after the colon on the command line: CATEGORY for the paper's method, or
        CATEGORY,best for the recipe of folder.py.
      policies: the augmentation of every category.
      textures: categories of textures (512², kernel of 3); the others are objects (256², kernel
        of 5).
      aligned: categories whose objects lie in the same place in every image, which matters for
        the recipe alone.
    """
    category, comma, variant = (arg or "").partition(",")
    if category not in policies:
        name = f" {category!r}" if category else ""
        raise ValueError(f"{dataset}: no category{name} after the colon; {', '.join(policies)}")
    if variant != ("best" if comma else ""):
        raise ValueError(f"{dataset}: {category} or {category},best, not {arg}")
    config = default.get_config()
    config.update_from_flattened_dict(TEXTURE if category in textures else OBJECT)
    if variant == "best":
        config.update_from_flattened_dict(folder.RECIPE)
        if category in aligned:
            config.eval.calibration = "position"
    config.update_from_flattened_dict(
        {
            "data.source": "tfds",
            "data.root": os.environ.get("TFDS_DATA_DIR", str(Path.home() / "tensorflow_datasets")),
            "data.category": f"{dataset}/{category}",
            "data.augmentation": policies[category],
            "data.texture_size": None,
        }
    )
    return config


def derive(config: ConfigDict, arg: str | None = None) -> None:
    """Stores textures at the size of the images, so that patterns keep their resolution."""
    data = config.data
    if data.texture_size is None:
        data.texture_size = max(data.height, data.width)


def members(categories: Iterable[str], arg: str) -> list[str] | None:
    """Returns the arguments that "all" or "all,best" stands for; None for another argument."""
    name, comma, variant = arg.partition(",")
    return [f"{category}{comma}{variant}" for category in categories] if name == "all" else None
