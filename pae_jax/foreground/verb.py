"""`pae foreground`: trains a network that finds the object of an image.

F/foreground.npz    the network; the file is there when the training has finished
F/foreground.json   configuration, labels, agreement with held-out labels, origin
F/sheet.png         images, labels, masks and suppressed images; look at it first

It sees the training images of the config and no test image. `data.foreground=F` makes a run use it.
"""

import dataclasses
import logging
import os
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.cache import parallel
from data_pipelines.dataset import TrainingSplit
from data_pipelines.errors import BadInput, printable
from data_pipelines.foregrounds import open_foregrounds
from data_pipelines.textures import open_textures
from pae_jax.config import Config
from pae_jax.config_schema import SCHEMA
from pae_jax.foreground import labels, sheet, training
from pae_jax.report import pictures
from pae_jax.workdir import files, provenance, suppression
from pae_jax.workdir.lock import lock
from pae_jax.workdir.paths import AnyPath, check_local, to_path
from pae_jax.workdir.run import open_images
from pae_jax.workdir.suppression import Foreground

REPORT, SHEET = "foreground.json", "sheet.png"
# Each image is a few tens of kilobytes in memory, and more of one category teach nothing new.
MOST_IMAGES = 1024
# One of so many labelled images is held out, to measure the agreement.
_PERIOD = 5

_logger = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """The result of `train_foreground`.

    Attributes:
      report: the content of foreground.json.
      sheet: the path of sheet.png.
    """

    report: dict[str, Any]
    sheet: AnyPath


class _Labels(NamedTuple):
    """The labels of the training images, by their index."""

    kind: str  # "given" or "otsu"
    masks: dict[int, np.ndarray]  # bool (h, w)


def train_foreground(config: Config, workdir: str | os.PathLike[str]) -> Outcome:
    """Trains the network in `workdir`; what an interrupted training left there is replaced.

    Args:
      config: `data` says which images, `foreground` how the network is trained.
      workdir: a folder or URI without a finished network and without a training run.

    Raises:
      BadInput: one line that names the file, folder or key.
    """
    folder = to_path(workdir)
    for key in ("root", "cache_dir", "textures"):
        check_local(f"data.{key}", str(getattr(config.data, key)))
    _check_free(folder)
    split = open_images(_network_config(config))
    names = [*split.names, *split.held_out_names]
    given = {}
    if config.foreground.labels != "otsu":
        given = open_foregrounds(_network_config(config).data.spec, names)
    chosen = _choose(names, given)
    n = len(split.images)
    images = np.stack([split.images[i] if i < n else split.held_out[i - n] for i in chosen])
    masks = {k: given[names[i]] for k, i in enumerate(chosen) if names[i] in given}
    labelled = _labels(config, images, masks)
    files.check_writable(folder)
    with lock(folder):
        return _train(config, folder, split, images, labelled)


def summary(report: dict[str, Any]) -> str:
    """Returns the lines that `pae foreground` prints.

    Args:
      report: the content of foreground.json.
    """
    agreement = report["held_out_overlap"]
    lines = {
        "labels": f"{report['labels']}, {report['labelled_images']} of "
        f"{report['training_images']} training images",
        "agreement": "not measured, too few labels"
        if agreement is None
        else f"{agreement:.4f} with {report['held_out_labels']} held-out labels "
        "(intersection over union)",
        "kept": f"{report['kept_fraction']:.1%} of the pixels, with the margin",
    }
    if report["images_without_object"]:
        lines["no object"] = f"in {report['images_without_object']} images, which stay whole"
    return "\n".join(f"{name:24s}{text}" for name, text in lines.items())


