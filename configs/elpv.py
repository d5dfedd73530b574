"""ELPV, monocrystalline solar cells: the demo, trained in minutes on two cores."""

from ml_collections import ConfigDict

from configs import default


def get_config(arg: str | None = None) -> ConfigDict:
    """Takes no argument."""
    config = default.get_config(arg)
    config.data.source = "elpv"
    config.data.size = 64
    config.data.texture_size = 64
    config.data.augmentation = "flips"
    config.model.widths = (16, 32, 64)
    config.model.branch_width = 32
    config.model.rates = (1, 2, 4)
    config.model.kernel = 3
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.train.steps = 3_000
    config.train.log_every = 100
    config.train.panel_every = 1_500
    return config
