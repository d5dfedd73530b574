"""What the configurations of the paper's benchmarks share (§4); not a configuration itself."""

import os
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from data_pipelines.errors import BadInput
from pae_jax.configs import default


def category_config(
    dataset: str, category: str | None, policies: Mapping[str, str], *, texture: bool
) -> ConfigDict:
    """One category, prepared as a TFDS dataset, at the paper's size.

    Args:
      dataset: "mvtec_ad" or "visa".
      category: what stood after the colon on the command line.
      policies: the augmentation of every category.
      texture: 512² and a kernel of 3, otherwise an object: 256² and a kernel of 5.
    """
    if category is None or category not in policies:
        name = f" {category!r}" if category else ""
        raise BadInput(f"{dataset}: no category{name} after the colon; {', '.join(policies)}")
    config = default.get_config()
    config.data.source = "tfds"
    config.data.root = os.environ.get("TFDS_DATA_DIR", str(Path.home() / "tensorflow_datasets"))
    config.data.category = f"{dataset}/{category}"
    config.data.augmentation = policies[category]
    config.data.size = config.data.texture_size = 512 if texture else 256
    # The bottleneck works at an eighth of the side. Dilations double until one tap reaches
    # half of its map; beyond that a convolution sees little else than padding.
    config.model.dilation_rates = (1, 2, 4, 8, 16, 32) if texture else (1, 2, 4, 8)
    config.model.dilated_kernel_size = 3 if texture else 5
    return config