def _train(
    config: Config, folder: AnyPath, split: TrainingSplit, images: np.ndarray, labelled: _Labels
) -> Outcome:
    settings = config.foreground
    indices = sorted(labelled.masks)
    held_out = indices[_PERIOD - 1 :: _PERIOD]
    used = [i for i in indices if i not in set(held_out)]
    _logger.info(
        "labels: %d of %d training images, %s; %d of them held out",
        *(len(indices), len(images), labelled.kind, len(held_out)),
    )
    data = config.data
    textures = open_textures(
        data.textures, size=data.texture_size, cache_dir=data.cache_dir, seed=config.train.seed
    )
    params = training.train(
        images[used],
        np.stack([labelled.masks[i] for i in used]),
        textures.train,
        steps=settings.steps,
        seed=config.train.seed,
    )
    shape = images.shape[1], images.shape[2]
    # The margin is no part of the object, so that the agreement is measured without it.
    bare = suppression.encode(params, shape, 0.0)
    agreement = [
        training.overlap(suppression.find(images[i], bare), labelled.masks[i]) for i in held_out
    ]
    foreground = suppression.encode(params, shape, settings.margin)
    report = {
        "schema": SCHEMA,
        "labels": labelled.kind,
        "labelled_images": len(indices),
        "training_images": len(images),
        "held_out_labels": len(held_out),
        "held_out_overlap": float(np.mean(agreement)) if agreement else None,
        **_coverage(images, foreground),
        "images_fingerprint": split.fingerprint,
        "fingerprint": foreground.fingerprint,
        "provenance": provenance.describe(config, step=settings.steps),
    }
    rows = sheet.choose(len(images), held_out)
    drawn = sheet.draw(images[rows], [labelled.masks.get(i) for i in rows], foreground)
    pictures.save_png(folder / SHEET, drawn)
    files.write_json(folder / REPORT, report)
    # Last, because it stands for a finished training.
    suppression.write(folder, foreground)
    return Outcome(report, folder / SHEET)


def _network_config(config: Config) -> Config:
    """Returns the config with images of the size that the network sees."""
    height, width = config.data.shape
    factor = min(1.0, config.foreground.size / max(height, width))
    data = dataclasses.replace(
        config.data,
        height=max(1, round(factor * height)),
        width=max(1, round(factor * width)),
    )
    return dataclasses.replace(config, data=data)


def _check_free(folder: AnyPath) -> None:
    """Checks that nothing in the folder would be replaced, but what an interruption has left.

    Raises:
      BadInput: it holds a finished network, a run or other files.
    """
    if (folder / suppression.NAME).exists() or (folder / "config.json").exists():
        raise BadInput(f"{folder}: holds a finished network or a run; choose another --workdir")
    # Hidden files are those of the lock, and temporary ones.
    own = (REPORT, SHEET)
    if folder.exists() and (
        other := [p.name for p in folder.iterdir() if p.name not in own and p.name[0] != "."]
    ):
        raise BadInput(f"{folder}: holds other files ({min(other)}); choose another --workdir")


def _choose(names: list[str], given: Collection[str]) -> list[int]:
    """Returns the indices of at most `MOST_IMAGES` images, in the order of their names.

    Those with a mask of the user come before the others, which are drawn evenly.
    """
    order = sorted(range(len(names)), key=names.__getitem__)
    labelled = [i for i in order if names[i] in given][:MOST_IMAGES]
    others = [i for i in order if names[i] not in given]
    room = MOST_IMAGES - len(labelled)
    if len(others) > room:
        others = [others[int(k)] for k in np.linspace(0, len(others) - 1, room)]
    return sorted(labelled + others, key=names.__getitem__)


def _labels(config: Config, images: np.ndarray, given: dict[int, np.ndarray]) -> _Labels:
    """Returns the masks of the user, or else those of Otsu's threshold.

    Args:
      config: the configuration.
      images: the training images.
      given: masks of the user by the index of their image.

    Raises:
      BadInput: there are none.
    """
    if given:
        return _Labels("given", given)
    if config.foreground.labels == "given":
        raise BadInput(
            "foreground.labels: given, but no training image has a mask of the object; "
            "docs/data.md says where they belong"
        )
    masks = list(parallel(labels.otsu_mask, list(images), "labelling"))
    usable = {i: mask for i, mask in enumerate(masks) if mask is not None}
    if 2 * len(usable) < len(images):
        raise BadInput(
            f"{config.data.root or config.data.source}: an object differs from the border in only "
            f"{len(usable)} of {len(images)} training images; give masks of the object for some "
            "of them (docs/data.md), or train without data.foreground"
        )
    return _Labels("otsu", usable)


def _coverage(images: np.ndarray, foreground: Foreground) -> dict[str, Any]:
    """Returns how much of the training images is kept, and in how many no object is found."""
    fractions = [float(suppression.find(image, foreground).mean()) for image in images]
    empty = fractions.count(0.0)
    if empty:
        _logger.warning(
            "%s", printable(f"no object found in {empty} of {len(images)} training images")
        )
    return {"kept_fraction": float(np.mean(fractions)), "images_without_object": empty}
