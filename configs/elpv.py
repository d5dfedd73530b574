"""ELPV, monocrystalline solar cells: the demo, trained in minutes on two cores."""

from ml_collections import ConfigDict

from pae_jax.configs import default


def get_config(arg: str | None = None) -> ConfigDict:
    """Takes no argument."""
    config = default.get_config(arg)
    config.data.source = "elpv"
    config.data.size = 64
    config.data.texture_size = 64
    # How bright a cell glows depends on the current and the exposure, which differ by module.
    config.data.augmentation = "flips+exposure"
    config.model.patch_size = (
        2  # blocks of 2 × 2 pixels: two thirds of the time at twice the widths
    )
    config.model.widths = (32, 64, 128)
    config.model.branch_width = 32
    config.model.dilation_rates = (1, 2)  # on a map of 4 × 4
    config.model.dilated_kernel_size = 3
    # Without a norm f keeps grey values sooner: less bias on held-out images at equal steps.
    config.model.norm = "none"
    # A small λ lowers it further, and corruptions wrong by their place help to rank images
    # (docs/recipe.md).
    config.objective.mask_weight = 0.05
    config.corruption.kind = "mixed"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.train.steps = 5_000
    config.train.log_every = 100
    config.train.panel_every = 1_500
    return config
