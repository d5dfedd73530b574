"""A first check on procedural images: needs no files and takes a minute on two cores.

The argument is a pattern of data_pipelines/procedural.py, for example smoke:dots.
"""

from ml_collections import ConfigDict

from pae_jax.configs import default

SETTINGS = {
    "data.source": "procedural",
    "data.category": "weave",
    "data.size": 64,
    "data.texture_size": 64,
    "data.augmentation": "flips",
    "model.widths": (8, 16, 32),
    "model.branch_width": 16,
    "model.dilation_rates": (1, 2),
    "model.dilated_kernel_size": 3,
    "model.bottleneck_layers": 1,
    "model.norm": "none",
    # A short training needs large steps.
    "optimizer.learning_rate": 2e-3,
    "optimizer.schedule": "cosine",
    "train.steps": 150,
    "train.validate_every": 150,
    "train.checkpoint_every": 50,
    "train.panel_every": 150,
    "train.log_every": 20,
    "train.validation_examples": 16,
    "eval.max_steps": 20,
    "eval.bootstrap_resamples": 200,
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config for the pattern `arg`; "weave" by default."""
    config = default.get_config()
    config.update_from_flattened_dict(SETTINGS)
    if arg:
        config.data.category = arg
    return config
