"""VisA in the paper's setting (§4), one category: --config=configs/visa.py:pcb1

Prepared by data_pipelines/prepare.py, in $TFDS_DATA_DIR or --config.data.root=TFDS.
The paper's corruption patterns: --config.data.textures=tfds:TFDS, or a folder with DTD.

The paper masks cluttered backgrounds of some categories by a further network; not done here.
"""

from ml_collections import ConfigDict
from pae_jax.configs.common import category_config

# By the rule in configs/mvtec.py. The photographs are wider than high and are resized to
# squares, so whatever turns by less than a half would also stretch the parts.
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
    """`arg`: one of the twelve categories; `pae train` also takes "all"."""
    return category_config("visa", arg, OBJECTS, texture=False)


def members(arg: str) -> list[str] | None:
    """What "all" stands for: every category, in a workdir of its own."""
    return list(OBJECTS) if arg == "all" else None
