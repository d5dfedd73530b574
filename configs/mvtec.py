"""One category of MVTec AD in the paper's setting (§4), for example mvtec:screw.

The data set is prepared by data_pipelines/prepare.py, in $TFDS_DATA_DIR or
--config.data.root=TFDS. The extracted archive works as well:
    --config.data.source=folder --config.data.root=EXTRACTED --config.data.category=screw
The paper's corruption patterns: --config.data.textures=tfds:TFDS, or a folder with DTD.

mvtec:screw,best is the recipe of folder.py with the paper's network and size, for an accelerator.
It was chosen on other data, with the screw as one of four categories (docs/log/detection.md).
"""

from ml_collections import ConfigDict

from pae_jax.configs import common

# The paper mentions rotations and flips per category and does not list them. The rule here: a
# transform is used if normal parts could be photographed in this way and no defect of the
# category consists in it.
TEXTURES = {
    "carpet": "flips+quarter_turns",  # no defect lies in the weave's direction
    "grid": "flips",  # diamonds are mirror-symmetric, but higher than wide
    "leather": "flips+quarter_turns",  # no direction; no free rotation, it would blur the grain
    "tile": "flips+quarter_turns",  # speckles without direction, blurred by free rotation
    "wood": "flips",  # the grain runs one way
}
OBJECTS = {
    "bottle": "rotation",  # round, seen from above
    "cable": "none",  # the order of the three cores is fixed: cable_swap
    "capsule": "none",  # print and halves lie one way round: faulty_imprint
    "hazelnut": "flips+rotation",  # lies at any angle and on any side
    "metal_nut": "rotation",  # lies at any angle, but its mirror image is the defect flip
    "pill": "none",  # the imprint lies one way round: faulty_imprint
    "screw": "rotation",  # lies at any angle; a mirrored thread is left-handed
    "toothbrush": "horizontal_flip",  # upright and symmetric
    "transistor": "none",  # stands on its legs in one place: misplaced
    "zipper": "none",  # upright; the rows of teeth are offset
}

# Objects that lie in the same place in every image.
ALIGNED = {"bottle", "capsule", "pill", "toothbrush", "transistor", "zipper"}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config of CATEGORY or CATEGORY,best; `pae train` also takes "all"."""
    policies = TEXTURES | OBJECTS
    return common.category_config("mvtec_ad", arg, policies, textures=TEXTURES, aligned=ALIGNED)


derive = common.derive


def members(arg: str) -> list[str] | None:
    """Returns the arguments that "all" stands for: every category, each in its own workdir."""
    return common.members(TEXTURES | OBJECTS, arg)
