"""The demo: ELPV, monocrystalline solar cells, in minutes on two cores."""

from ml_collections import ConfigDict

from pae_jax.configs import default

SETTINGS = {
    "data.source": "elpv",
    "data.size": 64,
    "data.texture_size": 64,
    # The brightness of a cell depends on the current and the exposure, which differ by module.
    "data.augmentation": "flips+exposure",
    # Blocks of 2 × 2 pixels take two thirds of the time at twice the widths.
    "model.patch_size": 2,
    "model.widths": (32, 64, 128),
    "model.branch_width": 32,
    "model.dilation_rates": (1, 2),  # the bottleneck's map is 4 × 4
    "model.dilated_kernel_size": 3,
    # Without a norm f learns grey values sooner: less bias on held-out images at equal steps.
    "model.norm": "none",
    # A small λ lowers the bias further, and corruptions by misplaced structure help to rank
    # images (docs/log/recipe.md).
    "objective.mask_weight": 0.05,
    "corruption.kind": "mixed",
    "optimizer.learning_rate": 1e-3,
    "optimizer.schedule": "cosine",
    "train.steps": 5_000,
    "train.log_every": 100,
    "train.panel_every": 1_500,
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config; takes no argument."""
    config = default.get_config(arg)
    config.update_from_flattened_dict(SETTINGS)
    return config
