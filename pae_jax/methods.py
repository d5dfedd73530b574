"""The methods that can be trained and evaluated: the paper's, and those to compare it with.

All share the data, the loop, validation, evaluation and the report. A new one is a `Method`
here and its name in `config.METHODS`; nothing else asks which method runs.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from data_pipelines.errors import BadInput
from pae_jax import baselines, objective, preprocess, unet
from pae_jax.config import Config
from pae_jax.corruption import CorruptedBatch
from pae_jax.detection import localise


class Method(NamedTuple):
    """What distinguishes a method; all but `fit` are pure and traced.

    Attributes:
      init: (config, key) → parameters; their shapes depend on the config alone.
      loss: (params, examples, keys (b,), config, step) → the value to be averaged, (b,), and its
        terms by name, (b,) each.
      localise: (params, images (b, h, w, 3) in [0, 1], config) → a reconstruction of the images,
        or None, and maps (b, h, w) in [0, 1], or (b, 1, 1) with one value for the whole image.
      reconstruct: (params, config) → f, if there is a function from images to images that may
        be judged as a projection; else None, and there are no diagnostics.
      fit: (params, stored images (n, h, w, c), config) → parameters, on the host, once before
        the first step; None where nothing is taken from the images in this way.
      pixels: whether the maps tell pixels apart; pixel metrics are undefined otherwise.
      whole: whether training and test images must have one size.
      closed_form: whether `fit` is all of the training, so that no step is taken.
      needs: a package of the extra "baselines" without which there is no `fit`.
    """

    init: Callable[[Config, Array], Any]
    loss: Callable[..., tuple[Array, dict[str, Array]]]
    localise: Callable[[Any, Array, Config], tuple[Array | None, Array]]
    reconstruct: Callable[[Any, Config], Callable[[Array], Array]] | None = None
    fit: Callable[[Any, Any, Config], Any] | None = None
    pixels: bool = True
    whole: bool = False
    closed_form: bool = False
    needs: str = ""


def check(config: Config) -> None:
    """`BadInput` where the method cannot be trained with the rest of the config, or here."""
    method = METHODS[config.method]
    if method.whole and config.data.train_shape != config.data.shape:
        raise BadInput(f"data.crop: {config.method} needs whole images; set it to 0")
    if method.needs and importlib.util.find_spec(method.needs) is None:
        extra = "pip install 'pae_jax[baselines]'"
        raise BadInput(f"method: {config.method} needs the package {method.needs}: {extra}")


def steps(config: Config) -> int:
    """Updates in the whole run: `train.steps`, or none for a method in closed form."""
    return 0 if METHODS[config.method].closed_form else config.train.steps


def _init_network(config: Config, key: Key[Array, ""]) -> Any:
    example = jnp.zeros((1, *config.data.train_shape, preprocess.CHANNELS))
    return unet.backbone(config.model).init(key, example)


def _bind_network(params: Any, config: Config) -> Callable[[Array], Array]:
    return unet.bind(config.model, params)


def _reconstructing(
    reconstruct: Callable[[Any, Config], Callable[[Array], Array]], **options: Any
) -> Method:
    """A method that learns f by eq. 1 and judges images by Δ(x̂, f(x̂))."""

    def loss(
        params: Any, batch: CorruptedBatch, keys: Array, config: Config, step: Any
    ) -> tuple[Float[Array, " b"], dict[str, Array]]:
        f = reconstruct(params, config)
        value = objective.objective(f, batch, keys, config.objective, step)
        return value.loss, value.terms

    def judge(params: Any, x: Array, config: Config) -> tuple[Array, Array]:
        return localise(reconstruct(params, config), x, config.eval)

    return Method(loss=loss, localise=judge, reconstruct=reconstruct, **options)


_PROJECTION = _reconstructing(_bind_network, init=_init_network)

METHODS: dict[str, Method] = {
    "projection": _PROJECTION,
    # What it learns to fill in is `corruption.kind`'s; "riad" is meant.
    "inpainting": _PROJECTION._replace(localise=baselines.localise_inpainting, reconstruct=None),
    "segmentation": Method(
        init=_init_network,
        loss=baselines.segmentation_loss,
        localise=baselines.localise_segmentation,
    ),
    "deep_svdd": Method(
        init=baselines.init_svdd,
        fit=baselines.fit_svdd,
        loss=baselines.svdd_loss,
        localise=baselines.localise_svdd,
        pixels=False,
        whole=True,
    ),
    "pca": _reconstructing(
        baselines.bind_pca,
        init=baselines.init_pca,
        fit=baselines.fit_pca,
        whole=True,
        closed_form=True,
    ),
    "one_class_svm": Method(
        init=baselines.init_svm,
        fit=baselines.fit_svm,
        loss=baselines.svm_loss,
        localise=baselines.localise_svm,
        pixels=False,
        closed_form=True,
        needs="sklearn",
    ),
}
