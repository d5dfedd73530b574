"""The floor that every run is held against: PCA on the same training images, in closed form.

It takes seconds and no step of training. A run that does not exceed it was not worth its training.
The map is the squared residual, as in `configs/baselines.py`, without a calibration; smoothing,
scores and sizes are those of the run.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from pae_jax.config import Config, DataConfig
from pae_jax.methods import pca
from pae_jax.methods.method import StoredImages

METHOD = "pca"
# The time grows with the square of the number. A mean and a few directions need no more images.
MAX_IMAGES = 1_000


class Floor(NamedTuple):
    """A fitted floor.

    Attributes:
      config: with which `detection` applies it.
      params: its parameters.
      images: the number of training images that it was fitted to.
    """

    config: Config
    params: Any
    images: int


def fit(config: Config, images: StoredImages) -> Floor:
    """Returns PCA fitted to the training images of a run, to at most `MAX_IMAGES` of them.

    Args:
      config: the configuration of the run.
      images: its training images. If there are more, evenly spaced ones are taken.
    """
    simple = Config(
        method=METHOD,
        # Whole images, also if the run trained on crops.
        data=DataConfig(
            height=config.data.height,
            width=config.data.width,
            augmentation=config.data.augmentation,
        ),
        eval=dataclasses.replace(
            config.eval, anomaly_map="mse", apply="once", iterations=1, calibration="none"
        ),
        baseline=config.baseline,
    )
    if len(images) > MAX_IMAGES:
        images = images[np.linspace(0, len(images) - 1, MAX_IMAGES).round().astype(int)]
    # On the device once, and not with every batch.
    params = jax.device_put(pca.fit_pca({}, images, simple))
    return Floor(simple, params, len(images))
