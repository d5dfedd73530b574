"""One category of VisA in the paper's setting (§4), for example visa:pcb1.

The data set is prepared by data_pipelines/prepare.py, in $TFDS_DATA_DIR or
--config.data.root=TFDS.
The paper's corruption patterns: --config.data.textures=tfds:TFDS, or a folder with DTD.

visa:pcb1,best is the recipe of folder.py with the paper's network and size, for an accelerator.

The paper masks cluttered backgrounds of some categories by a further network: `pae foreground`,
then --config.data.foreground=F.
"""

from ml_collections import ConfigDict

from pae_jax.configs import common

# The rule in configs/mvtec.py. The photographs are wider than high and are resized to squares,
# so a rotation by less than a half turn would also stretch the parts.
OBJECTS = {
    "candle": "flips",  # round, seen from above
    "capsules": "flips",  # scattered
    "cashew": "flips",  # may lie on either side
    "chewinggum": "flips",  # symmetric
    "fryum": "flips",  # a symmetric wheel
    "macaroni1": "flips",  # elbows may lie on either side
    "macaroni2": "flips",  # the same, scattered
    "pcb1": "none",  # a mirrored board has its parts in the wrong places
    "pcb2": "none",
    "pcb3": "none",
    "pcb4": "none",
    "pipe_fryum": "flips",  # symmetric
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config of CATEGORY or CATEGORY,best; `pae train` also takes "all"."""
    return common.category_config("visa", arg, OBJECTS)


derive = common.derive


def members(arg: str) -> list[str] | None:
    """Returns the arguments that "all" stands for: every category, each in its own workdir."""
    return common.members(OBJECTS, arg)
