"""The shared part of the paper's benchmarks (§4); not a config file itself."""

import os
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from pae_jax.configs import default

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
    dataset: str, category: str | None, policies: Mapping[str, str], *, texture: bool
) -> ConfigDict:
    """Returns the config of one category, prepared as a TFDS dataset, at the paper's size.

    A config file that uses it also needs `derive`.

    Args:
      dataset: "mvtec_ad" or "visa".
      category: the argument after the colon on the command line.
      policies: the augmentation of every category.
      texture: a texture (512², kernel of 3) instead of an object (256², kernel of 5).
    """
    if category is None or category not in policies:
        name = f" {category!r}" if category else ""
        raise ValueError(f"{dataset}: no category{name} after the colon; {', '.join(policies)}")
    config = default.get_config()
    config.update_from_flattened_dict(TEXTURE if texture else OBJECT)
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
