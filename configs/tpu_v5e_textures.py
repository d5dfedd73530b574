"""The paper's textures (§4) on a slice of TPU v5e: 512², dilated kernel 3, bfloat16.

pae train --config=configs/tpu_v5e_textures.py:carpet --workdir=W
pae compile --config=configs/tpu_v5e_textures.py --topology=v5e:2x2 tells, without a TPU, what it
takes. The batch is that of a 2×2 slice; on N chips --config.train.batch_size=4·N.
"""

from ml_collections import ConfigDict

from data_pipelines.errors import BadInput
from pae_jax.configs import mvtec

PER_CHIP, CHIPS = 4, 4


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: one of MVTec AD's five textures; by default one with the richest augmentation."""
    category = arg or "carpet"
    if category not in mvtec.TEXTURES:
        raise BadInput(f"mvtec_ad: no texture {category!r}; {', '.join(mvtec.TEXTURES)}")
    config = mvtec.get_config(category)
    config.model.dtype = "bfloat16"
    # Four images of 512² take three quarters of a chip's memory: DTD has no place beside them.
    config.data.on_device = "no"
    config.train.batch_size = PER_CHIP * CHIPS
    return config
