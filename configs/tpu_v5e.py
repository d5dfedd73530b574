"""One category of MVTec AD on a slice of TPU v5e, for example tpu_v5e:screw.

pae train --config=tpu_v5e:screw --workdir=W
pae compile --config=tpu_v5e --topology=v5e:2x2    # memory and time of the programs, without a TPU

The paper's setting (§4) in bfloat16: objects have 256² pixels and dilated kernels of 5, textures
512² pixels and kernels of 3. The batch is that of a 2×2
slice; on N chips use --config.train.batch_size=4·N.
"""

from ml_collections import ConfigDict

from pae_jax.configs import mvtec

CATEGORY = "hazelnut"  # the default: the object with the richest augmentation
SETTINGS = {
    "model.dtype": "bfloat16",
    "train.batch_size": 4 * 4,  # four images per chip on four chips
}
TEXTURE = {
    # Four images of 512² take three quarters of a chip's memory, so DTD does not fit beside them.
    "data.on_device": "no",
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the config of CATEGORY or CATEGORY,best."""
    category = arg or CATEGORY
    config = mvtec.get_config(category)
    config.update_from_flattened_dict(SETTINGS)
    if category.partition(",")[0] in mvtec.TEXTURES:
        config.update_from_flattened_dict(TEXTURE)
    return config


derive = mvtec.derive
