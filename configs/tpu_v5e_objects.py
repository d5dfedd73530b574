"""The paper's objects (§4) on a slice of TPU v5e: 256², dilated kernel 5, bfloat16.

pae train --config=configs/tpu_v5e_objects.py:screw --workdir=W
pae compile --config=configs/tpu_v5e_objects.py --topology=v5e:2x2 tells, without a TPU, what it
takes. The batch is that of a 2×2 slice; on N chips --config.train.batch_size=4·N.
"""

from ml_collections import ConfigDict

from data_pipelines.errors import BadInput
from pae_jax.configs import mvtec

PER_CHIP, CHIPS = 4, 4


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: one of MVTec AD's ten objects; by default the one with the richest augmentation."""
    category = arg or "hazelnut"
    if category not in mvtec.OBJECTS:
        raise BadInput(f"mvtec_ad: no object {category!r}; {', '.join(mvtec.OBJECTS)}")
    config = mvtec.get_config(category)
    config.model.dtype = "bfloat16"
    config.train.batch_size = PER_CHIP * CHIPS
    return config
