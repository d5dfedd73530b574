"""Procedural images, no files and no extras: trains and evaluates in a minute on two cores."""

from ml_collections import ConfigDict

from pae_jax.configs import default


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: a pattern of data_pipelines/procedural.py; "weave" by default."""
    config = default.get_config()
    config.data.source = "procedural"
    config.data.category = arg or "weave"
    config.data.size = 64
    config.data.texture_size = 64
    config.data.augmentation = "flips"
    config.model.widths = (8, 16, 32)
    config.model.branch_width = 16
    config.model.dilation_rates = (1, 2)
    config.model.dilated_kernel_size = 3
    config.model.bottleneck_layers = 1
    config.model.norm = "none"
    config.optimizer.learning_rate = 2e-3  # a short run wants large steps
    config.optimizer.schedule = "cosine"
    config.train.steps = 150
    config.train.validate_every = 150
    config.train.checkpoint_every = 50
    config.train.panel_every = 150
    config.train.log_every = 20
    config.train.validation_examples = 16
    config.eval.max_steps = 20
    config.eval.bootstrap_resamples = 200
    return config
