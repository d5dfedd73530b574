"""The methods that can be trained and evaluated: the paper's, and those to compare it with.

All share the data, the loop, validation, evaluation and the report. A new method is one file
that defines a `Method`, an entry of `METHODS`, and its name in `config.METHODS`. No other module
asks which method runs.

The methods to compare with isolate one idea each. Their recipes are in `configs/baselines.py`;
what was left out of a publication is said at its function.
"""

import importlib.util

from data_pipelines.errors import BadInput
from pae_jax.config import Config
from pae_jax.methods import (
    deep_svdd,
    inpainting,
    one_class_svm,
    pca,
    projection,
    segmentation,
)
from pae_jax.methods.method import Method

__all__ = ["METHODS", "Method", "check", "steps"]

METHODS: dict[str, Method] = {
    "projection": projection.METHOD,
    "inpainting": inpainting.METHOD,
    "segmentation": segmentation.METHOD,
    "deep_svdd": deep_svdd.METHOD,
    "pca": pca.METHOD,
    "one_class_svm": one_class_svm.METHOD,
}


def check(config: Config) -> None:
    """Refuses a method that cannot be trained with the rest of the config, or here.

    Raises:
      BadInput: one line that names the key.
    """
    method = METHODS[config.method]
    if method.whole and config.data.train_shape != config.data.shape:
        raise BadInput(f"data.crop_size: {config.method} needs whole images; set it to 0")
    if method.needs and importlib.util.find_spec(method.needs) is None:
        extra = "pip install 'pae_jax[baselines]'"
        raise BadInput(f"method: {config.method} needs the package {method.needs}: {extra}")


def steps(config: Config) -> int:
    """Returns the updates in the whole run: `train.steps`, or 0 for a method in closed form."""
    return 0 if METHODS[config.method].closed_form else config.train.steps
