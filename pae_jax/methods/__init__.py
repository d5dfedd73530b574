"""The methods that can be trained and evaluated: the paper's method and the baselines.

All methods share the data pipeline, the training loop, validation, evaluation and the report. A
new method is one file that defines a `Method`, an entry of `METHODS`, and its name in
`config.METHODS`. No other module depends on which method runs.

Each baseline isolates one idea. Its recipe is in `configs/baselines.py`; the docstring of its
file says what is left out of the publication.
"""

import importlib.util

from data_pipelines.errors import BadInput
from pae_jax.config import Config
from pae_jax.methods import (
    deep_svdd,
    discrepancy,
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
    "discrepancy": discrepancy.METHOD,
    "inpainting": inpainting.METHOD,
    "segmentation": segmentation.METHOD,
    "deep_svdd": deep_svdd.METHOD,
    "pca": pca.METHOD,
    "one_class_svm": one_class_svm.METHOD,
}


def check(config: Config) -> None:
    """Raises an error if the method cannot be trained with this config or installation.

    Raises:
      BadInput: one line that names the key.
    """
    method = METHODS[config.method]
    if method.fixed_size and config.data.train_shape != config.data.shape:
        raise BadInput(f"data.crop_size: {config.method} needs whole images; set it to 0")
    # The package is located, not imported, because `fit` imports it when it is needed.
    if method.requires and importlib.util.find_spec(method.requires) is None:
        extra = "pip install 'pae_jax[baselines]'"
        raise BadInput(f"method: {config.method} needs the package {method.requires}: {extra}")


def steps(config: Config) -> int:
    """Returns the updates in the whole run: `train.steps`, or 0 for a method in closed form."""
    return 0 if METHODS[config.method].closed_form else config.train.steps
